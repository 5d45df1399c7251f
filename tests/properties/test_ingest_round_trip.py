"""Whatever the counts, their types and the cutting: what is read back is what went in."""

import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlasvi.store import cells, frame, layout
from atlasvi.store.ingest import ingest
from atlasvi.store.sources import open_source
from tests.strategies import count_matrices


@st.composite
def cuttings(draw):
    """How finely things are cut: chunk, chunks a shard, entries read at once, and the budget."""
    return [
        draw(st.sampled_from(sizes)) for sizes in ((1, 8, 1 << 16), (1, 3), (1, 7, 1 << 18), (1, 1 << 27))
    ]


def set_cutting(monkeypatch, cutting):
    chunk, per_shard, block, _ = cutting
    monkeypatch.setattr(layout, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(layout, "CHUNKS_PER_SHARD", per_shard)
    monkeypatch.setattr(cells, "BLOCK_ENTRIES", block)
    monkeypatch.setattr(frame, "NAMES", 1 + block % 16)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count_matrices(), cuttings(), st.booleans(), st.integers(1, 3), st.booleans())
def test_round_trip(monkeypatch, matrix, cutting, shuffle, workers, on_disk):
    set_cutting(monkeypatch, cutting)
    adata = anndata.AnnData(matrix)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no counts", category=UserWarning)
        given_as = Path(folder) / "in.h5ad" if on_disk else adata
        if on_disk:
            adata.write_h5ad(given_as)
        out = Path(folder) / "a.zarr"
        report = ingest(given_as, out, shuffle=shuffle, seed=3, workers=workers, memory_budget=cutting[-1])
        atlas = anndata.read_zarr(out)
        order = adata.obs_names.get_indexer(atlas.obs_names)
        assert sorted(order) == list(range(adata.n_obs))
        assert shuffle or order.tolist() == list(range(adata.n_obs))
        expected = np.asarray(matrix.todense())[order]
        np.testing.assert_array_equal(atlas.X.toarray(), expected)
        assert report.nnz == np.count_nonzero(expected) and report.max_count == expected.max()
        source = open_source(out)
        start, stop = sorted((adata.n_obs // 3, adata.n_obs - adata.n_obs // 4))
        np.testing.assert_array_equal(
            source.read_rows(start, stop).to_scipy().toarray(), expected[start:stop]
        )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), cuttings(), st.sampled_from(["inner", "outer"]))
def test_a_join_is_a_gather_of_columns(monkeypatch, data, cutting, join):
    """Against a dense gather: each input's columns go where its gene stands, the rest is 0."""
    set_cutting(monkeypatch, cutting)
    matrices = data.draw(st.lists(count_matrices(12, 8, dtypes=("uint8", "float32")), min_size=2, max_size=3))
    pool = [f"g{k}" for k in range(12)]
    genes = [["shared", *data.draw(st.permutations(pool))][: m.shape[1]] for m in matrices]
    inputs = {}
    for k, (matrix, names) in enumerate(zip(matrices, genes, strict=True)):
        adata = anndata.AnnData(sp.csr_matrix(matrix))
        adata.obs_names, adata.var_names = [f"{k}-{i}" for i in range(adata.n_obs)], names
        inputs[str(k)] = adata
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no counts", category=UserWarning)
        ingest(inputs, Path(folder) / "a.zarr", join=join, memory_budget=cutting[-1])
        atlas = anndata.read_zarr(Path(folder) / "a.zarr")
    together = [set(names) for names in genes]
    assert set(atlas.var_names) == (set.intersection(*together) if join == "inner" else set.union(*together))
    assert list(atlas.var_names)[: len(genes[0])] == [g for g in genes[0] if g in set(atlas.var_names)]
    expected = np.zeros(atlas.shape)
    row = 0
    for matrix, names in zip(matrices, genes, strict=True):
        for column, gene in enumerate(names):
            if gene in atlas.var_names:
                expected[row : row + matrix.shape[0], atlas.var_names.get_loc(gene)] = matrix.toarray()[
                    :, column
                ]
        row += matrix.shape[0]
    np.testing.assert_array_equal(atlas.X.toarray(), expected)
