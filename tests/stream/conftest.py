"""A small atlas on disk, and what is read of it."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import atlasvi
from atlasvi.store.atlas import Atlas

N, GENES = 900, 50
KINDS = np.repeat(["a", "b", "c"], [700, 180, 20])


@pytest.fixture(scope="module")
def counts():
    matrix = sp.random(N, GENES, 0.3, format="csr", random_state=0, dtype=np.float32)
    matrix.data = np.ceil(matrix.data * 20)
    return matrix


@pytest.fixture(scope="module")
def path(counts, tmp_path_factory):
    adata = anndata.AnnData(counts)
    adata.obs["batch"] = np.resize(["x", "y", "z"], N)
    adata.obs["kind"] = KINDS
    path = tmp_path_factory.mktemp("small") / "atlas.zarr"
    atlasvi.ingest(adata, path)
    return path


@pytest.fixture
def atlas(path):
    with atlasvi.open(path) as atlas:
        yield atlas


@pytest.fixture
def reads(monkeypatch):
    """The reads of the store, as they come."""
    seen, read_rows = [], Atlas.read_rows

    def watching(self, rows):
        seen.append(rows)
        return read_rows(self, rows)

    monkeypatch.setattr(Atlas, "read_rows", watching)
    return seen
