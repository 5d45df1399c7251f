"""An atlas as an input of ingest: views of it and several as one, in their order, and never whole."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest

import atlasvi
from atlasvi.errors import CountsError, OptionError, StoreError
from atlasvi.store import cells
from atlasvi.store.atlas import Atlas
from atlasvi.store.ingest import ingest
from tests.store.test_joined import make_three


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, adata in make_three().items():
        adata.obsm["X_latent"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2)).astype(np.float32)
        adata.obsm["table"] = pd.DataFrame({"one": np.arange(adata.n_obs)}, index=adata.obs_names)
        adata.uns["note"] = name
        ingest(adata, folder / f"{name}.zarr")
    return [folder / f"{name}.zarr" for name in "abc"]


def random_half(atlas):
    return atlas[np.random.default_rng(1).permutation(atlas.n_obs)[: atlas.n_obs // 2]]


WAYS = {
    "whole": lambda atlas: atlas,
    "filter": lambda atlas: atlas.filter(min_counts=24),
    "cells in any order": random_half,
    "genes": lambda atlas: atlas[:, ["g7", "g20", "g5"]],
    "cells and genes": lambda atlas: atlas[::-2, ["g24", "g9"]],
}


def check(path, view):
    """The store holds what the view shows."""
    found, expected = anndata.read_zarr(path), view.to_anndata()
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert found.var_names.tolist() == expected.var_names.tolist()
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    for key in expected.obs:
        assert found.obs[key].tolist() == expected.obs[key].tolist()
    assert sorted(found.obs) == sorted({*expected.obs, "input"})
    assert found.var["symbol"].tolist() == expected.var["symbol"].tolist()
    np.testing.assert_array_equal(found.obsm["X_latent"], expected.obsm["X_latent"])
    return found


@pytest.mark.filterwarnings("ignore:.*have no counts")
@pytest.mark.parametrize("kind", ["on disk", "in memory", "several"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_view_becomes_a_store(way, kind, stores, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(cells, "MAX_BLOCK_ROWS", 16)
    whole = atlasvi.open(stores if kind == "several" else stores[0])
    if kind == "in memory":
        whole = Atlas.from_anndata(anndata.read_zarr(stores[0]))
    view = way(whole)
    read, read_rows = [], Atlas.read_rows

    def look(self, rows):
        if self is view:
            read.append(rows)
        return read_rows(self, rows)

    monkeypatch.setattr(Atlas, "read_rows", look)
    assert ingest(view, tmp_path / "new.zarr", memory_budget=1).n_obs == view.n_obs
    assert read and all(rows.stop - rows.start <= 16 for rows in read)
    monkeypatch.undo()
    found = check(tmp_path / "new.zarr", view)
    if kind != "several":
        assert found.uns["note"] == "a"
        assert found.obsm["table"]["one"].tolist() == view.row_numbers.tolist()
        assert found.obsm["table"].index.tolist() == found.obs_names.tolist()
    assert whole.n_obs == len(whole.obs_names)  # it was not closed


def test_several_views_are_inputs_like_others(stores, tmp_path):
    a, b = (atlasvi.open(path) for path in stores[:2])
    parts = [a[:20], b[5:], stores[2]]
    report = ingest(parts, tmp_path / "new.zarr", input_key="part", shuffle=True)
    assert report.inputs == ("a", "b", "c")
    found = anndata.read_zarr(tmp_path / "new.zarr")
    names = [f"a{i}" for i in range(20)] + [f"b{i}" for i in range(5, 40)] + [f"c{i}" for i in range(55)]
    assert sorted(found.obs_names) == sorted(names)
    assert found.obs["part"].astype(str).tolist() == [name[0] for name in found.obs_names]
    one = b.to_anndata()["b7", found.var_names]
    np.testing.assert_array_equal(found["b7"].X.toarray(), one.X.toarray())
    ingest({"more": a[20:, found.var_names]}, tmp_path / "new.zarr", append=True, input_key="part")
    found = anndata.read_zarr(tmp_path / "new.zarr")
    assert found.obs_names[-50:].tolist() == [f"a{i}" for i in range(20, 70)]


def test_seed_and_budget_may_be_numbers_of_numpys(stores, tmp_path):
    how = {"shuffle": True, "seed": np.int64(3), "memory_budget": np.int64(1 << 20)}
    ingest(atlasvi.open(stores[0]), tmp_path / "new.zarr", **how)
    with atlasvi.open(tmp_path / "new.zarr") as atlas:
        assert atlas.lies_at_random()


def test_a_store_that_is_read_from_is_not_written_to(stores):
    one, several = atlasvi.open(stores[0]), atlasvi.open(stores)
    before = {file: file.read_bytes() for file in stores[0].rglob("*") if file.is_file()}
    for what in (one, one[:5], several, several[3:], [stores[1], one], {"of": one}):
        for how in ({"overwrite": True}, {"append": True}):
            with pytest.raises(StoreError, match="is one of the inputs"):
                ingest(what, stores[0], **how)
    assert {file: file.read_bytes() for file in stores[0].rglob("*") if file.is_file()} == before


def test_the_layer_is_that_of_the_atlas(stores, tmp_path):
    adata = make_three()["a"]
    adata.layers["counts"] = adata.X
    adata.X = adata.X * 0.5
    view = Atlas.from_anndata(adata, layer="counts")[:9]
    assert ingest(view, tmp_path / "one.zarr", layer="counts").left_out == ("X",)
    np.testing.assert_array_equal(
        anndata.read_zarr(tmp_path / "one.zarr").X.toarray(), adata.layers["counts"][:9].toarray()
    )
    with pytest.raises(OptionError, match=r"from layers\['counts'\], and layer='raw' was asked for; open it"):
        ingest(view, tmp_path / "two.zarr", layer="raw")
    with pytest.raises(CountsError, match=r"X has 0\.5 at cell 'a\d+'.*pass layer='counts'"):
        ingest(Atlas.from_anndata(adata)[::-1], tmp_path / "two.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["one.zarr"]
