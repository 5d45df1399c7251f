"""Compiled loops on several threads, without a second OpenMP runtime.

numba's own parallel loops keep a pool of threads that spin while they wait, beside torch's pool that
does the same: on few cores each takes the other's time, several-fold on a busy machine. Python threads
that run compiled code without the GIL cost about 20 us a call and nothing in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(thread_name_prefix="atlasvi-kernel", max_workers=os.cpu_count() or 1)


def n_threads(most: int) -> int:
    """Threads to use for work of ``most`` parts: as many as torch uses, at least 1."""
    return max(1, min(torch.get_num_threads(), most))


def in_parallel(function: Callable[..., None], n_items: int, *arguments: Any, parts: int) -> None:
    """Call ``function(part, start, stop, *arguments)`` for ``parts`` ranges that cover ``n_items``.

    The function must release the GIL. The calling thread does one part itself.
    """
    bounds = [part * n_items // parts for part in range(parts + 1)]
    others = [
        _pool(os.getpid()).submit(function, part, bounds[part], bounds[part + 1], *arguments)
        for part in range(1, parts)
    ]
    function(0, bounds[0], bounds[1], *arguments)
    for other in others:
        other.result()


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 tensor of any content, in huge pages where the system grants them.

    numpy asks for them and torch does not. Of a large array that is written once, the first touch of its
    small pages costs several times what the writing does.
    """
    return torch.from_numpy(np.empty(shape, np.float32))
