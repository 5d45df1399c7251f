"""Hypothesis strategies for what the tests share: sparse counts in every shape and type they come in."""

import numpy as np
import scipy.sparse as sp
from hypothesis import strategies as st

COUNT_TYPES = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
INDEX_TYPES = ("int32", "int64")


@st.composite
def count_matrices(draw, max_obs: int = 40, max_vars: int = 30, dtypes=COUNT_TYPES):
    """A CSR matrix of counts (cells x genes, at least 1 x 1): any of `dtypes`, with explicit zeros,
    columns out of order, empty rows and empty columns; no column twice in a row."""
    n_obs, n_vars = draw(st.integers(1, max_obs)), draw(st.integers(1, max_vars))
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    index_dtype = np.dtype(draw(st.sampled_from(INDEX_TYPES)))
    density = draw(st.sampled_from((0.0, 0.02, 0.3, 1.0)))
    largest = draw(st.sampled_from((1, 255, 256, 65_535, 65_536, 2**31 - 1, 2**32 - 1)))
    if dtype.kind in "iu":
        largest = min(largest, np.iinfo(dtype).max)
    if dtype == np.float32:
        largest = min(largest, 1 << 24)  # above it float32 does not hold every integer
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    present = rng.random((n_obs, n_vars)) < density
    counts = rng.integers(0, largest, (n_obs, n_vars), endpoint=True)
    columns = [rng.permutation(np.flatnonzero(row)) for row in present]
    indptr = np.concatenate([[0], np.cumsum([len(c) for c in columns])])
    indices = np.concatenate([*columns, np.zeros(0, int)]).astype(index_dtype)
    data = counts[np.repeat(np.arange(n_obs), np.diff(indptr)), indices].astype(dtype)
    return sp.csr_matrix((data, indices, indptr.astype(index_dtype)), shape=(n_obs, n_vars))
