"""Reading ahead: the order of the plan, errors as they were, and threads that end."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from atlasvi.errors import OptionError
from atlasvi.store import atlas as atlas_module
from atlasvi.stream.plan import plan_epoch
from atlasvi.stream.read import default_workers, read_units
from atlasvi_kernels import CSR

WORKERS = (0, 1, 2, 4)


def units_of(n_rows, **changes):
    sizes = {"batch_size": 8, "block_rows": 10, "n_lanes": 3, "seed": 0, "epoch": 0}
    return plan_epoch(n_rows, **{**sizes, **changes}).schedule()


def reader(n_rows):
    """Row ``i`` holds ``i + 1`` in column ``i % 7``."""
    rows = np.arange(n_rows)
    matrix = sp.csr_matrix((rows + 1, (rows, rows % 7)), shape=(n_rows, 7))
    return lambda start, stop: CSR.from_scipy(matrix[start:stop])


def ours():
    names = ("atlasvi-read", "atlasvi-decode")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_units_come_in_the_order_given(num_workers):
    units = units_of(137)
    read = list(read_units(reader(137), units, num_workers=num_workers))
    assert len(read) == len(units) > 14
    for unit, counts in zip(units, read, strict=True):
        np.testing.assert_array_equal(counts.row_sums().numpy(), np.arange(unit.start, unit.stop) + 1)
    assert ours() == []


@pytest.mark.parametrize("num_workers", WORKERS)
def test_nothing_to_read(num_workers):
    assert list(read_units(reader(0), units_of(0), num_workers=num_workers)) == []


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_readers_own_error_reaches_the_consumer(num_workers):
    broken, good = ValueError("a shard is gone"), reader(137)

    def read(start, stop):
        if start == 70:
            raise broken
        return good(start, stop)

    with pytest.raises(ValueError, match="a shard is gone") as caught:
        list(read_units(read, units_of(137, shuffle=False), num_workers=num_workers))
    assert caught.value is broken
    assert ours() == []


@pytest.mark.parametrize("num_workers", WORKERS)
def test_what_was_read_before_an_error_is_still_given(num_workers):
    good = reader(137)

    def read(start, stop):
        if start >= 70:
            raise OSError("disk is gone")
        return good(start, stop)

    got = []
    with pytest.raises(OSError, match="disk is gone"):
        for counts in read_units(read, units_of(137, shuffle=False), num_workers=num_workers):
            got.extend(counts.row_sums().tolist())
    assert got == list(range(1, 71))


@pytest.mark.parametrize("num_workers", (1, 2, 4))
@pytest.mark.parametrize("how", ("break", "raise", "close", "interrupt"))
def test_threads_end_when_the_consumer_stops(num_workers, how):
    buffers = read_units(reader(900), units_of(900), num_workers=num_workers)
    if how == "break":
        for _ in buffers:
            break
        buffers.close()
    elif how == "close":
        next(buffers)
        assert ours()
        buffers.close()
    else:
        error = RuntimeError if how == "raise" else KeyboardInterrupt
        next(buffers)
        with pytest.raises(error):
            buffers.throw(error())
    assert ours() == []


def open_files(folder):
    """Descriptors of this process for files under a folder."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found.append(descriptor.readlink())
    return [path for path in found if path.is_relative_to(folder)]


@pytest.fixture(scope="module")
def stored(small_store, tmp_path_factory):
    """The same cells in the two kinds of files that can be opened."""
    folder = tmp_path_factory.mktemp("read")
    anndata.read_zarr(small_store).write_h5ad(folder / "small.h5ad")
    return {"store": small_store, "h5ad": folder / "small.h5ad"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are listed in /proc")
@pytest.mark.parametrize("kind", ("store", "h5ad"))
@pytest.mark.parametrize("how", ("break", "raise", "interrupt"))
def test_no_thread_and_no_file_is_left_when_a_consumer_stops_amid_a_full_queue(stored, kind, how):
    path, calls, ahead = stored[kind], [], 4
    before = set(threading.enumerate())

    def consume():
        def read(start, stop):
            calls.append(start)
            return atlas.read_rows(slice(start, stop))

        for _ in read_units(read, units_of(atlas.n_obs), num_workers=2, ahead=ahead):
            deadline = time.monotonic() + 30
            while len(calls) < ahead and time.monotonic() < deadline:
                time.sleep(0.005)
            if how == "break":
                break
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("the consumer has enough")

    with atlas_module.open(path) as atlas:
        if how == "break":
            consume()
        else:
            with pytest.raises(KeyboardInterrupt if how == "interrupt" else RuntimeError):
                consume()
        assert ahead <= len(calls) <= ahead + 1  # one more, for the one that was taken
        assert not set(threading.enumerate()) - before
        # An .h5ad stays open as long as its atlas, which shows that open files are seen.
        assert bool(open_files(path.parent)) == (kind == "h5ad")
    assert open_files(path.parent) == []


def test_a_stream_that_was_never_begun_has_no_threads():
    buffers = read_units(reader(900), units_of(900), num_workers=2)
    assert ours() == []
    buffers.close()
    assert ours() == []


@pytest.mark.parametrize("ahead", (2, 6))
def test_a_bounded_number_of_units_is_decoded_ahead(ahead):
    read, calls = reader(900), []

    def counting(start, stop):
        calls.append(start)
        return read(start, stop)

    units = read_units(counting, units_of(900, shuffle=False), num_workers=2, ahead=ahead)
    next(units)
    deadline = time.monotonic() + 5
    # The one that was taken has left room for another.
    while len(calls) <= ahead and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)  # time in which it could read on, if nothing held it back
    assert len(calls) == ahead + 1
    units.close()


def test_blocks_are_read_by_as_many_threads_as_asked_for_and_by_a_consumer_who_would_wait():
    names, read = set(), reader(900)

    def naming(start, stop):
        names.add(threading.current_thread().name)
        time.sleep(0.002)
        return read(start, stop)

    list(read_units(naming, units_of(900), num_workers=3))
    assert sorted(names) == ["MainThread", "atlasvi-read_0", "atlasvi-read_1", "atlasvi-read_2"]


@pytest.mark.parametrize(("num_workers", "ahead"), [(-1, 1), (1, 0)])
def test_numbers_that_cannot_be_are_named_at_once(num_workers, ahead):
    with pytest.raises(OptionError, match=f"num_workers={num_workers}, ahead={ahead}"):
        read_units(reader(9), units_of(9), num_workers=num_workers, ahead=ahead)


def test_workers_by_default():
    assert 1 <= default_workers() <= 4


def test_leaving_python_amid_an_epoch_does_not_hang():
    script = """
        import time
        import numpy as np, scipy.sparse as sp
        from atlasvi_kernels import CSR
        from atlasvi.stream.plan import plan_epoch
        from atlasvi.stream.read import read_units
        block = CSR.from_scipy(sp.csr_matrix(np.eye(10)))
        plan = plan_epoch(1000, batch_size=8, block_rows=10, n_lanes=2, seed=0, epoch=0)
        buffers = read_units(lambda start, stop: block, plan.schedule(), num_workers=2)
        next(buffers)
        time.sleep(0.5)  # until the readers wait for room
        print("left")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (0, "left\n"), run.stderr


def test_ctrl_c_ends_the_process():
    """A real SIGINT, while the consumer waits for a slow reader."""
    script = """
        import os, signal, threading, time
        import numpy as np, scipy.sparse as sp
        from atlasvi_kernels import CSR
        from atlasvi.stream.plan import plan_epoch
        from atlasvi.stream.read import read_units
        block = CSR.from_scipy(sp.csr_matrix(np.eye(10)))
        def read(start, stop):
            time.sleep(0.05)
            return block
        plan = plan_epoch(100_000, batch_size=8, block_rows=10, n_lanes=2, seed=0, epoch=0)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            for _ in read_units(read, plan.schedule(), num_workers=2):
                pass
        except KeyboardInterrupt:
            names = ("atlasvi-read", "atlasvi-decode")
            print([t.name for t in threading.enumerate() if t.name.startswith(names)])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr
