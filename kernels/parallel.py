"""Compiled loops on the threads that torch computes with.

A second pool of threads beside torch's takes its time: torch's OpenMP threads spin for a while after each
operation, numba's own do the same, and on few cores each then waits for the other (the likelihood after a
matrix product took twice as long). So loops are handed to torch's own team, through the entry point
``GOMP_parallel`` that compilers use, and that both of the usual OpenMP libraries have. Where torch was built
without one (macOS), and in a forked process, Python threads do the work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch


def compiled(**options: Any) -> Any:
    """A decorator of loops over arrays: without Python and its lock, kept on disk, division as numpy's."""
    return numba.njit(error_model="numpy", nogil=True, cache=True, **options)


_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _team(pid: int) -> Callable[[Any, None, int, int], None] | None:
    """``(work, None, n_threads, 0)``: call ``work`` on each thread of torch's team, and wait for all."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    # Threads do not survive a fork, and OpenMP then waits for them for ever.
    if pid != _PID or not library.is_file():
        return None
    team = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
    if team is not None:
        team.argtypes, team.restype = [_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return team


_PID = os.getpid()


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="atlasvi-kernel", max_workers=os.cpu_count() or 1)


def n_threads(most: int) -> int:
    """Threads to use for work of ``most`` parts: as many as torch uses, at least 1."""
    return max(1, min(torch.get_num_threads(), most))


def in_parallel(function: Callable[..., None], n_items: int, *arguments: Any, parts: int) -> None:
    """Call ``function(part, start, stop, *arguments)`` for ``parts`` ranges that cover ``n_items``.

    The function must release the GIL. The calling thread takes part.
    """
    bounds = [part * n_items // parts for part in range(parts + 1)]
    if parts == 1:
        return function(0, 0, n_items, *arguments)
    left, errors = iter(range(parts)), []

    def work(_: None) -> None:
        # OpenMP may grant fewer threads than were asked for, so none has a part of its own.
        for part in left:
            try:
                function(part, bounds[part], bounds[part + 1], *arguments)
            except BaseException as error:  # C cannot pass it on: it is raised below
                errors.append(error)

    pid = os.getpid()
    team = _team(pid)
    if team is not None:
        team(_Work(work), None, parts, 0)
    else:
        others = [_pool(pid).submit(work, None) for _ in range(parts - 1)]
        work(None)
        for other in others:
            other.result()
    if errors:
        raise errors[0]


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 tensor of any content, in huge pages where the system grants them.

    numpy asks for them and torch does not. Of a large array that is written once, the first touch of its
    small pages costs several times what the writing does.
    """
    return torch.from_numpy(np.empty(shape, np.float32))
