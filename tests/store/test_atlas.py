"""An atlas: what opens and what does not, views, reading, damage, and obsm written whole or not at all."""

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr
from atlasvi_kernels import CSR

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
from atlasvi.store import atlas as module
from atlasvi.store import layout, obsm
from atlasvi.store.atlas import Atlas, as_atlas
from atlasvi.store.base import STRING, Source
from atlasvi.store.fields import register, resolve
from atlasvi.store.ingest import ingest


def write_zarr(adata, path, zarr_format=3):
    with anndata.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zarr on consolidated metadata, anndata on sharding
        adata.write_zarr(path)
    return path


@pytest.fixture
def store(adata, tmp_path):
    """A store of its own, to be written to."""
    ingest(adata, tmp_path / "own.zarr")
    return tmp_path / "own.zarr"


class Counting(Source):
    """An in-memory source that writes down what is read."""

    def __init__(self, matrix):
        self.matrix, self.reads = sp.csr_matrix(matrix), []

    name = "counting"

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def obs_names(self):
        return np.array([f"c{i}" for i in range(self.shape[0])], dtype=STRING)

    @property
    def var_names(self):
        return np.array([f"g{i}" for i in range(self.shape[1])], dtype=STRING)

    def read_rows(self, start, stop):
        self.reads.append((start, stop))
        return CSR.from_scipy(self.matrix[start:stop])


# --- opening ----------------------------------------------------------------------------------------


def test_an_ingested_store_is_what_went_in(adata, small_atlas, small_store):
    assert small_atlas.shape == adata.shape
    assert len(small_atlas) == 300
    assert small_atlas.path == Path(small_store)
    assert small_atlas.obs_names.dtype == STRING
    assert list(small_atlas.obs_names) == list(adata.obs_names)
    assert list(small_atlas.var_names) == list(adata.var_names)
    assert (small_atlas.read_rows(slice(None)).to_scipy() != adata.X).nnz == 0
    assert "300 cells x 60 genes" in repr(small_atlas)


def test_obs_is_built_on_demand(adata, small_atlas):
    pd.testing.assert_frame_equal(small_atlas.obs[list(adata.obs)], adata.obs, check_names=False)
    pd.testing.assert_frame_equal(small_atlas.var[list(adata.var)], adata.var, check_names=False)
    view = small_atlas[[5, 2], ["gene-9"]]
    pd.testing.assert_frame_equal(view.obs[list(adata.obs)], adata.obs.iloc[[5, 2]], check_names=False)
    assert list(view.var.index) == ["gene-9"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_any_anndata_zarr_opens(adata, tmp_path, zarr_format):
    atlas = module.open(write_zarr(adata, tmp_path / "any.zarr", zarr_format))
    assert (atlas.read_rows([7, 3]).to_scipy() != adata.X[[7, 3]]).nnz == 0


def test_an_h5ad_opens(adata, tmp_path):
    adata.layers["counts"] = adata.X * 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    with module.open(str(tmp_path / "a.h5ad"), layer="counts") as atlas:
        assert atlas.layer == "counts"
        assert (atlas.read_rows([7, 3]).to_scipy() != adata.X[[7, 3]] * 2).nnz == 0


def test_what_is_not_an_atlas(tmp_path):
    remedy = "[Mm]ake one: atlasvi ingest INPUT -o atlas.zarr"
    with pytest.raises(NotAnAtlasError, match=f"nothing is there; {remedy}"):
        module.open(tmp_path / "absent.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotAnAtlasError, match=f"no AnnData group there; {remedy}") as caught:
        module.open(tmp_path / "folder")
    assert "\n" not in str(caught.value)
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(NotAnAtlasError):
        module.open(tmp_path / "other.zarr")
    (tmp_path / "text.txt").write_text("nothing of the kind")
    with pytest.raises(StoreError):
        module.open(tmp_path / "text.txt")


def test_anything_a_method_may_be_given(adata, store):
    atlas = module.open(store)
    assert as_atlas(atlas) is atlas
    assert as_atlas(adata).shape == as_atlas(store).shape == as_atlas(str(store)).shape == adata.shape
    with pytest.raises(OptionError, match="a ndarray holds no counts"):
        as_atlas(np.zeros(3))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_reads_the_same_counts_and_has_a_registration_of_its_own(make, adata, small_atlas):
    for atlas in (small_atlas, Atlas.from_anndata(adata), Atlas.from_anndata(adata)[3:9, [5, 2]]):
        again = make(atlas)
        expected = atlas.read_rows(slice(None)).to_dense()
        assert torch.equal(again.read_rows(slice(None)).to_dense(), expected)
        again.registration = register(again)
        assert atlas.registration is None


def test_the_registration_stays_with_the_atlas_and_off_the_disk(small_atlas, small_store):
    before = {p: p.stat().st_mtime_ns for p in Path(small_store).rglob("*")}
    assert small_atlas.registration is None
    small_atlas.registration = register(small_atlas, batch_key="batch")
    resolve(small_atlas.registration, small_atlas)
    assert small_atlas[:5].registration is small_atlas.registration
    assert {p: p.stat().st_mtime_ns for p in Path(small_store).rglob("*")} == before


def lazily_read(adata, folder):
    pytest.importorskip("xarray", reason="anndata.experimental.read_lazy needs xarray")
    return anndata.experimental.read_lazy(write_zarr(adata, folder / "lazy.zarr"))


def backed(adata, folder):
    adata.write_h5ad(folder / "backed.h5ad")
    return anndata.read_h5ad(folder / "backed.h5ad", backed="r")


@pytest.mark.parametrize("make", [lazily_read, backed])
def test_a_lazy_or_backed_anndata_is_what_it_is_in_memory(make, adata, tmp_path):
    atlas, memory = as_atlas(make(adata, tmp_path)), as_atlas(adata)
    keys = {"batch_key": "batch", "labels_key": "cell_type", "continuous_covariate_keys": ["age"]}
    fields = register(atlas, **keys)
    assert fields == register(memory, **keys)
    codes, expected = resolve(fields, atlas), resolve(fields, memory)
    np.testing.assert_array_equal(codes.batch_index, expected.batch_index)
    np.testing.assert_array_equal(codes.labels, expected.labels)
    np.testing.assert_array_equal(codes.cont_covs, expected.cont_covs)
    for (counts, rows), (others, other_rows) in zip(atlas.stream(64), memory.stream(64), strict=True):
        np.testing.assert_array_equal(rows, other_rows)
        assert (counts.to_scipy() != others.to_scipy()).nnz == 0


# --- views ------------------------------------------------------------------------------------------


def test_views_read_nothing_until_asked():
    source = Counting(np.eye(50))
    view = Atlas(source)[10:40][::2, ["g12", "g10"]]
    assert view.shape == (15, 2)
    assert list(view.var_names) == ["g12", "g10"]
    assert source.reads == []
    dense = view.read_rows([1, 0]).to_dense()
    assert dense.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("genes", "expected"),
    [
        ("gene-5", [5]),
        (["gene-5", "gene-2"], [5, 2]),
        (np.array(["gene-5", "gene-2"]), [5, 2]),
        ([5, 2], [5, 2]),
        (5, [5]),
        (slice(3, 6), [3, 4, 5]),
        (np.arange(60) % 20 == 0, [0, 20, 40]),
        (pd.Series(np.arange(60) % 20 == 0), [0, 20, 40]),
        ([], []),
    ],
)
def test_genes_are_chosen_by_name_number_slice_or_mask(adata, genes, expected):
    view = Atlas.from_anndata(adata)[:9, genes]
    np.testing.assert_array_equal(view.read_rows(slice(None)).to_dense(), adata.X[:9, expected].toarray())


def test_a_mask_of_obs_chooses_cells(adata, small_atlas):
    view = small_atlas[small_atlas.obs["batch"] == "b2"]
    rows = np.flatnonzero(adata.obs["batch"] == "b2")
    np.testing.assert_array_equal(view.row_numbers, rows)
    assert (view.read_rows(slice(None)).to_scipy() != adata.X[rows]).nnz == 0


def test_what_cannot_be_chosen_is_named(adata):
    atlas = Atlas.from_anndata(adata)
    with pytest.raises(CellsError, match="cells 300 was asked for but there are 300"):
        atlas[[0, 300]]
    with pytest.raises(OptionError, match="not 3 indices"):
        atlas[1, 2, 3]
    with pytest.raises(CellsError, match="a mask of 3 cells was given for 300"):
        atlas[np.array([True, False, True])]
    with pytest.raises(CellsError, match="by a slice, integers or a mask, not by float64"):
        atlas[np.array([0.5])]
    with pytest.raises(GenesError, match=r"lacks 1 .* 'gene-x'"):
        atlas[:, ["gene-1", "gene-x"]]
    with pytest.raises(GenesError, match="a gene twice"):
        atlas[:, [1, 1]]
    with pytest.raises(CellsError, match="cells 5 was asked for but there are 5"):
        atlas[:5].read_rows([5])


# --- reading ----------------------------------------------------------------------------------------


def test_neighbours_are_read_together():
    source = Counting(np.eye(2000))
    rows = np.array([900, 10, 12, 11, 950, 1900])
    counts = Atlas(source).read_rows(rows)
    assert source.reads == [(10, 13), (900, 951), (1900, 1901)]
    np.testing.assert_array_equal(counts.indices.numpy(), rows)


def test_a_long_read_with_holes_is_cut():
    source = Counting(sp.eye(20_000, format="csr"))
    rows = np.arange(0, 20_000, 3)
    np.testing.assert_array_equal(Atlas(source).read_rows(rows).indices.numpy(), rows)
    assert max(stop - start for start, stop in source.reads) <= 1024
    source.reads.clear()
    Atlas(source).read_rows(np.arange(20_000))
    assert source.reads == [(0, 20_000)]


@pytest.mark.parametrize("rows", [slice(0, 0), [], np.zeros(300, bool), slice(5, 2)])
def test_reading_no_rows(adata, rows):
    assert Atlas.from_anndata(adata).read_rows(rows).shape == (0, 60)
    assert Atlas.from_anndata(adata)[::-1, :7].read_rows(rows).shape == (0, 7)


def test_rows_may_repeat(adata):
    rows = [3, 3, 200, 3]
    assert (Atlas.from_anndata(adata).read_rows(rows).to_scipy() != adata.X[rows]).nnz == 0


def test_reading_from_many_threads(adata, small_atlas):
    rng = np.random.default_rng(0)
    wrong = []

    def read(rows):
        if (small_atlas.read_rows(rows).to_scipy() != adata.X[rows]).nnz:
            wrong.append(rows)

    threads = [threading.Thread(target=read, args=(rng.permutation(300)[:50],)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_bytes_per_row_is_about_the_mean(adata, small_atlas):
    whole = small_atlas.read_rows(slice(None)).nbytes / 300
    assert small_atlas.bytes_per_row == pytest.approx(whole, rel=0.1)
    assert small_atlas[:, :6].bytes_per_row < 0.4 * small_atlas.bytes_per_row


# --- what is not counts -----------------------------------------------------------------------------


def with_entry(matrix, row, column, value):
    dense = matrix.toarray()
    dense[row, column] = value
    return sp.csr_matrix(dense)


@pytest.mark.parametrize("bad", [-1.0, 0.5, np.nan, np.inf, -np.inf, 2.0**32])
def test_what_is_not_a_count_is_named_by_cell_and_gene_when_read(adata, bad):
    adata.layers["counts"] = adata.X
    adata.X = with_entry(adata.X, 70, 31, bad)
    atlas = Atlas.from_anndata(adata)
    atlas.read_rows(slice(0, 70))
    message = r"X has \S+ at cell 'cell-70', gene 'gene-31'.* pass layer='counts'"
    for read in (
        lambda: atlas.read_rows([70]),
        lambda: atlas[60:80].read_rows([10]),
        lambda: list(atlas.stream(num_workers=2)),
        lambda: register(atlas),
    ):
        with pytest.raises(CountsError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert register(Atlas.from_anndata(adata, layer="counts"), layer="counts").n_vars == 60


def test_negative_integers_are_not_counts(adata):
    adata.X = with_entry(adata.X.astype(np.int64), 3, 3, -2)
    with pytest.raises(CountsError, match="has -2 at cell 'cell-3', gene 'gene-3'"):
        Atlas.from_anndata(adata).check_counts()


def test_an_ingested_store_is_not_checked_again(small_atlas, monkeypatch):
    monkeypatch.setattr(module, "as_counts", None)
    small_atlas.check_counts()
    assert small_atlas.read_rows([1]).n_obs == 1


def test_of_many_cells_a_part_is_checked_beforehand():
    source = Counting(sp.eye(20_000, format="csr"))
    Atlas(source).check_counts(at_most=800)
    assert len(source.reads) == 8
    assert sum(stop - start for start, stop in source.reads) == 800
    assert (source.reads[0][0], source.reads[-1][1]) == (0, 20_000)


# --- damage -----------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A store of ten shards."""
    monkeypatch.setattr(layout, "CHUNK_ENTRIES", 1024)
    monkeypatch.setattr(layout, "CHUNKS_PER_SHARD", 8)
    counts = sp.random(3000, 50, 0.5, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 9)
    path = tmp_path / "shards.zarr"
    ingest(anndata.AnnData(counts), path)
    return path


def shard_files(path):
    return sorted((path / "X" / "data" / "c").iterdir(), key=lambda p: int(p.name))


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("array", ["data", "indices"])
def test_a_flipped_byte_is_an_error_that_names_shard_and_rows(shards, array, place):
    folder = shards / "X" / array / "c"
    assert len(list(folder.iterdir())) > 4
    file = folder / "2"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x40
    file.write_bytes(content)
    with module.open(shards) as atlas:
        with pytest.raises(CorruptError) as caught:
            for _ in atlas.stream(64, num_workers=2):
                pass
        message = str(caught.value)
        assert str(file) in message
        assert "\n" not in message
        first, last = (int(word) for word in message.split(" rows ")[1].split(" are ")[0].split(" to "))
        # What lies before and after the rows named is read as ever.
        atlas.read_rows(slice(0, first))
        atlas.read_rows(slice(last + 1, 3000))
        with pytest.raises(CorruptError):
            atlas.read_rows(slice(first, last + 1))


@pytest.mark.parametrize("harm", ["missing", "cut", "empty"])
def test_a_shard_that_is_missing_or_cut_short_is_an_error(shards, harm):
    file = shard_files(shards)[1]
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if harm == "empty" else -100])
    with module.open(shards) as atlas, pytest.raises(CorruptError, match=r"shard .*/1"):
        atlas.read_rows(slice(None))


# --- obsm -------------------------------------------------------------------------------------------


def read_zarr(path):
    return anndata.read_zarr(path)


def blocks_of(values, sizes):
    return iter(np.split(values, np.cumsum(sizes)[:-1]))


@pytest.mark.parametrize("sizes", [[300], [100, 200], [1, 299], [7] * 42 + [6]])
def test_obsm_is_what_anndata_reads(adata, store, sizes):
    latent = np.random.default_rng(0).normal(size=(300, 10)).astype(np.float32)
    module.open(store).write_obsm("X_scVI", blocks_of(latent, sizes), 10)
    back = read_zarr(store)
    np.testing.assert_array_equal(back.obsm["X_scVI"], latent)
    assert back.obsm["X_scVI"].dtype == np.float32
    assert (back.X != adata.X).nnz == 0
    assert (module.open(store).read_rows(slice(None)).to_scipy() != adata.X).nnz == 0


def test_obsm_of_many_chunks(tmp_path, monkeypatch):
    n = 5000
    write_zarr(anndata.AnnData(sp.csr_matrix((n, 3), dtype=np.float32)), tmp_path / "a.zarr")
    latent = np.random.default_rng(0).normal(size=(n, 700)).astype(np.float32)
    module.open(tmp_path / "a.zarr").write_obsm("X", blocks_of(latent, [999] * 5 + [5]), 700)
    array = zarr.open_array(tmp_path / "a.zarr" / "obsm" / "X", mode="r")
    assert array.nchunks == 14
    np.testing.assert_array_equal(array[:], latent)


def test_obsm_keeps_no_block_once_it_is_copied(store):
    """Small blocks kept amid the large ones of a stream would hold on to the heap around them."""
    blocks, alive = [], []

    def made():
        for _ in range(30):
            block = np.zeros((10, 4), np.float32)
            blocks.append(weakref.ref(block))
            yield block
            del block
            alive.append(sum(ref() is not None for ref in blocks))

    module.open(store).write_obsm("X_scVI", made(), 4)
    # The last one: the loop's own.
    assert max(alive) <= 1


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_obsm_of_a_store_that_anndata_wrote(adata, tmp_path, zarr_format):
    """Which has a second copy of its metadata, that must know of the new array."""
    adata.obsm["old"] = np.ones((300, 2), np.float32)
    path = write_zarr(adata, tmp_path / "any.zarr", zarr_format)
    module.open(path).write_obsm("X_scVI", [torch.full((300, 4), 2.0)], 4)
    module.open(path).write_obsm("X_scVI", [torch.full((300, 5), 3.0)], 5)
    back = read_zarr(path)
    assert {key: value.shape for key, value in back.obsm.items()} == {"old": (300, 2), "X_scVI": (300, 5)}
    assert (back.obsm["X_scVI"] == 3).all()
    group = zarr.open_group(path, mode="r")
    assert group.metadata.consolidated_metadata is not None
    assert [p.name for p in tmp_path.iterdir()] == ["any.zarr"]


def test_a_write_that_fails_midway_leaves_the_old_state(store, tmp_path):
    atlas = module.open(store)
    atlas.write_obsm("X_scVI", [np.ones((300, 4))], 4)

    def blocks():
        yield np.zeros((100, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atlas.write_obsm("X_scVI", blocks(), 4)
    with pytest.raises(KeyboardInterrupt):
        atlas.write_obsm("X_new", blocks(), 4)
    back = read_zarr(store)
    assert list(back.obsm) == ["X_scVI"]
    assert (back.obsm["X_scVI"] == 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["own.zarr"]


def test_a_killed_write_leaves_the_old_state(store):
    script = f"""
        import os, signal, numpy as np
        from atlasvi.store.atlas import open
        def blocks():
            yield np.zeros((100, 4))
            os.kill(os.getpid(), signal.SIGKILL)
        open({str(store)!r}).write_obsm("X_scVI", blocks(), 4)
    """
    module.open(store).write_obsm("X_scVI", [np.ones((300, 4))], 4)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert (read_zarr(store).obsm["X_scVI"] == 1).all()
    module.open(store).write_obsm("X_scVI", [np.full((300, 4), 2.0)], 4)
    assert (read_zarr(store).obsm["X_scVI"] == 2).all()
    assert [p.name for p in store.parent.iterdir()] == ["own.zarr"]


def test_what_a_killed_write_left_is_in_no_ones_way(store, tmp_path):
    (tmp_path / ".own.zarr.obsm-X_scVI.partial").mkdir()
    (tmp_path / ".own.zarr.obsm-X_scVI.partial" / "zarr.json").write_text("half")
    module.open(store).write_obsm("X_scVI", [np.ones((300, 4))], 4)
    assert (read_zarr(store).obsm["X_scVI"] == 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["own.zarr"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(299, 4)], "299 rows were given to be written for 300 cells"),
        ([(300, 4), (1, 4)], "more rows were given|301 rows"),
        ([(300, 5)], r"a block of \(300, 5\)"),
        ([(300,)], r"a block of \(300,\)"),
        ([], "0 rows were given"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(store, shapes, message):
    with pytest.raises(OptionError, match=message):
        module.open(store).write_obsm("X_scVI", (np.zeros(shape) for shape in shapes), 4)
    assert list(read_zarr(store).obsm) == []


def test_obsm_is_written_to_whole_stores_on_disk_only(adata, store):
    for atlas in (module.open(store)[:10], Atlas.from_anndata(adata)):
        with pytest.raises(OptionError, match="a whole store on disk"):
            atlas.write_obsm("X_scVI", [], 4)
    for key in ("", "a/b", "../x", ".hidden"):
        with pytest.raises(OptionError, match="cannot be the name of a folder"):
            module.open(store).write_obsm(key, [], 4)


def test_no_space_is_said_so(store, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(obsm, "_put", full)
    with pytest.raises(SpaceError, match=r"no space left to write obsm\['X_scVI'\]"):
        module.open(store).write_obsm("X_scVI", [np.ones((300, 4))], 4)
    assert list(read_zarr(store).obsm) == []


def test_obsm_of_an_h5ad(adata, tmp_path):
    """Written while the same file is being read, as a latent is."""
    path = tmp_path / "a.h5ad"
    adata.obsm["X_scVI"] = np.zeros((300, 9))
    adata.write_h5ad(path)
    with module.open(path) as atlas:
        totals = (counts.row_sums().numpy()[:, None] for counts, _ in atlas.iter_blocks())
        atlas.write_obsm("X_scVI", totals, 1)
    back = anndata.read_h5ad(path)
    np.testing.assert_array_equal(back.obsm["X_scVI"], adata.X.sum(1))
    pd.testing.assert_frame_equal(back.obs, adata.obs)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_an_h5ad_stays_as_it_was_when_the_blocks_fail(adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    before = path.read_bytes()

    def blocks():
        yield np.zeros((100, 4))
        raise CorruptError("shard 3 is damaged")

    with module.open(path) as atlas, pytest.raises(CorruptError, match=r"^shard 3 is damaged$"):
        atlas.write_obsm("X_scVI", blocks(), 4)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_store_that_may_not_be_written_to_is_said_so(store, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StoreError, match=r"cannot be written .* check that you may write there"):
        module.open(store).write_obsm("X_scVI", [np.ones((300, 4))], 4)
    assert list(read_zarr(store).obsm) == []


def test_a_view_becomes_an_anndata_that_scipy_and_scanpy_can_work_with(small_store, tmp_path):
    path = tmp_path / "atlas.zarr"
    shutil.copytree(small_store, path)
    with module.open(path) as opened:
        opened.write_obsm("X_scVI", [np.arange(2 * opened.n_obs).reshape(-1, 2)], 2)
    expected = anndata.read_zarr(path)
    with module.open(path) as opened:
        view = opened[[5, 1, 200], ["gene-3", "gene-0"]]
        got = view.to_anndata()
        whole = opened.to_anndata()
    assert (whole.X.dtype, whole.X.indices.dtype) == (np.float32, np.int32)
    whole.X.eliminate_zeros()  # what fails on the narrow indices of the store
    np.testing.assert_array_equal(whole.X.toarray(), expected.X.toarray())
    pd.testing.assert_frame_equal(whole.obs, expected.obs)
    part = expected[[5, 1, 200], ["gene-3", "gene-0"]]
    np.testing.assert_array_equal(got.X.toarray(), part.X.toarray())
    np.testing.assert_array_equal(got.obsm["X_scVI"], part.obsm["X_scVI"])
    assert list(got.var_names) == ["gene-3", "gene-0"]
    assert list(got.obs["cell_type"]) == list(part.obs["cell_type"])
