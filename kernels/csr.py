"""Compressed sparse rows of counts: the one container that travels from the store to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

if TYPE_CHECKING:
    import scipy.sparse
    from numpy.typing import NDArray

_INTEGER = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64)
_FLOAT = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class CSR:
    """A sparse matrix of counts by rows (cells x genes), held as three torch tensors.

    Row ``b`` holds the columns ``indices[indptr[b]:indptr[b+1]]`` with the values ``data[...]`` there.
    Columns need not be sorted within a row and explicit zeros are allowed, but no column may stand
    twice in one row. The integer types may be as narrow as the values allow: kernels widen them.

    Args:
        indptr: ``(B + 1,)`` int64, offsets of the rows, from 0 to the number of entries.
        indices: ``(nnz,)`` any integer type, column of each entry, in ``[0, n_vars)``.
        data: ``(nnz,)`` any integer or float type, the counts.
        n_vars: number of columns (genes).

    Raises:
        ValueError: shapes or types that do not fit.

    Example:
        >>> import scipy.sparse as sp
        >>> CSR.from_scipy(sp.csr_matrix([[0, 2], [1, 0]])).shape
        (2, 2)
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_vars: int

    def __post_init__(self) -> None:
        """Check what can be checked without reading the entries."""
        if self.indptr.dtype != torch.int64 or self.indptr.dim() != 1 or len(self.indptr) < 1:
            raise ValueError(
                f"indptr must be (B + 1,) int64, is {tuple(self.indptr.shape)} {self.indptr.dtype}"
            )
        if self.indices.dtype not in _INTEGER:
            raise ValueError(f"indices must be of an integer type, are {self.indices.dtype}")
        if self.data.dtype not in _INTEGER + _FLOAT:
            raise ValueError(f"data must be of an integer or float type, is {self.data.dtype}")
        if self.indices.shape != self.data.shape or self.data.dim() != 1:
            raise ValueError(
                f"indices {tuple(self.indices.shape)} and data {tuple(self.data.shape)} must be one "
                "vector each, of the same length"
            )
        if not self.indptr.device == self.indices.device == self.data.device:
            raise ValueError(
                f"indptr is on {self.indptr.device}, indices on {self.indices.device}, data on "
                f"{self.data.device}; they must be on one device"
            )

    @property
    def n_obs(self) -> int:
        """Number of rows (cells)."""
        return len(self.indptr) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self.n_obs, self.n_vars

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return len(self.data)

    @property
    def device(self) -> torch.device:
        """Where the three tensors are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the three tensors."""
        return self.indptr.nbytes + self.indices.nbytes + self.data.nbytes

    @classmethod
    def from_numpy(cls, indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], n_vars: int) -> CSR:
        """Wrap numpy arrays; no copy but of an ``indptr`` that is not int64."""
        return cls(
            torch.from_numpy(np.ascontiguousarray(indptr, dtype=np.int64)),
            torch.from_numpy(np.ascontiguousarray(indices)),
            torch.from_numpy(np.ascontiguousarray(data)),
            int(n_vars),
        )

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> CSR:
        """From any scipy sparse matrix; duplicate entries are summed, as scipy means them."""
        csr = matrix.tocsr()
        if not csr.has_canonical_format:
            csr = csr.copy()
            csr.sum_duplicates()
        return cls.from_numpy(csr.indptr, csr.indices, csr.data, csr.shape[1])

    @classmethod
    def from_torch(cls, matrix: torch.Tensor) -> CSR:
        """From a torch tensor of layout ``sparse_csr`` or a dense one."""
        if matrix.layout == torch.strided and matrix.dim() == 2:
            filled = matrix != 0
            indptr = torch.zeros(len(matrix) + 1, dtype=torch.int64, device=matrix.device)
            torch.cumsum(filled.sum(1), 0, out=indptr[1:])
            return cls(indptr, filled.nonzero()[:, 1], matrix[filled], matrix.shape[1])
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise ValueError(f"expected a 2-D sparse_csr or dense tensor, got {matrix.layout}")
        return cls(
            matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values(), matrix.shape[1]
        )

    def numpy(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """``(indptr, indices, data)`` as numpy arrays that share memory."""
        return self.indptr.numpy(), self.indices.numpy(), self.data.numpy()

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """A scipy ``csr_matrix`` (its indices are widened to int32 or int64)."""
        import scipy.sparse

        indptr, indices, data = self.numpy()
        index_type = np.int64 if max(self.nnz, self.n_vars) > np.iinfo(np.int32).max else np.int32
        return scipy.sparse.csr_matrix(
            (data, indices.astype(index_type), indptr.astype(index_type)), shape=self.shape
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``(B, G)`` dense. For one minibatch only: never for an atlas."""
        out = torch.zeros(self.shape, dtype=dtype, device=self.device)
        out[self.row_index(), self.indices.long()] = self.data.to(dtype)
        return out

    def row_index(self) -> torch.Tensor:
        """``(nnz,)`` int64, the row of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.n_obs, device=self.device), self.indptr.diff(), output_size=self.nnz
        )

    def row_sums(self) -> torch.Tensor:
        """``(B,)`` float32, the total count of each row (summed in float64)."""
        if self.device.type == "cpu":  # four times as fast as torch's, and a minibatch asks each step
            sums = np.empty(self.n_obs, np.float32)
            _row_sums(self.indptr.numpy(), self.data.numpy(), sums)
            return torch.from_numpy(sums)
        return torch.segment_reduce(self.data.double(), "sum", offsets=self.indptr).float()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CSR:
        """The same matrix on another device."""
        if torch.device(device) == self.device:
            return self
        return CSR(
            self.indptr.to(device, non_blocking=non_blocking),
            self.indices.to(device, non_blocking=non_blocking),
            self.data.to(device, non_blocking=non_blocking),
            self.n_vars,
        )

    def pin_memory(self) -> CSR:
        """The same matrix in page-locked memory, from which a GPU copies without waiting; one there stays."""
        if self.device.type != "cpu":
            return self
        return CSR(self.indptr.pin_memory(), self.indices.pin_memory(), self.data.pin_memory(), self.n_vars)

    def row_range(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop`` as a view: their entries are not copied.

        Raises:
            IndexError: a range outside ``[0, n_obs]``.
        """
        if not 0 <= start <= stop <= self.n_obs:
            raise IndexError(f"rows {start} to {stop} asked of a CSR with {self.n_obs} rows")
        if stop - start == self.n_obs:
            return self  # else a GPU would be asked, and waited for
        indptr = self.indptr[start : stop + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        return CSR(indptr - first, self.indices[first:last], self.data[first:last], self.n_vars)

    def take_rows(self, rows: NDArray[np.int64]) -> CSR:
        """Rows in the order given (they may repeat), copied.

        Raises:
            IndexError: a row outside ``[0, n_obs)``.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_obs:
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a CSR with {self.n_obs} rows")
        indptr, indices, data = self.numpy()
        out_indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.diff(indptr)[rows], out=out_indptr[1:])
        out_indices = np.empty(out_indptr[-1], indices.dtype)
        out_data = np.empty(out_indptr[-1], data.dtype)
        _gather_rows(indptr, indices, data, rows, out_indptr, out_indices, out_data)
        return CSR.from_numpy(out_indptr, out_indices, out_data, self.n_vars)

    def take_columns(self, column_of: NDArray[np.int64], n_vars: int) -> CSR:
        """Columns renamed or left out: entry in column ``g`` moves to ``column_of[g]``, or is dropped at -1.

        Args:
            column_of: ``(G,)`` int64, new column of each old one, or -1; no two may share one.
            n_vars: number of columns of the result.
        """
        indptr, indices, data = self.numpy()
        dtype = np.uint16 if n_vars <= 1 << 16 else np.uint32
        column_of = np.ascontiguousarray(column_of, np.int64)
        indptr, indices, data = _map_columns(indptr, indices, data, column_of, np.empty(0, dtype))
        return CSR.from_numpy(indptr, indices, data, n_vars)

    def drop_zeros(self) -> CSR:
        """Without the explicit zeros."""
        if bool((self.data != 0).all()):
            return self
        return self.take_columns(np.arange(self.n_vars), self.n_vars)

    @staticmethod
    def concatenate(parts: list[CSR]) -> CSR:
        """Stack matrices of the same width, row after row.

        Raises:
            ValueError: no part, or widths that differ.
        """
        if not parts or len({p.n_vars for p in parts}) != 1:
            raise ValueError(f"need parts of one width, got {[p.n_vars for p in parts]}")
        if len(parts) == 1:
            return parts[0]
        arrays = [p.numpy() for p in parts]
        offsets = np.cumsum([0] + [p.nnz for p in parts])
        indptr = np.concatenate(
            [arrays[0][0][:1]] + [a[0][1:] + o for a, o in zip(arrays, offsets, strict=False)]
        )
        return CSR.from_numpy(
            indptr,
            np.concatenate([a[1] for a in arrays]),
            np.concatenate([a[2] for a in arrays]),
            parts[0].n_vars,
        )


@numba.njit(nogil=True, cache=True)
def _row_sums(indptr, data, sums):  # type: ignore[no-untyped-def]
    for b in range(len(sums)):
        total = 0.0
        for k in range(indptr[b], indptr[b + 1]):
            total += np.float64(data[k])
        sums[b] = total


@numba.njit(nogil=True, cache=True)
def _gather_rows(indptr, indices, data, rows, out_indptr, out_indices, out_data):  # type: ignore[no-untyped-def]
    for b in range(len(rows)):
        start, out_start = indptr[rows[b]], out_indptr[b]
        for k in range(out_indptr[b + 1] - out_start):
            out_indices[out_start + k] = indices[start + k]
            out_data[out_start + k] = data[start + k]


@numba.njit(nogil=True, cache=True)
def _map_columns(indptr, indices, data, column_of, like):  # type: ignore[no-untyped-def]
    n_kept = 0
    for k in range(len(indices)):
        if data[k] != 0 and column_of[indices[k]] >= 0:
            n_kept += 1
    out_indptr = np.zeros(len(indptr), np.int64)
    out_indices = np.empty(n_kept, like.dtype)
    out_data = np.empty(n_kept, data.dtype)
    n = 0
    for b in range(len(indptr) - 1):
        for k in range(indptr[b], indptr[b + 1]):
            column = column_of[indices[k]]
            if data[k] != 0 and column >= 0:
                out_indices[n] = column
                out_data[n] = data[k]
                n += 1
        out_indptr[b + 1] = n
    return out_indptr, out_indices, out_data
