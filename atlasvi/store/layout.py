"""How an atlas is laid out on disk: lengths of chunks and shards, integer types, codecs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK_ENTRIES = 1 << 16
# With the narrowest types, uint16 for genes and uint8 for counts; wider ones have fewer.
CHUNKS_PER_SHARD = 32
_NARROWEST = 3
SHARD_BYTES = CHUNK_ENTRIES * CHUNKS_PER_SHARD * _NARROWEST
"""Of a decoded shard, at most."""
_UNSIGNED = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of the two long arrays of a CSR matrix.

    Args:
        nnz: number of entries.
        chunk: entries a chunk, the least that is decoded at once.
        shard: entries a shard, one file and one task of writing.
        index_dtype: of gene indices.
        data_dtype: of counts.

    Example:
        >>> layout = choose_layout(nnz=5_000_000, n_vars=30_000, max_count=255)
        >>> layout.n_shards, layout.index_dtype.name, layout.data_dtype.name
        (3, 'uint16', 'uint8')
    """

    nnz: int
    chunk: int
    shard: int
    index_dtype: np.dtype[Any]
    data_dtype: np.dtype[Any]

    @property
    def n_shards(self) -> int:
        """Number of shards, the last of which may not be full."""
        return -(-self.nnz // self.shard)

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one decoded entry."""
        return self.index_dtype.itemsize + self.data_dtype.itemsize

    def entries(self, k: int) -> tuple[int, int]:
        """First and one past the last entry of shard ``k``."""
        return k * self.shard, min((k + 1) * self.shard, self.nnz)


def choose_layout(nnz: int, n_vars: int, max_count: int) -> Layout:
    """The layout for a matrix of this size.

    Chunks are 65,536 entries and shards as many as decode to 6 MB, so that writing one takes the same
    memory however large the counts are: 32 chunks where an entry is 3 bytes, 24 where it is 4. A small
    matrix has the same, a chunk or a few of one shard: a large one may be appended to it.

    Args:
        nnz: number of entries, >= 0.
        n_vars: number of genes.
        max_count: largest count, at most 2**32 - 1.
    """
    index, count = index_dtype(n_vars), count_dtype(max_count)
    per_shard = max(1, CHUNKS_PER_SHARD * _NARROWEST // (index.itemsize + count.itemsize))
    return Layout(int(nnz), CHUNK_ENTRIES, CHUNK_ENTRIES * per_shard, index, count)


def index_dtype(n_vars: int) -> np.dtype[Any]:
    """Smallest of uint16 and uint32 that holds every column number and one more, for "nothing here"."""
    return np.dtype(np.uint16 if n_vars < 1 << 16 else np.uint32)


def count_dtype(max_count: int) -> np.dtype[Any]:
    """Smallest unsigned type up to 32 bits that holds ``max_count``.

    Raises:
        ValueError: more than 2**32 - 1, or less than 0.
    """
    if max_count >= 0:
        for dtype in _UNSIGNED:
            if max_count <= np.iinfo(dtype).max:
                return np.dtype(dtype)
    raise ValueError(f"no unsigned type of at most 32 bits holds {max_count}")


def codecs(*, counts: np.dtype[Any] | None = None) -> list[Any]:
    """Blosc lz4, level 1, then CRC-32C.

    lz4 decodes twice as fast as zstd here, at four thirds of the size; higher levels save 1 % and take up to
    twice as long.

    Args:
        counts: type of what is to be stored, where it is counts: bits of the same place are then put together
            before, not bytes. Counts are small numbers: they take a third to a fifth less so, and half the
            time to write.
    """
    from zarr.codecs import BloscCodec, Crc32cCodec

    if counts is None:
        return [BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"), Crc32cCodec()]
    # Blosc has no fast way for single bytes: two at a time are as small, and take two thirds of the time.
    typesize = max(2, counts.itemsize)
    return [BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=typesize), Crc32cCodec()]
