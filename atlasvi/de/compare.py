"""Compiled comparisons of decoded rows, in stretches of genes on several threads.

``rho`` is (R, G) float32; pair i of comparison k is of its rows ``one[k, i]`` and ``two[k, i]``.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from atlasvi_kernels.math_cpu import log32, vector_code
from atlasvi_kernels.parallel import in_parallel, n_threads

# Genes at a time: what is added to stays in the nearest cache.
_TILE = 512
_LANES = 16
_LN2 = np.float32(math.log(2))


def _compiled(function: Any) -> Any:
    return numba.njit(
        fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy", nogil=True, cache=True
    )(function)


def over_genes(function: Any, n_vars: int, *arguments: Any) -> None:
    """Call a compiled ``function(part, first gene, last gene, *arguments)`` on several threads."""
    in_parallel(function, n_vars, *arguments, parts=n_threads(max(1, n_vars // 64)))


@_compiled
def count_higher(part, start, stop, rho, one, two, counts):  # type: ignore[no-untyped-def]
    """Add to ``counts`` (K, G) int32 the pairs whose first side is higher."""
    vector_code()
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        for k in range(len(one)):
            count = counts[k, first:last]
            for i in range(one.shape[1]):
                a, b = rho[one[k, i], first:last], rho[two[k, i], first:last]
                for g in range(last - first):
                    count[g] += np.int32(a[g] > b[g])


@_compiled
def add_rho(part, start, stop, rho, pools, sums):  # type: ignore[no-untyped-def]
    """Add rho of each row to ``sums`` (P, G) float64 of its pool."""
    vector_code()
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        for r in range(len(rho)):
            row, total = rho[r, first:last], sums[pools[r], first:last]
            for g in range(last - first):
                total[g] += row[g]


@_compiled
def keep_highest(part, start, stop, rho, rows, highest):  # type: ignore[no-untyped-def]
    """Raise ``highest`` (K, G) float32 to the largest rho among ``rows`` (K, q)."""
    vector_code()
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        for k in range(len(rows)):
            top = highest[k, first:last]
            for i in range(rows.shape[1]):
                row = rho[rows[k, i], first:last]
                for g in range(last - first):
                    top[g] = row[g] if row[g] > top[g] else top[g]


@_compiled
def add_change(part, start, stop, rho, one, two, offset, sums):  # type: ignore[no-untyped-def]
    """Add to ``sums`` (K, G) float64 log2((a + c) / (b + c)) of each pair, with ``c = offset[k]``."""
    vector_code()
    change = np.empty(_TILE, np.float32)
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        for k in range(len(one)):
            total, c = sums[k, first:last], offset[k]
            for i in range(one.shape[1]):
                a, b = rho[one[k, i], first:last], rho[two[k, i], first:last]
                for g in range(last - first):
                    change[g] = log32((a[g] + c) / (b[g] + c)) / _LN2
                for g in range(last - first):
                    total[g] += change[g]


@_compiled
def take_change(part, start, stop, rho, one, two, offset, factor, at, higher, lower, change):  # type: ignore[no-untyped-def]
    """Count pairs beyond a threshold, and write down the change of every pair.

    With ``c = offset[k]``, ``higher`` and ``lower`` (K, G) int32 count ``a + c >= factor[k] (b + c)`` and
    ``(a + c) factor[k] < b + c``; ``change`` (K, G, m) float32 takes log2 of the ratio with a thousandth of
    c from pair ``at`` on.
    """
    vector_code()
    lanes = np.empty(_LANES, np.float32)
    for k in range(len(one)):
        c, small, f = offset[k], offset[k] * np.float32(1e-3), factor[k]
        for first in range(start, stop, _LANES):
            n = min(_LANES, stop - first)
            plus, minus = higher[k, first : first + n], lower[k, first : first + n]
            for i in range(one.shape[1]):
                a, b = rho[one[k, i], first : first + n], rho[two[k, i], first : first + n]
                for g in range(n):
                    x, y = a[g], b[g]
                    plus[g] += np.int32(x + c >= f * (y + c))
                    minus[g] += np.int32((x + c) * f < y + c)
                    lanes[g] = log32((x + small) / (y + small)) / _LN2
                for g in range(n):
                    change[k, first + g, at + i] = lanes[g]


@numba.njit(nogil=True, cache=True)
def describe(part, start, stop, change, mean, std, low, high):  # type: ignore[no-untyped-def]
    """Mean, standard deviation (n), lowest and highest of each gene's row of ``change`` (G, m)."""
    m = change.shape[1]
    for g in range(start, stop):
        total, lowest, highest = 0.0, np.inf, -np.inf
        for i in range(m):
            x = np.float64(change[g, i])
            total += x
            lowest, highest = min(lowest, x), max(highest, x)
        centre, square = total / m, 0.0
        for i in range(m):
            square += (change[g, i] - centre) ** 2
        mean[g], std[g], low[g], high[g] = centre, math.sqrt(square / m), lowest, highest


def median(change: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(G,)`` of each row of ``change`` (G, m), which is put into another order."""
    out = np.empty(len(change))
    m = change.shape[1]

    def part(_: int, start: int, stop: int) -> None:
        block = change[start:stop]
        block.partition([(m - 1) // 2, m // 2], axis=1)
        out[start:stop] = block[:, [(m - 1) // 2, m // 2]].mean(1, dtype=np.float64)

    in_parallel(part, len(change), parts=n_threads(max(1, len(change) // 64)))
    return out
