"""Rows of counts between the check and the writing: in memory, in types as narrow as each row allows.

Where they do not fit, what memory holds is put into the order of the atlas and written behind one file, as a
run, and memory is used again. A shard, which is a range of rows, is then a range of each run: it is read in
one piece a run, and no row is written twice.

A row is a number of 32-bit words: its counts, in 1, 2 or 4 bytes each, then its columns.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from atlasvi.store.layout import index_dtype
from atlasvi.store.spill import append, disk_array

Words: TypeAlias = NDArray[np.uint32]

_WORD = 4
_WRITE_WORDS = 1 << 18


@dataclass
class _Slab:
    """A part of memory that one thread at a time fills, from ``end`` on; all in words."""

    start: int
    stop: int
    end: int
    places: list[NDArray[np.int64]] = field(default_factory=list)


class KeptRows:
    """Rows that are added in any order, and read in theirs when all are there.

    Args:
        scratch: folder for temporary files.
        shape: ``(n_obs, n_vars)``.
        n_bytes: of memory; it is taken as it fills, and is at least what a few rows may need.
        workers: threads that add.
        spills: write a run when memory is full; else `add` says so.
        ahead: write one already when memory is half full, so that no thread waits: where it will not do.
    """

    def __init__(
        self,
        scratch: Path,
        shape: tuple[int, int],
        n_bytes: int,
        workers: int,
        *,
        spills: bool,
        ahead: bool = False,
    ) -> None:
        n_obs, n_vars = shape
        self._index = index_dtype(n_vars)
        longest = 2 + n_vars * (_WORD + self._index.itemsize) // _WORD
        n_slabs = 2 * workers + 8  # of which each thread fills one
        size = max(n_bytes // _WORD // n_slabs, longest)
        self._memory: Words = np.empty(n_slabs * size, np.uint32)
        self._free = [_Slab(k * size, (k + 1) * size, k * size) for k in range(n_slabs)]
        self._open: list[_Slab] = []
        self._full: list[_Slab] = []
        self._full_enough = n_slabs // 2 if spills and ahead else n_slabs + 1
        self._changed, self._is_spilling, self._reading = threading.Condition(), False, threading.local()
        # Of each row: its word in the file or, inverted, in memory; its words; the bytes of a count.
        self._where = disk_array(scratch / "rows-where.bin", n_obs, np.int64)
        self._sizes = disk_array(scratch / "rows-sizes.bin", n_obs, np.uint32)
        self._widths = disk_array(scratch / "rows-widths.bin", n_obs, np.uint8)
        self._file = scratch / "rows.bin" if spills else None
        self._runs: list[int] = []  # first word of each
        self._end = 0
        self._buffer: Words = np.empty(max(_WRITE_WORDS, longest) if spills else 0, np.uint32)

    @property
    def bytes_on_disk(self) -> int:
        """Of the runs."""
        return self._end * _WORD

    def add(
        self,
        places: slice | NDArray[np.int64],
        indptr: NDArray[np.int64],
        columns: NDArray[np.uint32],
        counts: NDArray[np.uint32],
    ) -> bool:
        """Keep rows; from any thread.

        Args:
            places: where they stand in the atlas.
            indptr: ``(n + 1,)``, their offsets.
            columns: of the entries.
            counts: of the entries.

        Returns:
            Whether there was room.
        """
        n, begin = len(indptr) - 1, 0
        places = np.arange(places.start, places.stop) if isinstance(places, slice) else np.asarray(places)
        widths, sizes = np.empty(n, np.uint8), np.empty(n, np.uint32)
        _measure(indptr, counts, self._index.itemsize, widths, sizes)
        self._widths[places], self._sizes[places] = widths, sizes
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        while begin < n:
            slab = self._take(int(sizes[begin]))
            if slab is None:
                return False
            try:
                room = slab.stop - slab.end
                stop = int(np.searchsorted(ends, ends[begin] + room, side="right")) - 1
                at = slab.end + ends[begin:stop] - ends[begin]
                _pack(indptr[begin : stop + 1], columns, counts, widths[begin:stop], at, *self._views())
                self._where[places[begin:stop]] = ~at
                slab.places.append(places[begin:stop])
                slab.end += int(ends[stop] - ends[begin])
            finally:
                self._put(slab)
            begin = stop
        return True

    def fill(
        self,
        start: int,
        offsets: NDArray[np.int64],
        begin: int,
        indices: NDArray[Any],
        data: NDArray[Any],
    ) -> None:
        """Read entries of rows from ``start`` on, from entry ``begin`` of the atlas, to fill the arrays.

        Args:
            start: first row.
            offsets: ``(n + 1,)``, where in the atlas the entries of rows from ``start`` on begin.
            begin: first entry.
            indices: to fill.
            data: to fill.
        """
        rows = slice(start, start + len(offsets) - 1)
        where, widths = np.asarray(self._where[rows]), np.asarray(self._widths[rows])
        has_some = np.diff(offsets) > 0
        here = np.flatnonzero(has_some & (where < 0))
        _unpack(here, ~where, widths, offsets, begin, indices, data, *self._views())
        there = np.flatnonzero(has_some & (where >= 0))
        run_of = np.searchsorted(self._runs, where[there], side="right")
        there = there[np.argsort(run_of, kind="stable")]
        for some in np.split(there, np.flatnonzero(np.diff(np.sort(run_of))) + 1) if len(there) else ():
            # In a run rows are in order: these lie one behind the other.
            first = int(where[some[0]])
            last = int(where[some[-1]]) + int(self._sizes[start + some[-1]])
            words = self._read(first, last)
            _unpack(some, where - first, widths, offsets, begin, indices, data, *self._views(words))

    def _views(self, words: Words | None = None) -> tuple[NDArray[Any], ...]:
        """The same memory as counts of each width, and as columns."""
        words = self._memory if words is None else words
        return words.view(np.uint8), words.view(np.uint16), words, words.view(self._index)

    def _take(self, size: int) -> _Slab | None:
        """A slab with room for ``size`` words, which is this thread's until it is put back."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._open or self._free or (self._full and not self._is_spilling)
                )
                if self._is_spilling or len(self._full) < self._full_enough:
                    if self._open:
                        slab = self._open.pop()
                        if slab.stop - slab.end >= size:
                            return slab
                        self._full.append(slab)
                        continue
                    if self._free:
                        return self._free.pop()
                    if self._file is None:
                        return None
                batch, self._full, self._is_spilling = self._full, [], True
            self._spill(batch)

    def _put(self, slab: _Slab) -> None:
        with self._changed:
            self._open.append(slab)
            self._changed.notify()

    def _spill(self, batch: list[_Slab]) -> None:
        """Write the rows of some slabs as a run, while other threads fill others."""
        back = self._full  # where the disk is full, whoever waits for room is to find that out too
        try:
            self._write_run(np.sort(np.concatenate([places for slab in batch for places in slab.places])))
            for slab in batch:
                slab.end, slab.places = slab.start, []
            back = self._free
        finally:
            with self._changed:
                back.extend(batch)
                self._is_spilling = False
                self._changed.notify_all()

    def _write_run(self, places: NDArray[np.int64]) -> None:
        assert self._file is not None
        sizes = self._sizes[places].astype(np.int64)
        source, done = ~self._where[places], 0
        with self._file.open("ab") as file:
            while done < len(places):
                done, n_words = _copy(self._memory, source, sizes, done, self._buffer)
                append(file, self._buffer[:n_words])
        self._where[places] = self._end + np.cumsum(sizes) - sizes
        self._runs.append(self._end)
        self._end += int(sizes.sum())

    def _read(self, first: int, last: int) -> Words:
        """Words of the file, in memory that this thread uses again."""
        assert self._file is not None
        buffer: Words = getattr(self._reading, "words", self._buffer[:0])
        if len(buffer) < last - first:
            buffer = self._reading.words = np.empty(last - first, np.uint32)
        words = buffer[: last - first]
        handle = os.open(self._file, os.O_RDONLY)
        try:
            n_bytes = os.preadv(handle, [words.data], first * _WORD)
        finally:
            os.close(handle)
        if n_bytes != words.nbytes:
            raise OSError(f"{self._file} ends at {first * _WORD + n_bytes}: was it changed while in use?")
        return words


@numba.njit(nogil=True, cache=True)
def _measure(indptr, counts, index_bytes, widths, sizes):  # type: ignore[no-untyped-def]
    for b in range(len(indptr) - 1):
        largest = np.uint32(0)
        for k in range(indptr[b], indptr[b + 1]):
            largest = max(largest, counts[k])
        width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
        n = indptr[b + 1] - indptr[b]
        widths[b] = width
        sizes[b] = (n * width + 3) // 4 + (n * index_bytes + 3) // 4


@numba.njit(nogil=True, cache=True)
def _pack(indptr, columns, counts, widths, at, bytes_, halves, words, index):  # type: ignore[no-untyped-def]
    for b in range(len(at)):
        first, n, width = indptr[b], indptr[b + 1] - indptr[b], np.int64(widths[b])
        if width == 1:
            for k in range(n):
                bytes_[4 * at[b] + k] = counts[first + k]
        elif width == 2:
            for k in range(n):
                halves[2 * at[b] + k] = counts[first + k]
        else:
            for k in range(n):
                words[at[b] + k] = counts[first + k]
        to = (at[b] + (n * width + 3) // 4) * (4 // index.itemsize)
        for k in range(n):
            index[to + k] = columns[first + k]


@numba.njit(nogil=True, cache=True)
def _unpack(rows, at, widths, offsets, begin, indices, data, bytes_, halves, words, index):  # type: ignore[no-untyped-def]
    for b in rows:
        first, n, width = offsets[b], offsets[b + 1] - offsets[b], np.int64(widths[b])
        lo, hi = max(first, begin), min(first + n, begin + len(data))
        skip, out, m = lo - first, lo - begin, hi - lo
        if width == 1:
            for k in range(m):
                data[out + k] = bytes_[4 * at[b] + skip + k]
        elif width == 2:
            for k in range(m):
                data[out + k] = halves[2 * at[b] + skip + k]
        else:
            for k in range(m):
                data[out + k] = words[at[b] + skip + k]
        of = (at[b] + (n * width + 3) // 4) * (4 // index.itemsize) + skip
        for k in range(m):
            indices[out + k] = index[of + k]


@numba.njit(nogil=True, cache=True)
def _copy(memory, source, sizes, done, buffer):  # type: ignore[no-untyped-def]
    """Rows from ``done`` on, as many as fit the buffer; the next row, and the words written."""
    n_words = 0
    while done < len(sizes) and n_words + sizes[done] <= len(buffer):
        for k in range(sizes[done]):
            buffer[n_words + k] = memory[source[done] + k]
        n_words += sizes[done]
        done += 1
    return done, n_words


__all__ = ["KeptRows"]
