"""Rows of several matrices at once, against scipy."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvi_kernels import CSR, RowPool


@settings(deadline=None)
@given(st.data())
def test_taking_rows_is_stacking_and_indexing(data):
    """Through additions, droppings and types that differ, of matrices with empty rows or none."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pool, held = RowPool(9), {}
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 3))):
            matrix = sp.random(int(rng.integers(0, 6)), 9, 0.4, format="csr", random_state=rng)
            matrix.data = np.ceil(matrix.data * 200)
            counts = CSR.from_numpy(
                matrix.indptr.astype(np.int64),
                matrix.indices.astype(data.draw(st.sampled_from([np.uint16, np.int32]))),
                matrix.data.astype(data.draw(st.sampled_from([np.uint8, np.uint16, np.float32]))),
                9,
            )
            held[pool.add(counts)] = matrix
        if held and data.draw(st.booleans()):
            slot = data.draw(st.sampled_from(sorted(held)))
            pool.drop(slot)
            del held[slot]
        assert len(pool) == len(held)
        pairs = [(slot, row) for slot, matrix in held.items() for row in range(matrix.shape[0])]
        asked = data.draw(st.lists(st.sampled_from(pairs), max_size=12)) if pairs else []
        got = pool.take(np.array([s for s, _ in asked], np.int64), np.array([r for _, r in asked], np.int64))
        expected = [held[slot][row].toarray() for slot, row in asked]
        np.testing.assert_array_equal(got.to_dense().numpy(), np.vstack([np.zeros((0, 9)), *expected]))


def test_what_is_not_there_is_named():
    pool = RowPool(3)
    slot = pool.add(CSR.from_scipy(sp.csr_matrix(np.eye(3))))
    with pytest.raises(IndexError, match="row 3 asked of matrix 0, which has 3"):
        pool.take(np.array([slot]), np.array([3]))
    with pytest.raises(IndexError, match="matrices 1 to 1 asked of a pool with 1"):
        pool.take(np.array([1]), np.array([0]))
    pool.drop(slot)
    with pytest.raises(IndexError, match="row 0 asked of matrix 0, which has 0"):
        pool.take(np.array([slot]), np.array([0]))
    with pytest.raises(ValueError, match="a matrix of 2 columns among those of 3"):
        pool.add(CSR.from_scipy(sp.csr_matrix(np.eye(2))))
