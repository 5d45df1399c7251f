"""How near a minibatch comes to one of a full shuffle, on a store sorted by cell type: the worst order."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from atlasvi.store.atlas import Atlas
from atlasvi.stream import Epochs
from atlasvi.stream.plan import default_sizes, plan_epoch

BATCH_SIZE = 128
SHARES = np.array([0.25, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])


def types_of(n_rows):
    """Of a store that is sorted by type."""
    return np.searchsorted(np.cumsum(SHARES), np.arange(n_rows) / n_rows, side="right")


def mean_entropy(minibatches, types):
    """Of the types in minibatches of row numbers, in bits."""
    cells = np.array([np.bincount(types[rows], minlength=len(SHARES)) for rows in minibatches])
    p = cells / cells.sum(1, keepdims=True)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(1).mean()


def of_a_full_shuffle(types):
    rows = np.random.default_rng(0).permutation(len(types))
    return mean_entropy(rows[: len(rows) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE), types)


def share_of_full_shuffle(n_rows, block_rows, n_lanes, every=25):
    """Mean entropy of some minibatches of three runs over that of a full shuffle."""
    types, sizes = types_of(n_rows), {"block_rows": block_rows, "n_lanes": n_lanes}
    plans = [plan_epoch(n_rows, batch_size=BATCH_SIZE, **sizes, seed=seed, epoch=seed) for seed in range(3)]
    some = [plan.positions(i) for plan in plans for i in range(0, n_rows // BATCH_SIZE, every)]
    return mean_entropy(some, types) / of_a_full_shuffle(types)


# Of cells with about 330, 1,000 and 2,000 non-zeros.
@pytest.mark.parametrize(
    ("n_rows", "bytes_per_row", "least"),
    [(200_000, 1_000, 0.95), (60_000, 3_000, 0.95), (120_000, 6_000, 0.95), (5_000, 600, 1), (2_000, 600, 1)],
)
def test_with_the_default_sizes_a_minibatch_has_95_percent_of_the_entropy_of_a_full_shuffle(
    n_rows, bytes_per_row, least
):
    sizes = default_sizes(bytes_per_row, n_rows=n_rows)
    assert share_of_full_shuffle(n_rows, *sizes, every=max(1, n_rows // 8_000)) > least


def test_the_measure_tells_lanes_from_none():
    n_rows = 60_000
    assert share_of_full_shuffle(n_rows, 512, 1) < 0.3
    assert 0.99 < share_of_full_shuffle(n_rows, n_rows, 1, every=1) < 1.01


def test_more_memory_mixes_better():
    n_rows, bytes_per_row = 60_000, 3_000
    shares = [
        share_of_full_shuffle(n_rows, *default_sizes(bytes_per_row, int(held * 2 * n_rows * bytes_per_row)))
        for held in (0.005, 0.05, 0.25, 1.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.9
    assert shares[-1] > 1.0  # each lane stands for one stretch of the store: better than chance


def test_the_stream_has_the_minibatches_of_that_plan():
    n_rows = 20_000
    counts = sp.csr_matrix((np.ones(n_rows, np.float32), np.arange(n_rows) % 7, np.arange(n_rows + 1)))
    epochs = Epochs(Atlas.from_anndata(anndata.AnnData(counts)), batch_size=BATCH_SIZE, memory_budget="160kB")
    plan = epochs.plan(0)
    assert plan.n_lanes == 16
    streamed = [rows for _, rows in epochs.counts(0)]
    assert all((rows == plan.positions(i)).all() for i, rows in enumerate(streamed))
    assert mean_entropy(streamed[:-1], types_of(n_rows)) > 0.85 * of_a_full_shuffle(types_of(n_rows))
