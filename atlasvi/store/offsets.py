"""The offsets of the rows of a matrix on disk, at two bytes a row where an array takes eight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = 64
# As the chunks that ingest writes, so that each is decoded once; a multiple of the step.
_PIECE = 1 << 18


class Offsets:
    """A read-only ``(n_rows + 1,)`` array of int64, held as the length of each row and a sum every 64 rows.

    They are held for every cell as long as a store is open. It does of an array what its users need:
    ``len``, integers, slices and ``np.searchsorted``; ``np.asarray`` gives the array.

    Args:
        indptr: the offsets; anything with a shape that is read by slices.

    Example:
        >>> offsets = Offsets(np.array([0, 3, 3, 7]))
        >>> int(offsets[-1]), offsets[1:].tolist(), int(np.searchsorted(offsets, 4, side="right"))
        (7, [3, 3, 7], 3)
    """

    dtype: np.dtype[np.int64] = np.dtype(np.int64)

    def __init__(self, indptr: Any) -> None:
        self._n = int(indptr.shape[0])
        self.shape = (self._n,)
        self.falls = False
        lengths: list[NDArray[Any]] = []
        sums: list[NDArray[np.int64]] = []
        before = np.zeros(0, np.int64)
        for start in range(0, self._n, _PIECE):
            piece = np.asarray(indptr[start : start + _PIECE], np.int64)
            length = np.diff(piece, prepend=before)
            before = piece[-1:].copy()
            self.falls = self.falls or bool(length.min(initial=0) < 0)
            lengths.append(length.astype(np.min_scalar_type(int(length.max(initial=0)))))
            sums.append(piece[::_STEP].copy())
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.uint8)
        self._sums = np.concatenate(sums) if sums else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, rows: int | slice) -> Any:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self._n)
            if step != 1:
                return np.asarray(self)[rows]
            return self._range(start, stop)
        row = rows + self._n if rows < 0 else rows
        if not 0 <= row < self._n:
            raise IndexError(f"row {rows} asked of {self._n} offsets")
        return self._range(row, row + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._range(0, self._n).astype(dtype or np.int64, copy=False)

    def _range(self, start: int, stop: int) -> NDArray[np.int64]:
        if stop <= start:
            return np.zeros(0, np.int64)
        block = start // _STEP
        out = np.empty(stop - start, np.int64)
        out[0] = self._sums[block] + self._lengths[block * _STEP : start].sum(dtype=np.int64)
        np.cumsum(self._lengths[start : stop - 1], dtype=np.int64, out=out[1:])
        out[1:] += out[0]
        return out

    def searchsorted(self, value: Any, side: Any = "left", sorter: None = None) -> Any:
        """Where ``value`` belongs, as `numpy.searchsorted` says it."""
        if np.ndim(value):
            return np.array([self.searchsorted(one, side) for one in value], np.intp)
        first = max(int(np.searchsorted(self._sums, value, side)) - 1, 0) * _STEP
        near = self._range(first, min(first + _STEP, self._n))
        return np.intp(first + np.searchsorted(near, value, side))


__all__ = ["Offsets"]
