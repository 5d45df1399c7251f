import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from atlasvi_kernels import CSR


def of_width(width):
    return st.tuples(st.integers(0, 6), width).flatmap(
        lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 3))
    )


matrices = of_width(st.integers(1, 9))


@given(matrices)
@settings(deadline=None)
def test_to_and_from_scipy_and_torch(dense):
    for counts in (CSR.from_scipy(sp.csr_matrix(dense)), CSR.from_torch(torch.from_numpy(dense))):
        assert counts.shape == dense.shape
        np.testing.assert_array_equal(counts.to_scipy().toarray(), dense)
        np.testing.assert_array_equal(counts.to_dense(torch.int64).numpy(), dense)
        np.testing.assert_array_equal(counts.row_sums().numpy(), dense.sum(1))


@given(matrices, st.data())
@settings(deadline=None)
def test_rows_and_columns_are_those_of_the_dense_matrix(dense, data):
    n, g = dense.shape
    counts = CSR.from_scipy(sp.csr_matrix(dense))
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=8) if n else st.just([])), np.int64)
    np.testing.assert_array_equal(counts.take_rows(rows).to_scipy().toarray(), dense[rows])
    chosen = np.array(data.draw(st.lists(st.integers(0, g - 1), unique=True)), np.int64)
    column_of = np.full(g, -1)
    column_of[chosen] = np.arange(len(chosen))
    got = counts.take_columns(column_of, len(chosen))
    np.testing.assert_array_equal(got.to_dense().numpy(), dense[:, chosen])


@given(st.lists(of_width(st.just(4)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=20)
def test_concatenation_stacks_rows(parts):
    got = CSR.concatenate([CSR.from_scipy(sp.csr_matrix(p)) for p in parts])
    np.testing.assert_array_equal(got.to_scipy().toarray(), np.concatenate(parts))


def test_duplicates_of_scipy_are_summed_and_explicit_zeros_dropped_on_request():
    messy = sp.csr_matrix((np.array([1, 2, 0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    counts = CSR.from_scipy(messy)
    assert counts.to_dense().tolist() == [[0, 3]]
    assert counts.drop_zeros().nnz == 1
    assert messy.nnz == 3, "the caller's matrix is left as it was"


def test_what_does_not_fit_is_named():
    indptr = torch.tensor([0, 1])
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="indptr must be"):
        CSR(indptr.int(), one, one, 1)
    with pytest.raises(ValueError, match="indices must be of an integer type"):
        CSR(indptr, one.float(), one, 1)
    with pytest.raises(ValueError, match="of the same length"):
        CSR(indptr, one, torch.tensor([1, 2]), 1)
    with pytest.raises(ValueError, match="parts of one width"):
        CSR.concatenate([])
    with pytest.raises(IndexError, match="rows 0 to 3"):
        CSR(indptr, one, one, 1).take_rows(np.array([0, 3]))
