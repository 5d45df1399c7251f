import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from atlasvi.store.layout import choose_layout, codecs, count_dtype, index_dtype


@pytest.mark.parametrize(
    ("largest", "name"),
    [
        (0, "uint8"), (255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32"),
        (2**32 - 1, "uint32"),
    ],
)  # fmt: skip
def test_counts_take_the_smallest_unsigned_type(largest, name):
    assert count_dtype(largest).name == name


@pytest.mark.parametrize("largest", [-1, 2**32])
def test_counts_beyond_32_bits_have_no_type(largest):
    with pytest.raises(ValueError, match=str(largest)):
        count_dtype(largest)


@pytest.mark.parametrize(("n_vars", "name"), [(1, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_gene_indices_take_the_smallest_unsigned_type(n_vars, name):
    assert index_dtype(n_vars).name == name


@pytest.mark.parametrize("nnz", [0, 1, 2, 3, 65_535, 65_536, 65_537, 2_097_152, 2_097_153, 10**9])
def test_shards_cover_every_entry_once_and_are_whole_chunks(nnz):
    layout = choose_layout(nnz, 1000, 9)
    edges = [layout.entries(k) for k in range(layout.n_shards)]
    assert [first for first, _ in edges] == [0, *[last for _, last in edges[:-1]]][: len(edges)]
    assert (edges[-1][1] if edges else 0) == nnz
    assert layout.shard % layout.chunk == 0
    assert 1 <= layout.chunk <= 65_536
    assert layout.chunk == 65_536 or layout.chunk < 2 * max(nnz, 1)


@pytest.mark.parametrize("n_vars", [1_000, 70_000])
@pytest.mark.parametrize("largest", [9, 300, 70_000])
def test_a_shard_decodes_to_about_six_megabytes_whatever_the_types(n_vars, largest):
    layout = choose_layout(10**9, n_vars, largest)
    n_bytes = layout.shard * (layout.index_dtype.itemsize + layout.data_dtype.itemsize)
    assert 0.9 * 6 * 2**20 < n_bytes <= 6 * 2**20


def test_anndata_reads_the_narrow_types(tmp_path):
    """AnnData's own reader, eager and by rows, on uint16 indices and uint8 counts with our codecs."""
    counts = sp.random(50, 300, 0.2, "csr", random_state=0, data_rvs=lambda n: np.arange(n) % 255 + 1)
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=3)
    x = group.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [50, 300]})
    arrays = {
        "indptr": counts.indptr,
        "indices": counts.indices.astype("u2"),
        "data": counts.data.astype("u1"),
    }
    for key, values in arrays.items():
        x.create_array(
            key, shape=values.shape, dtype=values.dtype, chunks=(64,), shards=(256,), compressors=codecs()
        )[...] = values
    eager = anndata.io.read_elem(x)
    assert eager.dtype == np.uint8
    np.testing.assert_array_equal(eager.toarray(), counts.toarray())
    np.testing.assert_array_equal(anndata.io.sparse_dataset(x)[10:20].toarray(), counts[10:20].toarray())
    np.testing.assert_array_equal(eager.astype(float) @ np.ones(300), counts.sum(1).A1)
