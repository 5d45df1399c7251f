"""Reading runs of entries straight out of the chunks of an HDF5 dataset.

The HDF5 library works for one thread at a time, and inflates inside: two threads that read an ``.h5ad`` wait
for each other. Here it says where the chunks are, once, and each thread reads and inflates its own. A dataset
that is laid out otherwise, or filtered in another way, is read through h5py.
"""

from __future__ import annotations

import os
import threading
import zlib
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import NDArray

try:  # the extra "fast": the same bytes, in half the time
    from isal import isal_zlib as inflater
except ImportError:
    inflater = zlib

_FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE)
_ABSENT = -1


class _Chunks(NamedTuple):
    """Where each chunk is in the file: its first byte or `_ABSENT`, its bytes, the filters it skips."""

    at: NDArray[np.int64]
    size: NDArray[np.uint32]
    skips: NDArray[np.uint8]


class ChunkedVector:
    """A vector of numbers in chunks, with gzip, byte shuffle, both or neither: ``vector[start:stop]``.

    Safe to call from several threads. Where the chunks are is looked up when the first is read.

    Args:
        dataset: open, and of the kind that `of` accepts.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self.shape: tuple[int] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        self.chunks: tuple[int] = dataset.chunks
        self._filters = _filters(dataset)
        self._chunks: _Chunks | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, dataset: h5py.Dataset) -> Self | None:
        """The reader of a dataset, or ``None`` where only h5py reads it.

        Example:
            >>> with h5py.File("counts.h5", "w") as file:
            ...     dataset = file.create_dataset("x", data=np.arange(100), compression="gzip")
            >>> with h5py.File("counts.h5") as file:
            ...     ChunkedVector.of(file["x"])[40:43]
            array([40, 41, 42])
        """
        is_plain = (
            dataset.ndim == 1 and dataset.chunks is not None and dataset.dtype.kind in "iuf"
            # What lies in the file is what lies in memory.
            and h5py.h5t.py_create(dataset.dtype) == dataset.id.get_type()
            and _filters(dataset) in ((), _FILTERS[:1], _FILTERS[1:], _FILTERS)
        )  # fmt: skip
        file = dataset.file
        is_read_by_bytes = file.mode == "r" and file.driver == "sec2" and file.userblock_size == 0
        return cls(dataset) if is_plain and is_read_by_bytes and hasattr(dataset.id, "chunk_iter") else None

    def __getitem__(self, run: slice) -> NDArray[Any]:
        """Entries ``start`` to ``stop``.

        Raises:
            ValueError: a chunk that is damaged, or cut short.
        """
        start, stop, _ = run.indices(self.shape[0])
        out: NDArray[Any] = np.empty(max(stop - start, 0), self.dtype)
        # That of h5py, asked for each time: of a file that was closed it is an error.
        handle, chunks, length = self._dataset.file.id.get_vfd_handle(), self._where(), self.chunks[0]
        for c in range(start // length, -(-stop // length) if len(out) else 0):
            lo, hi = max(start, c * length), min(stop, (c + 1) * length)
            if chunks.at[c] == _ABSENT:
                out[lo - start : hi - start] = self._dataset.fillvalue
            else:
                found = self._decoded(handle, chunks, c)
                out[lo - start : hi - start] = found[lo - c * length : hi - c * length]
        return out

    def _where(self) -> _Chunks:
        with self._lock:
            if self._chunks is None:
                self._chunks = _look_up(self._dataset)
            return self._chunks

    def _decoded(self, handle: int, chunks: _Chunks, c: int) -> NDArray[Any]:
        """All of chunk ``c``: also of the last, which is stored whole."""
        size, n_bytes = int(chunks.size[c]), self.chunks[0] * self.dtype.itemsize
        piece = os.pread(handle, size, int(chunks.at[c]))
        fault = "" if len(piece) == size else "is cut short"
        applied = [f for k, f in enumerate(self._filters) if not chunks.skips[c] >> k & 1]
        if not fault and h5py.h5z.FILTER_DEFLATE in applied:
            try:
                piece = inflater.decompress(piece, zlib.MAX_WBITS, n_bytes)
            except (zlib.error, inflater.error) as error:
                fault = f"cannot be inflated: {error}"
        if not fault and len(piece) != n_bytes:
            fault = f"holds {len(piece)} bytes, not {n_bytes}"
        if fault:
            raise ValueError(f"chunk {c} of {self._dataset.name} {fault}")
        if h5py.h5z.FILTER_SHUFFLE in applied:
            piece = np.frombuffer(piece, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
        return np.frombuffer(piece, self.dtype)


def _filters(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Codes of the filters that chunks went through, in order."""
    setup = dataset.id.get_create_plist()
    return tuple(setup.get_filter(k)[0] for k in range(setup.get_nfilters()))


def _look_up(dataset: h5py.Dataset) -> _Chunks:
    length = dataset.chunks[0]
    n = -(-dataset.shape[0] // length)
    found = _Chunks(np.full(n, _ABSENT, np.int64), np.zeros(n, np.uint32), np.zeros(n, np.uint8))

    def note(chunk: Any) -> None:
        c = chunk.chunk_offset[0] // length
        found.at[c], found.size[c], found.skips[c] = chunk.byte_offset, chunk.size, chunk.filter_mask & 0xFF

    dataset.id.chunk_iter(note)
    return found


__all__ = ["ChunkedVector"]
