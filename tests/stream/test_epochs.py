"""Epochs: the same cells each time, kept in memory where they fit, drawn by weight."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import atlasvi
from atlasvi.errors import ObsError, OptionError
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import register, resolve
from atlasvi.stream import Epochs
from atlasvi.stream.epochs import KeptBlocks
from tests.stream.conftest import KINDS, N


def everything(pieces):
    return [(rows.tolist(), counts.to_dense().numpy()) for counts, rows in pieces]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("positions", [None, np.arange(3, N, 2)])
def test_what_is_kept_gives_the_same_minibatches_and_is_not_read_again(atlas, reads, num_workers, positions):
    options = {"batch_size": 64, "seed": 5, "positions": positions, "num_workers": num_workers}
    kept, fresh = Epochs(atlas, **options), Epochs(atlas, keep=False, **options)
    for epoch in range(3):
        one, other = everything(kept.counts(epoch)), everything(fresh.counts(epoch))
        assert [rows for rows, _ in one] == [rows for rows, _ in other]
        for (_, a), (_, b) in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    reads.clear()
    list(kept.counts(7))
    assert reads == []
    list(fresh.counts(7))
    assert reads != []


def test_counts_are_kept_in_their_narrow_types(atlas):
    epochs = Epochs(atlas, batch_size=64, num_workers=0)
    list(epochs.counts(0))
    held = sum(block.nbytes for block in epochs._kept._blocks.values())
    assert held < 1.05 * (atlas.read_rows(slice(None)).nbytes + 8 * len(epochs._kept._blocks))


def test_what_does_not_fit_in_half_of_the_budget_is_read_each_time(atlas, reads):
    n_bytes = int(atlas.bytes_per_row * N)
    epochs = Epochs(atlas, num_workers=0, memory_budget=int(1.9 * n_bytes))
    list(epochs.counts(0))
    reads.clear()
    list(epochs.counts(0))
    assert reads != []
    assert Epochs(atlas, memory_budget=int(2.3 * n_bytes))._kept is not None


def test_a_block_is_read_once_whatever_part_of_it_is_asked_for(atlas):
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return atlas.read_rows(slice(start, stop))

    kept = KeptBlocks(read, 100, 250)
    for start, stop in [(30, 100), (0, 30), (200, 250), (240, 250)]:
        np.testing.assert_array_equal(
            kept(start, stop).to_dense(), atlas.read_rows(slice(start, stop)).to_dense()
        )
    assert reads == [(0, 100), (200, 250)] and not kept.is_complete
    kept(150, 151)
    assert kept.is_complete


def test_counts_in_memory_are_not_kept_twice(counts):
    assert Epochs(Atlas.from_anndata(anndata.AnnData(counts)))._kept is None


def test_minibatches_need_codes(atlas):
    with pytest.raises(OptionError, match="need codes"):
        Epochs(atlas)()
    minibatch = next(Epochs(atlas, resolve(register(atlas), atlas), num_workers=0)())
    assert minibatch.counts.shape == (128, 50)


def test_a_balanced_stream_draws_each_kind_equally_often(atlas):
    rows = np.concatenate([rows for _, rows in atlas.stream(64, balance="kind", seed=1, epoch=2)])
    shares = np.unique(KINDS[rows], return_counts=True)[1] / len(rows)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    some = np.flatnonzero(KINDS != "a")
    rows = np.concatenate([rows for _, rows in atlas.stream(64, balance="kind", positions=some)])
    assert set(KINDS[rows]) == {"b", "c"}


def test_weights_follow_the_positions_and_leave_the_counts_as_they_are(atlas, counts):
    some = np.arange(100, 300)
    weights = np.where(some < 200, 0.0, 1.0)
    for csr, rows in atlas.stream(32, positions=some, weights=weights, num_workers=2):
        assert ((rows >= 200) & (rows < 300)).all()
        np.testing.assert_array_equal(csr.to_dense(), counts[rows].toarray())


def test_balance_that_cannot_be_is_named(atlas):
    with pytest.raises(ObsError, match=r"no column 'sort' to balance; it has .*kind"):
        atlas.stream(balance="sort")
    with pytest.raises(OptionError, match="leave one out"):
        atlas.stream(balance="kind", weights=np.ones(N))


@pytest.mark.parametrize("budget", ["a lot", 0, -5, "0 MB", b"1"])
def test_a_budget_that_is_no_size_is_named(atlas, budget):
    with pytest.raises(OptionError, match="memory_budget="):
        atlas.stream(memory_budget=budget)
    with pytest.raises(OptionError, match="memory_budget="):
        atlas.iter_blocks(memory_budget=budget)


def test_a_budget_in_words_is_the_same_as_in_bytes(atlas):
    def order(budget):
        return np.concatenate([r for _, r in atlas.stream(64, memory_budget=budget)]).tolist()

    assert order("20 kB") == order(20_000) != order("20 MB")


def test_only_what_was_shuffled_and_not_sorted_since_is_read_in_longer_blocks(tmp_path):
    """The store says that it was shuffled; views, splits and appended cells may undo it."""
    random = np.random.default_rng(0)
    adata = anndata.AnnData(sp.csr_matrix(random.integers(1, 9, (9_000, 5)).astype(np.float32)))
    atlasvi.ingest(adata, tmp_path / "as_is.zarr")
    atlasvi.ingest(adata, tmp_path / "shuffled.zarr", shuffle=True)

    def n_lanes(atlas, positions=None):
        return Epochs(atlas, positions=positions).plan(0).n_lanes

    some = np.sort(random.choice(9_000, 8_000, replace=False))
    assert n_lanes(atlasvi.open(tmp_path / "as_is.zarr")) == 64
    with atlasvi.open(tmp_path / "shuffled.zarr") as atlas:
        assert n_lanes(atlas) == n_lanes(atlas[some]) == n_lanes(atlas, some) == 32
        assert n_lanes(atlas[some][1_000:], np.arange(10, 6_500)) == 32
        assert n_lanes(atlas[random.permutation(some)]) == n_lanes(atlas, some[::-1]) == 64
    atlasvi.ingest(adata, tmp_path / "shuffled.zarr", append=True, make_unique=True)
    assert n_lanes(atlasvi.open(tmp_path / "shuffled.zarr")) == 64
