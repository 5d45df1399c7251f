"""Corruptions do what they say they did, and errors are scipy's and numpy's."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats

from atlasvi.errors import CellsError, CountsError, OptionError
from atlasvi.imputation import binomial, imputation_errors, uniform_zero

COUNTS = sp.random(
    400, 300, 0.2, "csr", random_state=1, data_rvs=lambda n: np.random.default_rng(2).poisson(2, n) + 1
)


def check_says_what_it_changed(found):
    after = COUNTS.toarray()
    assert (after[found.rows, found.genes] == found.before).all()
    after[found.rows, found.genes] = found.after
    np.testing.assert_array_equal(found.counts.toarray(), after)
    assert (found.counts.data > 0).all()
    assert len(set(zip(found.rows.tolist(), found.genes.tolist(), strict=True))) == len(found.rows)
    np.testing.assert_array_equal(found.changed, found.before != found.after)


@pytest.mark.parametrize(("p_zero", "share"), [(0.9, 0.09), (0.1, 0.01), (1.0, 0.1), (0.0, 0.0)])
def test_uniform_zero(p_zero, share):
    found = uniform_zero(COUNTS, p_zero=p_zero)
    check_says_what_it_changed(found)
    assert set(found.after[found.changed]) <= {0}
    error = 4 * np.sqrt(0.1 / COUNTS.nnz)
    assert abs(len(found.rows) / COUNTS.nnz - 0.1) < error
    assert abs(found.changed.sum() / COUNTS.nnz - share) < error


def test_binomial():
    many = sp.csr_matrix(np.full((200, 50), 20.0))
    found = binomial(many, rate=0.5, p=0.2)
    share = np.bincount(found.after.astype(int), minlength=21) / len(found.after)
    np.testing.assert_allclose(share, scipy.stats.binom.pmf(np.arange(21), 20, 0.2), atol=0.02)
    check_says_what_it_changed(binomial(COUNTS))
    assert not binomial(COUNTS, rate=1, p=1).changed.any()
    assert binomial(COUNTS, rate=1, p=0).counts.nnz == 0


@pytest.mark.parametrize("how", [uniform_zero, binomial])
def test_a_piece_is_corrupted_as_the_whole_is(how):
    whole = how(COUNTS, seed=3).counts
    cells = np.array([399, 0, 17])
    piece = how(COUNTS[cells], seed=3, cells=cells)
    assert (piece.counts != whole[cells]).nnz == 0
    assert (how(COUNTS, seed=4).counts != whole).nnz > 0


def test_the_counts_that_were_given_stay_what_they_were():
    before = COUNTS.copy()
    uniform_zero(COUNTS, rate=1)
    assert (COUNTS != before).nnz == 0


def test_errors():
    truth = np.array([1, 1, 2, 5, 9.0])
    guess = np.array([1.5, 0.5, 2, 3, 10])
    found = imputation_errors(guess, truth)
    assert (found.n, found.median_l1, found.mean_l1) == (5, 0.5, pytest.approx(0.8))
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(guess, truth).statistic)
    assert imputation_errors(guess, truth, at_least=2).n == 3
    assert np.isnan(imputation_errors(np.ones(5), truth).spearman)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: uniform_zero(COUNTS, rate=1.5), OptionError, "rate"),
        (lambda: uniform_zero(COUNTS, p_zero=-0.1), OptionError, "p_zero"),
        (lambda: binomial(COUNTS, p=2), OptionError, "p must"),
        (lambda: binomial(COUNTS * 0.5), CountsError, "not a count"),
        (lambda: uniform_zero(COUNTS * -1), CountsError, "not a count"),
        (lambda: uniform_zero(COUNTS, cells=np.arange(3)), CellsError, "3 numbers"),
        (lambda: imputation_errors([1.0], [1.0, 2.0]), CellsError, "one each"),
        (lambda: imputation_errors([1.0, 1.0], [1.0, 2.0], at_least=2), CellsError, "1 originals"),
    ],
)
def test_what_cannot_be_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
