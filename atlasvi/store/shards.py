"""Reading runs of entries straight out of the shards of a Zarr v3 array.

A block of cells is a run of entries that covers some inner chunks of one or two shards. Asked through zarr,
most of the time goes into describing these chunks, in Python; here a shard is opened, its index and the
chunks wanted are read, and every chunk is checked (CRC-32C) and decoded into its place, on a local disk in
one call (`atlasvi.store.chunks`). The files stay plain Zarr; an array that is laid out otherwise is read
through zarr. A chunk or shard that is not there would be the fill value elsewhere; counts are never all that,
so it is damage.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from atlasvi.store.chunks import read_chunks

Decode: TypeAlias = Callable[[Any, Any], Any]

_DECODERS: dict[str, Decode] = {"blosc": blosc.decompress, "zstd": zstd.decompress}
_CRC_BYTES = 4
ABSENT = (1 << 64) - 1
"""Offset and length, in an index, of a chunk that was not written."""

_buffer = threading.local()


class DamagedShard(Exception):
    """A shard that is missing, cut short or altered.

    Args:
        name: the file, or its URL.
        fault: what is wrong with it, to follow its name in a sentence.
        first: first entry that it holds.
        last: the entry after the last.
    """

    def __init__(self, name: str, fault: str, first: int, last: int) -> None:
        super().__init__(f"shard {name} {fault}")
        self.first, self.last = first, last


class ShardFile(Protocol):
    """A shard, of which pieces are read."""

    def tail(self, n: int) -> bytes:
        """The last ``n`` bytes, or all where there are fewer."""
        ...

    def read(self, begin: int, end: int) -> bytes | memoryview:
        """Bytes ``begin`` to ``end``, fewer where it ends before; good until this thread reads again."""
        ...


class _File(AbstractContextManager["_File"]):
    """A shard on a local disk."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._file).st_size

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def tail(self, n: int) -> bytes:
        """The last bytes."""
        return os.pread(self._file, n, max(self._size - n, 0))

    def read(self, begin: int, end: int) -> memoryview:
        """Some bytes; memory for what is not there is not asked for."""
        n = max(min(end, self._size) - begin, 0)
        # New memory for each piece would cost more than reading it: its pages have to be cleared.
        if len(getattr(_buffer, "bytes", b"")) < n:
            _buffer.bytes = bytearray(n)
        place = memoryview(_buffer.bytes)[:n]
        return place[: os.preadv(self._file, [place], begin)]


class ShardedVector:
    """A vector in shards, from which runs of entries are read: ``vector[start:stop]``.

    Safe to call from several threads. Nothing is kept between two reads, so a shard that is replaced between
    them, as appending does with the last, is read as it then is.

    Args:
        folder: of the array: a path, or what joins names with ``/`` as one does.
        shape: ``(n,)``.
        shard: entries a shard.
        chunk: entries an inner chunk.
        dtype: of an entry.
        decode: of a chunk, into an array; ``None`` where chunks are not compressed.
    """

    def __init__(
        self,
        folder: Any,
        shape: tuple[int],
        shard: int,
        chunk: int,
        dtype: np.dtype[Any],
        decode: Decode | None,
    ) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._is_fast = isinstance(folder, Path) and decode in (None, blosc.decompress)
        self._prefix = os.path.join(folder, "c", "") if self._is_fast else ""
        self._shard, self._chunk, self._decode = shard, chunk, decode

    @classmethod
    def of(cls, folder: Any, array: Any) -> Self | None:
        """The reader of ``array``, or ``None`` where it is laid out in another way.

        Args:
            folder: of the array, as the class has it.
            array: the opened ``zarr.Array``.
        """
        metadata = array.metadata.to_dict()
        codecs = metadata["codecs"] if metadata["zarr_format"] == 3 and array.ndim == 1 else []
        if len(codecs) != 1 or codecs[0].get("name") != "sharding_indexed":
            return None
        setup = codecs[0]["configuration"]
        inner = [codec["name"] for codec in setup["codecs"]]
        index = [codec["name"] for codec in setup["index_codecs"]]
        key = metadata["chunk_key_encoding"]
        is_ours = (
            inner[0] == "bytes" and inner[-1] == "crc32c" and len(inner) <= 3
            and all(name in _DECODERS for name in inner[1:-1])
            and index == ["bytes", "crc32c"] and setup.get("index_location", "end") == "end"
            and key["name"] == "default" and key.get("configuration", {}).get("separator", "/") == "/"
            and _is_little(setup["codecs"][0], array.dtype) and _is_little(setup["index_codecs"][0], None)
        )  # fmt: skip
        if not is_ours:
            return None
        decode = _DECODERS[inner[1]] if len(inner) == 3 else None
        shape, shard, chunk = (int(array.shape[0]),), int(array.shards[0]), int(array.chunks[0])
        return cls(folder, shape, shard, chunk, np.dtype(array.dtype), decode)

    def __getitem__(self, run: slice) -> NDArray[Any]:
        """Entries ``start`` to ``stop``.

        Raises:
            DamagedShard: a shard on the way is missing, cut short or altered.
        """
        start, stop, _ = run.indices(self.shape[0])
        out: NDArray[Any] = np.empty(max(stop - start, 0), self.dtype)
        for k in range(start // self._shard, -(-stop // self._shard) if stop > start else 0):
            first, last = max(start, k * self._shard), min(stop, (k + 1) * self._shard)
            self._read(k, first, last, out[first - start : last - start])
        return out

    def _read(self, k: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Entries ``start`` to ``stop`` of the vector, all of them in shard ``k``."""
        size, first = self.dtype.itemsize, start - k * self._shard
        chunks, chunk_bytes = self._shard // self._chunk, self._chunk * size
        if not self._is_fast or not read_chunks(
            f"{self._prefix}{k}", chunks, chunk_bytes, first * size, out, is_blosc=self._decode is not None
        ):
            self._read_pieces(k, start, stop, out)

    def _read_pieces(self, k: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """The same in Python, which says what is wrong."""
        base, chunk = k * self._shard, self._chunk

        def damaged(fault: str) -> DamagedShard:
            return DamagedShard(str(self._path(k)), fault, base, min(base + self._shard, self.shape[0]))

        n_chunks = self._shard // chunk
        low, high = (start - base) // chunk, -(-(stop - base) // chunk)
        try:
            with self._open(k) as file:
                tail = file.tail(index_bytes(n_chunks))
                if len(tail) < index_bytes(n_chunks):
                    raise damaged("is cut short")
                index = read_index(tail, n_chunks)
                if index is None:
                    raise damaged("has a wrong checksum in its index")
                wanted = index[low:high].tolist()
                if any(ABSENT in entry for entry in wanted):
                    raise damaged("lacks a chunk")
                begin, end = min(at for at, _ in wanted), max(map(sum, wanted))
                block = memoryview(file.read(begin, end))
        except FileNotFoundError as error:
            raise damaged("is missing") from error
        if len(block) < end - begin:
            raise damaged("is cut short")
        for c, (offset, length) in enumerate(wanted, low):
            at = base + c * chunk - start
            piece = block[offset - begin : offset - begin + length]
            if not _crc_matches(piece):
                raise damaged("has a wrong checksum")
            self._put(piece[:-_CRC_BYTES], out, at)

    def _open(self, k: int) -> AbstractContextManager[ShardFile]:
        """Shard ``k``. Where there is none, this or a read from it raises `FileNotFoundError`."""
        return _File(self._path(k))

    def _path(self, k: int) -> Any:
        return self.folder / "c" / str(k)

    def _put(self, piece: memoryview, out: NDArray[Any], at: int) -> None:
        """Decode a chunk whose first entry belongs at ``out[at]``; what lies outside ``out`` is left out."""
        if self._decode is None:
            values: NDArray[Any] = np.frombuffer(piece, self.dtype)
        elif at >= 0 and at + self._chunk <= len(out):
            self._decode(piece, out[at : at + self._chunk])
            return
        else:
            values = np.empty(self._chunk, self.dtype)
            self._decode(piece, values)
        low, high = max(at, 0), min(at + self._chunk, len(out))
        out[low:high] = values[low - at : high - at]


def _is_little(codec: dict[str, Any], dtype: np.dtype[Any] | None) -> bool:
    """Whether a ``bytes`` codec leaves numbers as they lie in memory here."""
    if dtype is not None and dtype.itemsize == 1:
        return True
    native = np.dtype("<u2").isnative
    return native and codec.get("configuration", {}).get("endian", "little") == "little"


def index_bytes(n_chunks: int) -> int:
    """Bytes of the index at the end of a shard, its checksum included."""
    return 16 * n_chunks + _CRC_BYTES


def read_index(tail: bytes, n_chunks: int) -> NDArray[np.uint64] | None:
    """``(n_chunks, 2)`` offset and length of each chunk, or ``None`` where the checksum is wrong.

    Args:
        tail: the last `index_bytes` of a shard.
        n_chunks: chunks of a whole shard.
    """
    return np.frombuffer(tail, "<u8", 2 * n_chunks).reshape(n_chunks, 2) if _crc_matches(tail) else None


def checksum(piece: bytes) -> bytes:
    """CRC-32C of a chunk or of an index, as it stands behind it."""
    return int(google_crc32c.value(piece)).to_bytes(_CRC_BYTES, "little")


def _crc_matches(block: bytes | memoryview) -> bool:
    # Of fewer bytes than a checksum there is nothing that it could be of.
    return len(block) >= _CRC_BYTES and checksum(bytes(block[:-_CRC_BYTES])) == block[-_CRC_BYTES:]


__all__ = ["ABSENT", "DamagedShard", "ShardFile", "ShardedVector", "checksum", "index_bytes", "read_index"]
