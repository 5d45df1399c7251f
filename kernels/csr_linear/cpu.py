"""The numba backend: cells in parallel forward, slices of hidden units in parallel backward."""

from __future__ import annotations

from typing import Any

import numba
from numpy.typing import NDArray

from ..parallel import in_parallel, n_threads

_FLAGS = {"contract", "nsz", "nnan", "ninf"}


def forward(indptr: NDArray, indices: NDArray, values: NDArray, weight: NDArray, out: NDArray) -> None:
    """``out[b] = sum_k values[k] * weight[indices[k]]`` over the entries k of row b."""
    n_obs = len(indptr) - 1
    in_parallel(_forward, n_obs, indptr, indices, values, weight, out, parts=n_threads(n_obs))


def backward(
    indptr: NDArray, indices: NDArray, values: NDArray, upstream: NDArray, g_weight: NDArray
) -> None:
    """``g_weight[indices[k]] += values[k] * upstream[b]``; ``g_weight`` comes in as zeros."""
    n_hidden = g_weight.shape[1]
    in_parallel(_backward, n_hidden, indptr, indices, values, upstream, g_weight, parts=n_threads(n_hidden))


def _njit(**options: Any) -> Any:
    return numba.njit(error_model="numpy", nogil=True, cache=True, **options)


@_njit(fastmath=_FLAGS)
def _add(out, value, row):  # type: ignore[no-untyped-def]
    for h in range(len(out)):
        out[h] += value * row[h]


@_njit()
def _forward(part, first, last, indptr, indices, values, weight, out):  # type: ignore[no-untyped-def]
    for b in range(first, last):
        out[b, :] = 0
        for k in range(indptr[b], indptr[b + 1]):
            _add(out[b], values[k], weight[indices[k]])


@_njit()
def _backward(part, first, last, indptr, indices, values, upstream, g_weight):  # type: ignore[no-untyped-def]
    # Two cells may share a gene: each thread owns some hidden units of all genes, so none collide.
    for b in range(len(indptr) - 1):
        for k in range(indptr[b], indptr[b + 1]):
            _add(g_weight[indices[k], first:last], values[k], upstream[b, first:last])
