"""A published atlas: what it answers, its store as zarr, anndata and dask read it, and what is refused."""

import json
import shutil

import anndata
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr

import atlasvi
from atlasvi.errors import CellsError, CorruptError, ObsError, OptionError, StoreError, VersionError
from atlasvi.infer import compact as module
from atlasvi.models.compact import open_compact, publish
from atlasvi.models.scvi import SCVI
from tests.conftest import make_adata


@pytest.fixture(scope="module", params=["observed", "latent library"])
def made(request, tmp_path_factory):
    """A model, and its published atlas."""
    folder = tmp_path_factory.mktemp("published")
    adata = make_adata()
    SCVI.setup_anndata(
        adata, batch_key="batch", labels_key="cell_type", categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"], gene_mask=None,
    )  # fmt: skip
    model = SCVI(adata, n_hidden=16, n_latent=3, use_observed_lib_size=request.param == "observed",
                 dispersion="gene-label")  # fmt: skip
    model.train(2, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    publish(model, None, folder / "my.atlasvi", transform_batch=["b2"])
    return model, folder / "my.atlasvi"


@pytest.fixture
def copied(made, tmp_path):
    """One that may be damaged."""
    shutil.copytree(made[1], tmp_path / "my.atlasvi")
    return tmp_path / "my.atlasvi"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", (64, 16))


HOWS = [
    {"genes": ["gene-7", "gene-1"]},
    {"genes": ["gene-7"], "transform_batch": "b2", "library_size": "latent"},
    {"n_samples": 2, "cells": [299, 5]},
]


@pytest.mark.parametrize("how", HOWS)
def test_it_answers_what_the_model_does(how, made):
    model, path = made
    expected = model.expression(**how).compute()
    # Latents are rounded to 11 bits.
    np.testing.assert_allclose(open_compact(path).expression(**how).compute(), expected, rtol=0.02)


DIFFERENCES = [
    {"groupby": "cell_type"},
    {"groupby": "cell_type", "group1": "T", "estimator": "paper", "n_cells": 20, "n_draws": 10},
    {"idx1": "cell_type == 'T'", "idx2": "cell_type == 'B'", "mode": "change", "pseudocounts": 1e-4},
    {"groupby": "cell_type", "batch_correction": True, "filter_outlier_cells": True},
]


@pytest.mark.parametrize("how", DIFFERENCES)
def test_it_compares_groups_as_the_model_does_without_counts(how, made, tmp_path):
    model, _ = made
    publish(model, None, tmp_path / "exact.atlasvi", dtype="float32")
    how = {**how, "n_samples_overall": 500, "silent": True}
    expected = model.differential_expression(all_stats=False, **how)
    found = open_compact(tmp_path / "exact.atlasvi").differential_expression(**how)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=2e-3)
    again = model.differential_expression(all_stats=False, encoded=model.encode(), **how)
    pd.testing.assert_frame_equal(again, expected, rtol=1e-3, atol=2e-3)


def test_what_needs_counts_of_published_cells_is_refused(made):
    published = open_compact(made[1])
    for how in ({"all_stats": True}, {"mode": "change"}):
        with pytest.raises(OptionError, match="have no counts: pass all_stats=False"):
            published.differential_expression("cell_type", silent=True, **how)
    with pytest.raises(ObsError, match="'kind'"):
        published.differential_expression("kind", silent=True)
    with pytest.raises(CellsError, match="latents of 300 cells for the 10"):
        made[0].differential_expression(
            make_adata()[:10], "cell_type", encoded=made[0].encode(), all_stats=False, silent=True
        )


def test_with_float32_it_answers_the_same(made, tmp_path):
    model, _ = made
    publish(model, None, tmp_path / "exact.atlasvi", dtype="float32")
    found = open_compact(tmp_path / "exact.atlasvi")
    for how in HOWS:
        np.testing.assert_allclose(
            found.expression(**how).compute(), model.expression(**how).compute(), rtol=2e-5
        )
    p = model.technical_zeros(model.encode()).compute()
    np.testing.assert_allclose(found.model.technical_zeros(found.cells).compute(), p, rtol=1e-4)
    counts = model.posterior_predictive_sample(n_samples=2)
    for a, b in zip(found.sample(n_samples=2), counts, strict=True):
        # A mean that is rounded otherwise in its last bit may move a count that sat on the edge.
        assert (a != b).nnz <= 2


def test_normalisers_are_there_and_right(made, monkeypatch):
    _, path = made
    found = open_compact(path)
    assert {key[1:] for key in found.cells.normalisers} == {(0, None, "float32"), (0, 1, "float32")}
    how = {"genes": ["gene-3"]}
    quick = found.expression(**how).compute()
    found.cells.normalisers.clear()
    np.testing.assert_allclose(quick, found.expression(**how).compute(), rtol=1e-5)


def test_names_and_columns_are_the_atlas(made):
    model, path = made
    found, adata = open_compact(path), made[0].atlas
    assert found.shape == (300, 60)
    assert found.obs.index.tolist() == adata.obs_names.tolist()
    assert found.obs["cell_type"].tolist() == list(adata.obs_column("cell_type"))
    assert found.var_names == model.fields.var_names
    frame = found.model.get_normalized_expression(found.cells, indices=[4], gene_list=["gene-2"])
    assert frame.index.tolist() == ["cell-4"]
    assert "300 cells x 60 genes" in repr(found)


def test_columns_that_cannot_be_written_are_left_out_or_refused_by_name(made, tmp_path, caplog, monkeypatch):
    model, _ = made
    adata = make_adata()
    adata.obs["day"] = pd.Timestamp("2024-01-01")
    adata.obs["mixed"] = pd.Series([1, "a"] * (adata.n_obs // 2), adata.obs_names, dtype=object)
    adata.obs["score"] = pd.array([0.5] * adata.n_obs, dtype="Float64")
    adata.obs["depth"] = pd.cut(np.arange(adata.n_obs), 3)
    publish(model, adata, tmp_path / "most.atlasvi")
    kept = [key for key in adata.obs if key not in ("day", "mixed", "score")]
    assert list(open_compact(tmp_path / "most.atlasvi").obs) == kept
    report = atlasvi.ingest(adata, tmp_path / "atlas.zarr")
    assert len(report.left_out) == 3
    assert caplog.messages == [f"publish: left out: {left}" for left in report.left_out]
    obs = zarr.open_group(tmp_path / "atlas.zarr", mode="r")["obs"]
    assert sorted(obs) == sorted([*kept, "_index", "input"])  # and nothing half-written
    monkeypatch.setattr(model, "encode", None)
    with pytest.raises(ObsError, match=r"obs\['day'\] of AnnData cannot be published: .*datetime64"):
        publish(model, adata, tmp_path / "new.atlasvi", obs=["batch", "day"])
    assert not (tmp_path / "new.atlasvi").exists()


def test_only_the_columns_asked_for_are_published(made, tmp_path):
    publish(made[0], None, tmp_path / "one.atlasvi", obs="donor")
    publish(made[0], None, tmp_path / "few.atlasvi", obs=["donor", "donor"])
    assert list(open_compact(tmp_path / "few.atlasvi").obs.columns) == ["donor"]
    with pytest.raises(ObsError, match="'nothing'"):
        publish(made[0], None, tmp_path / "x.atlasvi", obs=["nothing"])
    assert not (tmp_path / "x.atlasvi").exists()


# --- the store -------------------------------------------------------------------------------------


@pytest.fixture
def store(made, tmp_path, small_chunks):
    publish(made[0], None, tmp_path / "small.atlasvi")
    return open_compact(tmp_path / "small.atlasvi").store


def test_zarr_slices_rho_that_is_nowhere(store):
    expected = store_rho(store)
    rho = zarr.open_array(store, path="layers/rho", mode="r")
    assert rho.shape == (300, 60) and rho.chunks == (64, 16)
    for where in [np.s_[:], np.s_[5:200:7, 30:], np.s_[299, :2], np.s_[:, 59]]:
        np.testing.assert_allclose(rho[where], expected[where], rtol=1e-5)
    np.testing.assert_allclose(rho.oindex[[0, 200], [3, 50]], expected[np.ix_([0, 200], [3, 50])], rtol=1e-5)
    assert not list((store.folder / "cells.zarr" / "layers" / "rho").rglob("c/*"))


def store_rho(store):
    return open_compact(store.folder).expression().compute()


def test_dask_reads_it_lazily(store):
    rho = da.from_zarr(zarr.open_array(store, path="layers/rho", mode="r"))
    np.testing.assert_allclose(rho.mean(0).compute(), store_rho(store).mean(0), rtol=1e-5)


def test_anndata_reads_it(store):
    back = anndata.read_zarr(zarr.open_group(store, mode="r"))
    np.testing.assert_allclose(back.layers["rho"], store_rho(store), rtol=1e-5)
    assert back.obs["batch"].tolist() and back.obsm["X_scVI"].shape == (300, 3)
    adata = open_compact(store.folder).to_anndata()
    np.testing.assert_allclose(
        adata[10:12, ["gene-4"]].layers["rho"].compute(), store_rho(store)[10:12, [4]], rtol=1e-5
    )


def test_anndata_reads_it_lazily(store):
    pytest.importorskip("xarray")
    lazy = anndata.experimental.read_lazy(zarr.open_group(store, mode="r"))
    np.testing.assert_allclose(lazy.layers["rho"][3:5].compute(), store_rho(store)[3:5], rtol=1e-5)


def test_a_read_of_everything_is_refused_with_its_size(store, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_READ", 16 * 64 * 16 * 4)
    rho = zarr.open_array(store, path="layers/rho", mode="r")
    assert rho[:128, :32].shape == (128, 32)  # four chunks; all of it is twenty
    with pytest.raises(OptionError, match=r"GiB of rho at once.*all of it is 0\.0 GiB.*dask"):
        rho[:]
    # What is reduced chunk by chunk reads as much, and never at once.
    assert da.from_zarr(rho).sum().compute(scheduler="synchronous") == pytest.approx(300, rel=1e-4)


def test_the_store_is_read_only_and_lists_what_there_is(store):
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_array(store, path="layers/rho", mode="r+")[0, 0] = 1
    with pytest.raises(OptionError, match="mode='r'"):
        store.with_read_only(False)
    keys = zarr.core.sync.sync(_collect(store.list()))
    assert "layers/rho/c/4/3" in keys and "obs/zarr.json" in keys and "layers/rho/c/5/0" not in keys
    assert sorted(zarr.core.sync.sync(_collect(store.list_dir("layers/rho/c")))) == ["0", "1", "2", "3", "4"]
    assert sorted(zarr.core.sync.sync(_collect(store.list_dir("layers/rho/c/1")))) == ["0", "1", "2", "3"]
    assert zarr.core.sync.sync(store.exists("layers/rho/c/0/1"))
    for key in (
        "layers/rho/c/5/0",
        "layers/rho/c/00/0",
        "layers/rho/c/-1/0",
        "layers/rho/c/0",
        "layers/rho/c/a/b",
    ):
        assert not zarr.core.sync.sync(store.exists(key)), key
        assert store.read(key) is None


async def _collect(items):
    return [item async for item in items]


def test_parts_of_a_value_may_be_read(store):
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

    whole = store.read("layers/rho/c/0/0")
    for asked, expected in [(RangeByteRequest(8, 40), whole[8:40]), (OffsetByteRequest(16), whole[16:]),
                            (SuffixByteRequest(12), whole[-12:]), (None, whole)]:  # fmt: skip
        assert zarr.core.sync.sync(store.get("layers/rho/c/0/0", byte_range=asked)).to_bytes() == expected


# --- what is refused -------------------------------------------------------------------------------


def test_there_is_no_overwriting_by_accident(made, copied, tmp_path):
    with pytest.raises(StoreError, match="overwrite"):
        publish(made[0], None, copied)
    publish(made[0], None, copied, overwrite=True)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.tex").write_text("years of work")
    with pytest.raises(StoreError, match="no published atlas"):
        publish(made[0], None, thesis, overwrite=True)
    with pytest.raises(OptionError, match="float64"):
        publish(made[0], None, tmp_path / "x", dtype="float64")
    with pytest.raises(ObsError, match="b9"):
        publish(made[0], None, tmp_path / "x", transform_batch=["b9"])


@pytest.mark.parametrize(
    "part", ["model/weights.safetensors", "model/model.json", "cells.zarr/zarr.json", "latent.zarr"]
)
def test_a_part_that_is_missing_is_named(part, copied):
    place = copied / part
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(CorruptError, match=part):
        open_compact(copied)


def test_a_changed_byte_is_found(copied):
    place = copied / "model" / "weights.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(CorruptError, match=r"checksum.*weights\.safetensors"):
        open_compact(copied)
    open_compact(copied, verify=False)
    place.write_bytes(content[:-4])
    with pytest.raises(CorruptError, match="bytes of"):
        open_compact(copied, verify=False)


def test_other_folders_and_formats_are_named(copied, tmp_path):
    with pytest.raises(StoreError, match="atlasvi publish"):
        open_compact(tmp_path)
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(VersionError, match="99"):
        open_compact(copied)
    (copied / "index.json").write_text("{")
    with pytest.raises(CorruptError, match="damaged"):
        open_compact(copied)


def test_the_public_names_are_these():
    assert atlasvi.open_compact is open_compact and atlasvi.publish is publish


def test_new_cells_of_a_new_batch_are_put_beside_those_published(tmp_path):
    """Without the reference's counts: its model and latents suffice, and stay what they were."""
    adata = make_adata()
    is_query = np.arange(300) % 3 == 0
    reference, query = adata[~is_query].copy(), adata[is_query].copy()
    SCVI.setup_anndata(reference, batch_key="batch", gene_mask=None)
    model = SCVI(reference, n_hidden=16, n_latent=3, encode_covariates=True)
    model.train(20, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    publish(model, None, tmp_path / "my.atlasvi", obs=["cell_type"], dtype="float32")
    published = open_compact(tmp_path / "my.atlasvi")
    query.obs["batch"] = "new"
    query = SCVI.prepare_query_anndata(query[:, :0:-1].copy(), published.model)  # other order, a gene less
    mapped = SCVI.load_query_data(query, published.model)
    mapped.train(5, batch_size=32, enable_progress_bar=False)
    z = mapped.get_latent_representation()
    assert mapped.fields.batch_categories == ("b1", "b2", "new")
    # Each new cell takes the type that most of its neighbours among the published cells have.
    near = np.square(z[:, None] - published.cells.loc[None]).sum(-1).argsort(1)[:, :9]
    types = published.obs["cell_type"].to_numpy()
    found = [max(set(row), key=list(row).count) for row in types[near]]
    assert (found == query.obs["cell_type"].to_numpy()).mean() > 0.8
    # What was published answers as before.
    again = mapped.get_latent_representation(reference)
    np.testing.assert_allclose(again, published.cells.loc, rtol=1e-4, atol=1e-5)
