"""Blocks read by Dask tasks, in threads or on a cluster, a bounded number of them ahead of the consumer."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from atlasvi_kernels import CSR
from dask.threaded import get
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.store import cluster
from atlasvi.stream.plan import Unit

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

ReadBlock = Callable[[int, int], CSR]

# A task that Dask knows of takes about 8 kB.
_AT_ONCE = 256
# A task of Dask's costs a fifth of a millisecond, in which a thousand rows are read.
_TASK_ROWS = 4096


def default_workers() -> int:
    """Readers used unless told otherwise: one a core but for that of the consumer, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores - 1))


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

    Up to ``ahead`` units are begun that the consumer has not taken; each is a Dask task in a pool of
    ``num_workers`` threads. When the consumer stops (``break``, an exception, Ctrl-C), the threads
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

    A task is some units, thousands of rows, or scheduling would take longer than reading. It is told the path
    of the store and the rows of each unit, and gives compact arrays.
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

    # Whatever the size of a task, there is one for each worker.
    at_once = max(1, min(units_a_task(_largest(units)), ahead // cluster.count_readers(client)))
    parts = (units[first : first + at_once] for first in range(0, len(units), at_once))
    calls = (([cluster.locate(atlas, rows(unit)) for unit in part],) for part in parts)
    return _as_csr(cluster.in_order(client, cluster.read_blocks, calls, ahead=ahead // at_once))


def _as_csr(tasks: Generator[list[cluster.Arrays]]) -> Generator[CSR]:
    with closing(tasks):
        for found in tasks:
            # Nothing is kept alive while the next one is waited for.
            found.reverse()
            while found:
                yield CSR.from_numpy(*found.pop())


def units_a_task(rows: int) -> int:
    """Units of so many rows that one task of Dask reads."""
    return -(-_TASK_ROWS // rows)


def _largest(units: list[Unit]) -> int:
    return max((unit.stop - unit.start for unit in units), default=1)


def _read_ahead(read: ReadBlock, units: list[Unit], num_workers: int, ahead: int) -> Generator[CSR]:
    window = _Window(read, units, ahead)
    pool = _Readers(num_workers)
    scheduler = threading.Thread(
        target=_schedule, args=(window, units, num_workers, pool), name="atlasvi-decode", daemon=True
    )

    def finish() -> None:
        window.close()
        scheduler.join()
        pool.shutdown()

    # Python may be left amid an epoch: a thread that then comes back from compiled code would abort it.
    atexit.register(finish)
    scheduler.start()
    try:
        for i in range(len(units)):
            yield window.take(i)
    finally:
        atexit.unregister(finish)
        finish()


class _Window:
    """Units on their way from the readers to the consumer: at most ``ahead`` begun and not taken.

    Which unit a reader begins is decided here and not by the scheduler, so that no order of its tasks can
    fill the window with later units while the consumer waits for an earlier one. A consumer who would have to
    wait reads too: so one reader and a consumer who does little else keep two cores busy.
    """

    def __init__(self, read: ReadBlock, units: list[Unit], ahead: int) -> None:
        self._read, self._units, self._ahead = read, units, ahead
        self._begun = self._taken = 0
        self._here: dict[int, CSR | BaseException] = {}
        self._closed = False
        self._changed = threading.Condition()

    def read_next(self) -> bool:
        """Read the next unit, once there is room for it; ``False`` where nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room)
            if self._closed or self._begun == len(self._units):
                return False
            i = self._begin()
        self._fetch(i)
        return True

    def take(self, i: int) -> CSR:
        """Unit ``i``, once it is here. What went wrong with it is raised."""
        while True:
            with self._changed:
                if i in self._here or self._begun == len(self._units) or not self._has_room:
                    break
                ours = self._begin()
            self._fetch(ours)
        with self._changed:
            self._changed.wait_for(lambda: i in self._here)
            item = self._here.pop(i)
            self._taken += 1
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def _has_room(self) -> bool:
        return self._begun < self._taken + self._ahead

    def _begin(self) -> int:
        self._begun += 1
        return self._begun - 1

    def _fetch(self, i: int) -> None:
        try:
            item: CSR | BaseException = self._read(self._units[i].start, self._units[i].stop)
        except KeyboardInterrupt:  # of the consumer, who wants nothing more
            raise
        except BaseException as error:  # for the consumer to raise, when it comes to this unit
            item = error
        with self._changed:
            self._here[i] = item
            self._changed.notify_all()


class _Readers(Executor):
    """Daemon threads, which Python does not wait for when it is left amid an epoch.

    For those of a `ThreadPoolExecutor` it does, before anything that was to be done at its exit; and these
    wait for a consumer who is gone.
    """

    def __init__(self, n: int) -> None:
        self._max_workers = n  # which Dask asks for
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"atlasvi-read_{k}", daemon=True) for k in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call


def _schedule(window: _Window, units: list[Unit], num_workers: int, pool: Executor) -> None:
    """The body of the thread that runs Dask: a task for some units, thousands of rows."""
    at_once = min(units_a_task(_largest(units)), max(1, -(-len(units) // num_workers)))

    def read_some() -> None:
        for _ in range(at_once):
            if not window.read_next():
                return

    # Its own pool and the threaded scheduler, whatever Dask is set to elsewhere in the process.
    tasks = range(-(-len(units) // at_once))
    for first in range(0, len(tasks), _AT_ONCE):
        graph = {f"atlasvi-read-{k}": (read_some,) for k in tasks[first : first + _AT_ONCE]}
        get(graph, list(graph), pool=pool)
