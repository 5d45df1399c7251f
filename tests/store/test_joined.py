"""Several stores as one atlas: the same as ingesting them into one, without doing so."""

import logging
import os
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import atlasvi
from atlasvi.errors import (
    CellsError,
    CorruptError,
    CountsError,
    GenesError,
    NotAnAtlasError,
    ObsError,
    OptionError,
)
from atlasvi.store.atlas import Atlas
from atlasvi.store.base import STRING
from atlasvi.store.fields import register, resolve
from atlasvi.store.ingest import ingest


def make(n_obs, prefix, seed, genes=None, types=("T", "B")):
    """Counts with columns of every kind."""
    genes = [f"g{g}" for g in range(30)] if genes is None else genes
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n_obs, len(genes))).astype(np.float32)
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names, adata.var_names = [f"{prefix}{i}" for i in range(n_obs)], genes
    adata.obs["kind"] = pd.Categorical(rng.choice(types, n_obs), types)
    adata.obs["depth"] = rng.normal(size=n_obs)
    adata.obs["n"] = rng.integers(0, 9, n_obs)
    adata.obs["ok"] = rng.random(n_obs) < 0.5
    adata.obs["age"] = pd.array([None, *range(n_obs - 1)], dtype="Int64")
    adata.obs["note"] = [f"note {i}" for i in range(n_obs)]
    adata.var["symbol"] = [name.upper() for name in genes]
    adata.var["highly_variable"] = np.arange(len(genes)) % 2 == 0
    return adata


def make_three():
    """Cells in three batches with genes in other orders, of which g5 to g24 are in all."""
    return {
        "a": make(70, "a", 0),
        "b": make(40, "b", 1, [f"g{g}" for g in range(34, 4, -1)], ("B", "NK")),
        "c": make(55, "c", 2, [f"g{g}" for g in [*range(0, 25, 2), *range(1, 25, 2)]], ("NK", "T", "B")),
    }


@pytest.fixture
def three():
    return make_three()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Each in its own store, as ingest writes it but without the column that names the input."""
    folder = tmp_path_factory.mktemp("stores")
    for name, adata in make_three().items():
        ingest(adata, folder / f"{name}.zarr", input_key="of")
    return [folder / f"{name}.zarr" for name in "abc"]


@pytest.fixture
def own_stores(stores, tmp_path):
    """To be written to."""
    return [shutil.copytree(path, tmp_path / path.name) for path in stores]


@pytest.fixture(scope="module", params=["inner", "outer"])
def join(request):
    return request.param


@pytest.fixture(scope="module")
def together(stores, tmp_path_factory, join):
    """The stores as one, and one store of the same inputs."""
    path = tmp_path_factory.mktemp(join) / "one.zarr"
    ingest(stores, path, join=join)
    with atlasvi.open(stores, join=join) as joined, atlasvi.open(path) as one:
        yield joined, one


# --- what it is -------------------------------------------------------------------------------------


def test_it_equals_one_store_of_the_same_inputs(together):
    joined, one = together
    assert joined.shape == one.shape
    assert joined.obs_names.dtype == STRING
    assert list(joined.obs_names) == list(one.obs_names)
    assert list(joined.var_names) == list(one.var_names)
    assert (joined.read_rows(slice(None)).to_scipy() != one.read_rows(slice(None)).to_scipy()).nnz == 0
    pd.testing.assert_frame_equal(joined.obs, one.obs)
    pd.testing.assert_frame_equal(joined.var, one.var)
    assert joined.is_whole and joined.is_checked and joined.path is None and joined.layer is None
    assert joined.name == "a + b + c"
    np.testing.assert_array_equal(joined.row_numbers, np.arange(165))


def test_it_agrees_with_anndata(three, together, join):
    """`anndata.concat` in memory, from the data before any of it was written."""
    joined, _ = together
    expected = anndata.concat(three, join=join, label="input", fill_value=0)[:, list(joined.var_names)]
    np.testing.assert_array_equal(joined.read_rows(slice(None)).to_dense(), expected.X.toarray())
    assert joined.obs["input"].tolist() == expected.obs["input"].tolist()
    for key in ("kind", "depth", "n", "ok", "note"):
        assert joined.obs[key].tolist() == expected.obs[key].tolist()
    assert set(joined.obs["kind"].cat.categories) == {"T", "B", "NK"}


@pytest.mark.parametrize(
    "rows", [[0], [164, 0, 69, 70, 110, 109, 70], slice(60, 120), slice(None, None, 7), slice(5, 5)]
)
def test_rows_in_any_order_and_across_stores(together, rows):
    joined, one = together
    assert (joined.read_rows(rows).to_scipy() != one.read_rows(rows).to_scipy()).nnz == 0


def test_views_of_cells_and_genes(together):
    joined, one = together
    mask = (joined.obs["kind"] == "B").to_numpy()
    for index in ((mask, ["g20", "g5"]), (slice(10, 150, 3), slice(None)), (slice(None), [3, 1, 7])):
        got, expected = joined[index], one[index]
        assert (got.read_rows(slice(None)).to_scipy() != expected.read_rows(slice(None)).to_scipy()).nnz == 0
        pd.testing.assert_frame_equal(got.obs, expected.obs)
        pd.testing.assert_frame_equal(got.var, expected.var)
        assert list(got.read_names(1, 3)) == list(expected.obs_names[1:3])
        assert got.to_anndata().shape == expected.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_it_streams_the_same_minibatches(together, workers):
    joined, one = together
    epochs = [atlas.stream(16, seed=3, epoch=1, num_workers=workers) for atlas in (joined, one)]
    for (counts, rows), (expected, expected_rows) in zip(*epochs, strict=True):
        np.testing.assert_array_equal(rows, expected_rows)
        assert (counts.to_scipy() != expected.to_scipy()).nnz == 0


def test_it_is_set_up_as_one_store_is(together):
    joined, one = together
    options = {"batch_key": "input", "labels_key": "kind", "continuous_covariate_keys": ["depth", "n"]}
    fields = register(joined, **options)
    assert fields == register(one, **options)
    got, expected = resolve(fields, joined), resolve(fields, one)
    for name in ("batch_index", "labels", "cont_covs", "gene_columns"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


# --- what it may be made of -------------------------------------------------------------------------


def test_a_mapping_names_the_stores(stores):
    with atlasvi.open({"old": stores[0], "new": str(stores[1])}, input_key="study") as joined:
        assert joined.obs["study"].value_counts().to_dict() == {"old": 70, "new": 40}
        assert joined.name == "old + new"
        assert "input" not in joined.obs_keys and "of" in joined.obs_keys


def test_open_atlases_views_and_other_formats(three, stores, tmp_path):
    three["b"].write_h5ad(tmp_path / "b.h5ad")
    with atlasvi.open(stores[0]) as first:
        view = first[[30, 2, 9], ["g9", "g7", "g6"]]
        with atlasvi.open([view, tmp_path / "b.h5ad", Atlas.from_anndata(three["c"])]) as joined:
            assert list(joined.var_names) == ["g9", "g7", "g6"]
            assert not joined.is_checked
            counts = joined.read_rows(slice(None)).to_dense().numpy()
            names = list(joined.obs_names)
        # What was open before stays open.
        assert first.read_rows([1]).n_obs == 1
    parts = [three["a"][[30, 2, 9]], three["b"], three["c"]]
    np.testing.assert_array_equal(
        counts, np.concatenate([part[:, ["g9", "g7", "g6"]].X.toarray() for part in parts])
    )
    assert names == [name for part in parts for name in part.obs_names]


def test_a_joined_atlas_may_be_joined_again(stores):
    with atlasvi.open(stores[:2]) as two, atlasvi.open({"two": two, "c": stores[2]}) as all_three:
        with atlasvi.open(stores) as expected:
            got = all_three.read_rows(slice(None)).to_scipy()
            assert list(all_three.var_names) == list(expected.var_names)
            assert (got != expected.read_rows(slice(None)).to_scipy()).nnz == 0
            assert set(all_three.obs["input"]) == {"two", "c"}


def test_one_store_in_a_list(stores):
    with atlasvi.open(stores[:1]) as joined, atlasvi.open(stores[0]) as one:
        assert (joined.read_rows(slice(None)).to_scipy() != one.read_rows(slice(None)).to_scipy()).nnz == 0
        assert set(joined.obs["input"]) == {"a"}


def test_counts_in_different_places(three, stores, tmp_path):
    three["b"].layers["counts"] = three["b"].X.copy()
    three["b"].X = three["b"].X.multiply(0.5).tocsr()
    three["b"].write_h5ad(tmp_path / "b.h5ad")
    with atlasvi.open(tmp_path / "b.h5ad", layer="counts") as b, atlasvi.open([stores[0], b]) as joined:
        assert joined.layer is None
        expected = three["b"][:, list(joined.var_names)].layers["counts"].toarray()
        np.testing.assert_array_equal(joined.read_rows(slice(70, 110)).to_dense(), expected)


def test_genes_are_matched_by_a_column(three, tmp_path):
    three["b"].var_names = [f"other{g}" for g in range(30)]
    for name in ("a", "b"):
        three[name].write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    with pytest.raises(GenesError, match=r"no gene is in all 2 inputs .*'g0'.*'other0'.*join='outer'"):
        atlasvi.open(paths)
    with atlasvi.open(paths, var_key="symbol") as joined:
        assert list(joined.var_names) == [f"g{g}" for g in range(5, 30)]
        expected = three["b"].X.toarray()[:, ::-1][:, :25]
        np.testing.assert_array_equal(joined.read_rows(slice(70, None)).to_dense(), expected)


# --- obs --------------------------------------------------------------------------------------------


def test_a_column_that_one_lacks_is_left_out_and_named(three, tmp_path, caplog):
    three["a"].obs["donor"] = "d1"
    for name, adata in three.items():
        ingest(adata, tmp_path / f"{name}.zarr", input_key="of")
    with caplog.at_level(logging.WARNING), atlasvi.open([tmp_path / f"{n}.zarr" for n in three]) as joined:
        assert "donor" not in joined.obs_keys
        (record,) = caplog.records
        assert "'donor' is not in b + c" in record.getMessage()
        with pytest.raises(ObsError, match="obs column 'donor' is not in b \\+ c"):
            joined.obs_column("donor")
        with pytest.raises(ObsError, match="no column 'donor'"):
            register(joined, batch_key="donor")
        with pytest.raises(KeyError):
            joined.obs_column("never there")


def test_the_stores_own_column_of_that_name_gives_way(three, tmp_path, caplog):
    """Which every store that was ingested has."""
    for name in ("a", "b"):
        ingest({f"file-{name}": three[name]}, tmp_path / f"{name}.zarr")
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    with caplog.at_level(logging.INFO), atlasvi.open(paths) as joined:
        assert joined.obs_keys.count("input") == 1
        assert joined.obs["input"].tolist() == ["a"] * 70 + ["b"] * 40
    assert any("pass another input_key=" in record.getMessage() for record in caplog.records)
    with atlasvi.open(paths, input_key="store") as joined:
        assert joined.obs["input"].tolist() == ["file-a"] * 70 + ["file-b"] * 40
        assert joined.obs["store"].tolist() == ["a"] * 70 + ["b"] * 40


# --- what it refuses --------------------------------------------------------------------------------


def test_a_cell_that_stands_twice(three, tmp_path):
    three["b"].obs_names = [*three["b"].obs_names[:-1], "a7"]
    for name, adata in three.items():
        ingest(adata, tmp_path / f"{name}.zarr")
    paths = [tmp_path / f"{name}.zarr" for name in three]
    message = r"cell 'a7' is in '.*a\.zarr' and in '.*b\.zarr'; pass make_unique=True"
    with pytest.raises(CellsError, match=message):
        atlasvi.open(paths)
    with atlasvi.open(paths, make_unique=True) as joined:
        expected = [f"{cell}-{name}" for name, adata in three.items() for cell in adata.obs_names]
        assert list(joined.obs_names) == expected
        assert list(joined.read_names(68, 72)) == expected[68:72]


def test_the_same_store_twice(stores):
    with pytest.raises(CellsError, match="cell 'a0' is in"):
        atlasvi.open([stores[0], stores[0]])
    with atlasvi.open([stores[0], stores[0]], make_unique=True) as joined:
        assert len(set(joined.obs_names)) == 140
        assert joined.obs["input"].cat.categories.tolist() == ["0-a", "1-a"]


def test_nothing_is_left_of_the_look_at_the_names(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with atlasvi.open(stores):
        assert not any((tmp_path / "tmp").iterdir())


def test_genes_that_do_not_match(three, tmp_path):
    three["b"].var_names = [f"mouse{g}" for g in range(30)]
    for name in ("a", "b"):
        ingest(three[name], tmp_path / f"{name}.zarr")
    with pytest.raises(GenesError, match="no gene is in all 2 inputs"):
        atlasvi.open([tmp_path / "a.zarr", tmp_path / "b.zarr"])
    with atlasvi.open([tmp_path / "a.zarr", tmp_path / "b.zarr"], join="outer") as joined:
        assert joined.n_vars == 60
        assert joined.read_rows(slice(0, 70)).indices.numpy().max() < 30
        assert joined.read_rows(slice(70, 110)).indices.numpy().min() >= 30


@pytest.mark.parametrize(
    ("what", "options", "text"),
    [
        ([], {}, "nothing to open"),
        ({}, {}, "nothing to open"),
        (3, {}, "a int cannot be opened; pass a path"),
        (None, {"join": "left"}, "join='left' is not a way to join genes"),
        (None, {"layer": "spliced"}, "no layer 'spliced'"),
    ],
)
def test_wrong_options(stores, what, options, text):
    with pytest.raises(OptionError, match=text):
        atlasvi.open(stores if what is None else what, **options)


def test_obsm_that_all_have_is_one(three, tmp_path):
    paths = [tmp_path / f"{name}.zarr" for name in three]
    for k, (path, adata) in enumerate(zip(paths, three.values(), strict=True)):
        rng = np.random.default_rng(k)
        adata.obsm["X_pca"] = rng.normal(size=(adata.n_obs, 3)).astype(np.float32 if k else np.float64)
        adata.obsm["X_umap"] = rng.normal(size=(adata.n_obs, 2 + k))
        if k:
            adata.obsm["some"] = rng.normal(size=(adata.n_obs, 2))
        atlasvi.ingest(adata, path)
    expected = np.concatenate([adata.obsm["X_pca"] for adata in three.values()])
    with atlasvi.open(paths) as joined:
        assert joined.obsm_keys == ["X_pca"]
        np.testing.assert_array_equal(joined.read_obsm("X_pca", 0, joined.n_obs), expected)
        np.testing.assert_array_equal(joined.read_obsm("X_pca", 30, 90), expected[30:90])
        order = np.random.default_rng(0).permutation(joined.n_obs)[:50]
        np.testing.assert_array_equal(joined[order].to_anndata().obsm["X_pca"], expected[order])
        with atlasvi.open([joined[::2], joined[1::2]]) as again:
            both = np.concatenate([expected[::2], expected[1::2]])
            np.testing.assert_array_equal(again.read_obsm("X_pca", 0, again.n_obs), both)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_obsm_is_written_to_each(own_stores, three, step):
    with atlasvi.open(own_stores) as joined:
        values = np.random.default_rng(0).normal(size=(joined.n_obs, 4)).astype(np.float32)
        joined.write_obsm("X_scVI", (values[k : k + step] for k in range(0, len(values), step)), 4)
    parts = [anndata.read_zarr(path).obsm["X_scVI"] for path in own_stores]
    assert [len(part) for part in parts] == [adata.n_obs for adata in three.values()]
    np.testing.assert_array_equal(np.concatenate(parts), values)
    with atlasvi.open(own_stores) as joined:
        np.testing.assert_array_equal(joined.read_obsm("X_scVI", 0, joined.n_obs), values)


@pytest.mark.parametrize("n_more", [-1, 1])
def test_obsm_of_too_few_or_many_rows_is_written_to_none(own_stores, n_more):
    with atlasvi.open(own_stores) as joined:
        values = np.zeros((joined.n_obs + n_more, 4))
        with pytest.raises(OptionError, match="one row a cell"):
            joined.write_obsm("X_scVI", [values], 4)
    for path in own_stores:
        assert "X_scVI" not in anndata.read_zarr(path).obsm
        assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_obsm_of_a_view_or_of_what_is_not_on_disk_is_refused(stores, three):
    with atlasvi.open(stores) as joined, atlasvi.open([stores[0], joined[-5:]]) as of_a_view:
        in_memory = atlasvi.open([stores[0], atlasvi.Atlas.from_anndata(three["b"])])
        for atlas in (joined[:3], of_a_view, in_memory):
            with pytest.raises(OptionError, match="a whole store on disk, or to several") as caught:
                atlas.write_obsm("X_scVI", [], 4)
            assert "\n" not in str(caught.value)


def test_what_is_not_a_count_is_named_with_its_store(three, stores, tmp_path):
    bad = three["b"].copy()
    dense = bad.X.toarray()
    dense[7, 3] = 0.5
    bad.X = sp.csr_matrix(dense)
    bad.write_h5ad(tmp_path / "bad.h5ad")
    with atlasvi.open([stores[0], tmp_path / "bad.h5ad"]) as joined:
        joined.read_rows(slice(0, 77))
        with pytest.raises(CountsError, match=r"bad\.h5ad' X has 0\.5 at cell 'b7', gene 'g31'"):
            joined.read_rows([77])
        with pytest.raises(CountsError, match=r"bad\.h5ad' X has 0\.5 at cell 'b7'"):
            joined.check_counts()


def test_damage_is_named_with_its_store(stores, tmp_path):
    stores = [shutil.copytree(path, tmp_path / path.name) for path in stores]
    (shard,) = (stores[1] / "X" / "data" / "c").iterdir()
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(bytes(content))
    with atlasvi.open(stores) as joined:
        joined.read_rows(slice(0, 70))
        with pytest.raises(CorruptError, match=r"shard .*b\.zarr.* are damaged"):
            joined.read_rows([70])


def open_files(folder):
    links = map(os.path.realpath, Path("/proc/self/fd").glob("*"))
    return [link for link in links if link.startswith(f"{folder}/") and link.endswith(".h5ad")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are seen in /proc")
def test_files_are_closed(three, tmp_path):
    for name, adata in three.items():
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [tmp_path / f"{name}.h5ad" for name in three]
    with atlasvi.open(paths) as joined:
        joined.read_rows([0, 100])
        assert len(open_files(tmp_path)) == 3
    assert open_files(tmp_path) == []
    with pytest.raises(NotAnAtlasError, match="nothing is there"):
        atlasvi.open([*paths, tmp_path / "absent.zarr"])
    with pytest.raises(CellsError):
        atlasvi.open([*paths, paths[0]])
    assert open_files(tmp_path) == []
