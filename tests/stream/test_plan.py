"""The order of an epoch is a pure function, and every cell comes once."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlasvi.errors import OptionError
from atlasvi.stream.plan import count_minibatches, default_sizes, plan_epoch

SIZES = {
    "n_rows": st.integers(0, 700),
    "batch_size": st.integers(1, 90),
    "block_rows": st.integers(1, 120),
    "buffer_blocks": st.integers(1, 9),
    "seed": st.integers(0, 2**64 - 1),
    "epoch": st.integers(0, 2**32 - 1),
}


def whole(plan):
    parts = [plan.positions(k) for k in range(plan.n_buffers)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@given(st.fixed_dictionaries({**SIZES, "shuffle": st.booleans()}))
def test_every_cell_comes_exactly_once_an_epoch(arguments):
    plan = plan_epoch(**arguments)
    assert sorted(whole(plan)) == list(range(arguments["n_rows"]))


@given(st.fixed_dictionaries(SIZES))
def test_minibatches_cut_the_epoch_without_gaps_and_none_is_tiny(arguments):
    plan = plan_epoch(**arguments)
    bounds = list(plan.minibatches())
    n, size = arguments["n_rows"], arguments["batch_size"]
    assert [a for a, _ in bounds] == [i * size for i in range(len(bounds))]
    assert [b for _, b in bounds[:-1]] == [a for a, _ in bounds[1:]]
    assert len(bounds) == plan.n_minibatches == count_minibatches(n, size)
    if n:
        assert bounds[-1][1] == n
        last = bounds[-1][1] - bounds[-1][0]
        assert last >= min(3, n, size)
        assert last <= size + 2
    else:
        assert bounds == []


@pytest.mark.parametrize(
    ("n", "expected"),
    [(256, [128, 128]), (257, [128, 129]), (258, [128, 130]), (259, [128, 128, 3]), (2, [2])],
)
def test_a_tail_of_fewer_than_three_cells_joins_the_minibatch_before(n, expected):
    plan = plan_epoch(n, batch_size=128, block_rows=50, buffer_blocks=2, seed=0, epoch=0)
    assert [b - a for a, b in plan.minibatches()] == expected


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    sizes = {"batch_size": 10, "block_rows": 20, "buffer_blocks": 3}
    order = whole(plan_epoch(500, seed=3, epoch=4, **sizes))
    np.testing.assert_array_equal(order, whole(plan_epoch(500, seed=3, epoch=4, **sizes)))
    for other in ({"seed": 3, "epoch": 5}, {"seed": 4, "epoch": 4}, {"seed": 4, "epoch": 3}):
        assert (order != whole(plan_epoch(500, **other, **sizes))).mean() > 0.9


def test_a_buffer_is_ordered_without_looking_at_the_earlier_ones():
    plan = plan_epoch(900, batch_size=10, block_rows=20, buffer_blocks=3, seed=1, epoch=1)
    backwards = [plan.positions(k) for k in reversed(range(plan.n_buffers))]
    np.testing.assert_array_equal(np.concatenate(backwards[::-1]), whole(plan))


def test_buffers_are_permuted_differently():
    plan = plan_epoch(4000, batch_size=10, block_rows=100, buffer_blocks=10, seed=0, epoch=0)
    orders = [plan.order(k) for k in range(4)]
    assert all((a != b).any() for a, b in pairwise(orders))


def test_in_order_without_shuffling():
    plan = plan_epoch(103, batch_size=10, block_rows=7, buffer_blocks=3, seed=9, epoch=9, shuffle=False)
    np.testing.assert_array_equal(whole(plan), np.arange(103))


def test_shuffling_mixes_cells_from_far_apart():
    """A minibatch of a store sorted by type holds cells of all types, in about their shares."""
    n = 20_000
    plan = plan_epoch(n, batch_size=500, block_rows=500, buffer_blocks=20, seed=0, epoch=0)
    kind = whole(plan) // (n // 4)
    shares = np.array([np.bincount(kind[a:b], minlength=4) for a, b in plan.minibatches()]) / 500
    assert shares.min() > 0.03
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("block_rows", 0), ("buffer_blocks", 0), ("seed", -1), ("epoch", -1), ("n_rows", -1)],
)
def test_a_number_that_cannot_be_is_named(name, value):
    arguments = {"n_rows": 5, "batch_size": 2, "block_rows": 2, "buffer_blocks": 2, "seed": 0, "epoch": 0}
    with pytest.raises(OptionError, match=f"{name}={value}"):
        plan_epoch(**{**arguments, name: value})


@given(st.floats(8, 2e4), st.integers(1, 4096), st.integers(48 << 20, 1 << 34))
def test_two_buffers_stay_within_the_budget(bytes_per_row, batch_size, budget):
    block_rows, buffer_blocks = default_sizes(bytes_per_row, batch_size, budget)
    assert 512 <= block_rows <= 4096
    assert 2 * buffer_blocks * block_rows * bytes_per_row <= budget or buffer_blocks == 2


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(OptionError, match="memory_budget=0"):
        default_sizes(100.0, 128, 0)
