"""A Dask cluster of two processes reads what threads read, in the same order, even where a worker dies."""

import hashlib
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

from atlasvi.errors import CorruptError, CountsError, OptionError, StoreError
from atlasvi.store import atlas as atlas_module
from atlasvi.store.atlas import Atlas
from atlasvi.store.cluster import Piece, Place, check_places, count_readers, in_order, locate
from atlasvi.store.ingest import ingest
from atlasvi.store.tasks import run_tasks
from atlasvi.stream import Epochs, Room
from atlasvi.stream.plan import plan_epoch
from atlasvi.stream.read import count_workers, read_units_on

distributed = pytest.importorskip("distributed")

N_OBS, N_VARS = 3000, 24


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """A worker that is killed, and a cluster that goes, are logged as errors; both are meant here."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def write_store(path, seed=0, n_obs=N_OBS, genes=N_VARS, append=False):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2.0, (n_obs, genes))).astype(np.float32)
    counts[:, 0] += 1
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"{seed}-{i}" for i in range(n_obs)]
    adata.obs["batch"] = np.where(np.arange(n_obs) % 3, "b0", "b1")
    adata.var_names = [f"g{g}" for g in np.random.default_rng(genes).permutation(genes)]
    ingest(adata, path, overwrite=not append, append=append)
    return counts


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Atlases of every kind that a cluster can read, and what `Atlas.read_rows` gives of all their cells."""
    folder = tmp_path_factory.mktemp("cluster")
    write_store(folder / "a.zarr")
    write_store(folder / "b.zarr", seed=1, n_obs=500, genes=20)
    rng = np.random.default_rng(3)
    whole, other = atlas_module.open(folder / "a.zarr"), atlas_module.open(folder / "b.zarr")
    part = other[rng.permutation(500)[:300], rng.permutation(20)[:15]]
    joined = atlas_module.open({"a": whole, "b": part, "c": whole[:0]}, join="outer")
    opened = {
        "store": whole,
        "view": whole[rng.permutation(N_OBS)[:2000], rng.permutation(N_VARS)[:10]],
        "joined": joined,
        "view of joined": joined[rng.permutation(joined.n_obs), rng.permutation(joined.n_vars)[:12]],
    }
    yield opened
    whole.close()
    other.close()


PLACES = ("store", "view", "joined", "view of joined")


def units_of(n_rows, **changes):
    sizes = {"batch_size": 64, "block_rows": 250, "n_lanes": 4, "seed": 0, "epoch": 0}
    return plan_epoch(n_rows, **{**sizes, **changes}).schedule()


def digest(blocks):
    h = hashlib.sha256()
    for counts in blocks:
        for array in counts.numpy():
            h.update(str(array.dtype).encode())
            h.update(array.tobytes())
    return h.hexdigest()


def n_tasks(client):
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))


def wait_for_no_tasks(client):
    """What the cluster still holds after it had time to forget."""
    deadline = time.monotonic() + 30
    while n_tasks(client) and time.monotonic() < deadline:
        time.sleep(0.02)
    return n_tasks(client)


# --- the same, whoever reads ------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_worker_reads_what_is_read_here(client, places, place):
    atlas = places[place]
    positions = np.random.default_rng(1).permutation(atlas.n_obs)[:1500]
    for at in (np.arange(atlas.n_obs), positions):
        units = units_of(len(at))
        there = read_units_on(client, atlas, at, units, ahead=3)
        assert digest(there) == digest(atlas.read_rows(at[unit.start : unit.stop]) for unit in units)
    assert wait_for_no_tasks(client) == 0


def digest_of_stream(pieces):
    h, n = hashlib.sha256(), 0
    for counts, rows in pieces:
        h.update(rows.tobytes())
        h.update(digest([counts]).encode())
        n += len(rows)
    return h.hexdigest(), n


@pytest.mark.parametrize("place", ("store", "view of joined"))
@pytest.mark.parametrize("shuffle", (True, False))
def test_the_same_sequence_from_threads_and_from_the_cluster(client, places, place, shuffle):
    atlas = places[place]
    asked = {"batch_size": 64, "seed": 1, "epoch": 2, "shuffle": shuffle, "memory_budget": 1 << 17}
    here = {digest_of_stream(atlas.stream(**asked, num_workers=n)) for n in (0, 1, 2, 4)}
    there = {digest_of_stream(atlas.stream(**asked, num_workers=n, client=client)) for n in (1, 2, 4, None)}
    assert {n for _, n in here} == {atlas.n_obs}
    assert there == here
    assert len(here) == 1


def test_counts_that_a_cluster_read_stay_on_the_device(client, places, monkeypatch):
    atlas = places["view of joined"]
    options = {"batch_size": 64, "seed": 1}
    fresh = Epochs(atlas, **options, keep=False)
    here = Epochs(atlas, **options, client=client, room=Room(torch.device("cpu"), 1 << 30))
    list(here.counts(0))
    monkeypatch.setattr(client, "submit", None)  # whoever asks it from now on fails
    monkeypatch.setattr(client, "compute", None)
    assert digest_of_stream(here.counts(1)) == digest_of_stream(fresh.counts(1))


def test_ordered_blocks_come_from_the_cluster_too(client, places):
    atlas = places["view"]
    blocks = list(atlas.iter_blocks(client=client, memory_budget=1 << 17))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate([at for _, at in blocks]), np.arange(atlas.n_obs))
    both = [np.vstack([counts.to_dense().numpy() for counts in some]) for some in
            ([counts for counts, _ in blocks], [atlas.read_rows(slice(None))])]  # fmt: skip
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("place", PLACES)
def test_statistics_are_the_same_to_the_last_bit(client, places, place, monkeypatch):
    monkeypatch.setattr("atlasvi.store.stats._READ_ROWS", 128)
    atlas = places[place]
    asked = {"batch_key": "batch", "gene_sets": {"ones": "g1"}}
    here, there = atlas.statistics(**asked), atlas.statistics(**asked, client=client)
    for name in ("mean", "variance", "n_cells", "total_counts", "n_genes"):
        one, two = getattr(here, name), getattr(there, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two, err_msg=name)
    np.testing.assert_array_equal(here.shares["ones"], there.shares["ones"])
    assert (here.library, here.batch_cells) == (there.library, there.batch_cells)


def test_filters_and_variable_genes_are_the_same(client, places):
    atlas = places["joined"]
    asked = {"min_counts": 20, "min_genes": 8, "max_share": {"ones": 0.6}, "gene_sets": {"ones": "g1"}}
    here, there = atlas.filter(**asked), atlas.filter(**asked, client=client)
    assert 0 < here.n_obs < atlas.n_obs
    np.testing.assert_array_equal(here.row_numbers, there.row_numbers)
    asked = {"n_top_genes": 5, "batch_key": "batch", "span": 1.0}
    here, there = (places["store"].highly_variable_genes(**asked, client=who) for who in (None, client))
    pd.testing.assert_frame_equal(here, there, check_exact=True)


def contents(path):
    """Every array of a store, decoded: in which order a shard has its chunks depends on threads."""
    group = zarr.open_group(path, mode="r")
    arrays = {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    return {name: (str(array.dtype), np.asarray(array[...]).tolist()) for name, array in arrays.items()}


@pytest.mark.parametrize("shuffle", (False, True))
def test_an_ingest_on_the_cluster_writes_the_same(client, places, tmp_path, monkeypatch, shuffle):
    monkeypatch.setattr("atlasvi.store.cells.BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr("atlasvi.store.layout.CHUNK_ENTRIES", 1 << 8)
    first = places["store"].path
    atlas_module.open(first.with_name("b.zarr")).to_anndata().write_h5ad(tmp_path / "b.h5ad")
    inputs, done = [first, tmp_path / "b.h5ad"], []
    asked = {"join": "outer", "shuffle": shuffle, "seed": 3, "input_key": "store"}
    ingest(inputs, tmp_path / "here.zarr", **asked)
    ingest(inputs, tmp_path / "there.zarr", **asked, client=client,
           progress=lambda *what: done.append(what))  # fmt: skip
    assert contents(tmp_path / "there.zarr") == contents(tmp_path / "here.zarr")
    assert ("checking counts", N_OBS + 500, N_OBS + 500) in done
    assert wait_for_no_tasks(client) == 0


# --- faults -----------------------------------------------------------------------------------------


def test_a_corrupt_shard_is_named_by_the_worker_that_read_it(client, tmp_path):
    write_store(tmp_path / "a.zarr")
    shard = tmp_path / "a.zarr" / "X" / "data" / "c" / "0"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    with atlas_module.open(tmp_path / "a.zarr") as atlas:
        shard.write_bytes(raw)
        with pytest.raises(CorruptError, match=r"X/data/c/0 .* rows 0 to 2999"):
            list(read_units_on(client, atlas, None, units_of(N_OBS), ahead=4))
    assert wait_for_no_tasks(client) == 0


def test_what_is_no_count_is_named_by_the_worker_that_saw_it(client, tmp_path):
    counts = np.eye(40, dtype=np.float32)
    counts[17, 5] = 0.5
    anndata.AnnData(sp.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(CountsError, match=r"a\.h5ad' X has 0\.5 at cell '17', gene '5'"):
        ingest(tmp_path / "a.h5ad", tmp_path / "a.zarr", client=client)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
    assert wait_for_no_tasks(client) == 0


def test_tasks_under_way_are_given_up_where_one_fails():
    given_up = threading.Event()

    def work(k):
        if k == 0:
            raise ValueError("the first is broken")
        assert given_up.wait(30)

    with pytest.raises(ValueError, match="the first is broken"):
        run_tasks(work, [0, 1], [1, 1], label="work", workers=2, progress=None, give_up=given_up.set)
    assert given_up.is_set()


@pytest.mark.parametrize("how", ("break", "raise", "interrupt", "statistics"))
def test_the_cluster_forgets_what_a_consumer_left(client, places, how, monkeypatch):
    error = {"raise": RuntimeError, "interrupt": KeyboardInterrupt, "statistics": RuntimeError}.get(how)

    def consume():
        for _ in read_units_on(client, places["store"], None, units_of(N_OBS, block_rows=20), ahead=16):
            if how == "break":
                break
            raise error

    def fail(*_):
        raise error

    if how == "break":
        consume()
    elif how == "statistics":
        monkeypatch.setattr("atlasvi.store.stats.merged", fail)
        with pytest.raises(error):
            places["store"].statistics(client=client)
    else:
        with pytest.raises(error):
            consume()
    assert wait_for_no_tasks(client) == 0


def test_a_bounded_number_of_tasks_is_submitted_ahead(client):
    drawn = []

    def calls():
        for k in range(50):
            drawn.append(k)
            yield (k,)

    results = in_order(client, abs, calls(), ahead=6)
    assert drawn == []
    for k in range(50):
        assert next(results) == k
        assert len(drawn) == min(50, 7 + k)
    assert list(results) == []


# --- what is sent -----------------------------------------------------------------------------------


def test_a_task_is_told_the_rows_of_its_block_alone(places):
    view = places["view"]
    rows = view.row_numbers[100:140]
    (piece,) = locate(view, np.arange(100, 140)).pieces
    np.testing.assert_array_equal(piece.rows, rows)
    assert (piece.rows.dtype, piece.columns.dtype) == (np.uint16, np.int8)
    assert len(pickle.dumps(locate(view, np.arange(100, 140)))) < 1000
    assert locate(places["store"], np.arange(100, 140)).pieces[0].rows == slice(100, 140)


@pytest.mark.parametrize("place", PLACES)
def test_an_atlas_is_pickled_by_where_it_is(places, place):
    atlas = places[place]
    raw = pickle.dumps(atlas)
    counts = atlas.read_rows(slice(None))
    # The rows and genes of a view, not their counts.
    assert len(raw) < 8 * (atlas.n_obs + 400) + 3000 < counts.nbytes or not place.startswith("view")
    assert len(raw) < 6000 or place.startswith("view")
    again = pickle.loads(raw)
    assert digest([again.read_rows(slice(None))]) == digest([counts])
    assert again.var_names.tolist() == atlas.var_names.tolist()
    assert again.obs_names[:9].tolist() == atlas.obs_names[:9].tolist()
    again.close()


def test_a_store_that_was_replaced_is_opened_again(tmp_path):
    path = tmp_path / "a.zarr"
    for seed in (0, 1):
        counts = write_store(path, seed, n_obs=50)
        with atlas_module.open(path) as atlas:
            block = pickle.loads(pickle.dumps(locate(atlas, np.arange(50))))
        np.testing.assert_array_equal(block.read().to_dense().numpy(), counts)


def test_a_store_that_has_grown_is_opened_again(tmp_path):
    path = tmp_path / "a.zarr"
    counts = [write_store(path, 0, n_obs=50)]
    for seed in (0, 1):
        if seed:
            counts.append(write_store(path, seed, n_obs=30, append=True))
        with atlas_module.open(path) as atlas:
            block = locate(atlas, np.arange(atlas.n_obs))
        np.testing.assert_array_equal(block.read().to_dense().numpy(), np.vstack(counts))


def test_a_store_that_the_worker_does_not_see_is_named(places, tmp_path):
    shutil.copytree(places["store"].path, tmp_path / "a.zarr")
    with atlas_module.open(tmp_path / "a.zarr") as atlas:
        (piece,) = locate(atlas, np.arange(3)).pieces
    shutil.rmtree(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=r"a\.zarr' is not there on .*; put it where all"):
        piece.read()


def test_a_relative_path_is_sent_as_an_absolute_one(places, monkeypatch):
    monkeypatch.chdir(places["store"].path.parent)
    with atlas_module.open("a.zarr") as atlas:
        assert locate(atlas, np.arange(3)).pieces == (
            Piece(Place(str(places["store"].path), None), slice(0, 3), None, N_VARS),
        )


def test_a_store_behind_a_url_is_sent_by_its_url(places):
    url = places["store"].path.as_uri()
    with atlas_module.open(url) as atlas:
        block = locate(atlas, np.arange(5, 9))
    assert block.pieces[0].place == Place(url, None)
    expected = places["store"].read_rows(slice(5, 9))
    assert digest([block.read()]) == digest([expected])


# --- what is refused --------------------------------------------------------------------------------


def test_counts_in_memory_are_refused(client, tmp_path):
    adata = anndata.AnnData(sp.eye(4, 24, format="csr", dtype=np.float32))
    memory = Atlas.from_anndata(adata)
    joined = atlas_module.open({"a": memory, "b": Atlas.from_anndata(adata)}, make_unique=True)
    told = r"'AnnData' X is in the memory of this process.* pickle; .*atlasvi\.ingest\("
    for atlas in (memory, joined):
        for ask in (
            check_places,
            pickle.dumps,
            lambda atlas: atlas.stream(client=client),
            lambda atlas: atlas.iter_blocks(client=client),
            lambda atlas: atlas.statistics(client=client),
        ):
            with pytest.raises(OptionError, match=told):
                ask(atlas)
    with pytest.raises(OptionError, match=told):
        ingest(adata, tmp_path / "a.zarr", client=client)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_client_is_refused(client):
    with pytest.raises(OptionError, match=r"'tcp://127\.0\.0\.1:8786' is a str; pass "):
        count_readers("tcp://127.0.0.1:8786")
    with pytest.raises(OptionError, match="num_workers=0 of a cluster cannot be; give at least 1"):
        count_readers(client, 0)
    with distributed.Client(client.cluster) as other:
        assert count_readers(other) == 2
    with pytest.raises(OptionError, match="is closed and cannot be waited for"):
        count_readers(other)


def test_distributed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(OptionError, match=r"pip install 'atlasvi\[cluster\]'"):
        count_workers(2, object())
    assert count_workers(2) == 2


# --- last, since the worker that takes its place would import everything anew ---------------------------


def test_a_killed_worker_costs_no_cell(client, places, monkeypatch):
    atlas = places["store"]
    asked = {"batch_size": 64, "seed": 1, "memory_budget": 1 << 17}
    before = client.run(os.getpid)
    got, submitted, submit = [], [], distributed.Client.submit
    monkeypatch.setattr(
        distributed.Client,
        "submit",
        lambda self, *call, **how: submitted.append(1) or submit(self, *call, **how),
    )
    for k, (counts, rows) in enumerate(atlas.stream(**asked, client=client)):
        if k == 5:
            os.kill(next(iter(before.values())), signal.SIGKILL)
            n_before = len(submitted)
        got.append((counts, rows))
    assert len(submitted) > n_before + 10
    assert digest_of_stream(got) == digest_of_stream(atlas.stream(**asked, num_workers=0))
    np.testing.assert_array_equal(np.sort(np.concatenate([rows for _, rows in got])), np.arange(N_OBS))
    client.wait_for_workers(2)
    assert set(client.run(os.getpid).values()) != set(before.values())


@pytest.mark.parametrize(("block_rows", "ahead", "at_once"), [(20, 16, 8), (20, 3, 1), (4096, 16, 1)])
def test_a_task_is_thousands_of_rows_and_there_is_one_for_each_worker(
    client, places, monkeypatch, block_rows, ahead, at_once
):
    tasks, submit = [], distributed.Client.submit

    def counted(self, function, blocks, **how):
        tasks.append(len(blocks))
        return submit(self, function, blocks, **how)

    monkeypatch.setattr(distributed.Client, "submit", counted)
    units = units_of(N_OBS, block_rows=block_rows)
    there = read_units_on(client, places["store"], None, units, ahead=ahead)
    assert [block.shape[0] for block in there] == [unit.stop - unit.start for unit in units]
    assert sum(tasks) == len(units) and max(tasks) == at_once
