"""The order of an epoch is a pure function, and every cell comes once."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvi.errors import OptionError
from atlasvi.stream.plan import (
    balance_weights,
    blocks_ahead,
    count_minibatches,
    default_sizes,
    plan_epoch,
)

SIZES = {
    "n_rows": st.integers(0, 300),
    "batch_size": st.integers(1, 90) | st.integers(20, 60),
    "block_rows": st.integers(1, 120),
    "n_lanes": st.integers(1, 20),
    "seed": st.integers(0, 2**64 - 1),
    "epoch": st.integers(0, 2**32 - 1),
}


def whole(plan):
    parts = [plan.positions(i) for i in range(plan.n_minibatches)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({**SIZES, "shuffle": st.booleans()}))
def test_every_cell_comes_exactly_once_an_epoch(arguments):
    plan = plan_epoch(**arguments)
    assert sorted(whole(plan)) == list(range(arguments["n_rows"]))


@settings(deadline=None, max_examples=60)
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
    plan = plan_epoch(n, batch_size=128, block_rows=50, n_lanes=2, seed=0, epoch=0)
    assert [b - a for a, b in plan.minibatches()] == expected


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    sizes = {"batch_size": 10, "block_rows": 20, "n_lanes": 3}
    order = whole(plan_epoch(500, seed=3, epoch=4, **sizes))
    np.testing.assert_array_equal(order, whole(plan_epoch(500, seed=3, epoch=4, **sizes)))
    for other in ({"seed": 3, "epoch": 5}, {"seed": 4, "epoch": 4}, {"seed": 4, "epoch": 3}):
        assert (order != whole(plan_epoch(500, **other, **sizes))).mean() > 0.9


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({**SIZES, "shuffle": st.booleans()}), st.integers(1, 5))
def test_readers_that_share_the_lanes_have_together_what_one_has(arguments, world_size):
    plan = plan_epoch(**arguments)
    for i in range(plan.n_minibatches):
        parts = [plan.positions(i, range(r, plan.n_lanes, world_size)) for r in range(world_size)]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(plan.positions(i)))
        start, stop = plan.bounds(i)
        assert len(plan.positions(i)) == stop - start


def test_a_lane_keeps_its_blocks_from_epoch_to_epoch_and_visits_them_in_another_order():
    plans = [plan_epoch(9000, batch_size=64, block_rows=100, n_lanes=7, seed=3, epoch=e) for e in (0, 1)]
    for lane in range(7):
        one, other = ([(u.start // 100) for u in plan.units(lane)] for plan in plans)
        assert set(one) == set(other)
        assert one != other


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries(SIZES))
def test_every_row_comes_at_its_share_of_the_epoch(arguments):
    """Row j of a lane of n comes at (j + 1/2) / n: by brute force over all rows, with exact fractions."""
    plan = plan_epoch(**arguments)
    rows = plan.lane_rows.tolist()
    assert sum(rows) == arguments["n_rows"]
    when = sorted((Fraction(2 * j + 1, 2 * n), lane) for lane, n in enumerate(rows) for j in range(n))
    for i in range(plan.n_minibatches + 1):
        total = arguments["n_rows"] if i == plan.n_minibatches else plan.bounds(i)[0]
        expected = np.bincount([lane for _, lane in when[:total]], minlength=plan.n_lanes)
        np.testing.assert_array_equal(plan.taken(i), expected)


def test_a_minibatch_draws_from_all_lanes():
    plan = plan_epoch(64_000, batch_size=128, block_rows=100, n_lanes=64, seed=0, epoch=0)
    drawn = np.diff([plan.taken(i) for i in range(plan.n_minibatches + 1)], axis=0)
    assert drawn.min() >= 1 and drawn.max() <= 3


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries(SIZES), st.integers(0, 5))
def test_units_are_scheduled_as_minibatches_need_them(arguments, start):
    plan = plan_epoch(**arguments)
    start = min(start, plan.n_minibatches)
    units = plan.schedule(start=start)
    needed = [min(i for i in range(plan.n_minibatches) if plan.taken(i + 1)[u.lane] > u.first) for u in units]
    assert np.maximum(needed, start).tolist() == sorted(np.maximum(needed, start).tolist())
    everything = np.concatenate([np.arange(u.start, u.stop) for u in units] or [[]])
    later = [int(p) for i in range(start, plan.n_minibatches) for p in plan.positions(i)]
    assert set(later) <= set(everything.tolist())


def test_lanes_do_not_come_to_the_end_of_a_block_together():
    """So that reading is spread over the epoch: no minibatch wants many blocks at once."""
    plan = plan_epoch(64_000, batch_size=500, block_rows=500, n_lanes=32, seed=0, epoch=0)
    wanted = np.zeros(plan.n_minibatches, int)
    for unit in plan.schedule():
        wanted[next(i for i in range(len(wanted)) if plan.taken(i + 1)[unit.lane] > unit.first)] += 1
    assert wanted[1:].max() <= 3


def test_in_order_without_shuffling():
    plan = plan_epoch(103, batch_size=10, block_rows=7, n_lanes=3, seed=9, epoch=9, shuffle=False)
    np.testing.assert_array_equal(whole(plan), np.arange(103))


def test_shuffling_mixes_cells_from_far_apart():
    """A minibatch of a store sorted by type holds cells of all types, in about their shares."""
    n = 20_000
    plan = plan_epoch(n, batch_size=500, block_rows=500, n_lanes=20, seed=0, epoch=0)
    kind = whole(plan) // (n // 4)
    shares = np.array([np.bincount(kind[a:b], minlength=4) for a, b in plan.minibatches()]) / 500
    assert shares.min() > 0.03
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("block_rows", 0), ("n_lanes", 0), ("seed", -1), ("epoch", -1), ("n_rows", -1)],
)
def test_a_number_that_cannot_be_is_named(name, value):
    arguments = {"n_rows": 5, "batch_size": 2, "block_rows": 2, "n_lanes": 2, "seed": 0, "epoch": 0}
    with pytest.raises(OptionError, match=f"{name}={value}"):
        plan_epoch(**{**arguments, name: value})


@given(st.floats(8, 2e4), st.integers(16 << 20, 1 << 34), st.integers(1, 64), st.booleans())
def test_what_is_held_and_what_is_read_ahead_stay_within_three_quarters_of_the_budget(
    each, budget, workers, is_shuffled
):
    block_rows, n_lanes = default_sizes(each, budget, is_shuffled=is_shuffled)
    ahead = blocks_ahead(each, block_rows, workers, budget)
    assert 64 <= block_rows <= 4096 and 2 <= n_lanes <= 64 and 1 <= ahead <= 4 * workers
    block = block_rows * each
    assert n_lanes * block <= budget / 2
    # Reading takes about as much again as what is read.
    assert 2 * ahead * block <= budget / 4


def test_cells_that_lie_at_random_come_in_fewer_and_longer_blocks():
    assert default_sizes(4200, 256 << 20) == (499, 64)
    assert default_sizes(4200, 256 << 20, is_shuffled=True) == (998, 32)
    # A small budget makes lanes fewer, and blocks shorter only below four of them.
    assert default_sizes(4200, 64 << 20, is_shuffled=True) == (998, 8)
    assert default_sizes(4200, 16 << 20, is_shuffled=True) == (499, 4)
    # Of few cells there are still as many lanes as can be.
    assert default_sizes(4200, 256 << 20, 6_400, is_shuffled=True) == (200, 32)


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries(SIZES), st.integers(1, 4), st.data())
def test_with_weights_a_cell_comes_its_expected_number_of_times_rounded_up_or_down(arguments, world, data):
    n = arguments["n_rows"]
    weights = np.array(data.draw(st.lists(st.sampled_from([0, 0.5, 1, 3, 40]), min_size=n, max_size=n)))
    if not weights.sum():
        return
    plan = plan_epoch(**arguments, weights=weights)
    expected = weights * n / weights.sum()
    came = np.bincount(whole(plan), minlength=n)
    assert (np.abs(came - expected) < 1).all()
    assert (came[weights == 0] == 0).all()
    assert came.sum() == plan.n_visits == plan.lane_rows.sum()
    for i in range(plan.n_minibatches):
        parts = [plan.positions(i, range(r, plan.n_lanes, world)) for r in range(world)]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(plan.positions(i)))
        assert np.subtract(*plan.bounds(i)[::-1]) == len(plan.positions(i))


@pytest.mark.parametrize("value", [0.0, 1e308, 5e-324])
def test_weights_that_give_no_epoch_are_refused(value):
    with pytest.raises(OptionError, match=r"weights (are 0|come to)"):
        plan_epoch(40, batch_size=8, block_rows=8, seed=0, epoch=0, weights=np.full(40, value))


def test_weights_are_right_on_average_over_epochs_and_every_epoch_differs():
    weights = np.random.default_rng(0).gamma(1.0, size=400)
    sizes = {"batch_size": 64, "block_rows": 32, "n_lanes": 4, "seed": 1, "weights": weights}
    came = [np.bincount(whole(plan_epoch(400, epoch=e, **sizes)), minlength=400) for e in range(300)]
    expected = weights * 400 / weights.sum()
    share = expected % 1
    error = np.sqrt(np.maximum(share * (1 - share), 1e-9) / 300)
    assert (np.abs(np.mean(came, 0) - expected) < 5 * error + 1e-9).all()
    assert (came[0] != came[1]).any()
    np.testing.assert_array_equal(
        whole(plan_epoch(400, epoch=7, **sizes)), whole(plan_epoch(400, epoch=7, **sizes))
    )


def test_equal_weights_change_nothing():
    sizes = {"batch_size": 10, "block_rows": 16, "n_lanes": 4, "seed": 3, "epoch": 2}
    order = whole(plan_epoch(256, **sizes))
    np.testing.assert_array_equal(whole(plan_epoch(256, weights=np.full(256, 0.25), **sizes)), order)


def test_balanced_classes_come_equally_often():
    codes = np.repeat([0, 1, 2, -1], [900, 90, 9, 50])
    plan = plan_epoch(
        len(codes), batch_size=128, block_rows=64, n_lanes=5, seed=0, epoch=0, weights=balance_weights(codes)
    )
    came = np.bincount(codes[whole(plan)] + 1, minlength=4)
    assert came[0] == 0
    np.testing.assert_allclose(came[1:], len(codes) / 3, rtol=0.05)


def test_blocks_of_weight_zero_are_not_read():
    weights = np.repeat([0.0, 1.0], 500)
    plan = plan_epoch(1000, batch_size=50, block_rows=50, n_lanes=4, seed=0, epoch=0, weights=weights)
    assert min(unit.start for unit in plan.schedule()) >= 500


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(4), "need 5 numbers"),
        (np.array([1, 1, -1, 1, 1.0]), "that of cell 2 is -1"),
        (np.array([1, np.nan, 1, 1, 1.0]), "that of cell 1 is nan"),
        (np.zeros(5), "0 for all cells"),
    ],
)
def test_weights_that_cannot_be_are_named(weights, message):
    with pytest.raises(OptionError, match=message):
        plan_epoch(5, batch_size=2, block_rows=2, seed=0, epoch=0, weights=weights)
    with pytest.raises(OptionError, match="without shuffling"):
        plan_epoch(5, batch_size=2, block_rows=2, seed=0, epoch=0, weights=np.ones(5), shuffle=False)
    with pytest.raises(OptionError, match="no cell has one"):
        balance_weights(np.array([-1, -1]))
