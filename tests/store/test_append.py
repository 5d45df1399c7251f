"""Appending: as if all had been ingested at once, and nobody who reads the atlas takes notice."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import atlasvi
from atlasvi import cli
from atlasvi.errors import (
    CellsError,
    CorruptError,
    CountsError,
    GenesError,
    NotAnAtlasError,
    ObsError,
    OptionError,
    StoreError,
)
from atlasvi.store import append, metadata

N_VARS = 30


def make(prefix, n_obs=40, seed=0, levels=("T", "B"), largest=None):
    """Counts, and columns of every kind."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_obs, N_VARS)).astype(np.float32)
    counts[np.arange(n_obs), np.arange(n_obs) % N_VARS] += 1
    counts[0] += 1
    if largest is not None:
        counts[n_obs // 2, 3] = largest
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"{prefix}{i}" for i in range(n_obs)]
    adata.var_names = [f"g{g}" for g in range(N_VARS)]
    adata.obs["kind"] = pd.Categorical(rng.choice(levels, n_obs), levels)
    adata.obs["grade"] = pd.Categorical(rng.integers(1, 4, n_obs))
    adata.obs["rank"] = pd.Categorical(rng.choice(["low", "high"], n_obs), ["low", "high"], ordered=True)
    adata.obs["depth"] = rng.normal(size=n_obs)
    adata.obs["n"] = rng.integers(0, 9, n_obs).astype(np.int16)
    adata.obs["ok"] = rng.random(n_obs) < 0.5
    adata.obs["age"] = pd.array([None, *range(n_obs - 1)], dtype="Int64")
    adata.obs["note"] = [f"note {i} of {prefix}" for i in range(n_obs)]
    adata.var["symbol"] = [f"S{g}" for g in range(N_VARS)]
    adata.obsm["X_pca"] = rng.normal(size=(n_obs, 3))
    adata.obsm["proteins"] = pd.DataFrame(rng.poisson(3, (n_obs, 2)), adata.obs_names, ["CD3", "CD4"])
    return adata


def slim(*arguments, **options):
    """As `make`, with the fewest columns, which take most of the time."""
    adata = make(*arguments, **options)
    adata.obs = adata.obs[["kind", "note"]]
    del adata.obsm["proteins"]
    return adata


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    """Of ``make("a")`` and ``slim("a")``; not to be written to."""
    folder = tmp_path_factory.mktemp("atlases")
    for function in (make, slim):
        atlasvi.ingest({"a": function("a")}, folder / function.__name__)
    return folder


@pytest.fixture
def path(atlases, tmp_path):
    """An atlas of ``make("a")``."""
    return shutil.copytree(atlases / "make", tmp_path / "a.zarr")


@pytest.fixture
def slim_path(atlases, tmp_path):
    """An atlas of ``slim("a")``."""
    return shutil.copytree(atlases / "slim", tmp_path / "a.zarr")


@pytest.fixture
def small(monkeypatch):
    """Several shards, chunks and pieces out of a few hundred entries."""
    monkeypatch.setattr("atlasvi.store.layout.CHUNK_ENTRIES", 64)
    monkeypatch.setattr("atlasvi.store.layout.CHUNKS_PER_SHARD", 4)
    monkeypatch.setattr("atlasvi.store.frame.NAMES", 36)
    monkeypatch.setattr("atlasvi.store.frame.CHUNK", 36)
    monkeypatch.setattr("atlasvi.store.convert._INDPTR_CHUNK", 36)
    monkeypatch.setattr("atlasvi.store.append._PIECE_ROWS", 1)


def assert_same(one, other):
    """Two AnnDatas, to the bit and the type."""
    for key in ("indptr", "indices", "data"):
        ours, theirs = getattr(one.X, key), getattr(other.X, key)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert one.shape == other.shape
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)
    assert set(one.obsm) == set(other.obsm)
    for key, value in one.obsm.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other.obsm[key]))


def same_as_before(reader, expected):
    """What a reader that was opened before sees of everything there is."""
    assert reader.shape == expected.shape
    seen = reader.to_anndata()
    np.testing.assert_array_equal(seen.X.toarray(), expected.X.toarray())
    pd.testing.assert_frame_equal(seen.obs, expected.obs)
    np.testing.assert_array_equal(seen.obsm["X_pca"], expected.obsm["X_pca"])


def files_of(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# --- what comes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(36, 40), (33, 1, 50), (1, 1)])
def test_one_after_the_other_is_all_at_once(tmp_path, small, sizes):
    parts = {
        f"part{k}": make(f"c{k}-", n, seed=k, levels=("T", "B", *"XYZ"[:k])) for k, n in enumerate(sizes)
    }
    atlasvi.ingest({"part0": parts["part0"]}, tmp_path / "grown.zarr")
    for name in list(parts)[1:]:
        report = atlasvi.ingest({name: parts[name]}, tmp_path / "grown.zarr", append=True)
        assert report.inputs == (name,)
        assert report.n_obs - report.n_before == parts[name].n_obs
    whole = atlasvi.ingest(parts, tmp_path / "whole.zarr")
    assert (report.n_obs, report.nnz, report.max_count) == (whole.n_obs, whole.nnz, whole.max_count)
    assert report.left_out == () and report.warnings == ()
    grown, at_once = (anndata.read_zarr(tmp_path / name) for name in ("grown.zarr", "whole.zarr"))
    assert_same(grown, at_once)
    about, other = (
        dict(zarr.open_group(tmp_path / n, mode="r").attrs["atlasvi"]) for n in ("grown.zarr", "whole.zarr")
    )
    assert about == other
    assert leftovers(tmp_path) == []


def test_the_arrays_by_themselves_and_every_reader_agree(tmp_path, small):
    """zarr with its own codecs and with zarrs, by the copy of the metadata and without, and atlasvi."""
    from atlasvi.store.rows import with_zarrs

    path = tmp_path / "a.zarr"
    parts = [slim("a"), slim("b", 57, 1), slim("c", 9, 2)]
    atlasvi.ingest(parts[0], path)
    for k, part in enumerate(parts[1:]):
        atlasvi.ingest({f"more {k}": part}, path, append=True)
    expected = sp.vstack([part.X for part in parts]).tocsr()
    expected.sort_indices()
    for consolidated in (True, False):
        group = zarr.open_group(path, mode="r", use_consolidated=consolidated)
        np.testing.assert_array_equal(group["X/indptr"][:], expected.indptr)
        for key in ("indices", "data"):
            for array in (group[f"X/{key}"], with_zarrs(lambda: group[f"X/{key}"])):  # noqa: B023
                np.testing.assert_array_equal(array[:], getattr(expected, key))
                np.testing.assert_array_equal(array[100:130], getattr(expected, key)[100:130])
        assert list(group["X"].attrs["shape"]) == list(expected.shape)
    with atlasvi.open(path) as atlas:
        np.testing.assert_array_equal(atlas.read_rows(slice(None)).to_scipy().toarray(), expected.toarray())
    again = atlasvi.ingest(path, tmp_path / "copy.zarr", input_key="source")
    assert again.nnz == expected.nnz


def test_new_shards_are_new_files_and_old_ones_only_grow(tmp_path, small):
    path = tmp_path / "a.zarr"
    atlasvi.ingest(slim("a", 61), path)
    before = files_of(path)
    atlasvi.ingest({"b": slim("b", 50, 1)}, path, append=True)
    after = files_of(path)
    shards = [key for key in before if key.startswith(("X/indices/c/", "X/data/c/"))]
    assert len(shards) > 4
    changed = [key for key in shards if after[key] != before[key]]
    last = max(int(key.rsplit("/", 1)[1]) for key in shards)
    assert sorted(changed) == [f"X/data/c/{last}", f"X/indices/c/{last}"]
    for key in changed:
        assert after[key].startswith(before[key])
    assert sum(key.startswith("X/data/c/") for key in after) > len(shards) // 2


def test_several_inputs_and_genes_in_any_order(tmp_path):
    parts = {"a": slim("a"), "b": slim("b", 20, 1), "c": slim("c", 30, 2, ("B", "Q"))}
    atlasvi.ingest({"a": parts["a"]}, tmp_path / "grown.zarr")
    order = np.random.default_rng(0).permutation(N_VARS)
    new = {"b": parts["b"][:, order].copy(), "c": parts["c"]}
    atlasvi.ingest(new, tmp_path / "grown.zarr", append=True)
    atlasvi.ingest(parts, tmp_path / "whole.zarr")
    assert_same(*(anndata.read_zarr(tmp_path / name) for name in ("grown.zarr", "whole.zarr")))


def test_a_shuffle_mixes_the_new_cells_alone(slim_path):
    with pytest.warns(UserWarning, match="only the new cells were shuffled"):
        atlasvi.ingest({"b": slim("b", seed=1)}, slim_path, append=True, shuffle=True, seed=3)
    names = list(anndata.read_zarr(slim_path).obs_names)
    assert names[:40] == [f"a{i}" for i in range(40)]
    assert names[40:] != [f"b{i}" for i in range(40)] and set(names[40:]) == {f"b{i}" for i in range(40)}


def test_an_atlas_without_a_single_count_grows(tmp_path):
    empty = anndata.AnnData(sp.csr_matrix((3, N_VARS), dtype=np.float32), var=make("a").var[[]])
    full = make("b")
    full.obs = full.obs[[]]
    path = tmp_path / "a.zarr"
    with pytest.warns(UserWarning, match="no counts"):
        atlasvi.ingest({"a": empty}, path)
    atlasvi.ingest({"b": full}, path, append=True)
    empty.obs_names = list("xyz")
    with pytest.warns(UserWarning, match="3 of 3 new cells"):
        atlasvi.ingest({"c": empty}, path, append=True)
    back = anndata.read_zarr(path)
    np.testing.assert_array_equal(back.X[3:-3].toarray(), full.X.toarray())
    assert back.X[:3].nnz == back.X[-3:].nnz == 0


def test_more_levels_than_a_byte_can_tell(tmp_path):
    one, other = make("a", 10), make("b", 300)
    one.obs = pd.DataFrame({"donor": pd.Categorical(["d0"] * 10)}, one.obs_names)
    other.obs = pd.DataFrame({"donor": pd.Categorical([f"d{k}" for k in range(300)])}, other.obs_names)
    atlasvi.ingest({"a": one}, tmp_path / "grown.zarr")
    atlasvi.ingest({"b": other}, tmp_path / "grown.zarr", append=True)
    atlasvi.ingest({"a": one, "b": other}, tmp_path / "whole.zarr")
    assert_same(*(anndata.read_zarr(tmp_path / name) for name in ("grown.zarr", "whole.zarr")))


def test_the_latent_of_a_model_is_nan_for_new_cells(slim_path):
    latent = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    with atlasvi.open(slim_path) as atlas:
        atlas.write_obsm("X_scVI", [latent], 5)
    with pytest.warns(UserWarning, match=r"obsm\['X_scVI'\] is NaN for the 20 new cells"):
        atlasvi.ingest({"b": slim("b", 20, 1)}, slim_path, append=True)
    found = anndata.read_zarr(slim_path).obsm["X_scVI"]
    np.testing.assert_array_equal(found[:40], latent)
    assert np.isnan(found[40:]).all() and found.shape == (60, 5)
    with atlasvi.open(slim_path) as atlas:
        atlas.write_obsm("X_scVI", [np.zeros((60, 4))], 4)
    assert anndata.read_zarr(slim_path).obsm["X_scVI"].shape == (60, 4)


def test_what_is_not_of_cells_is_named_and_left(path):
    new = make("b", 20, 1)
    new.uns["info"] = "mine"
    new.var["length"] = 3
    new.obsm["X_umap"] = np.zeros((20, 2))
    report = atlasvi.ingest({"b": new}, path, append=True)
    assert len(report.left_out) == 3
    for what in ("uns of", "var['length']", "obsm['X_umap']"):
        assert any(what in line for line in report.left_out)
    back = anndata.read_zarr(path)
    assert dict(back.uns) == {} and list(back.var) == ["symbol"]


def test_names_of_inputs_that_are_taken_get_a_number(tmp_path):
    path = tmp_path / "a.zarr"
    atlasvi.ingest({"x": slim("a")}, path)
    assert atlasvi.ingest({"x": slim("b", seed=1)}, path, append=True).inputs == ("x-2",)
    assert atlasvi.ingest({"x": slim("c", seed=2)}, path, append=True).inputs == ("x-3",)
    assert list(anndata.read_zarr(path).obs["input"].cat.categories) == ["x", "x-2", "x-3"]


# --- who reads meanwhile -----------------------------------------------------------------------------


def test_a_reader_that_was_there_sees_what_it_saw(tmp_path, small, monkeypatch):
    """Before, between files that are moved in, and after; and one that opens sees the old or the new."""
    path, old, new = tmp_path / "a.zarr", make("a", 41), make("b", 30, 1, ("T", "Z"))
    atlasvi.ingest({"a": old}, path)
    reader, untouched = atlasvi.open(path), atlasvi.open(path)
    expected = reader.to_anndata()
    replace, n_seen, shapes = os.replace, 0, []

    def replace_and_look(source, place):
        nonlocal n_seen
        replace(source, place)
        if str(path) in str(place):
            n_seen += 1
            if n_seen % 10 == 0 or str(place) == str(path / "zarr.json"):
                same_as_before(reader, expected)
                with atlasvi.open(path) as fresh:
                    shapes.append(fresh.shape)
                    if fresh.n_obs == old.n_obs:
                        same_as_before(fresh, expected)
                assert anndata.read_zarr(path).n_obs == shapes[-1][0]

    monkeypatch.setattr(os, "replace", replace_and_look)
    atlasvi.ingest({"b": new}, path, append=True)
    monkeypatch.undo()
    assert n_seen > 30 and {n for n, _ in shapes} == {41, 71} and shapes == sorted(shapes)
    for one in (reader, untouched):
        same_as_before(one, expected)
        one.close()


def test_a_stream_that_runs_through_appends_gives_every_old_cell(tmp_path, small):
    path = tmp_path / "a.zarr"
    atlasvi.ingest({"a": slim("a", 90)}, path)
    with atlasvi.open(path) as atlas:
        expected = atlas.read_rows(slice(None)).to_scipy().toarray()
        stop, failed, rounds = threading.Event(), [], []

        def read():
            try:
                while not stop.is_set() or not rounds:
                    got = np.zeros_like(expected)
                    for counts, rows in atlas.stream(16, num_workers=0, epoch=len(rounds)):
                        got[rows] = counts.to_scipy().toarray()
                    np.testing.assert_array_equal(got, expected)
                    rounds.append(1)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        for k in range(2):
            atlasvi.ingest({f"b{k}": slim(f"b{k}-", 13, k)}, path, append=True)
        stop.set()
        thread.join()
    assert not failed, failed
    assert anndata.read_zarr(path).n_obs == 90 + 2 * 13


def test_a_second_writer_waits_its_turn(slim_path):
    with metadata.only_writer(slim_path), atlasvi.open(slim_path) as atlas:
        with pytest.raises(StoreError, match="written to by another process"):
            atlasvi.ingest({"b": slim("b")}, slim_path, append=True)
        with pytest.raises(StoreError, match="written to by another process"):
            atlas.write_obsm("X_scVI", [np.zeros((40, 2))], 2)
    atlas = atlasvi.open(slim_path)
    atlasvi.ingest({"b": slim("b")}, slim_path, append=True)
    with pytest.raises(StoreError, match="80 cells by now"):
        atlas.write_obsm("X_scVI", [np.zeros((40, 2))], 2)


# --- killed on the way -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import atlasvi
from test_append import slim
replace, n = os.replace, 0
def dying(source, place):
    global n
    n += 1
    os.kill(os.getpid(), signal.SIGKILL) if n > 7 else replace(source, place)
os.replace = dying
atlasvi.ingest({{"b": slim("b", 30, 1, ("T", "Z"))}}, {path!r}, append=True)
"""


class Killed(BaseException):
    """Nothing is tidied up after it."""


def kill_at(monkeypatch, where):
    """An append that stops dead: what it left lies there."""
    replace, moved = os.replace, []

    def die(*_):
        raise Killed

    def dying(source, place):
        moved.append(place)
        die() if len(moved) > 7 else replace(source, place)

    places = {
        "while it prepares": (append.Growth, "add_counts", die),
        "amid the moves": (os, "replace", dying),
        "before it is known": (metadata.Metadata, "write", die),
        "before it is settled": (metadata.Metadata, "write_nodes", die),
    }
    monkeypatch.setattr(*places[where])
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)


def still_works(path, parts, b_is_in):
    """The atlas is as before or has all of ``b``, and two more can be appended, the first a shorter ``b``."""
    folder, found = path.parent, anndata.read_zarr(path)
    both = sp.vstack([part.X for part in parts.values()]).toarray()
    np.testing.assert_array_equal(found.X.toarray(), both if b_is_in else parts["a"].X.toarray())
    assert found.obs["note"].tolist() == [n for p in parts.values() for n in p.obs["note"]][: found.n_obs]
    assert list(found.obs["kind"].cat.categories) == (["T", "B", "Z"] if b_is_in else ["T", "B"])
    parts = dict(parts)
    if not b_is_in:
        kinds = parts["b"].obs["kind"].dtype
        parts["b"] = parts["b"][:11].copy()
        parts["b"].obs["kind"] = parts["b"].obs["kind"].astype(kinds)
        atlasvi.ingest({"b": parts["b"]}, path, append=True)
    parts["c"] = slim("c", 5, 2)
    atlasvi.ingest({"c": parts["c"]}, path, append=True)
    atlasvi.ingest(parts, folder / "whole.zarr")
    assert_same(anndata.read_zarr(path), anndata.read_zarr(folder / "whole.zarr"))
    by_itself = zarr.open_group(path, mode="r", use_consolidated=False)
    assert by_itself["obs/_index"].shape == (sum(part.n_obs for part in parts.values()),)
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    "where",
    [
        "while it prepares",
        "amid the moves",
        "before it is known",
        "before it is settled",
    ],
)
def test_a_killed_append_leaves_an_atlas_to_which_the_next_can_append(tmp_path, small, where):
    path, parts = tmp_path / "a.zarr", {"a": slim("a", 41), "b": slim("b", 30, 1, ("T", "Z"))}
    atlasvi.ingest({"a": parts["a"]}, path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, where)
        atlasvi.ingest({"b": parts["b"]}, path, append=True)
    assert leftovers(tmp_path) == [".a.zarr.append"]
    still_works(path, parts, b_is_in=where == "before it is settled")


def test_a_process_that_is_killed_amid_the_moves(tmp_path):
    path, parts = tmp_path / "a.zarr", {"a": slim("a", 41), "b": slim("b", 30, 1, ("T", "Z"))}
    atlasvi.ingest({"a": parts["a"]}, path)
    script = KILLED.format(tests=os.path.dirname(__file__), path=str(path))
    run = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    still_works(path, parts, b_is_in=False)


@pytest.mark.parametrize("fails", ["add_annotations", "add_counts"])
def test_one_that_fails_before_it_is_known_changes_nothing(slim_path, tmp_path, monkeypatch, fails):
    before = files_of(slim_path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(append.Growth, fails, fail)
    with pytest.raises(KeyboardInterrupt):
        atlasvi.ingest({"b": slim("b")}, slim_path, append=True)
    assert files_of(slim_path) == before and leftovers(tmp_path) == []


def test_obsm_written_where_an_append_was_not_settled(slim_path, monkeypatch):
    monkeypatch.setattr(metadata.Metadata, "write_nodes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        atlasvi.ingest({"b": slim("b", 20)}, slim_path, append=True)
    monkeypatch.undo()
    with atlasvi.open(slim_path) as atlas:
        atlas.write_obsm("X_scVI", [np.ones((60, 2))], 2)
    back = anndata.read_zarr(slim_path)
    assert back.shape == (60, N_VARS) and (back.obsm["X_scVI"] == 1).all()


# --- what does not fit -------------------------------------------------------------------------------


def misfit_genes_missing(new):
    return new[:, 2:].copy(), {}


def misfit_genes_extra(new):
    new.var_names = [*new.var_names[:-1], "other"]
    return new, {"join": "outer"}


def misfit_cells(new):
    new.obs_names = ["a7", *new.obs_names[1:]]
    return new, {}


def misfit_columns(new):
    new.obs["more"] = 1
    del new.obs["depth"], new.obs["note"]
    return new, {}


def misfit_types(new):
    new.obs["n"] = np.where(np.arange(new.n_obs) == 3, 70_000, 0)
    new.obs["ok"] = [f"t{i}" for i in range(new.n_obs)]
    new.obs["rank"] = pd.Categorical(["middle"] * new.n_obs)
    new.obs["grade"] = pd.Categorical(["x"] * new.n_obs)
    new.obs["depth"] = pd.Categorical(["x"] * new.n_obs)
    new.obs["note"] = pd.Categorical([None, *["x"] * (new.n_obs - 1)])
    return new, {}


def misfit_count(new):
    counts = new.X.toarray()
    counts[13, 5] = 256
    new.X = sp.csr_matrix(counts)
    return new, {}


MISFITS = {
    misfit_genes_missing: (GenesError, ["lacks 'g0', 'g1'", "join='outer'"]),
    misfit_genes_extra: (GenesError, ["has besides 'other'", "join='inner'"]),
    misfit_cells: (CellsError, ["'a7'", "make_unique", "a.zarr"]),
    misfit_columns: (ObsError, ["lacks 'depth', 'note'", "has besides 'more'"]),
    misfit_types: (
        ObsError,
        [
            "obs['n'] has 70000",
            "obs['ok'] has values",
            "obs['rank'] has 'middle'",
            "obs['grade'] has categories such as 'x'",
            "obs['depth'] has",
            "obs['note'] has missing",
        ],
    ),
    misfit_count: (CountsError, ["256 at cell 'b13', gene 'g5'", "up to 255 (uint8)"]),
}


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_named_and_changes_nothing(path, tmp_path, misfit):
    before = files_of(path)
    new, options = misfit(make("b", seed=1))
    kind, words = MISFITS[misfit]
    with pytest.raises(kind) as caught:
        atlasvi.ingest({"b": new}, path, append=True, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(path) == before and leftovers(tmp_path) == []


def test_options_that_make_genes_and_cells_fit(tmp_path):
    path, old = tmp_path / "a.zarr", slim("a")
    atlasvi.ingest({"a": old}, path)
    fewer = slim("b", seed=1)[:, 2:].copy()
    atlasvi.ingest({"b": fewer}, path, append=True, join="outer")
    more = slim("c", seed=2)
    counts = sp.hstack([more.X, np.ones((40, 1), np.float32)]).tocsr()
    names = pd.DataFrame(index=[*more.var_names, "other"])
    extra = anndata.AnnData(counts, obs=more.obs, var=names, obsm=dict(more.obsm))
    report = atlasvi.ingest({"c": extra}, path, append=True, join="inner")
    assert any("1 genes of" in line for line in report.left_out)
    same_names = slim("a", seed=3)
    atlasvi.ingest({"d": same_names}, path, append=True, make_unique=True)
    back = anndata.read_zarr(path)
    assert list(back.obs_names[:40]) == list(old.obs_names)
    assert list(back.obs_names[-40:]) == [f"a{i}-d" for i in range(40)]
    dense = back.X.toarray()
    np.testing.assert_array_equal(dense[40:80], np.hstack([np.zeros((40, 2)), fewer.X.toarray()]))
    np.testing.assert_array_equal(dense[80:120], more.X.toarray())
    np.testing.assert_array_equal(dense[120:], same_names.X.toarray())


def test_columns_keep_the_types_of_the_atlas(tmp_path):
    path, one, other = tmp_path / "a.zarr", make("a", 4), make("b", 3)
    one.obs = pd.DataFrame(
        {"f": np.float32([1, 2, 3, 4]), "i": np.int64([1, 2, 3, 4]), "s": list("wxyz"),
         "c": pd.Categorical(list("ppqq")), "m": pd.array([1, None, 3, 4], dtype="Int64")}, one.obs_names,
    )  # fmt: skip
    other.obs = pd.DataFrame(
        {"f": [0.1, np.nan, 3], "i": np.uint8([1, 2, 3]), "s": pd.Categorical(list("aab")),
         "c": ["q", "r", "q"], "m": np.int32([7, 8, 9])}, other.obs_names,
    )  # fmt: skip
    for adata in (one, other):
        del adata.obsm["X_pca"], adata.obsm["proteins"]
    atlasvi.ingest({"a": one}, path)
    atlasvi.ingest({"b": other}, path, append=True)
    obs = anndata.read_zarr(path).obs
    assert obs["f"].dtype == np.float32 and obs["i"].dtype == np.int64
    np.testing.assert_array_equal(obs["f"][4:], np.float32([0.1, np.nan, 3]))
    assert obs["i"].tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert obs["s"].tolist() == [*"wxyzaab"]
    assert obs["c"].tolist() == [*"ppqqqrq"]
    assert obs["m"].isna().tolist() == [False, True, *[False] * 5] and obs["m"][4:].tolist() == [7, 8, 9]


def test_an_input_without_cells_is_an_error(slim_path):
    before = files_of(slim_path)
    with pytest.raises(CellsError, match="no cells"):
        atlasvi.ingest({"b": slim("b")[:0].copy()}, slim_path, append=True)
    assert files_of(slim_path) == before


def test_where_nothing_can_be_appended(tmp_path):
    new = {"b": slim("b")}
    with pytest.raises(NotAnAtlasError, match="no atlas"):
        atlasvi.ingest(new, tmp_path / "none.zarr", append=True)
    with pytest.raises(OptionError, match="one of them"):
        atlasvi.ingest(new, tmp_path / "none.zarr", append=True, overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zarr on consolidated metadata, anndata on sharding
        slim("a").write_zarr(tmp_path / "theirs.zarr")
    with pytest.raises(NotAnAtlasError, match="no atlas that atlasvi made"):
        atlasvi.ingest(new, tmp_path / "theirs.zarr", append=True)
    path = tmp_path / "a.zarr"
    atlasvi.ingest({"a": slim("a")}, path)
    with pytest.raises(StoreError, match="is one of the inputs"):
        atlasvi.ingest([path], path, append=True)
    with pytest.raises(OptionError, match="input_key='x'"):
        atlasvi.ingest(new, path, append=True, input_key="x")
    zarr.open_group(path, mode="r+", use_consolidated=False)["obs/note"].attrs["unit"] = "m"
    with pytest.raises(StoreError, match="'obs/note' was changed"):
        atlasvi.ingest(new, path, append=True)
    shutil.rmtree(path)
    atlasvi.ingest({"a": slim("a")}, path)
    zarr.open_group(path, mode="r+", use_consolidated=False)["layers"].create_group("spliced")
    metadata.consolidate(path)
    with pytest.raises(StoreError, match="'layers/spliced'"):
        atlasvi.ingest(new, path, append=True)


def test_damage_is_not_given_a_new_checksum(tmp_path, small):
    path = tmp_path / "a.zarr"
    atlasvi.ingest({"a": slim("a", 41)}, path)
    last = max((path / "X/data/c").iterdir(), key=lambda file: int(file.name))
    whole = bytearray(last.read_bytes())
    index = np.frombuffer(whole[-(16 * 4 + 4) : -4], "<u8").reshape(4, 2)
    offset, length = (int(v) for v in index[index[:, 0] < len(whole)][-1])
    whole[offset + length // 2] ^= 0xFF
    last.write_bytes(whole)
    with pytest.raises(CorruptError, match="X/data, shard"):
        atlasvi.ingest({"b": slim("b")}, path, append=True)
    last.unlink()
    with pytest.raises(CorruptError, match="X/data, shard"):
        atlasvi.ingest({"b": slim("b")}, path, append=True)


def test_the_command_appends_and_names_what_does_not_fit(tmp_path, monkeypatch, capsys):
    slim("a").write_h5ad(tmp_path / "a.h5ad")
    slim("b", 30, 1).write_h5ad(tmp_path / "b.h5ad")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atlasvi", "ingest", *arguments, "-o", "atlas.zarr"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert run("a.h5ad")[0] == 0
    code, said = run("b.h5ad", "--append")
    assert code == 0 and said.out.splitlines()[0] == "30 cells added to 40"
    assert "70 cells x 30 genes" in said.out
    code, said = run("b.h5ad", "--append")
    assert code == 1 and len(said.err.splitlines()) == 1 and "cell 'b0' is in" in said.err
    assert anndata.read_zarr("atlas.zarr").n_obs == 70
