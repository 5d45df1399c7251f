"""Blocks read by Dask tasks into buffers, a bounded number of them decoded ahead of the consumer."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from atlasvi_kernels import CSR
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.stream.plan import EpochPlan

ReadBlock = Callable[[int, int], CSR]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Some blocks, decoded.

    Args:
        counts: the rows of the blocks, side by side.
        positions: ``(n,)`` int64, the position of each of these rows.
        order: ``(n,)`` int64, the order in which to visit them.
    """

    counts: CSR
    positions: NDArray[np.int64]
    order: NDArray[np.int64]


def default_workers() -> int:
    """Readers used unless told otherwise: one a core, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_buffers(
    read: ReadBlock, plan: EpochPlan, *, num_workers: int, prefetch: int = 1
) -> Generator[Buffer]:
    """The buffers of an epoch in the order of the plan, whatever the number of workers.

    One thread decodes up to ``prefetch`` buffers ahead of the one that the consumer holds; each block
    is one Dask task in a pool of ``num_workers`` threads. When the consumer stops (``break``, an
    exception, Ctrl-C), the threads end once the blocks in hand are read.

    Args:
        read: reads positions ``start`` to ``stop``, from any thread.
        plan: of the epoch.
        num_workers: threads that read; 0 reads in the calling thread, nothing ahead.
        prefetch: buffers decoded ahead, >= 1.

    Raises:
        OptionError: a number outside its range.
        Exception: what ``read`` raised, as it raised it.
    """
    if num_workers < 0 or prefetch < 1:
        raise OptionError(
            f"num_workers={num_workers}, prefetch={prefetch} cannot be: "
            "give num_workers >= 0 (0 reads in the calling thread) and prefetch >= 1"
        )
    if num_workers == 0:
        return _read_here(read, plan)
    return _read_ahead(read, plan, num_workers, prefetch)


def _read_here(read: ReadBlock, plan: EpochPlan) -> Generator[Buffer]:
    for k in range(plan.n_buffers):
        # One buffer at a time: nothing may keep the last one alive while the next is decoded.
        yield _buffer([read(start, stop) for start, stop in plan.block_ranges(k)], plan, k)


def _read_ahead(read: ReadBlock, plan: EpochPlan, num_workers: int, prefetch: int) -> Generator[Buffer]:
    ready: queue.SimpleQueue[Buffer | BaseException] = queue.SimpleQueue()
    slots = threading.Semaphore(prefetch + 1)  # buffers that exist, the consumer's included
    stop = threading.Event()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="atlasvi-read")
    decoder = threading.Thread(
        target=_decode, args=(read, plan, pool, ready, slots, stop), name="atlasvi-decode", daemon=True
    )

    def finish() -> None:
        stop.set()
        slots.release()
        decoder.join()
        pool.shutdown(wait=True, cancel_futures=True)

    # Python may be left amid an epoch: a thread that then comes back from compiled code would abort it.
    atexit.register(finish)
    decoder.start()
    try:
        for _ in range(plan.n_buffers):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
            slots.release()
    finally:
        atexit.unregister(finish)
        finish()


def _decode(
    read: ReadBlock,
    plan: EpochPlan,
    pool: ThreadPoolExecutor,
    ready: queue.SimpleQueue[Buffer | BaseException],
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """The body of the decoding thread; what goes wrong is handed to the consumer."""

    def read_unless_stopped(start: int, end: int) -> CSR | None:
        return None if stop.is_set() else read(start, end)

    # Its own pool and the threaded scheduler, whatever Dask is set to elsewhere in the process.
    run = partial(compute, scheduler="threads", pool=pool, optimize_graph=False, traverse=False)
    task = delayed(read_unless_stopped, pure=False, traverse=False)
    try:
        for k in range(plan.n_buffers):
            slots.acquire()
            if stop.is_set():
                return
            tasks = [task(start, end) for start, end in plan.block_ranges(k)]
            parts: list[CSR] = list(run(*tasks))
            del tasks
            if stop.is_set():
                return
            ready.put(_buffer(parts, plan, k))
            del parts
    except BaseException as error:
        ready.put(error)


def _buffer(parts: list[CSR], plan: EpochPlan, k: int) -> Buffer:
    return Buffer(side_by_side(parts), plan.side_by_side(k), plan.order(k))


def side_by_side(parts: list[CSR]) -> CSR:
    """Stack matrices row after row, and empty the list on the way.

    As `CSR.concatenate`, but each part is let go as soon as it is copied, so that the peak is little
    more than the result and not twice that.
    """
    if len(parts) == 1:
        return parts.pop()
    n_vars = parts[0].n_vars
    nnz = [part.nnz for part in parts]
    indptr = np.zeros(sum(part.n_obs for part in parts) + 1, np.int64)
    indices = np.empty(sum(nnz), np.result_type(*{part.indices.numpy().dtype for part in parts}))
    data = np.empty(sum(nnz), np.result_type(*{part.data.numpy().dtype for part in parts}))
    row = entry = 0
    parts.reverse()
    while parts:
        part_indptr, part_indices, part_data = parts.pop().numpy()
        stop = entry + len(part_data)
        indptr[row + 1 : row + len(part_indptr)] = part_indptr[1:] + entry
        indices[entry:stop] = part_indices
        data[entry:stop] = part_data
        row, entry = row + len(part_indptr) - 1, stop
    return CSR.from_numpy(indptr, indices, data, n_vars)
