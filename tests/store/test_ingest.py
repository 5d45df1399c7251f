"""Ingest: what comes out equals what went in, and what is wrong with the input is said in one line."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from atlasvi.errors import (
    CellsError,
    CorruptError,
    CountsError,
    GenesError,
    NotAnAtlasError,
    OptionError,
    SpaceError,
    StoreError,
)
from atlasvi.store import cells, convert, layout
from atlasvi.store.ingest import ingest
from atlasvi.store.rows import DenseRows
from atlasvi.store.sources import open_source


def make(n_obs=60, n_vars=20, seed=0, prefix="c"):
    """Counts in which every cell and gene has some, with columns of every kind."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_obs, n_vars)).astype(np.float32)
    counts[np.arange(n_obs), np.arange(n_obs) % n_vars] += 1
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"{prefix}{i}" for i in range(n_obs)]
    adata.var_names = [f"g{g}" for g in range(n_vars)]
    adata.obs["kind"] = pd.Categorical(rng.choice(["T", "B", "NK"], n_obs))
    adata.obs["rank"] = pd.Categorical(rng.choice(["low", "high"], n_obs), ["low", "high"], ordered=True)
    adata.obs["depth"] = rng.normal(size=n_obs)
    adata.obs["n"] = rng.integers(0, 9, n_obs).astype(np.int16)
    adata.obs["ok"] = rng.random(n_obs) < 0.5
    adata.obs["age"] = pd.array([None, *range(n_obs - 1)], dtype="Int64")
    adata.obs["note"] = [f"note {i} of a cell" for i in range(n_obs)]
    adata.var["symbol"] = [f"S{g}" for g in range(n_vars)]
    adata.var["length"] = rng.integers(100, 999, n_vars)
    adata.obsm["X_pca"] = rng.normal(size=(n_obs, 3))
    adata.obsm["proteins"] = pd.DataFrame(rng.poisson(3, (n_obs, 2)), adata.obs_names, ["CD3", "CD4"])
    adata.uns["info"] = {"who": "we", "n": 3, "list": np.arange(4)}
    return adata


def as_scipy(adata):
    """The matrix with wide types, as scipy's own arithmetic wants."""
    x = adata.X
    return sp.csr_matrix((x.data.astype(np.float64), x.indices.astype(np.int32), x.indptr), shape=x.shape)


def assert_same_counts(atlas, expected):
    assert atlas.shape == expected.shape
    assert (as_scipy(atlas) != sp.csr_matrix(expected.X).astype(np.float64)).nnz == 0
    assert list(atlas.obs_names) == list(expected.obs_names)
    assert list(atlas.var_names) == list(expected.var_names)


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards, chunks, read blocks and runs out of a few thousand entries."""
    monkeypatch.setattr(layout, "CHUNK_ENTRIES", 32)
    monkeypatch.setattr(layout, "CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr(cells, "BLOCK_ENTRIES", 50)
    # Nothing is left of the budget for rows to be kept in memory.
    monkeypatch.setattr(convert, "_BYTES_IN_FLIGHT", 1 << 40)
    monkeypatch.setattr("atlasvi.store.frame.NAMES", 16)
    monkeypatch.setattr("atlasvi.store.frame.CHUNK", 16)


def with_value(matrix, value, dtype, cell=41, gene=3):
    dense = matrix.toarray().astype(dtype)
    dense[cell, gene] = value
    return sp.csr_matrix(dense)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- what comes out


@pytest.mark.parametrize("workers", [1, 3])
def test_one_input_comes_out_as_it_went_in(tmp_path, small_shards, workers):
    adata = make()
    report = ingest(adata, tmp_path / "a.zarr", workers=workers)
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert_same_counts(atlas, adata)
    for key in adata.obs:
        pd.testing.assert_series_equal(atlas.obs[key], adata.obs[key], check_dtype=key != "note")
    assert atlas.obs["rank"].cat.ordered
    assert set(atlas.obs["input"]) == {"AnnData-0"}
    pd.testing.assert_frame_equal(atlas.var, adata.var, check_dtype=False)
    np.testing.assert_array_equal(atlas.obsm["X_pca"], adata.obsm["X_pca"])
    pd.testing.assert_frame_equal(atlas.obsm["proteins"], adata.obsm["proteins"])
    assert atlas.uns["info"]["who"] == "we" and atlas.uns["info"]["list"].tolist() == [0, 1, 2, 3]
    assert (report.n_obs, report.n_vars, report.nnz) == (*adata.shape, adata.X.nnz)
    assert report.left_out == () and report.warnings == ()
    assert report.n_bytes == sum(f.stat().st_size for f in (tmp_path / "a.zarr").rglob("*") if f.is_file())
    assert leftovers(tmp_path) == []


def test_the_store_is_sharded_narrow_and_checksummed(tmp_path, small_shards):
    adata = make()
    ingest(adata, tmp_path / "a.zarr", seed=5)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    assert group["X/indices"].dtype == np.uint16 and group["X/data"].dtype == np.uint8
    assert group["X/data"].chunks == (32,) and group["X/data"].shards == (128,)
    for key in ("X/indices", "X/data"):
        (sharding,) = group[key].metadata.to_dict()["codecs"]
        names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        assert names == ["bytes", "blosc", "crc32c"]
        assert len(list((tmp_path / "a.zarr" / key / "c").iterdir())) == -(-adata.X.nnz // 128)
    about = group.attrs["atlasvi"]
    assert about["format"] == 1 and about["nnz"] == adata.X.nnz and about["max_count"] == adata.X.max()
    assert about["shuffle"] is False and about["seed"] is None


def test_columns_are_sorted_and_zeros_dropped(tmp_path):
    adata = make()
    x = adata.X
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(x.indptr[:-1], x.indptr[1:], strict=True)])
    messy = sp.csr_matrix((x.data[order], x.indices[order], x.indptr), shape=x.shape)
    messy.data[::5] = 0
    expected = messy.toarray()
    with pytest.warns() if (expected.sum(1) == 0).any() else contextlib.nullcontext():
        ingest(anndata.AnnData(messy, obs=adata.obs[[]], var=adata.var[[]]), tmp_path / "a.zarr")
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(atlas.X.toarray(), expected)
    assert (atlas.X.data != 0).all()
    for b in range(atlas.n_obs):
        assert (np.diff(atlas.X[b].indices.astype(int)) > 0).all()


@pytest.mark.parametrize(
    "largest, name", [(255, "uint8"), (256, "uint16"), (70_000, "uint32"), (2**32 - 1, "uint32")]
)
def test_counts_take_the_type_of_the_largest(tmp_path, largest, name):
    adata = make()
    adata.X = with_value(adata.X, largest, np.float64, cell=7)
    report = ingest(adata, tmp_path / "a.zarr")
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert atlas.X.dtype == name and atlas.X[7, 3] == largest == report.max_count


def test_an_atlas_can_be_ingested_again(tmp_path):
    adata = make()
    ingest({"first": adata}, tmp_path / "a.zarr")
    ingest(tmp_path / "a.zarr", tmp_path / "b.zarr")
    atlas = anndata.read_zarr(tmp_path / "b.zarr")
    assert_same_counts(atlas, adata)
    assert set(atlas.obs["input"]) == {"first"}


def test_a_layer_and_raw(tmp_path):
    adata = make()
    counts = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.X = adata.X.multiply(0.31).tocsr()
    report = ingest(adata, tmp_path / "layer.zarr", layer="counts")
    assert_same_counts(anndata.read_zarr(tmp_path / "layer.zarr"), counts)
    assert report.left_out == ("X", "raw")
    ingest(adata[:, ::2].copy(), tmp_path / "raw.zarr", layer="raw")
    assert_same_counts(anndata.read_zarr(tmp_path / "raw.zarr"), counts)


def test_texts_with_gaps_become_categories(tmp_path):
    adata = make()
    adata.obs["gaps"] = pd.Series([None, "a", "b"] * 20, adata.obs_names, dtype=object)
    adata.obs["nullable"] = pd.array([None, "a", "b"] * 20, dtype="string")
    adata.obs["depth"] = adata.obs["depth"].astype(object)
    ingest(adata, tmp_path / "a.zarr")
    obs = anndata.read_zarr(tmp_path / "a.zarr").obs
    for key in ("gaps", "nullable"):
        assert obs[key].isna().tolist() == [True, False, False] * 20
        assert obs[key].dropna().tolist() == ["a", "b"] * 20
    assert obs["depth"].tolist() == adata.obs["depth"].tolist() and obs["depth"].dtype == float


def test_what_is_not_carried_is_named(tmp_path):
    adata = make()
    adata.layers["spliced"] = adata.X.copy()
    adata.varm["loadings"] = np.zeros((20, 2))
    adata.obsp["distances"] = sp.eye(60, format="csr")
    adata.obs["mixed"] = [1, "one"] * 30
    adata.obs["alike"] = pd.Categorical.from_codes([0, 1] * 30, [1, "1"])
    adata.uns["odd"] = {"x": object()}
    adata.uns["fine"] = 3
    report = ingest(adata, tmp_path / "a.zarr")
    text = "\n".join(report.left_out)
    left = ("layers['spliced']", "varm['loadings']", "obsp['distances']", "obs['mixed']", "uns['odd']")
    for what in (*left, "obs['alike']"):
        assert what in text
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert atlas.uns["fine"] == 3 and "odd" not in atlas.uns and "mixed" not in atlas.obs


def test_empty_cells_and_genes_warn_and_stay(tmp_path):
    adata = make()
    x = adata.X.tolil()
    x[5], x[:, 4] = 0, 0
    adata.X = x.tocsr()
    with pytest.warns(UserWarning) as caught:
        report = ingest(adata, tmp_path / "a.zarr")
    assert [str(w.message) for w in caught] == list(report.warnings)
    assert report.warnings == (
        "1 of 60 cells have no counts; they are kept", "1 of 20 genes have no counts; they are kept"
    )  # fmt: skip
    assert_same_counts(anndata.read_zarr(tmp_path / "a.zarr"), adata)


def test_nothing_but_zeros(tmp_path):
    adata = anndata.AnnData(sp.csr_matrix((3, 2), dtype=np.float32))
    with pytest.warns(UserWarning, match="have no counts"):
        report = ingest(adata, tmp_path / "a.zarr")
    assert report.nnz == 0
    np.testing.assert_array_equal(anndata.read_zarr(tmp_path / "a.zarr").X.toarray(), np.zeros((3, 2)))


@pytest.mark.parametrize("budget", [8_000, 1 << 20], ids=["read again", "kept"])
def test_dense_cells_may_be_more_than_was_expected(tmp_path, monkeypatch, budget):
    adata = make(200, 50)
    adata.X = adata.X.toarray() + 1
    adata.write_h5ad(tmp_path / "dense.h5ad")
    monkeypatch.setattr(convert, "_BYTES_IN_FLIGHT", 1)
    monkeypatch.setattr(cells, "DENSE_BLOCK", 500)
    reads, read = [], DenseRows.read
    monkeypatch.setattr(DenseRows, "read", lambda *args: reads.append(args[1]) or read(*args))
    ingest(tmp_path / "dense.h5ad", tmp_path / "a.zarr", memory_budget=budget, workers=1)
    assert (len(set(reads)) < len(reads)) == (budget == 8_000)
    assert_same_counts(anndata.read_zarr(tmp_path / "a.zarr"), adata)


@pytest.mark.parametrize("budget", [0, "much", "-1GB", "", "GB"])
def test_a_budget_that_cannot_be(tmp_path, budget):
    with pytest.raises(OptionError, match=r"memory_budget=.* cannot be: give bytes"):
        ingest(make(), tmp_path / "a.zarr", memory_budget=budget)
    assert not list(tmp_path.iterdir())


def test_a_budget_in_words(tmp_path):
    assert ingest(make(), tmp_path / "a.zarr", memory_budget="1 MB").n_obs == 60


def test_progress_ends_at_every_cell(tmp_path, small_shards):
    calls = []
    ingest(make(), tmp_path / "a.zarr", shuffle=True, progress=lambda *call: calls.append(call))
    for label in ("checking counts", "writing counts"):
        done = [(n, total) for what, n, total in calls if what == label]
        assert len(done) > 1 and done == sorted(done)
        assert done[-1] == (60, 60)


# --- shuffle


def test_shuffle_is_a_permutation_of_its_seed(tmp_path, small_shards):
    adata = make(200)
    orders = {}
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 2)):
        ingest(adata, tmp_path / f"{name}.zarr", shuffle=True, seed=seed, workers=workers)
        atlas = anndata.read_zarr(tmp_path / f"{name}.zarr")
        orders[name] = list(atlas.obs_names)
        assert sorted(orders[name]) == sorted(adata.obs_names)
        expected = adata[atlas.obs_names]
        assert_same_counts(atlas, expected)
        for key in ("kind", "depth", "age"):
            assert atlas.obs[key].astype(str).tolist() == expected.obs[key].astype(str).tolist()
        np.testing.assert_array_equal(atlas.obsm["X_pca"], expected.obsm["X_pca"])
    assert orders["a"] == orders["b"] != orders["c"]
    assert orders["a"] != list(adata.obs_names)
    moved = np.abs(pd.Index(orders["a"]).get_indexer(adata.obs_names) - np.arange(200))
    assert moved.mean() > 40  # of 67 expected of a random order: cells go everywhere, not only nearby


def test_shuffle_mixes_the_inputs(tmp_path, small_shards):
    ingest({"a": make(100), "b": make(100, seed=1, prefix="d")}, tmp_path / "a.zarr", shuffle=True)
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert 25 < (atlas.obs["input"][:100] == "a").sum() < 75
    assert (atlas.obs["input"] == "a").tolist() == [name.startswith("c") for name in atlas.obs_names]


# --- several inputs


def two(tmp_path):
    one, other = make(), make(40, 25, seed=1, prefix="d")
    other = other[:, ::-1].copy()  # g24 ... g0
    other.var_names = [*other.var_names[:-2], "only-here", "g0"]  # no g1
    return one, other


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_join_agrees_with_anndata(tmp_path, small_shards, join):
    one, other = two(tmp_path)
    one.write_h5ad(tmp_path / "one.h5ad")
    with anndata.settings.override(auto_shard_zarr_v3=False):
        anndata.io.write_elem(zarr.open_group(tmp_path / "other.zarr", mode="w", zarr_format=3), "/", other)
    ingest([tmp_path / "one.h5ad", str(tmp_path / "other.zarr")], tmp_path / "a.zarr", join=join)
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    expected = anndata.concat([one, other], join=join, fill_value=0, label="input", keys=["one", "other"])
    assert set(atlas.var_names) == set(expected.var_names)
    assert list(atlas.var_names)[: 20 - (join == "inner")] == [
        name for name in one.var_names if join == "outer" or name != "g1"
    ]
    expected = expected[:, atlas.var_names]
    assert_same_counts(atlas, expected)
    for key in ("kind", "depth", "n", "ok", "age", "note", "input"):
        assert atlas.obs[key].astype(str).tolist() == expected.obs[key].astype(str).tolist()
    np.testing.assert_array_equal(atlas.obsm["X_pca"], expected.obsm["X_pca"])
    lengths = atlas.var["length"].to_numpy()
    np.testing.assert_array_equal(
        lengths[:19], one.var["length"].drop("g1" if join == "inner" else "-", errors="ignore")[:19]
    )
    if join == "outer":
        assert np.isnan(lengths[20:]).all()


def test_columns_that_one_input_lacks(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    for key in ("kind", "depth", "ok", "note", "n"):
        del other.obs[key]
    other.obs["extra"] = np.arange(40)
    report = ingest({"one": one, "other": other}, tmp_path / "a.zarr")
    obs = anndata.read_zarr(tmp_path / "a.zarr").obs
    for key in ("kind", "depth", "ok", "note", "n"):
        assert obs[key][:60].astype(one.obs[key].dtype).tolist() == one.obs[key].tolist()
        assert obs[key][60:].isna().all()
    assert obs["extra"][:60].isna().all() and obs["extra"][60:].tolist() == list(range(40))
    assert any("uns" in what for what in report.left_out)


def test_obsm_that_does_not_fit_is_left_out(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    other.obsm["X_pca"] = np.zeros((40, 5))
    del other.obsm["proteins"]
    report = ingest([one, other], tmp_path / "a.zarr")
    assert {what[:13] for what in report.left_out} >= {"obsm['X_pca']", "obsm['protein"}
    assert set(anndata.read_zarr(tmp_path / "a.zarr").obsm) == set()


def test_genes_are_joined_by_a_column(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    other = other[:, ::-1].copy()
    other.var_names = [f"another-{k}" for k in range(20)]
    ingest([one, other], tmp_path / "a.zarr", var_key="symbol")
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert list(atlas.var_names) == list(one.var_names)
    np.testing.assert_array_equal(atlas.X[60:].toarray(), other.X[:, ::-1].toarray())
    with pytest.raises(OptionError, match="no column 'ensembl' in var; its columns are: 'symbol', 'length'"):
        ingest([one, other], tmp_path / "b.zarr", var_key="ensembl")


def test_versions_of_ensembl_ids_do_not_count(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    one.var_names = [f"ENSG{g:011d}.{g % 3 + 1}" for g in range(20)]
    other.var_names = [f"ENSG{g:011d}" for g in range(20)][::-1]
    ingest([one, other], tmp_path / "a.zarr")
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert list(atlas.var_names) == list(one.var_names)
    np.testing.assert_array_equal(atlas.X[60:].toarray(), other.X[:, ::-1].toarray())


def test_a_dot_in_other_names_is_no_version(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    one.var_names, other.var_names = [f"AC{g}.1" for g in range(20)], [f"AC{g}.2" for g in range(20)]
    with pytest.raises(GenesError, match=r"no gene is in all 2 inputs.*'AC0\.1'.*'AC0\.2'.*join='outer'"):
        ingest([one, other], tmp_path / "a.zarr")


def test_duplicate_genes(tmp_path):
    adata = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata.var_names = ["MT", "A", "MT", "A", "A", "A-1", *adata.var_names[6:]]
    with pytest.raises(GenesError, match="2 genes more than once, such as 'MT', 'A'; pass make_unique=True"):
        ingest(adata, tmp_path / "a.zarr")
    ingest(adata, tmp_path / "a.zarr", make_unique=True)
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert list(atlas.var_names)[:6] == ["MT", "A", "MT-1", "A-2", "A-3", "A-1"]
    np.testing.assert_array_equal(atlas.X.toarray(), adata.X.toarray())


def test_duplicate_cells_in_two_inputs(tmp_path, small_shards):
    one, other = make(), make(40, seed=1, prefix="d")
    other.obs_names = [*other.obs_names[:-1], "c7"]
    with pytest.raises(CellsError, match="cell 'c7' is in 'AnnData' and in 'AnnData'; pass make_unique=True"):
        ingest([one, other], tmp_path / "a.zarr")
    ingest({"one": one, "two": other}, tmp_path / "a.zarr", make_unique=True)
    names = list(anndata.read_zarr(tmp_path / "a.zarr").obs_names)
    assert names == [f"{name}-one" for name in one.obs_names] + [f"{name}-two" for name in other.obs_names]


def test_duplicate_cells_in_one_input(tmp_path, small_shards):
    adata = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata.obs_names = ["x", *adata.obs_names[1:40], "x", "x", *adata.obs_names[42:]]
    with pytest.raises(CellsError, match="cell 'x' is twice in 'AnnData'"):
        ingest(adata, tmp_path / "a.zarr")
    ingest(adata, tmp_path / "a.zarr", make_unique=True)
    names = list(anndata.read_zarr(tmp_path / "a.zarr").obs_names)
    assert (names[0], names[40], names[41]) == ("x", "x-1", "x-2") and len(set(names)) == 60


def test_a_clash_of_hashes_is_not_a_duplicate(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.util, "hash_array", lambda names, categorize: np.zeros(len(names), np.uint64))
    ingest(make(), tmp_path / "a.zarr")
    assert anndata.read_zarr(tmp_path / "a.zarr").n_obs == 60


def test_inputs_of_one_name_are_told_apart(tmp_path):
    for name, seed in (("s1", 0), ("s2", 1)):
        (tmp_path / name).mkdir()
        make(seed=seed, prefix=name).write_h5ad(tmp_path / name / "counts.h5ad")
    paths = [tmp_path / "s1" / "counts.h5ad", tmp_path / "s2" / "counts.h5ad"]
    report = ingest(paths, tmp_path / "a.zarr")
    assert report.inputs == tuple(str(path) for path in paths)


def test_a_column_called_input(tmp_path):
    one, other = make(), make(40, seed=1, prefix="d")
    one.obs["input"] = "mine"
    with pytest.raises(OptionError, match="column 'input' already; pass another input_key="):
        ingest([one, other], tmp_path / "a.zarr")
    ingest({"one": one, "other": other}, tmp_path / "a.zarr", input_key="source")
    assert anndata.read_zarr(tmp_path / "a.zarr").obs["source"].value_counts().to_dict() == {
        "one": 60,
        "other": 40,
    }


# --- what is not a count


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, r"-1\.0"), (0.31, r"0\.31"), (np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"),
        (2.0**32, r"4(294967296\.0|\.2949673e\+09)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_bad_count_is_named_by_cell_and_gene(tmp_path, small_shards, value, text, dtype, shuffle):
    adata = make()
    adata.X = with_value(adata.X, value, dtype)
    adata.write_h5ad(tmp_path / "bad.h5ad")
    match = rf"bad\.h5ad' X has {text} at cell 'c41', gene 'g3'; counts must be integers from 0 to 4294967295"
    with pytest.raises(CountsError, match=match):
        ingest(tmp_path / "bad.h5ad", tmp_path / "a.zarr", shuffle=shuffle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5ad"]


@pytest.mark.parametrize(("dtype", "value"), [(np.int32, -7), (np.int64, 2**32), (np.uint64, 2**63)])
def test_a_bad_integer_is_named_too(tmp_path, dtype, value):
    adata = make()
    adata.X = with_value(adata.X, value, dtype)
    with pytest.raises(CountsError, match="at cell 'c41', gene 'g3'"):
        ingest(adata, tmp_path / "a.zarr")


def test_the_error_says_where_the_counts_are(tmp_path):
    adata = make()
    counts = adata.X.copy()
    adata.X = adata.X.multiply(0.5).tocsr()
    adata.layers["scaled"], adata.layers["counts"] = adata.X.copy(), counts
    adata.write_h5ad(tmp_path / "a.h5ad")
    for given in (adata, tmp_path / "a.h5ad"):
        with pytest.raises(CountsError, match=r"layers\['counts'\] holds counts: pass layer='counts'"):
            ingest(given, tmp_path / "a.zarr")
    del adata.layers["counts"]
    raw = make()
    adata.raw = raw
    with pytest.raises(CountsError, match=r"raw\.X holds counts: pass layer='raw'"):
        ingest(adata, tmp_path / "a.zarr")
    adata.X = counts
    with pytest.raises(CountsError, match=r"layers\['scaled'\] has .* X holds counts: leave layer out"):
        ingest(adata, tmp_path / "a.zarr", layer="scaled")


def test_a_gene_twice_in_a_cell(tmp_path):
    adata = make()
    adata.write_h5ad(tmp_path / "a.h5ad")
    import h5py

    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        indices = file["X/indices"][...]
        indices[1] = indices[0]
        file["X/indices"][...] = indices
    with pytest.raises(CountsError, match=r"a gene twice in cell 'c0' \(row 0\).*sum_duplicates"):
        ingest(tmp_path / "a.h5ad", tmp_path / "a.zarr")


def test_no_cells_or_no_inputs(tmp_path):
    with pytest.raises(CellsError, match="no cells"):
        ingest(make()[:0].copy(), tmp_path / "a.zarr")
    with pytest.raises(OptionError, match="nothing to ingest"):
        ingest([], tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("options", "text"),
    [({"join": "left"}, "join='left'"), ({"workers": 0}, "workers=0"), ({"layer": "x"}, "no layer 'x'")],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(OptionError, match=text):
        ingest(make(), tmp_path / "a.zarr", **options)
    assert not any(tmp_path.iterdir())


# --- nothing half-written


def test_an_atlas_is_replaced_only_when_asked(tmp_path):
    ingest(make(), tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="is there already; pass overwrite=True"):
        ingest(make(30), tmp_path / "a.zarr")
    ingest(make(30), tmp_path / "a.zarr", overwrite=True)
    assert anndata.read_zarr(tmp_path / "a.zarr").n_obs == 30
    assert leftovers(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    ingest(make(), tmp_path / "a.zarr")
    bad = make(30)
    bad.X = with_value(bad.X, 0.5, np.float32, cell=2)
    with pytest.raises(CountsError):
        ingest(bad, tmp_path / "a.zarr", overwrite=True)
    assert_same_counts(anndata.read_zarr(tmp_path / "a.zarr"), make())
    assert leftovers(tmp_path) == []


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="not a Zarr store, so it is not overwritten"):
        ingest(make(), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()
    with pytest.raises(StoreError, match="is no folder to write"):
        ingest(make(), tmp_path / "nowhere" / "a.zarr")


def test_an_atlas_is_not_written_over_itself(tmp_path):
    ingest(make(), tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="is one of the inputs"):
        ingest(tmp_path / "a.zarr", tmp_path / "a.zarr", overwrite=True)


SLOW_INGEST = """
import sys, time
from atlasvi.store import convert
from atlasvi.store.ingest import ingest
from atlasvi.store.rows import DenseRows
fill, calls = convert.Conversion._fill, []
def slowly(*args):
    fill(*args)
    calls.append(args)
    if len(calls) > 1:
        print("writing", flush=True)
        time.sleep(60)
convert.Conversion._fill = slowly
from atlasvi.store import layout
layout.CHUNK_ENTRIES, layout.CHUNKS_PER_SHARD = 32, 4
ingest(sys.argv[1], sys.argv[2], workers=1)
"""


@pytest.fixture
def interrupted(tmp_path):
    """Starts an ingest, waits until a shard is on disk, and sends a signal."""

    def interrupt(number):
        make().write_h5ad(tmp_path / "in.h5ad")
        command = [sys.executable, "-c", SLOW_INGEST, str(tmp_path / "in.h5ad"), str(tmp_path / "a.zarr")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "writing\n", process.stderr.read()
            process.send_signal(number)
            if number == signal.SIGINT:
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            process.kill()

    return interrupt


def test_a_killed_ingest_leaves_no_atlas_and_runs_again(tmp_path, interrupted):
    interrupted(signal.SIGKILL)
    assert not (tmp_path / "a.zarr").exists()
    (unfinished,) = (tmp_path / name for name in leftovers(tmp_path))
    assert list((unfinished / "atlas" / "X" / "data" / "c").iterdir())  # it was well under way
    for folder in (unfinished, unfinished / "atlas"):
        with pytest.raises(NotAnAtlasError):
            open_source(folder)
    ingest(tmp_path / "in.h5ad", tmp_path / "a.zarr")
    assert_same_counts(anndata.read_zarr(tmp_path / "a.zarr"), make())
    assert leftovers(tmp_path) == []


def test_ctrl_c_removes_what_was_written(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.Conversion, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ingest(make(), tmp_path / "a.zarr")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("IO error: No space left on device (os error 28)"),
    ],
    ids=["python", "zarrs"],
)
def test_a_full_disk_is_named_and_nothing_left(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(zarr.Array, "__setitem__", fail)
    with pytest.raises(
        SpaceError, match=rf"no space left in '{tmp_path}' to write 'a\.zarr': about 0 MiB is needed"
    ):
        ingest(make(), tmp_path / "a.zarr")
    assert not any(tmp_path.iterdir())


FULL_DISK = """
import os, sys
import anndata, numpy as np, scipy.sparse as sp
from atlasvi.errors import SpaceError
from atlasvi.store.ingest import ingest
from atlasvi.store.rows import DenseRows
counts = np.random.default_rng(0).integers(0, 60_000, (1000, 2000)).astype(np.int32)
for shuffle in (False, True):
    try:
        ingest(anndata.AnnData(sp.csr_matrix(counts)), sys.argv[1] + "/a.zarr", shuffle=shuffle)
    except SpaceError as error:
        print(error, os.listdir(sys.argv[1]))
"""


def test_a_full_disk_in_truth(tmp_path):
    """A file system of 3 MB in a mount namespace of its own, which ends with the process."""
    mount = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"']
    run = [*command, sys.executable, "-c", FULL_DISK, str(tmp_path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == 2
    for line in out:
        assert line.startswith(f"no space left in '{tmp_path}' to write 'a.zarr'")
        assert line.endswith("[]")


def test_a_truncated_input_leaves_nothing(tmp_path):
    make().write_h5ad(tmp_path / "in.h5ad")
    content = (tmp_path / "in.h5ad").read_bytes()
    (tmp_path / "in.h5ad").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(CorruptError, match=r"in\.h5ad"):
        ingest(tmp_path / "in.h5ad", tmp_path / "a.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


# --- a damaged atlas


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "index", "empty"])
@pytest.mark.parametrize("array", ["indices", "data"])
def test_a_corrupt_shard_is_named_with_its_rows(tmp_path, small_shards, damage, array):
    """zarrs itself lets most of these pass when a part of a shard is read."""
    adata = make()
    ingest(adata, tmp_path / "a.zarr")
    shard = tmp_path / "a.zarr" / "X" / array / "c" / "2"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[40] ^= 1
    elif damage == "index":
        content[-20] ^= 1
    shard.write_bytes(bytes(content[: {"cut": 50, "empty": 0}.get(damage, len(content))]))
    if damage == "missing":
        shard.unlink()
    source = open_source(tmp_path / "a.zarr")
    first, last = np.searchsorted(source.indptr, [256, 383], side="right") - 1
    np.testing.assert_array_equal(
        source.read_rows(0, first - 8).to_scipy().toarray(), adata.X[: first - 8].toarray()
    )
    match = rf"shard .*a\.zarr/X/{array}/c/2 .*rows {first} to {last} are damaged"
    with pytest.raises(CorruptError, match=match):
        source.read_rows(int(first), int(first) + 1)
    with pytest.raises(CorruptError, match=match):
        source.read_rows(0, 60)


def test_an_atlas_of_a_newer_version(tmp_path):
    ingest(make(), tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr")
    group.attrs["atlasvi"] = {**group.attrs["atlasvi"], "format": 2}
    with pytest.raises(StoreError, match="format 2, made by a newer atlasvi"):
        open_source(tmp_path / "a.zarr")


# --- real data


@pytest.mark.data
@pytest.mark.parametrize("name", ["pbmc_sorted_reference", "worm_neuron", "cbmc_citeseq"])
def test_real_data_round_trip(data_dir, tmp_path, name):
    path = data_dir / f"{name}.h5ad"
    expected = anndata.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no counts", category=UserWarning)
        report = ingest(path, tmp_path / "a.zarr")
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    assert_same_counts(atlas, expected)
    pd.testing.assert_frame_equal(atlas.obs[expected.obs.columns], expected.obs)
    assert set(atlas.obsm) == set(expected.obsm) and set(atlas.uns) == set(expected.uns)
    assert report.left_out == ()
    assert report.n_bytes < os.path.getsize(path) * 1.5


@pytest.mark.data
def test_real_inputs_join(data_dir, tmp_path):
    paths = [data_dir / "pbmc_sorted_reference.h5ad", data_dir / "pbmc_frozen_donorA.h5ad"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no counts", category=UserWarning)
        ingest(paths, tmp_path / "a.zarr", shuffle=True, seed=1, make_unique=True)
    atlas = anndata.read_zarr(tmp_path / "a.zarr")
    for path in paths:
        expected = anndata.read_h5ad(path)[:, atlas.var_names]
        part = atlas[atlas.obs["input"] == path.stem]
        plain = part.obs_names.str.removesuffix(f"-{path.stem}")
        order = expected.obs_names.get_indexer(plain)
        assert part.n_obs == expected.n_obs and (order >= 0).all()
        np.testing.assert_array_equal(as_scipy(part).toarray(), expected.X[order].toarray())


def test_a_link_stays_and_the_atlas_that_it_names_is_replaced(tmp_path, monkeypatch):
    few, many = (anndata.AnnData(sp.csr_matrix(np.ones((n, 3), np.float32))) for n in (2, 5))
    ingest(few, tmp_path / "disk.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "disk.zarr")
    ingest(many, tmp_path / "link.zarr", overwrite=True)
    assert (tmp_path / "link.zarr").is_symlink()
    assert anndata.read_zarr(tmp_path / "disk.zarr").n_obs == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.zarr", "link.zarr"]
    monkeypatch.chdir(tmp_path / "disk.zarr")
    with pytest.raises(StoreError, match="the folder that you are in"):
        ingest(few, ".", overwrite=True)
