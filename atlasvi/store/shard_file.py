"""Writing a shard of a Zarr v3 array, as its metadata say: what `atlasvi.store.shards` reads.

Through zarr a shard is copied and held several times over, in memory that is asked for anew each time. Here
each chunk is compressed out of the caller's array, by the caller's thread, and written at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlasvi.store.shards import ABSENT, checksum

_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class ShardWriter:
    """Writes whole shards of a vector, from any thread.

    Args:
        folder: of the array, whose metadata are there.
        array: the ``zarr.Array``: of one dimension, in shards, with chunks that go through Blosc and CRC-32C.
        codec: its Blosc.
    """

    def __init__(self, folder: Path, array: Any, codec: BloscCodec) -> None:
        self._folder, self._fill = folder / "c", array.fill_value
        self._chunk, self._n_chunks = array.chunks[0], array.shards[0] // array.chunks[0]
        # What is put together: entries, or more if the codec was told so and a chunk is a whole number of it.
        entry, told = array.dtype.itemsize, codec.typesize
        self._unit = np.dtype(f"u{told if told > entry and self._chunk * entry % told == 0 else entry}")
        self._how = codec.cname.value.encode(), codec.clevel, _SHUFFLES[codec.shuffle.value]
        self._folder.mkdir(exist_ok=True)

    def write(self, k: int, values: NDArray[Any]) -> None:
        """Write shard ``k``.

        Args:
            k: number of the shard.
            values: ``(n,)``, all of its entries, of the type of the array; the last shard may have fewer.
        """
        # Chunks that are not there at all: beyond the end of the array.
        index = np.full((self._n_chunks, 2), ABSENT, "<u8")
        at = 0
        with (self._folder / str(k)).open("wb") as file:
            for c in range(-(-len(values) // self._chunk)):
                chunk = values[c * self._chunk : (c + 1) * self._chunk]
                if len(chunk) < self._chunk:
                    chunk = np.concatenate(
                        [chunk, np.full(self._chunk - len(chunk), self._fill, chunk.dtype)]
                    )
                index[c] = at, _write_checked(file, blosc.compress(chunk.view(self._unit), *self._how))
                at += int(index[c, 1])
            _write_checked(file, index.tobytes())


def _write_checked(file: Any, piece: bytes) -> int:
    """Write bytes and their checksum; how many bytes that is."""
    return int(file.write(piece) + file.write(checksum(piece)))


__all__ = ["ShardWriter"]
