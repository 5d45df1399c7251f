"""Blocks read by Dask tasks, a bounded number of them decoded ahead of the consumer."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from atlasvi_kernels import CSR
from dask.base import compute
from dask.delayed import delayed

from atlasvi.errors import OptionError
from atlasvi.stream.plan import Unit

ReadBlock = Callable[[int, int], CSR]


def default_workers() -> int:
    """Readers used unless told otherwise: one a core, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
