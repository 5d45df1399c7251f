"""Runs of entries read out of shards are what zarr reads, and damage is named."""

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from atlasvi.store import shards
from atlasvi.store.shards import DamagedShard, ShardedVector

N, CHUNK, SHARD = 1003, 16, 64
VALUES = np.random.default_rng(0).integers(0, 60_000, N)


def write(folder, *compressors, dtype="uint16", n=N):
    array = zarr.create_array(
        folder, shape=(n,), dtype=dtype, chunks=(CHUNK,), shards=(SHARD,),
        compressors=[*compressors, Crc32cCodec()],
    )  # fmt: skip
    array[:] = VALUES[:n].astype(dtype)
    return ShardedVector.of(folder, array), array


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float32"])
@pytest.mark.parametrize("compressors", [(), (BloscCodec(cname="lz4"),), (ZstdCodec(level=1),)])
@pytest.mark.parametrize("how", ["in one call", "in Python"])
def test_any_run_is_what_zarr_reads(tmp_path, compressors, dtype, how, monkeypatch):
    if how == "in Python":
        monkeypatch.setattr(shards, "read_chunks", lambda *_, **__: False)
    elif compressors[:1] != (ZstdCodec(level=1),):  # which is not read otherwise
        monkeypatch.setattr(ShardedVector, "_read_pieces", None)
    vector, array = write(tmp_path / "a", *compressors, dtype=dtype)
    assert vector.shape == array.shape and vector.dtype == array.dtype
    random = np.random.default_rng(1)
    runs = [(0, N), (0, 0), (N, N), (80, 80), (63, 65), (64, 128), (15, 17), (992, N), (500, 400)]
    for start, stop in runs + np.sort(random.integers(0, N + 1, (60, 2)), axis=1).tolist():
        np.testing.assert_array_equal(vector[start:stop], array[start:stop])


def test_other_layouts_are_left_to_zarr(tmp_path):
    plain = zarr.create_array(tmp_path / "plain", shape=(N,), dtype="u2", chunks=(CHUNK,))
    no_checksum = zarr.create_array(tmp_path / "b", shape=(N,), dtype="u2", chunks=(CHUNK,), shards=(SHARD,))
    matrix = zarr.create_array(tmp_path / "c", shape=(4, 4), dtype="u2", chunks=(2, 2), shards=(4, 4))
    old = zarr.create_array(tmp_path / "d", shape=(N,), dtype="u2", chunks=(CHUNK,), zarr_format=2)
    for array in (plain, no_checksum, matrix, old):
        assert ShardedVector.of(tmp_path, array) is None
    assert write(tmp_path / "e", GzipCodec())[0] is None


def test_bytes_the_other_way_round_are_left_to_zarr(tmp_path):
    inner = [BytesCodec(endian="big"), Crc32cCodec()]
    codec = ShardingCodec(chunk_shape=(CHUNK,), codecs=inner)
    array = zarr.create(
        shape=(N,), dtype="uint16", chunks=(SHARD,), codecs=[codec], store=tmp_path / "big", zarr_format=3
    )
    assert ShardedVector.of(tmp_path / "big", array) is None


def test_a_chunk_whose_header_lies_is_left_alone_though_its_checksum_is_right(tmp_path):
    """Blosc believes the sizes in its header, and would write beyond the place there is."""
    vector, _ = write(tmp_path / "a", BloscCodec(cname="lz4"))
    path = tmp_path / "a" / "c" / "0"
    n = SHARD // CHUNK
    content = bytearray(path.read_bytes())
    offset, length = np.frombuffer(content[-16 * n - 4 : -4], "<u8")[:2].tolist()
    content[offset + 4 : offset + 8] = (1 << 20).to_bytes(4, "little")
    chunk = bytes(content[offset : offset + length - 4])
    content[offset + length - 4 : offset + length] = google_crc32c.value(chunk).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises((ValueError, RuntimeError)):
        vector[:CHUNK]


@pytest.mark.parametrize("at", [0, -1, -30])
def test_an_altered_byte_is_noticed_each_time_and_where_it_is(tmp_path, at):
    vector, _ = write(tmp_path / "a", BloscCodec(cname="lz4"))
    path = tmp_path / "a" / "c" / "3"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DamagedShard, match=r"shard .*c/3 has a wrong checksum") as caught:
            vector[3 * SHARD : 4 * SHARD]
        assert (caught.value.first, caught.value.last) == (3 * SHARD, 4 * SHARD)
    np.testing.assert_array_equal(vector[: 3 * SHARD], VALUES[: 3 * SHARD])


def test_a_missing_or_short_shard_is_named(tmp_path):
    vector, _ = write(tmp_path / "a")
    path = tmp_path / "a" / "c" / "15"
    content = path.read_bytes()
    for keep in (len(content) - 1, 20, 0):
        path.write_bytes(content[:keep])
        with pytest.raises(DamagedShard, match=r"c/15 (is cut short|has a wrong checksum in its index)"):
            vector[:]
    path.unlink()
    with pytest.raises(DamagedShard, match="c/15 is missing") as caught:
        vector[:]
    assert (caught.value.first, caught.value.last) == (15 * SHARD, N)


def test_a_chunk_that_was_not_written_is_a_fault_and_not_zeros(tmp_path):
    vector, array = write(tmp_path / "a")
    array[20:60] = 0
    assert (tmp_path / "a" / "c" / "0").stat().st_size < (tmp_path / "a" / "c" / "1").stat().st_size
    for run in (slice(0, 64), slice(33, 47)):
        with pytest.raises(DamagedShard, match="c/0 lacks a chunk"):
            vector[run]
    np.testing.assert_array_equal(vector[:16], array[:16])


def test_a_shard_whose_chunks_lie_in_another_order_is_read(tmp_path):
    """The index says where a chunk is; nobody promised an order."""
    vector, _ = write(tmp_path / "a")
    path = tmp_path / "a" / "c" / "0"
    content = path.read_bytes()
    n = SHARD // CHUNK
    tail = 16 * n + 4
    index = np.frombuffer(content[-tail:-4], "<u8").reshape(n, 2).copy()
    chunks = [content[o : o + size] for o, size in index.tolist()]
    body, at = b"", 0
    for c in (2, 0, 3, 1):
        index[c, 0], at = at, at + len(chunks[c])
        body += chunks[c]
    raw = index.astype("<u8").tobytes()
    path.write_bytes(body + raw + google_crc32c.value(raw).to_bytes(4, "little"))
    for run in (slice(0, 64), slice(20, 40), slice(5, 60)):
        np.testing.assert_array_equal(vector[run], VALUES[run])
