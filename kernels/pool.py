"""Rows gathered from several matrices at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from .addresses import copy_bytes, pointer
from .csr import CSR
from .parallel import compiled, in_parallel, n_threads

# Bytes of indices: a tenth of a millisecond of copying.
_WORTH_A_THREAD = 1 << 19
_KEPT = 3  # addresses a matrix: of indptr, indices and data


class RowPool:
    """Some CSR matrices of the same columns, from which rows are taken in any order into a new one.

    `CSR.take_rows` reads one matrix. A minibatch that draws a few rows from each of dozens of decoded blocks
    would spend its time in calls; here it is one compiled loop over addresses.

    Args:
        n_vars: number of columns.

    Example:
        >>> import torch
        >>> pool = RowPool(2)
        >>> slots = [pool.add(CSR.from_torch(torch.tensor([[k, 0], [0, k]]))) for k in (1, 2)]
        >>> pool.take(np.array([slots[1], slots[0]]), np.array([1, 0])).to_dense().tolist()
        [[0.0, 2.0], [1.0, 0.0]]
    """

    def __init__(self, n_vars: int) -> None:
        self.n_vars = n_vars
        self._arrays: list[tuple[NDArray[Any], ...] | None] = []
        self._addresses = np.zeros((0, _KEPT), np.uint64)
        self._types: tuple[np.dtype[Any], np.dtype[Any]] | None = None

    def __len__(self) -> int:
        """Number of matrices held."""
        return sum(arrays is not None for arrays in self._arrays)

    def add(self, counts: CSR) -> int:
        """Hold a matrix, and return the number by which `take` and `drop` know it.

        Raises:
            ValueError: it has another number of columns.
        """
        if counts.n_vars != self.n_vars:
            raise ValueError(f"a matrix of {counts.n_vars} columns among those of {self.n_vars}")
        indptr, indices, data = counts.numpy()
        wanted = (indices.dtype, data.dtype)
        if self._types is not None and wanted != self._types:
            # One loop copies bytes of one width: all are held in a type that has room for each.
            wanted = (np.result_type(wanted[0], self._types[0]), np.result_type(wanted[1], self._types[1]))
            for slot, held in enumerate(self._arrays):
                if held is not None:
                    self._hold(slot, held[0], held[1].astype(wanted[0]), held[2].astype(wanted[1]))
        self._types = wanted
        if None in self._arrays:
            slot = self._arrays.index(None)
        else:
            slot = len(self._arrays)
            self._arrays.append(None)
            self._addresses = np.concatenate([self._addresses, np.zeros((1, _KEPT), np.uint64)])
        self._hold(slot, indptr, indices.astype(wanted[0], copy=False), data.astype(wanted[1], copy=False))
        return slot

    def drop(self, slot: int) -> None:
        """Let go of a matrix."""
        self._arrays[slot] = None
        self._addresses[slot] = 0

    def take(self, slots: NDArray[np.int64], rows: NDArray[np.int64], *, alone: bool = True) -> CSR:
        """Row ``rows[i]`` of matrix ``slots[i]``, for all i, copied.

        Args:
            slots: ``(n,)``, numbers that `add` gave.
            rows: ``(n,)``, of these matrices.
            alone: whether to use all threads; a caller beside whom others read is better off with its own.

        Raises:
            IndexError: a number that no matrix has, or a row outside it.
        """
        slots, rows = np.ascontiguousarray(slots, np.int64), np.ascontiguousarray(rows, np.int64)
        n_rows = np.array([-1 if a is None else len(a[0]) - 1 for a in self._arrays], np.int64)
        if len(slots) and not 0 <= slots.min() <= slots.max() < len(n_rows):
            raise IndexError(f"matrices {slots.min()} to {slots.max()} asked of a pool with {len(n_rows)}")
        wrong = np.flatnonzero((rows < 0) | (rows >= n_rows[slots]))
        if len(wrong):
            slot, row = int(slots[wrong[0]]), int(rows[wrong[0]])
            raise IndexError(f"row {row} asked of matrix {slot}, which has {max(int(n_rows[slot]), 0)}")
        out_indptr = np.zeros(len(rows) + 1, np.int64)
        _count(self._addresses, slots, rows, out_indptr)
        index_type, data_type = self._types or (np.dtype(np.int32), np.dtype(np.float32))
        indices, data = np.empty(out_indptr[-1], index_type), np.empty(out_indptr[-1], data_type)
        in_parallel(
            _copy, len(rows), self._addresses, slots, rows, out_indptr, np.uint64(indices.ctypes.data),
            np.uint64(data.ctypes.data), index_type.itemsize, data_type.itemsize,
            parts=n_threads(indices.nbytes // _WORTH_A_THREAD) if alone else 1,
        )  # fmt: skip
        return CSR.from_numpy(out_indptr, indices, data, self.n_vars)

    def _hold(self, slot: int, *arrays: NDArray[Any]) -> None:
        kept = tuple(np.ascontiguousarray(a) for a in arrays)
        self._arrays[slot] = kept
        self._addresses[slot] = [a.ctypes.data for a in kept]


@compiled()
def _count(addresses, slots, rows, out_indptr):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        indptr = carray(pointer(addresses[slots[i], 0]), (rows[i] + 2,), np.int64)
        out_indptr[i + 1] = out_indptr[i] + indptr[rows[i] + 1] - indptr[rows[i]]


@compiled()
def _copy(  # type: ignore[no-untyped-def]
    part, start, stop, addresses, slots, rows, out_indptr, indices, data, index_size, data_size
):
    for i in range(start, stop):
        slot = slots[i]
        first = carray(pointer(addresses[slot, 0]), (rows[i] + 2,), np.int64)[rows[i]]
        n, to = out_indptr[i + 1] - out_indptr[i], out_indptr[i]
        for k, out, size in ((1, indices, index_size), (2, data, data_size)):
            copy_bytes(out + np.uint64(to * size), addresses[slot, k] + np.uint64(first * size), n * size)
