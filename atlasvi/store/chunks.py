"""Chunks of a shard read, checked and decoded in one call, without Python and its lock.

A block of cells is dozens of chunks, and readers work in several threads beside one that trains. A call for
each chunk would take the lock some hundred times a block, and threads would wait for one another longer than
they read. So the C functions that Python's packages bring, of the C library, of Blosc and for CRC-32C, are
called by their addresses out of one compiled loop. What it cannot do, or finds amiss, it leaves to
`atlasvi.store.shards`, which reads in Python and says what is wrong.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import google_crc32c
import numba
import numpy as np
from atlasvi_kernels.addresses import address_of, call, copy_bytes
from numcodecs import blosc
from numpy.typing import NDArray

_OPEN, _SEEK, _READ, _CLOSE, _CHECKSUM, _DECODE = range(6)
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
_END = os.SEEK_END
_CRC_BYTES = 4
# Of a chunk that Blosc could not make smaller: all that it adds.
_BLOSC_HEADER = 16


@cache
def _functions() -> NDArray[np.uint64] | None:
    """Addresses of the functions, or ``None`` where one is not to be had, or numbers lie the other way."""
    crc = find_spec("google_crc32c._crc32c") if google_crc32c.implementation == "c" else None
    if crc is None or os.name != "posix" or sys.byteorder != "little":
        return None
    found = [address_of(None, name) for name in ("open", "lseek", "pread", "close")]
    found += [address_of(crc.origin, "crc32c_value"), address_of(blosc.__file__, "blosc_decompress_ctx")]
    return np.array(found, np.uint64) if all(found) else None


def read_chunks(
    path: str, n_chunks: int, chunk_bytes: int, first: int, out: NDArray[Any], *, is_blosc: bool
) -> bool:
    """Fill ``out`` with what a shard holds from byte ``first`` on, decoded and checked.

    Args:
        path: of the shard.
        n_chunks: chunks of a whole shard.
        chunk_bytes: of a decoded chunk.
        first: where to begin, in decoded bytes.
        out: contiguous, to fill.
        is_blosc: whether chunks went through Blosc; else they are as they lie in memory.

    Returns:
        Whether it was done. If not, ``out`` may hold anything, and why is for the slow way to find out.
    """
    functions = _functions()
    if functions is None:
        return False
    name = np.frombuffer(os.fsencode(path) + b"\0", np.uint8)
    return bool(_read_shard(functions, name, n_chunks, chunk_bytes, first, out.view(np.uint8), is_blosc))


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _read_shard(functions, name, n_chunks, chunk_bytes, first, out, is_blosc):  # type: ignore[no-untyped-def]
    file = np.int32(call(functions[_OPEN], name.ctypes.data, _FLAGS))
    if file < 0:
        return False
    done = _read_index_and_chunks(functions, file, n_chunks, chunk_bytes, first, out, is_blosc)
    call(functions[_CLOSE], file)
    return done


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _read_index_and_chunks(functions, file, n_chunks, chunk_bytes, first, out, is_blosc):  # type: ignore[no-untyped-def]
    size = call(functions[_SEEK], file, 0, _END)
    n_index = 16 * n_chunks + _CRC_BYTES
    tail = np.empty(n_index, np.uint8)
    if size < n_index or not _read_checked(functions, file, size - n_index, tail):
        return False
    index = tail[:-_CRC_BYTES].view(np.int64)
    packed = np.empty(chunk_bytes + _BLOSC_HEADER + _CRC_BYTES, np.uint8)
    spare = np.empty(chunk_bytes, np.uint8)
    for c in range(first // chunk_bytes, (first + len(out) + chunk_bytes - 1) // chunk_bytes):
        # A chunk that is not there has offset and length -1.
        offset, length = index[2 * c], index[2 * c + 1]
        if not (0 <= offset <= size and _CRC_BYTES <= length <= min(len(packed), size - offset)):
            return False
        piece = packed[:length]
        if not _read_checked(functions, file, offset, piece):
            return False
        at = c * chunk_bytes - first
        low, high = max(at, 0), min(at + chunk_bytes, len(out))
        place = out[low:high] if high - low == chunk_bytes else spare
        if not _decode(functions, piece[:-_CRC_BYTES], place, is_blosc):
            return False
        if high - low < chunk_bytes:
            out[low:high] = spare[low - at : high - at]
    return True


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _read_checked(functions, file, offset, piece):  # type: ignore[no-untyped-def]
    """Fill ``piece`` from a file; whether its last four bytes are the checksum of the others."""
    n = len(piece) - _CRC_BYTES
    if call(functions[_READ], file, piece.ctypes.data, len(piece), offset) != len(piece):
        return False
    found = np.uint32(call(functions[_CHECKSUM], piece.ctypes.data, n))
    return found == _number(piece, n)


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _decode(functions, piece, place, is_blosc):  # type: ignore[no-untyped-def]
    if not is_blosc:
        if len(piece) != len(place):
            return False
        copy_bytes(np.uint64(place.ctypes.data), np.uint64(piece.ctypes.data), len(place))
        return True
    # Blosc believes its header: the decoded bytes stand at 4 and the encoded at 12.
    if len(piece) < _BLOSC_HEADER or _number(piece, 4) != len(place) or _number(piece, 12) != len(piece):
        return False
    done = call(functions[_DECODE], piece.ctypes.data, place.ctypes.data, len(place), 1)
    return np.int32(done) == len(place)


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _number(piece, at):  # type: ignore[no-untyped-def]
    """Four bytes as a number, the least significant first."""
    number = np.uint32(0)
    for k in range(4):
        number |= np.uint32(piece[at + k]) << np.uint32(8 * k)
    return number


__all__ = ["read_chunks"]
