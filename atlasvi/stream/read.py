"""Blocks read by Dask tasks, in threads or on a cluster, a bounded number of them ahead of the consumer."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from atlasvi_kernels import CSR
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.store import cluster
from atlasvi.stream.plan import Unit

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

ReadBlock = Callable[[int, int], CSR]


def default_workers() -> int:
    """Readers used unless told otherwise: one a core, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def count_workers(num_workers: int | None, client: distributed.Client | None = None) -> int:
    """Readers, of this process or of a cluster, that is checked for being one.

    Raises:
        OptionError: a client that cannot be used, see `atlasvi.store.cluster.count_readers`.
    """
    if client is not None:
        return cluster.count_readers(client, num_workers)
    return default_workers() if num_workers is None else num_workers


def read_units(
    read: ReadBlock, units: list[Unit], *, num_workers: int, ahead: int | None = None
) -> Generator[CSR]:
    """The units in the order given, decoded, whatever the number of workers.

    One thread has up to ``ahead`` units decoded that the consumer has not taken; each is a Dask task in a
    pool of ``num_workers`` threads. When the consumer stops (``break``, an exception, Ctrl-C), the threads
    end once the units in hand are read.

    Args:
        read: reads positions ``start`` to ``stop``, from any thread.
        units: what to read.
        num_workers: threads that read; 0 reads in the calling thread, nothing ahead.
        ahead: >= 1; by default two for each worker.

    Raises:
        OptionError: a number outside its range.
        Exception: what ``read`` raised, as it raised it.
    """
    if num_workers < 0 or (ahead is not None and ahead < 1):
        raise OptionError(
            f"num_workers={num_workers}, ahead={ahead} cannot be: "
            "give num_workers >= 0 (0 reads in the calling thread) and ahead >= 1"
        )
    if num_workers == 0:
        return (read(unit.start, unit.stop) for unit in units)
    return _read_ahead(read, units, num_workers, ahead or 2 * num_workers)


def read_units_on(
    client: distributed.Client,
    atlas: Atlas,
    positions: NDArray[np.integer] | None,
    units: list[Unit],
    *,
    ahead: int,
) -> Generator[CSR]:
    """The units in the order given, as `read_units`, read by the workers of a cluster.

    A task is a unit. It is told the path of the store and the rows of the unit, and gives compact arrays.
    When the consumer stops, the tasks that were submitted are given up; a worker that dies costs nothing, as
    Dask gives its tasks to another.

    Args:
        client: of the cluster, whose workers must see the store under the same path.
        atlas: a store on disk, a view of one, or several as one.
        positions: ``(n,)``, the cells that the units count; all when ``None``.
        units: what to read.
        ahead: >= 1, units that may be under way or here and not taken.

    Raises:
        OptionError: cells of an AnnData in memory.
        Exception: what reading raised, as it raised it.
    """
    cluster.check_places(atlas)

    def rows(unit: Unit) -> NDArray[np.int64]:
        if positions is None:
            return np.arange(unit.start, unit.stop)
        return positions[unit.start : unit.stop].astype(np.int64)

    calls = ((cluster.locate(atlas, rows(unit)),) for unit in units)
    arrays = cluster.in_order(client, cluster.read_block, calls, ahead=ahead)
    return _as_csr(arrays)


def _as_csr(blocks: Generator[tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]]) -> Generator[CSR]:
    with closing(blocks):
        for arrays in blocks:
            yield CSR.from_numpy(*arrays)
            # Else it is kept alive while the next one is waited for.
            del arrays


def _read_ahead(read: ReadBlock, units: list[Unit], num_workers: int, ahead: int) -> Generator[CSR]:
    ready: queue.SimpleQueue[CSR | BaseException] = queue.SimpleQueue()
    slots = threading.Semaphore(ahead)  # units that may be decoded and not taken
    stop = threading.Event()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="atlasvi-read")
    decoder = threading.Thread(
        target=_decode, args=(read, units, pool, num_workers, ahead, ready, slots, stop),
        name="atlasvi-decode", daemon=True,
    )  # fmt: skip

    def finish() -> None:
        stop.set()
        slots.release(ahead)
        decoder.join()
        pool.shutdown(wait=True, cancel_futures=True)

    # Python may be left amid an epoch: a thread that then comes back from compiled code would abort it.
    atexit.register(finish)
    decoder.start()
    try:
        for _ in units:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            slots.release()
            yield item
            del item
    finally:
        atexit.unregister(finish)
        finish()


def _decode(
    read: ReadBlock,
    units: list[Unit],
    pool: ThreadPoolExecutor,
    num_workers: int,
    ahead: int,
    ready: queue.SimpleQueue[CSR | BaseException],
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """The body of the decoding thread; what goes wrong is handed to the consumer."""

    def read_unless_stopped(start: int, end: int) -> CSR | None:
        return None if stop.is_set() else read(start, end)

    # Its own pool and the threaded scheduler, whatever Dask is set to elsewhere in the process.
    run = partial(compute, scheduler="threads", pool=pool, optimize_graph=False, traverse=False)
    task = delayed(read_unless_stopped, pure=False, traverse=False)
    together = min(num_workers, ahead)
    try:
        for k in range(0, len(units), together):
            some = units[k : k + together]
            for _ in some:
                slots.acquire()
            if stop.is_set():
                return
            parts: list[CSR] = list(run(*[task(unit.start, unit.stop) for unit in some]))
            if stop.is_set():
                return
            parts.reverse()
            while parts:
                ready.put(parts.pop())
    except BaseException as error:
        ready.put(error)
