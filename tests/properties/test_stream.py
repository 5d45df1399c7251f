"""Properties of the stream: each cell once, nothing depends on workers or on where the counts live."""

import hashlib
import threading
import tracemalloc
import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlasvi.store import atlas as atlas_module
from atlasvi.store.atlas import Atlas
from atlasvi.store.ingest import ingest

N_OBS, N_VARS = 1500, 24


def matrix():
    rng = np.random.default_rng(5)
    counts = rng.poisson(rng.gamma(0.3, 2.0, (N_OBS, N_VARS))).astype(np.float32)
    counts[17] = 0
    counts[:, 3] = 0
    return sp.csr_matrix(counts)


@pytest.fixture(scope="module")
def counts():
    return matrix()


@pytest.fixture(scope="module")
def atlases(counts, tmp_path_factory):
    """The same counts in every place that a stream can read."""
    folder = tmp_path_factory.mktemp("stream")
    adata = anndata.AnnData(counts)
    adata.write_h5ad(folder / "a.h5ad")
    with anndata.settings.override(zarr_write_format=3), warnings.catch_warnings():
        # zarr on consolidated metadata, anndata on sharding, ingest on cells without counts
        warnings.simplefilter("ignore", UserWarning)
        adata.write_zarr(folder / "a.zarr")
        ingest(adata, folder / "ours.zarr")
    lazy_x = anndata.experimental.read_elem_lazy(zarr.open_group(folder / "a.zarr", mode="r")["X"])
    opened = {
        "memory": Atlas.from_anndata(adata),
        "dense": Atlas.from_anndata(anndata.AnnData(counts.toarray())),
        "backed": Atlas.from_anndata(anndata.read_h5ad(folder / "a.h5ad", backed="r")),
        "lazy": Atlas.from_anndata(anndata.AnnData(lazy_x, obs=adata.obs, var=adata.var)),
        "h5ad": atlas_module.open(folder / "a.h5ad"),
        "anndata-zarr": atlas_module.open(folder / "a.zarr"),
        "store": atlas_module.open(folder / "ours.zarr"),
    }
    yield opened
    for atlas in opened.values():
        atlas.close()


PLACES = ("memory", "dense", "backed", "lazy", "h5ad", "anndata-zarr", "store")


def digest(pieces):
    """Of the sequence of cells, the cuts between minibatches and the counts."""
    h = hashlib.sha256()
    for csr, rows in pieces:
        h.update(rows.tobytes())
        h.update(b"|")
        h.update(csr.to_dense().numpy().tobytes())
    return h.hexdigest()


def rows_of(pieces):
    return np.concatenate([rows for _, rows in pieces])


@pytest.mark.parametrize("place", PLACES)
def test_stream_counts_are_the_rows_of_the_matrix(atlases, counts, place):
    seen = []
    for csr, rows in atlases[place].stream(256, seed=3, num_workers=2):
        assert rows.dtype == np.int64
        assert (csr.to_scipy() != counts[rows]).nnz == 0
        seen.extend(rows)
    assert sorted(seen) == list(range(N_OBS))


def test_the_same_sequence_whatever_the_workers_and_the_place(atlases):
    digests = {
        (place, workers): digest(atlases[place].stream(100, seed=7, epoch=2, num_workers=workers))
        for place in PLACES
        for workers in (0, 1, 2, 4)
    }
    # Sizes follow from bytes a row, which differ with the type of the counts, but here all fits one buffer.
    assert len(set(digests.values())) == 1, digests


def test_the_same_sequence_whatever_the_workers_with_many_buffers(atlases):
    small = 1 << 16  # two blocks a buffer
    orders = [
        rows_of(atlases["store"].stream(100, seed=7, num_workers=workers, memory_budget=small))
        for workers in (0, 1, 2, 4)
    ]
    for order in orders[1:]:
        np.testing.assert_array_equal(order, orders[0])
    assert sorted(orders[0]) == list(range(N_OBS))


def test_same_seed_same_order_other_epoch_or_seed_another(atlases):
    def order(**key):
        return rows_of(atlases["memory"].stream(128, num_workers=0, **key))

    first = order(seed=1, epoch=0)
    np.testing.assert_array_equal(first, order(seed=1, epoch=0))
    for key in ({"seed": 1, "epoch": 1}, {"seed": 2, "epoch": 0}):
        assert (first != order(**key)).mean() > 0.9
    np.testing.assert_array_equal(order(shuffle=False), np.arange(N_OBS))


@given(batch_size=st.integers(1, 700), seed=st.integers(0, 99), workers=st.sampled_from([0, 2]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_minibatches_have_the_size_asked_for(atlases, batch_size, seed, workers):
    sizes = [csr.n_obs for csr, _ in atlases["memory"].stream(batch_size, seed=seed, num_workers=workers)]
    assert all(size == batch_size for size in sizes[:-1])
    assert min(3, batch_size) <= sizes[-1] <= batch_size + 2
    assert sum(sizes) == N_OBS


@given(data=st.data(), place=st.sampled_from(["memory", "backed", "store"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_view_streams_its_own_rows_and_genes(atlases, counts, data, place):
    rows = np.array(data.draw(st.lists(st.integers(0, N_OBS - 1), min_size=3, max_size=300, unique=True)))
    genes = np.array(data.draw(st.lists(st.integers(0, N_VARS - 1), min_size=1, unique=True)))
    view = atlases[place][rows, genes]
    seen = []
    for csr, numbers in view.stream(64, num_workers=data.draw(st.sampled_from([0, 2]))):
        np.testing.assert_array_equal(csr.to_dense(), counts[numbers][:, genes].toarray())
        seen.extend(numbers)
    assert sorted(seen) == sorted(rows)


@given(data=st.data(), place=st.sampled_from(["memory", "store"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_a_view_of_a_view_is_indexing_twice(atlases, counts, data, place):
    """Against numpy: slices, masks and integers, that repeat or run backwards, on a view of a view."""
    first = data.draw(an_index(N_OBS))
    inner = np.arange(N_OBS)[first]
    second = data.draw(an_index(len(inner)))
    view = atlases[place][first][second]
    expected = counts.toarray()[inner][second]
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.row_numbers, inner[second])
    np.testing.assert_array_equal(view.read_rows(slice(None)).to_dense(), expected)


@st.composite
def an_index(draw, n):
    kind = draw(st.sampled_from(["slice", "ints", "mask"]))
    if kind == "slice":
        return draw(st.slices(n))
    if kind == "ints" and n:
        return np.array(draw(st.lists(st.integers(-n, n - 1), max_size=60)), np.int64)
    return np.random.default_rng(draw(st.integers(0, 9))).random(n) < draw(st.sampled_from([0.0, 0.02, 0.9]))


def test_breaking_out_of_a_stream_of_a_store_leaves_no_threads(atlases):
    before = set(threading.enumerate())
    for _ in atlases["store"].stream(16, num_workers=4, memory_budget=1 << 16):
        break
    left = {thread for thread in threading.enumerate() if thread.name.startswith("atlasvi")}
    assert not left - before


def test_memory_of_an_epoch_stays_within_the_budget():
    """40 MB of counts through a budget of 8 MB (numpy reports to tracemalloc what it allocates)."""
    counts = sp.random(40_000, 200, 0.6, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 9)
    atlas = Atlas.from_anndata(anndata.AnnData(counts))
    budget = 8 << 20
    assert counts.data.nbytes + counts.indices.nbytes > 4 * budget
    next(atlas.stream(64, num_workers=0, memory_budget=budget))  # compiles
    tracemalloc.start()
    try:
        n = sum(csr.n_obs for csr, _ in atlas.stream(256, num_workers=2, memory_budget=budget))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 40_000
    assert peak < budget
