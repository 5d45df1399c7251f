"""The order of an epoch is a pure function, and every cell comes once."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvi.errors import OptionError
from atlasvi.stream.plan import count_minibatches, default_sizes, plan_epoch

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


@given(st.floats(8, 2e4), st.integers(48 << 20, 1 << 34))
def test_the_lanes_stay_within_two_thirds_of_the_budget(bytes_per_row, budget):
    block_rows, n_lanes = default_sizes(bytes_per_row, budget)
    assert 512 <= block_rows <= 4096 and 2 <= n_lanes <= 64
    assert 1.5 * n_lanes * block_rows * bytes_per_row <= budget


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(OptionError, match="memory_budget=0"):
        default_sizes(100.0, 0)
