"""A matrix stored by genes (CSC), put into rows in temporary files: memory does not grow with cells."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import CorruptError
from atlasvi.store.rows import SparseRows, member, plain, reading
from atlasvi.store.spill import Spill, disk_array
from atlasvi_kernels import CSR

logger = logging.getLogger(__name__)

PIECE = 1 << 18


class ColumnRows:
    """A CSC matrix on disk as rows.

    It is sorted by cells when rows, or their offsets, are first asked for: into temporary files that `close`
    removes.

    Args:
        node: an HDF5 or Zarr group with ``indptr``, ``indices`` and ``data``.
        place: file and matrix, for errors.
        scratch: folder for temporary files; by default the system's.
    """

    def __init__(self, node: Any, place: str, scratch: Path | None) -> None:
        self._place, self._scratch = place, scratch
        self.shape = int(node.attrs["shape"][0]), int(node.attrs["shape"][1])
        self._indices, self._data = member(node, "indices"), member(node, "data")
        with reading(place, 0, self.shape[0]):
            self._starts = np.asarray(node["indptr"][...], np.int64)
        lengths = int(self._indices.shape[0]), int(self._data.shape[0])
        ends = self._starts[[0, -1]].tolist() if len(self._starts) == self.shape[1] + 1 else None
        if ends != [0, lengths[0]] or lengths[0] != lengths[1] or (np.diff(self._starts) < 0).any():
            raise CorruptError(
                f"{place}: indptr does not fit {self.shape[1]} genes and {lengths[0]} entries; the file is "
                "damaged, write it again"
            )
        self._rows: SparseRows | None = None
        self._folder: Path | None = None
        self._lock = threading.Lock()

    @property
    def indptr(self) -> Any:
        """Offsets of the rows; asking sorts the matrix."""
        return self._sorted().indptr

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        return self._sorted().read(start, stop)

    def values(self, n: int) -> Iterator[NDArray[Any]]:
        """Up to ``n`` values at a time from three places, without sorting."""
        n_all = int(self._data.shape[0])
        for start in sorted({0, max(0, (n_all - n) // 2), max(0, n_all - n)}):
            with reading(self._place, 0, self.shape[0]):
                some = np.asarray(self._data[start : start + n])
            yield plain(some, self._place)

    def close(self) -> None:
        """Remove the temporary files."""
        with self._lock:
            self._remove()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
        self._folder = self._rows = None

    def _sorted(self) -> SparseRows:
        with self._lock:
            if self._rows is None:
                logger.info("%s is stored by genes: putting it into the order of cells first", self._place)
                self._folder = Path(tempfile.mkdtemp(prefix="atlasvi-csc-", dir=self._scratch))
                try:
                    self._rows = self._sort(self._folder)
                except BaseException:
                    self._remove()
                    raise
            return self._rows

    def _sort(self, folder: Path) -> SparseRows:
        n_obs, n_vars = self.shape
        dtype = plain(np.zeros(0, self._data.dtype), self._place).dtype
        indptr = disk_array(folder / "indptr.bin", n_obs + 1, np.int64)
        spill = Spill(folder, n_obs, int(self._starts[-1]), dtype)
        for rows, columns, values in self._entries():
            _count(rows, indptr)
            spill.add(rows, columns, values)
        np.cumsum(indptr, out=indptr)
        indices, data = spill.begin_merge(indptr)
        for bucket in range(spill.n_buckets):
            spill.merge(bucket)
        return SparseRows(indptr, indices, data, n_vars, self._place)

    def _entries(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]]:
        """Rows, columns and values, a piece at a time: whole chunks, so that none is decoded twice."""
        chunk = max(1, *((array.chunks or (1,))[0] for array in (self._indices, self._data)))
        step = -(-PIECE // chunk) * chunk
        for start in range(0, int(self._starts[-1]), step):
            stop = min(start + step, int(self._starts[-1]))
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            last = int(np.searchsorted(self._starts, stop, side="left"))
            with reading(self._place, 0, self.shape[0]):
                rows = np.asarray(self._indices[start:stop]).astype(np.int64)
                values = plain(np.asarray(self._data[start:stop]), self._place)
            if not 0 <= rows.min() <= rows.max() < self.shape[0]:
                raise CorruptError(
                    f"{self._place}: a row outside 0 to {self.shape[0] - 1} in genes {first} to {last - 1}; "
                    "the file is damaged, write it again"
                )
            ends: NDArray[np.int64] = np.clip(self._starts[first : last + 1], start, stop)
            yield rows, np.repeat(np.arange(first, last), np.diff(ends)), values


@numba.njit(nogil=True, cache=True)
def _count(rows, indptr):  # type: ignore[no-untyped-def]
    for k in range(len(rows)):
        indptr[rows[k] + 1] += 1


__all__ = ["ColumnRows"]
