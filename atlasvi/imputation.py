"""Testing imputation: counts are corrupted, a model sees what is left, and is asked what was there.

The corruptions of Lopez et al. 2018 (Methods), as functions that say what they changed. Which entries change
depends on (seed, cell, gene) alone, so an atlas can be corrupted piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import CellsError, CountsError, OptionError
from atlasvi_kernels import binomial_quantile, counter_pairs

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True)
class Corruption:
    """Counts of which some were changed, and which.

    Args:
        counts: ``(n_obs, n_vars)`` CSR, as a model is to see them; no zeros are stored.
        rows: ``(n,)`` int64, cells of the entries that were chosen, whether or not they came out changed.
        genes: ``(n,)`` int64, their genes.
        before: ``(n,)`` their counts before, all above 0.
        after: ``(n,)`` their counts now.
    """

    counts: sp.csr_matrix
    rows: NDArray[np.int64]
    genes: NDArray[np.int64]
    before: NDArray[Any]
    after: NDArray[Any]

    @property
    def changed(self) -> NDArray[np.bool_]:
        """``(n,)`` which of the chosen entries are other than they were."""
        changed: NDArray[np.bool_] = self.before != self.after
        return changed


def uniform_zero(
    counts: Any,
    rate: float = 0.1,
    p_zero: float = 0.9,
    *,
    seed: int = 0,
    cells: NDArray[np.int64] | None = None,
) -> Corruption:
    """Choose a share of the non-zero counts, and set each of these to zero with a probability.

    The paper chooses 10 % and multiplies each by a Bernoulli variable of 0.9, which keeps nine in ten of them
    (``p_zero=0.1``: 1 % of the non-zeros are lost), while its text speaks of 9 % (``p_zero=0.9``).

    Args:
        counts: cells x genes, sparse.
        rate: share of the non-zeros chosen, in [0, 1].
        p_zero: probability that a chosen one is set to zero, in [0, 1].
        seed: of the choice.
        cells: ``(n_obs,)`` int64, numbers of the cells where ``counts`` is a piece of an atlas.

    Raises:
        OptionError: a share that is none.
        CountsError: values that are not counts.

    Example:
        >>> import scipy.sparse as sp
        >>> uniform_zero(sp.csr_matrix([[3, 0, 1]]), rate=1, p_zero=1).counts.nnz
        0
    """
    _check_shares(rate=rate, p_zero=p_zero)
    matrix, rows, genes, u = _entries(counts, seed, cells)
    return _apply(matrix, rows, genes, u[:, 0] < rate, np.where(u[:, 1] < p_zero, 0, matrix.data))


def binomial(
    counts: Any, rate: float = 0.1, p: float = 0.2, *, seed: int = 0, cells: NDArray[np.int64] | None = None
) -> Corruption:
    """Choose a share of the non-zero counts, and put a binomial draw of each of these in its place.

    Args:
        counts: cells x genes, sparse.
        rate: share of the non-zeros chosen, in [0, 1].
        p: probability that a molecule is kept, in [0, 1].
        seed: of the choice and the draws.
        cells: see `uniform_zero`.

    Raises:
        OptionError: a share that is none.
        CountsError: values that are not counts.

    Example:
        >>> import scipy.sparse as sp
        >>> found = binomial(sp.csr_matrix([[100, 0, 50]]), rate=1)
        >>> bool((found.after < found.before).all())
        True
    """
    _check_shares(rate=rate, p=p)
    matrix, rows, genes, u = _entries(counts, seed, cells)
    drawn = matrix.data if p == 1 else binomial_quantile(u[:, 1], matrix.data, p)
    return _apply(matrix, rows, genes, u[:, 0] < rate, drawn)


@dataclass(frozen=True)
class ImputationErrors:
    """How far imputed counts are from what they were, over entries that were changed.

    Args:
        n: entries.
        median_l1: median of abs(imputed - original), the paper's measure. Most non-zeros are 1 in many data
            sets, and then it says little.
        mean_l1: their mean.
        spearman: rank correlation of imputed and original.
    """

    n: int
    median_l1: float
    mean_l1: float
    spearman: float


def imputation_errors(imputed: Any, original: Any, *, at_least: float = 1) -> ImputationErrors:
    """Compare imputed counts with originals.

    Args:
        imputed: ``(n,)`` float.
        original: ``(n,)``.
        at_least: look at originals of this or more; 2 leaves out the ones, which a constant answers well.

    Raises:
        CellsError: there are fewer than two such originals, or they do not match.

    Example:
        >>> imputation_errors([1.0, 2.5, 2.0], [1, 3, 2]).mean_l1
        0.16666666666666666
    """
    import scipy.stats

    guess, truth = np.asarray(imputed, np.float64), np.asarray(original, np.float64)
    if guess.shape != truth.shape or guess.ndim != 1:
        raise CellsError(
            f"{guess.shape} imputed values were given for {truth.shape} originals; one each is needed"
        )
    keep = truth >= at_least
    if keep.sum() < 2:
        raise CellsError(f"{int(keep.sum())} originals are {at_least:g} or more; at least two are needed")
    off = np.abs(guess - truth)[keep]
    constant = np.ptp(guess[keep]) == 0 or np.ptp(truth[keep]) == 0
    rank = np.nan if constant else float(scipy.stats.spearmanr(guess[keep], truth[keep]).statistic)
    return ImputationErrors(int(keep.sum()), float(np.median(off)), float(off.mean()), rank)


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise OptionError(f"{name} must be a share in [0, 1], is {share}")


def _entries(
    counts: Any, seed: int, cells: NDArray[np.int64] | None
) -> tuple[Any, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The counts as CSR without zeros, row and gene of each, and two uniform draws that belong to it."""
    import scipy.sparse as sp

    matrix = sp.csr_matrix(counts, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    wrong = np.flatnonzero(~((matrix.data > 0) & (matrix.data == np.floor(matrix.data))))
    if len(wrong):
        raise CountsError(f"{matrix.data[wrong[0]]} is not a count; corrupt counts, and normalise afterwards")
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    genes = matrix.indices.astype(np.int64)
    if cells is not None and len(cells) != matrix.shape[0]:
        raise CellsError(f"{len(cells)} numbers were given for {matrix.shape[0]} cells; one each is needed")
    numbers = rows if cells is None else np.asarray(cells, np.int64)[rows]
    return matrix, rows, genes, counter_pairs(seed, 0, numbers, genes)


def _apply(
    matrix: Any,
    rows: NDArray[np.int64],
    genes: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    instead: NDArray[Any],
) -> Corruption:
    before = matrix.data[chosen].copy()
    matrix.data[chosen] = instead[chosen]
    after = matrix.data[chosen].copy()
    matrix.eliminate_zeros()
    return Corruption(matrix, rows[chosen], genes[chosen], before, after)


__all__ = ["Corruption", "ImputationErrors", "binomial", "imputation_errors", "uniform_zero"]
