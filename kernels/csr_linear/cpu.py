"""The numba backend: cells in parallel forward, slices of hidden units in parallel backward."""

from __future__ import annotations

from typing import Any

import numba
from numpy.typing import NDArray

_FLAGS = {"contract", "nsz", "nnan", "ninf"}


def forward(indptr: NDArray, indices: NDArray, values: NDArray, weight: NDArray, out: NDArray) -> None:
    """``out[b] = sum_k values[k] * weight[indices[k]]`` over the entries k of row b."""
    _forward(indptr, indices, values, weight, out)


def backward(indptr: NDArray, indices: NDArray, values: NDArray, upstream: NDArray, g_weight: NDArray) -> None:
    """``g_weight[indices[k]] += values[k] * upstream[b]``; ``g_weight`` comes in as zeros."""
    _backward(indptr, indices, values, upstream, g_weight, min(numba.get_num_threads(), g_weight.shape[1]))


def _njit(**options: Any) -> Any:
    return numba.njit(error_model="numpy", nogil=True, cache=True, **options)


@_njit(fastmath=_FLAGS)
def _add(out, value, row):  # type: ignore[no-untyped-def]
    for h in range(len(out)):
        out[h] += value * row[h]


@_njit(parallel=True)
def _forward(indptr, indices, values, weight, out):  # type: ignore[no-untyped-def]
    for b in numba.prange(len(indptr) - 1):
        out[b, :] = 0
        for k in range(indptr[b], indptr[b + 1]):
            _add(out[b], values[k], weight[indices[k]])


@_njit(parallel=True)
def _backward(indptr, indices, values, upstream, g_weight, n_slices):  # type: ignore[no-untyped-def]
    # Two cells may share a gene: each thread owns some hidden units of all genes, so none collide.
    n_hidden = g_weight.shape[1]
    for index in numba.prange(n_slices):
        part = numba.int64(index)  # numba makes the loop's own variable unsigned
        lo, hi = part * n_hidden // n_slices, (part + 1) * n_hidden // n_slices
        for b in range(len(indptr) - 1):
            for k in range(indptr[b], indptr[b + 1]):
                _add(g_weight[indices[k], lo:hi], values[k], upstream[b, lo:hi])
