"""Counts stored by genes (CSC) on disk: ingested as they would be in rows, with memory that does not grow."""

import errno
import json
import os
import subprocess
import sys
import warnings

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

import atlasvi
from atlasvi.errors import CorruptError, CountsError, OptionError, SpaceError
from atlasvi.store import columns
from atlasvi.store.atlas import Atlas
from atlasvi.store.ingest import ingest
from atlasvi.store.sources import open_source


def make(n_obs=83, n_vars=31, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_obs, n_vars))
    counts[np.arange(n_obs), np.arange(n_obs) % n_vars] += 1
    adata = anndata.AnnData(sp.csc_matrix(counts.astype(dtype)))
    adata.obs_names = [f"c{i}" for i in range(n_obs)]
    adata.var_names = [f"g{g}" for g in range(n_vars)]
    return adata


def write_h5ad(adata, path):
    """In chunks of a few entries: a piece is never less than a chunk."""
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for key in [f"{matrix}/{array}" for matrix in ("X", "layers/counts", "raw/X") if matrix in file
                    for array in ("indices", "data")]:  # fmt: skip
            values = file[key][...]
            del file[key]
            options = {"chunks": (16,), "compression": "gzip"} if len(values) else {}
            file.create_dataset(key, data=values, **options)
    return path


def write_zarr(adata, path, zarr_format=3):
    with anndata.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
        anndata.io.write_elem(zarr.open_group(path, mode="w", zarr_format=zarr_format), "/", adata)
    return path


def backed(adata, path):
    return anndata.read_h5ad(write_h5ad(adata, path), backed="r")


WRITERS = {
    "h5ad": write_h5ad,
    "zarr v2": lambda adata, path: write_zarr(adata, path, 2),
    "zarr v3": write_zarr,
    "backed": backed,
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS)
def write(request):
    return request.param


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces and buckets out of a few hundred entries, which cut genes in the middle."""
    monkeypatch.setattr(columns, "PIECE", 37)
    monkeypatch.setattr("atlasvi.store.spill.BUCKET_ENTRIES", 100)


def counts_of(path):
    with atlasvi.open(path) as atlas:
        return atlas.read_rows(slice(None)).to_scipy()


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "u1", "u2", "i8"])
def test_rows_are_those_that_scipy_makes(tmp_path, small_pieces, write, dtype):
    adata = make(dtype=dtype)
    source = open_source(write(adata, tmp_path / "in"), scratch=tmp_path)
    assert source.shape == adata.shape and source.by_genes
    rows = adata.X.tocsr()
    np.testing.assert_array_equal(source.indptr, rows.indptr)
    for start, stop in ((0, 83), (0, 0), (5, 6), (11, 70), (82, 83)):
        got = source.read_rows(start, stop)
        np.testing.assert_array_equal(got.to_scipy().toarray(), rows[start:stop].toarray())
        assert got.data.numpy().dtype == np.dtype(dtype)
    # As scipy does: genes in order within a cell.
    np.testing.assert_array_equal(source.read_rows(0, 83).indices.numpy(), rows.indices)
    source.close()
    assert [p.name for p in tmp_path.iterdir() if p.name != "in"] == []


@pytest.mark.parametrize("shuffle", [False, True])
def test_ingest_makes_of_it_what_it_makes_of_rows(tmp_path, small_pieces, write, shuffle):
    adata = make()
    ingest(write(adata, tmp_path / "by-genes"), tmp_path / "a.zarr", shuffle=shuffle, seed=2)
    adata.X = adata.X.tocsr()
    ingest(adata, tmp_path / "b.zarr", shuffle=shuffle, seed=2)
    assert (counts_of(tmp_path / "a.zarr") != counts_of(tmp_path / "b.zarr")).nnz == 0
    a, b = (anndata.read_zarr(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    assert list(a.obs_names) == list(b.obs_names)
    for key in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a.X, key), getattr(b.X, key))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "b.zarr", "by-genes"]


def test_layers_and_raw_by_genes(tmp_path, small_pieces):
    adata = make()
    counts = adata.X.copy()
    adata.layers["counts"] = counts
    adata.raw = adata.copy()
    adata.X = adata.X.multiply(0.31).tocsc()
    write_h5ad(adata, tmp_path / "in.h5ad")
    for layer in ("counts", "raw"):
        ingest(tmp_path / "in.h5ad", tmp_path / f"{layer}.zarr", layer=layer)
        np.testing.assert_array_equal(counts_of(tmp_path / f"{layer}.zarr").toarray(), counts.toarray())
    message = r"in\.h5ad' X has 0\.\d+ at cell 'c0'.*layers\['counts'\] holds counts: pass layer="
    with pytest.raises(CountsError, match=message):
        ingest(tmp_path / "in.h5ad", tmp_path / "a.zarr")


def test_joined_with_rows(tmp_path, small_pieces):
    one, other = make(), make(40, seed=1)
    other.obs_names = [f"d{i}" for i in range(40)]
    ingest([write_h5ad(one, tmp_path / "one.h5ad"), anndata.AnnData(other.X.tocsr(), other.obs, other.var)],
           tmp_path / "a.zarr")  # fmt: skip
    expected = np.concatenate([one.X.toarray(), other.X.toarray()])
    np.testing.assert_array_equal(counts_of(tmp_path / "a.zarr").toarray(), expected)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (7, 1)])
def test_nothing_but_zeros(tmp_path, shape):
    adata = anndata.AnnData(sp.csc_matrix(shape, dtype=np.float32))
    with pytest.warns(UserWarning, match="have no counts"):
        ingest(write_h5ad(adata, tmp_path / "in.h5ad"), tmp_path / "a.zarr")
    assert counts_of(tmp_path / "a.zarr").shape == shape


def test_an_atlas_cannot_be_read_by_cells_and_says_what_to_do(tmp_path, write):
    made = write(make(), tmp_path / "in")
    remedy = r"X is stored as csc_matrix, by genes.*atlasvi\.ingest\(.*adata\.X = adata\.X\.tocsr\(\)"
    with pytest.raises(OptionError, match=remedy) as caught:
        Atlas.from_anndata(made) if isinstance(made, anndata.AnnData) else atlasvi.open(made)
    assert "\n" not in str(caught.value)
    # Nothing was sorted to find that out.
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --- what is wrong, and what is left ----------------------------------------------------------------


def broken(tmp_path, array, change):
    write_h5ad(make(), tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        values = change(file[f"X/{array}"][...])
        del file[f"X/{array}"]
        file[f"X/{array}"] = values
    return tmp_path / "in.h5ad"


def put(at, value):
    def change(values):
        values = values.copy()
        values[at] = value
        return values

    return change


@pytest.mark.parametrize(
    ("array", "change", "text"),
    [
        ("indices", put(9, 83), "a row outside 0 to 82 in genes 0 to 1"),
        ("indices", put(9, -1), "a row outside 0 to 82"),
        ("indptr", put(-1, 7), "indptr does not fit 31 genes"),
        ("indptr", put(0, 1), "indptr does not fit"),
        ("indptr", put(3, 10**6), "indptr does not fit"),
        ("indptr", lambda values: values[:-1], "indptr does not fit"),
        ("data", lambda values: values[:-1], "indptr does not fit"),
    ],
)
def test_a_damaged_matrix_leaves_nothing(tmp_path, small_pieces, array, change, text):
    path = broken(tmp_path, array, change)
    with pytest.raises(CorruptError, match=rf"in\.h5ad' X: .*{text}"):
        ingest(path, tmp_path / "a.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_a_cell_twice_in_a_gene(tmp_path, small_pieces):
    path = broken(tmp_path, "indices", lambda values: np.concatenate([values[:1], values[:1], values[2:]]))
    with pytest.raises(CountsError, match=r"a gene twice in cell 'c\d+'"):
        ingest(path, tmp_path / "a.zarr")


def test_a_full_disk_is_named_and_nothing_left(tmp_path, monkeypatch):
    write_h5ad(make(), tmp_path / "in.h5ad")

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("atlasvi.store.spill.append", fail)
    with pytest.raises(SpaceError, match=r"no space left .* to write 'a\.zarr'"):
        ingest(tmp_path / "in.h5ad", tmp_path / "a.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_a_failure_may_be_tried_again(tmp_path, small_pieces, monkeypatch):
    adata = make()
    source = open_source(write_h5ad(adata, tmp_path / "in.h5ad"), scratch=tmp_path)
    entries = columns.ColumnRows._entries

    def interrupted(rows):
        yield next(entries(rows))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(columns.ColumnRows, "_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.read_rows(0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]
    np.testing.assert_array_equal(source.read_rows(0, 83).to_scipy().toarray(), adata.X.toarray())
    source.close()


KILLED = """
import os, signal, sys
from atlasvi.store import columns
columns.PIECE = 37
count, calls = columns._count, []
def killed(*args):
    count(*args)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
columns._count = killed
from atlasvi.store.ingest import ingest
ingest(sys.argv[1], sys.argv[2])
"""


def test_a_killed_ingest_leaves_no_atlas_and_the_next_removes_the_rest(tmp_path):
    adata = make()
    write_h5ad(adata, tmp_path / "in.h5ad")
    paths = [str(tmp_path / "in.h5ad"), str(tmp_path / "a.zarr")]
    assert subprocess.run([sys.executable, "-c", KILLED, *paths], timeout=120).returncode == -9
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.zarr.ingest", "in.h5ad"]
    ingest(*paths)
    np.testing.assert_array_equal(counts_of(tmp_path / "a.zarr").toarray(), adata.X.toarray())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "in.h5ad"]


# --- memory -----------------------------------------------------------------------------------------

# Compiled code and libraries are loaded on a small file first.
PEAK = """
import json, sys
from atlasvi.memory import Watch
from atlasvi.store.ingest import ingest
ingest(sys.argv[1], sys.argv[4] + "/warm.zarr", workers=1)
peaks = []
for path in sys.argv[2:4]:
    with Watch() as watch:
        ingest(path, path + ".zarr", workers=1, memory_budget=16 << 20)
    peaks.append(watch.peak_bytes - watch.before_bytes)
print(json.dumps(peaks))
"""


def write_many(path, n_obs, n_vars=200, per_cell=40):
    """An h5ad by genes, made gene by gene."""
    rng = np.random.default_rng(0)
    n = n_obs * per_cell // n_vars
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csc_matrix", "encoding-version": "0.1.0", "shape": [n_obs, n_vars]})
        x["indptr"] = np.arange(n_vars + 1, dtype=np.int64) * n
        indices = x.create_dataset("indices", (n_vars * n,), "i4", chunks=(1 << 16,))
        data = x.create_dataset("data", (n_vars * n,), "f4", chunks=(1 << 16,))
        for g in range(n_vars):
            cells = (np.arange(n) * (n_obs // n) + rng.integers(0, n_obs // n)) % n_obs
            indices[g * n : (g + 1) * n], data[g * n : (g + 1) * n] = cells, rng.integers(1, 9, n)
        for key, prefix, count in (("obs", "c", n_obs), ("var", "g", n_vars)):
            table = file.create_group(key)
            table.attrs.update({
                "encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index",
                "column-order": np.array([], h5py.string_dtype()),
            })  # fmt: skip
            names = table.create_dataset("_index", (count,), h5py.string_dtype(), chunks=True)
            for start in range(0, count, 10_000):
                stop = min(start + 10_000, count)
                names[start:stop] = [f"{prefix}{i}" for i in range(start, stop)]
            names.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_cells(tmp_path):
    """Four times the entries in little more than the fewer take, and in less than they are themselves."""
    few, many = 50_000, 200_000
    paths = [write_many(tmp_path / f"{n}.h5ad", n) for n in (2_000, few, many)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, *paths, str(tmp_path)],
            capture_output=True, text=True, check=True, timeout=300,
            env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )  # fmt: skip
    peaks = json.loads(run.stdout.splitlines()[-1])
    assert peaks[1] < peaks[0] + 16 * (many - few) + (4 << 20), [peak / 2**20 for peak in peaks]
    assert peaks[1] < 0.8 * 8 * 40 * many, [peak / 2**20 for peak in peaks]
