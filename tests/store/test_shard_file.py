"""Shards that are written here are what zarr reads, and lie where zarr puts them."""

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from atlasvi.store.layout import codecs
from atlasvi.store.shard_file import ShardWriter

CHUNK, SHARD = 16, 64
VALUES = np.random.default_rng(0).integers(1, 200, 1003)


@pytest.mark.parametrize("n", [1, 16, 64, 65, 128, 1003])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("shuffle", ["noshuffle", "shuffle", "bitshuffle"])
def test_zarr_reads_what_was_written(tmp_path, dtype, shuffle, n):
    codec, values = BloscCodec(cname="lz4", clevel=1, shuffle=shuffle), VALUES[:n].astype(dtype)
    ours, theirs = (
        zarr.create_array(
            tmp_path / name, shape=(n,), dtype=dtype, chunks=(CHUNK,), shards=(SHARD,), fill_value=0,
            compressors=[codec, Crc32cCodec()],
        )
        for name in ("ours", "theirs")
    )  # fmt: skip
    writer = ShardWriter(tmp_path / "ours", ours, codec)
    for k in reversed(range(-(-n // SHARD))):
        writer.write(k, values[k * SHARD : (k + 1) * SHARD])
    theirs[:] = values
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours", mode="r")[:], values)
    names = [
        sorted(str(p.relative_to(a)) for p in a.rglob("*"))
        for a in map(tmp_path.joinpath, ("ours", "theirs"))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("chunk", [15, 16])
def test_single_bytes_are_put_together_by_two_where_a_chunk_has_an_even_number(tmp_path, chunk):
    codec, values = codecs(counts=np.dtype("u1"))[0], VALUES.astype("u1")
    array = zarr.create_array(
        tmp_path / "a", shape=(len(values),), dtype="u1", chunks=(chunk,), shards=(4 * chunk,), fill_value=0,
        compressors=[codec, Crc32cCodec()],
    )  # fmt: skip
    writer = ShardWriter(tmp_path / "a", array, codec)
    for k in range(-(-len(values) // (4 * chunk))):
        writer.write(k, values[k * 4 * chunk : (k + 1) * 4 * chunk])
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], values)
    # The fourth byte of a Blosc frame is the size of what it puts together.
    assert (tmp_path / "a" / "c" / "0").read_bytes()[3] == (2 if chunk == 16 else 1)
