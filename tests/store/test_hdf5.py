"""Runs of entries read out of HDF5 chunks are what h5py reads, and damage is named."""

import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from atlasvi.store import hdf5
from atlasvi.store.hdf5 import ChunkedVector
from atlasvi.store.rows import member

N, CHUNK = 1003, 64
VALUES = np.random.default_rng(0).integers(0, 100, N)
RUNS = [(0, N), (0, 0), (N, N), (80, 80), (63, 65), (64, 128), (127, 129), (960, N), (1002, N), (500, 400)]
FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle and gzip": {"compression": "gzip", "shuffle": True},
    "shuffle": {"shuffle": True},
}


def assert_same(vector, dataset):
    assert vector.shape == dataset.shape and vector.dtype == dataset.dtype
    random = np.random.default_rng(1).integers(0, len(dataset) + 1, (40, 2))
    for start, stop in RUNS + np.sort(random, axis=1).tolist():
        found = vector[start:stop]
        assert found.dtype == dataset.dtype
        np.testing.assert_array_equal(found, dataset[start:stop])


@pytest.fixture
def opened(tmp_path):
    """``opened(fill) -> the dataset "x"`` of a file that ``fill(file)`` wrote, open for reading."""
    files = []

    def make(fill, **options):
        with h5py.File(tmp_path / f"{len(files)}.h5", "w", **options) as file:
            fill(file)
        files.append(h5py.File(tmp_path / f"{len(files)}.h5"))
        return files[-1]["x"]

    yield make
    for file in files:
        file.close()


@pytest.mark.parametrize("dtype", ["u1", "i2", "<i4", ">i4", "i8", "u8", "f4", "f8", ">f4"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_any_run_is_what_h5py_reads(opened, filters, dtype):
    dataset = opened(
        lambda file: file.create_dataset("x", data=VALUES.astype(dtype), chunks=(CHUNK,), **filters)
    )
    assert_same(ChunkedVector.of(dataset), dataset)


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["old format", "new format"])
def test_a_vector_that_may_grow_and_one_of_a_single_chunk(opened, options):
    for chunk, limit in [(CHUNK, None), (4096, None), (N, N)]:
        dataset = opened(
            lambda file, chunk=chunk, limit=limit: file.create_dataset(
                "x", data=VALUES, chunks=(chunk,), maxshape=(limit,), compression="gzip"
            ),
            **options,
        )
        assert_same(ChunkedVector.of(dataset), dataset)


def test_chunks_that_were_never_written_hold_the_fill_value(opened):
    def fill(file):
        dataset = file.create_dataset("x", (N,), "i4", chunks=(CHUNK,), compression="gzip", fillvalue=7)
        dataset[130:140] = 1

    dataset = opened(fill)
    vector = ChunkedVector.of(dataset)
    assert_same(vector, dataset)
    assert vector[0:3].tolist() == [7, 7, 7] and vector[129:131].tolist() == [7, 1]


def test_filters_that_a_chunk_skips_are_not_undone(opened):
    block = np.arange(CHUNK, dtype="<i4")
    shuffled = block.view(np.uint8).reshape(-1, 4).T.tobytes()

    def fill(file):
        dataset = file.create_dataset(
            "x", (4 * CHUNK,), "<i4", chunks=(CHUNK,), compression="gzip", shuffle=True
        )
        chunks = [zlib.compress(shuffled), zlib.compress(block.tobytes()), shuffled, block.tobytes()]
        for skips, chunk in enumerate(chunks):
            dataset.id.write_direct_chunk((skips * CHUNK,), chunk, filter_mask=skips)

    dataset = opened(fill)
    np.testing.assert_array_equal(dataset[:], np.tile(block, 4))
    assert_same(ChunkedVector.of(dataset), dataset)


def test_other_layouts_are_left_to_h5py(opened):
    def fill(file):
        make = file.create_dataset
        make("x", data=VALUES)  # contiguous
        make("lzf", data=VALUES, chunks=(CHUNK,), compression="lzf")
        make("checksum", data=VALUES, chunks=(CHUNK,), fletcher32=True)
        make("scaled", data=VALUES, chunks=(CHUNK,), scaleoffset=0)
        make("matrix", data=VALUES[:1000].reshape(10, 100), chunks=(5, 50))
        make("bool", data=VALUES > 50, chunks=(CHUNK,))
        make("text", data=np.array([b"a", b"bc"] * 50), chunks=(CHUNK,))
        narrow = h5py.h5t.NATIVE_INT32.copy()
        narrow.set_precision(30)
        space, setup = h5py.h5s.create_simple((N,)), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        setup.set_chunk((CHUNK,))
        h5py.h5d.create(file.id, b"narrow", narrow, space, setup)

    file = opened(fill).file
    assert {key for key in file if ChunkedVector.of(file[key]) is not None} == set()
    shifted = opened(lambda file: file.create_dataset("x", data=VALUES, chunks=(CHUNK,)), userblock_size=512)
    assert ChunkedVector.of(shifted) is None
    with h5py.File("memory.h5", "w", driver="core", backing_store=False) as memory:
        assert ChunkedVector.of(memory.create_dataset("x", data=VALUES, chunks=(CHUNK,))) is None


@pytest.mark.parametrize("module", [zlib, hdf5.inflater], ids=lambda module: module.__name__)
def test_damage_is_named(opened, tmp_path, monkeypatch, module):
    monkeypatch.setattr(hdf5, "inflater", module)
    dataset = opened(lambda file: file.create_dataset("x", data=VALUES, chunks=(CHUNK,), compression="gzip"))
    assert_same(ChunkedVector.of(dataset), dataset)
    at = dataset.id.get_chunk_info(3)
    with open(dataset.file.filename, "r+b") as file:
        file.seek(at.byte_offset + 20)
        file.write(b"\xff" * 8)
    vector = ChunkedVector.of(dataset)
    np.testing.assert_array_equal(vector[0 : 3 * CHUNK], VALUES[: 3 * CHUNK])
    with pytest.raises(ValueError, match=r"^chunk 3 of /x cannot be inflated: "):
        vector[3 * CHUNK : 3 * CHUNK + 1]


def test_what_is_cut_short_is_named(opened):
    short = zlib.compress(np.arange(10).tobytes())

    def fill(file):
        dataset = file.create_dataset("x", (2 * CHUNK,), "i8", chunks=(CHUNK,), compression="gzip")
        dataset.id.write_direct_chunk((0,), short)
        dataset.id.write_direct_chunk((CHUNK,), zlib.compress(bytes(8 * CHUNK)))

    dataset = opened(fill)
    vector = ChunkedVector.of(dataset)
    with pytest.raises(ValueError, match=r"^chunk 0 of /x holds 80 bytes, not 512$"):
        vector[:3]
    with open(dataset.file.filename, "r+b") as file:
        file.truncate(dataset.id.get_chunk_info(1).byte_offset + 5)
    with pytest.raises(ValueError, match=r"^chunk 1 of /x is cut short$"):
        vector[CHUNK:]


def test_threads_read_one_vector(opened):
    dataset = opened(lambda file: file.create_dataset("x", data=VALUES, chunks=(8,), compression="gzip"))
    vector = ChunkedVector.of(dataset)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: vector[k * 10 : k * 10 + 50], range(100)))
    for k, values in enumerate(found):
        np.testing.assert_array_equal(values, VALUES[k * 10 : k * 10 + 50])


def test_of_a_closed_file_nothing_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=VALUES, chunks=(CHUNK,))
    with h5py.File(tmp_path / "a.h5") as file:
        vector = ChunkedVector.of(file["x"])
        vector[:10]
    with pytest.raises(ValueError):
        vector[:10]


def test_arrays_of_an_h5ad_are_read_this_way(opened):
    dataset = opened(lambda file: file.create_dataset("x", data=VALUES, chunks=(CHUNK,), compression="lzf"))
    assert member(dataset.file, "x") == dataset
    dataset = opened(lambda file: file.create_dataset("x", data=VALUES, chunks=(CHUNK,), compression="gzip"))
    assert isinstance(member(dataset.file, "x"), ChunkedVector)
