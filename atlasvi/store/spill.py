"""Sparse matrices in temporary files, put into row order on disk: memory does not grow with cells.

Entries arrive in any order, are appended to the file of their bucket (a range of rows), and each bucket
in turn, small enough for memory, is put in order into flat files of indices and values.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numba
import numpy as np
from numpy.typing import NDArray

BUCKET_ENTRIES = 1 << 20
MAX_BUCKETS = 1024


class FileArray:
    """A one-dimensional array in a plain binary file, read by ranges and never mapped into memory."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path, self.dtype = path, np.dtype(dtype)
        self._n = path.stat().st_size // self.dtype.itemsize
        self.shape = (self._n,)

    def __len__(self) -> int:
        return int(self._n)

    def __getitem__(self, rows: slice | EllipsisType) -> NDArray[Any]:
        start, stop, _ = (slice(None) if rows is Ellipsis else rows).indices(self._n)
        return np.fromfile(self._path, self.dtype, max(0, stop - start), offset=start * self.dtype.itemsize)


def append(file: BinaryIO, array: NDArray[Any]) -> None:
    """Write an array's bytes. ``array.tofile`` does not say that it was the disk that was full."""
    if len(array):
        file.write(array.view(np.uint8).data)


def disk_array(path: Path, n: int, dtype: Any) -> NDArray[Any]:
    """An array of zeros that lives in a file: its pages are the system's to write out, not the heap's."""
    if n == 0:
        return np.zeros(0, dtype)
    zeros = np.zeros(min(n, 1 << 16), dtype)
    with path.open("wb") as file:
        # Written, not only sized: a full disk is then an error here and not a bus error at some later store.
        for start in range(0, n, len(zeros)):
            append(file, zeros[: n - start])
    return np.memmap(path, dtype=dtype, mode="r+", shape=(n,))


class Spill:
    """An external sort of entries by row.

    Args:
        folder: for the temporary files; must exist and be empty.
        n_rows: number of rows.
        n_entries: how many entries to expect (a guess is enough: it sets the number of buckets).
        dtype: of the values.
    """

    def __init__(self, folder: Path, n_rows: int, n_entries: int, dtype: Any) -> None:
        self._folder, self._n_rows = folder, n_rows
        buckets = max(1, min(MAX_BUCKETS, n_rows, -(-n_entries // BUCKET_ENTRIES)))
        self._per_bucket = max(1, -(-n_rows // buckets))
        self.n_buckets = max(1, -(-n_rows // self._per_bucket))
        self._record = np.dtype([("row", np.uint32), ("column", np.uint32), ("value", dtype)])
        self._locks = [threading.Lock() for _ in range(16)]

    def add(self, rows: NDArray[np.int64], columns: NDArray[Any], values: NDArray[Any]) -> None:
        """Append entries, in any order, from any thread."""
        records = np.empty(len(rows), self._record)
        ends = np.zeros(self.n_buckets + 1, np.int64)
        _scatter(
            rows, columns, values, self._per_bucket, ends,
            records["row"], records["column"], records["value"],
        )  # fmt: skip
        for b in np.flatnonzero(np.diff(ends)).tolist():
            with self._locks[b % len(self._locks)], self._path(b).open("ab") as file:
                append(file, records[ends[b] : ends[b + 1]])

    def rows_per_bucket(self) -> list[int]:
        """Number of rows of each bucket."""
        starts = range(0, self._n_rows, self._per_bucket)
        return [min(self._per_bucket, self._n_rows - start) for start in starts]

    def begin_merge(self, indptr: NDArray[np.int64]) -> tuple[FileArray, FileArray]:
        """Make the flat files; `merge` fills them.

        Args:
            indptr: offsets of the rows, from the number of entries added to each.
        """
        self._indptr = indptr
        paths = self._folder / "indices.bin", self._folder / "values.bin"
        dtypes = np.dtype(np.uint32), self._record["value"]
        for path, dtype in zip(paths, dtypes, strict=True):
            with path.open("wb") as file:
                file.truncate(int(indptr[-1]) * dtype.itemsize)
        return FileArray(paths[0], dtypes[0]), FileArray(paths[1], dtypes[1])

    def merge(self, bucket: int) -> None:
        """Put one bucket in order and remove its file."""
        first = bucket * self._per_bucket
        indptr = np.asarray(self._indptr[first : min(first + self._per_bucket, self._n_rows) + 1])
        path = self._path(bucket)
        if not path.exists():
            return
        records = np.fromfile(path, self._record)
        n = int(indptr[-1] - indptr[0])
        if n != len(records):
            raise OSError(f"{path} holds {len(records)} entries of {n}: was it changed while in use?")
        columns, values = np.empty(n, np.uint32), np.empty(n, self._record["value"])
        _place(records["row"], records["column"], records["value"], indptr[:-1] - indptr[0], columns, values)
        for name, array in (("indices.bin", columns), ("values.bin", values)):
            with (self._folder / name).open("r+b") as file:
                file.seek(int(indptr[0]) * array.dtype.itemsize)
                append(file, array)
        os.remove(path)

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:04d}.bin"


@numba.njit(nogil=True, cache=True)
def _scatter(rows, columns, values, per_bucket, ends, out_rows, out_columns, out_values):  # type: ignore[no-untyped-def]
    """Entries by bucket, in the order they came within each; ``ends[b]`` is where bucket b begins."""
    for k in range(len(rows)):
        ends[rows[k] // per_bucket + 1] += 1
    for b in range(len(ends) - 1):
        ends[b + 1] += ends[b]
    cursor = ends[:-1].copy()
    for k in range(len(rows)):
        bucket = rows[k] // per_bucket
        at = cursor[bucket]
        out_rows[at] = rows[k] - bucket * per_bucket
        out_columns[at] = columns[k]
        out_values[at] = values[k]
        cursor[bucket] = at + 1


@numba.njit(nogil=True, cache=True)
def _place(rows, columns, values, cursor, out_columns, out_values):  # type: ignore[no-untyped-def]
    for k in range(len(rows)):
        at = cursor[rows[k]]
        out_columns[at] = columns[k]
        out_values[at] = values[k]
        cursor[rows[k]] = at + 1
