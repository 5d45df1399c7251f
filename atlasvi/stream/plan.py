"""Which cells come when: a pure function of (number of cells, sizes, seed, epoch).

Positions ``0 .. n_rows`` are cut into blocks of neighbours, because neighbours are cheap to read together.
The blocks are dealt to a fixed number of lanes, once for all epochs. In an epoch each lane goes through its
blocks in an order of its own, through the rows of a block in a random order, and every minibatch draws from
all lanes in proportion to their lengths. So what a minibatch holds does not depend on who reads: a reader,
or one of several machines, takes some of the lanes and reads the blocks of these alone; and any minibatch
can be asked for without the ones before it.

Weights change how often a cell comes: a cell of expected number e comes floor(e) or floor(e) + 1 times, by a
random number that belongs to (seed, epoch, cell), so that epochs are right on average and a cell of weight 0
never comes. Blocks without a cell that comes are not read.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numba
import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.memory import as_bytes

MEMORY_BUDGET = 256 << 20
"""Bytes that the blocks and minibatches of one stream may take together, unless told otherwise."""

MAX_LANES = 64
SHUFFLED_LANES = 32
# Cells in order need no wide reading, which is there to mix them.
_ORDERED_BUDGET = 8 << 20
# Eight chunks of a store: of less, much is decoded and left. Small cells take no more than so many.
_EFFICIENT_BYTES = 1536 << 10
_MIN_BLOCK_ROWS = 512
_MAX_BLOCK_ROWS = 4096
# Fewer lanes mix badly: below that, blocks become smaller instead.
_FEW_LANES = 16
_LEAST_BLOCK_ROWS = 64
# Of cells in a random order any few blocks are a sample; of blocks of twenty chunks little is left unused.
_SHUFFLED_BYTES = 4 << 20
_FEW_SHUFFLED_LANES = 4
# Batch norm divides by the variance over a minibatch: a last one of 1 or 2 cells would upset it.
_MIN_TAIL = 3
_DEAL, _LANE, _WEIGHTS, _ROWS = 0, 1, 1 << 30, 1 << 31  # streams of random numbers
_DRAWN_AT_ONCE = 1 << 16
_MOST_TOGETHER = 32

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unit:
    """Neighbouring rows that a lane reads together: a block, or a part of its first block.

    Args:
        lane: whose it is.
        first: rows of the lane that come before.
        start: first position.
        stop: position after the last.
        n: rows that it gives; without weights as many as it has positions.
    """

    lane: int
    first: int
    start: int
    stop: int
    n: int

    @property
    def last(self) -> int:
        """Rows of the lane up to and with this unit."""
        return self.first + self.n


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch, worked out when asked for.

    Args:
        n_rows: number of positions to visit.
        batch_size: cells a minibatch.
        block_rows: neighbours that are read together.
        n_lanes: lanes that a minibatch draws from, at most as many as there are blocks.
        seed: of the run.
        epoch: number of the epoch, from 0.
        shuffle: whether the order is random at all; if not there is one lane.
        repeats: ``(n_rows,)`` uint32, how often each position comes; once when ``None``.

    Example:
        >>> plan = plan_epoch(10, batch_size=4, block_rows=2, n_lanes=3, seed=0, epoch=0)
        >>> [len(plan.positions(i)) for i in range(plan.n_minibatches)]
        [4, 6]
        >>> sorted(int(p) for i in (1, 0) for p in plan.positions(i)) == list(range(10))
        True
    """

    n_rows: int
    batch_size: int
    block_rows: int
    n_lanes: int
    seed: int
    epoch: int
    shuffle: bool
    repeats: NDArray[np.uint32] | None = field(default=None, repr=False, compare=False)
    _lanes: dict[int, list[Unit]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def n_visits(self) -> int:
        """Cells that come in the epoch: ``n_rows``, or about as many where there are weights."""
        return self.n_rows if self.repeats is None else int(self.repeats.sum(dtype=np.int64))

    @property
    def n_minibatches(self) -> int:
        """Number of minibatches."""
        return count_minibatches(self.n_visits, self.batch_size)

    def minibatches(self) -> Iterator[tuple[int, int]]:
        """Each minibatch as ``(start, stop)`` in the order of the whole epoch."""
        for i in range(self.n_minibatches):
            yield self.bounds(i)

    def bounds(self, i: int) -> tuple[int, int]:
        """Cells that come before minibatch ``i``, and those that have come with it."""
        last = self.n_minibatches - 1
        return i * self.batch_size, self.n_visits if i == last else (i + 1) * self.batch_size

    @cached_property
    def lane_rows(self) -> Positions:
        """``(n_lanes,)`` int64, number of rows of each lane."""
        starts = np.arange(0, self.n_rows, self.block_rows)
        if self.repeats is None:
            of_block = np.minimum(self.n_rows - starts, self.block_rows)
        else:
            of_block = np.add.reduceat(self.repeats, starts, dtype=np.int64) if len(starts) else starts
        rows = np.zeros(self.n_lanes, np.int64)
        np.add.at(rows, np.arange(len(starts)) % self.n_lanes, of_block[self._dealt])
        return rows

    def units(self, lane: int) -> list[Unit]:
        """What a lane reads, in its order."""
        if lane not in self._lanes:
            self._lanes[lane] = self._units(lane)
        return self._lanes[lane]

    def schedule(self, lanes: range | None = None, start: int = 0) -> list[Unit]:
        """The units of some lanes, in the order in which minibatches from ``start`` on first need them."""
        taken = self.taken(start)
        lanes = range(self.n_lanes) if lanes is None else lanes
        units = [u for lane in lanes for u in self.units(lane) if u.last > taken[lane]]
        rows = self.lane_rows
        return sorted(units, key=lambda u: ((u.first + 0.5) / rows[u.lane], u.lane))

    def taken(self, i: int) -> Positions:
        """``(n_lanes,)`` int64, the rows of each lane that come before minibatch ``i``.

        Row j of a lane of n rows comes at ``(j + 1/2) / n`` of the epoch, ties in the order of the lanes.
        """
        total = self.n_visits if i >= self.n_minibatches else i * self.batch_size
        n = self.lane_rows
        if total in (0, self.n_visits):
            return n.copy() if total else np.zeros_like(n)
        taken: Positions = _taken(n, total, self.n_visits)
        return taken

    def positions(self, i: int, lanes: range | None = None) -> Positions:
        """The positions of minibatch ``i``, or of it what some lanes have, lane after lane."""
        before, after = self.taken(i), self.taken(i + 1)
        parts = [np.empty(0, np.int64)]
        for lane in range(self.n_lanes) if lanes is None else lanes:
            for unit in self.units(lane):
                lo, hi = max(before[lane], unit.first), min(after[lane], unit.last)
                if lo < hi:
                    parts.append(unit.start + self.order(unit)[lo - unit.first : hi - unit.first])
        return np.concatenate(parts)

    def order(self, unit: Unit) -> Positions:
        """The rows of a unit in the order in which they come, counted from its first position."""
        rows = np.arange(unit.stop - unit.start)
        if self.repeats is not None:
            rows = np.repeat(rows, self.repeats[unit.start : unit.stop])
        if self.shuffle:
            rows = _generator(self.seed, self.epoch, _ROWS + unit.start).permutation(rows)
        return rows

    @cached_property
    def _dealt(self) -> Positions:
        """The blocks as they are dealt to the lanes, one to each in turn."""
        n_blocks = -(-self.n_rows // self.block_rows)
        if not self.shuffle:
            return np.arange(n_blocks)
        return _generator(self.seed, 0, _DEAL).permutation(n_blocks)

    def _block(self, block: int) -> tuple[int, int]:
        return block * self.block_rows, min((block + 1) * self.block_rows, self.n_rows)

    def _units(self, lane: int) -> list[Unit]:
        blocks = self._dealt[lane :: self.n_lanes]
        if not (self.shuffle and len(blocks)):
            ranges = [self._block(b) for b in blocks.tolist()]
        else:
            order = _generator(self.seed, self.epoch, _LANE + lane).permutation(len(blocks))
            ranges = [self._block(b) for b in blocks[order].tolist()]
            # Lanes would all come to the end of a block at once and want the next: so each begins with
            # another share of its first block, and ends with the rest of it.
            start, stop = ranges[0]
            middle = start + -(-(stop - start) * (lane + 1) // self.n_lanes)
            ranges = [(start, middle), *ranges[1:], *([(middle, stop)] if middle < stop else [])]
        units, first = [], 0
        for start, stop in ranges:
            n = stop - start if self.repeats is None else int(self.repeats[start:stop].sum(dtype=np.int64))
            if n:
                units.append(Unit(lane, first, start, stop, n))
            first += n
        return units


def plan_epoch(
    n_rows: int,
    *,
    batch_size: int,
    block_rows: int,
    n_lanes: int = MAX_LANES,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    weights: NDArray[np.floating] | None = None,
) -> EpochPlan:
    """The order of one epoch, in which every position comes exactly once unless weights say otherwise.

    It depends on the arguments alone: not on the number of readers, nor on earlier epochs.

    Args:
        n_rows: number of positions to visit, >= 0.
        batch_size: cells a minibatch, >= 1; a tail of fewer than 3 cells joins the minibatch before.
        block_rows: neighbours that are read together, >= 1.
        n_lanes: lanes that the blocks are dealt to, >= 1; no more are used than there are blocks.
        seed: of the run, in [0, 2^64).
        epoch: number of the epoch, in [0, 2^32).
        shuffle: ``False`` visits the positions in order.
        weights: ``(n_rows,)``, >= 0, on any scale: how often each position comes, relative to the others.

    Raises:
        OptionError: a number outside its range.

    Example:
        >>> plan = plan_epoch(4, batch_size=2, block_rows=2, seed=0, epoch=0, weights=np.array([2, 1, 1, 0]))
        >>> sorted(int(p) for i in range(plan.n_minibatches) for p in plan.positions(i))
        [0, 0, 1, 2]
    """
    for name, value, low, high in (
        ("n_rows", n_rows, 0, 1 << 31),
        ("batch_size", batch_size, 1, 1 << 31),
        ("block_rows", block_rows, 1, 1 << 31),
        ("n_lanes", n_lanes, 1, 1 << 20),
        ("seed", seed, 0, 1 << 64),
        ("epoch", epoch, 0, 1 << 32),
    ):
        if not low <= value < high:
            raise OptionError(f"{name}={value} cannot be: it must be at least {low} and below {high}")
    n_blocks = -(-n_rows // block_rows)
    n_lanes = max(1, min(n_lanes, n_blocks)) if shuffle else 1
    repeats = None
    if weights is not None:
        if not shuffle:
            raise OptionError("weights without shuffling cannot be; leave shuffle=True or the weights out")
        repeats = _draw_repeats(weights, int(n_rows), int(seed), int(epoch))
    return EpochPlan(
        int(n_rows), int(batch_size), int(block_rows), int(n_lanes), int(seed), int(epoch), bool(shuffle),
        repeats,
    )  # fmt: skip


def balance_weights(codes: NDArray[np.integer]) -> NDArray[np.float32]:
    """Weights with which every class comes equally often, however many cells it has.

    Args:
        codes: ``(n,)`` class of each cell; a negative one is of no class, and such cells do not come.

    Returns:
        ``(n,)`` float32, one over the number of cells of the class.

    Example:
        >>> balance_weights(np.array([0, 0, 1, -1])).tolist()
        [0.5, 0.5, 1.0, 0.0]
    """
    codes = np.asarray(codes)
    if not (codes >= 0).any():
        raise OptionError("classes cannot be balanced: no cell has one; look at the labels")
    each = 1 / np.maximum(np.bincount(codes[codes >= 0]), 1)
    return np.where(codes >= 0, each.astype(np.float32)[np.maximum(codes, 0)], np.float32(0))


def _draw_repeats(weights: NDArray[np.floating], n_rows: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    """How often each position comes: the expected number, rounded up or down at random."""
    weights = np.asarray(weights)
    if weights.shape != (n_rows,) or weights.dtype.kind not in "iufb":
        raise OptionError(f"weights: need {n_rows} numbers, one a cell, not {weights.dtype} {weights.shape}")
    wrong = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if len(wrong):
        raise OptionError(f"weights must be finite and >= 0; that of cell {wrong[0]} is {weights[wrong[0]]}")
    with np.errstate(over="ignore"):
        total = float(weights.sum(dtype=np.float64))
    if total == 0:
        raise OptionError("weights are 0 for all cells; give some cell a weight above 0")
    if not n_rows / sys.float_info.max < total <= sys.float_info.max:
        raise OptionError(f"weights come to {total} in sum, which numbers cannot hold; scale them to about 1")
    generator = _generator(seed, epoch, _WEIGHTS)
    repeats = np.empty(n_rows, np.uint32)
    for first in range(0, n_rows, _DRAWN_AT_ONCE):
        some = slice(first, first + _DRAWN_AT_ONCE)
        expected = weights[some].astype(np.float64) * (n_rows / total)
        repeats[some] = np.floor(expected + generator.random(len(expected)))
    return repeats


def count_minibatches(n_rows: int, batch_size: int) -> int:
    """Number of minibatches of an epoch; a tail of fewer than 3 cells is not one of its own.

    Example:
        >>> count_minibatches(258, 128), count_minibatches(259, 128), count_minibatches(2, 128)
        (2, 3, 1)
    """
    full, tail = divmod(n_rows, batch_size)
    if tail >= _MIN_TAIL or (full == 0 and tail > 0):
        return full + 1
    return full


def as_budget(memory_budget: int | str | None) -> int:
    """Bytes, from a number, from text such as ``"500MB"`` or ``"4 GiB"``, or the default.

    Raises:
        OptionError: text that is no size, or less than a byte.

    Example:
        >>> as_budget("4GB"), as_budget("1 MiB"), as_budget(None) == MEMORY_BUDGET
        (4000000000, 1048576, True)
    """
    return MEMORY_BUDGET if memory_budget is None else as_bytes(memory_budget)


def default_sizes(
    bytes_per_row: float,
    memory_budget: int = MEMORY_BUDGET,
    n_rows: int | None = None,
    *,
    is_shuffled: bool = False,
) -> tuple[int, int]:
    """``(block_rows, n_lanes)`` such that a stream stays within a budget.

    A block of each lane is held: at most half of the budget. The other half is for blocks that are being
    read, and for minibatches. Few cells are cut into smaller blocks, so that there are lanes to mix them.

    Args:
        bytes_per_row: mean size of a decoded cell.
        memory_budget: bytes for the stream.
        n_rows: number of cells to visit, where it is known.
        is_shuffled: whether cells lie in a random order: fewer blocks do then, of a size that reads well.

    Example:
        >>> default_sizes(3000.0), default_sizes(3000.0, n_rows=10_000)
        ((699, 64), (157, 64))
        >>> default_sizes(3000.0, is_shuffled=True)
        (1398, 32)
    """
    rows = _rows_within(bytes_per_row, memory_budget // 2)
    if is_shuffled:
        most_lanes = SHUFFLED_LANES
        block_rows = min(_rows_within(bytes_per_row, _SHUFFLED_BYTES), rows // _FEW_SHUFFLED_LANES)
    else:
        most_lanes = MAX_LANES
        # All lanes there may be, before blocks grow: beyond that larger blocks mean fewer, longer reads.
        efficient = min(_MIN_BLOCK_ROWS, _rows_within(bytes_per_row, _EFFICIENT_BYTES))
        block_rows = max(min(efficient, rows // _FEW_LANES), rows // MAX_LANES)
    block_rows = min(max(block_rows, _LEAST_BLOCK_ROWS), _MAX_BLOCK_ROWS)
    if n_rows is not None:
        block_rows = min(block_rows, max(_LEAST_BLOCK_ROWS, -(-n_rows // most_lanes)))
    return block_rows, min(most_lanes, max(2, rows // block_rows))


def blocks_ahead(bytes_per_row: float, block_rows: int, workers: int, memory_budget: int) -> int:
    """Blocks that may be read before they are needed: four a worker, within a quarter of the budget.

    Twice, since reading a block takes about as much again as the block. The order does not depend on it.
    """
    rows = _rows_within(2 * bytes_per_row, memory_budget // 4)
    return max(1, min(4 * workers, rows // block_rows))


def minibatches_together(
    bytes_per_row: float, batch_size: int, memory_budget: int, *, is_ordered: bool = False
) -> int:
    """Minibatches that are gathered in one go, within a thirty-second of the budget, or one.

    One after the other they would be mostly calls. What was gathered before may still be in use.

    Args:
        bytes_per_row: mean size of a decoded cell.
        batch_size: cells a minibatch.
        memory_budget: bytes for the stream.
        is_ordered: whether cells are visited in order, for which at most 8 MiB are used.
    """
    budget = min(memory_budget, _ORDERED_BUDGET) if is_ordered else memory_budget
    rows = _rows_within(bytes_per_row, budget // 32)
    return max(1, min(_MOST_TOGETHER, rows // batch_size))


def ordered_rows(bytes_per_row: float, workers: int, memory_budget: int = MEMORY_BUDGET) -> int:
    """Rows of a block for cells that are visited in order, so that each reader can hold a few.

    Args:
        bytes_per_row: mean size of a decoded cell.
        workers: threads that read.
        memory_budget: bytes for the stream, of which at most 8 MiB are used.

    Example:
        >>> ordered_rows(1000.0, 2)
        699
    """
    rows = _rows_within(bytes_per_row, min(memory_budget, _ORDERED_BUDGET) // 3)
    return min(max(_MIN_BLOCK_ROWS, rows // (2 * max(workers, 1))), _MAX_BLOCK_ROWS)


def _rows_within(bytes_per_row: float, budget: int) -> int:
    return max(1, int(budget / max(bytes_per_row, 1.0)))


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _taken(n, total, n_visits):  # type: ignore[no-untyped-def]
    """Of lanes of ``n`` rows each, how many of each are among the first ``total`` of all."""
    # Those that surely come before, then one after the other.
    spare = 2 + n * len(n) // n_visits
    taken = np.maximum(np.ceil(total / n_visits * n - 0.5).astype(np.int64) - spare, 0)
    nearest = [((taken[lane] + 0.5) / n[lane], lane) for lane in range(len(n)) if taken[lane] < n[lane]]
    heapq.heapify(nearest)
    for _ in range(total - taken.sum()):
        lane = nearest[0][1]
        taken[lane] += 1
        when = (taken[lane] + 0.5) / n[lane] if taken[lane] < n[lane] else np.inf
        heapq.heapreplace(nearest, (when, lane))
    return taken


_own = threading.local()


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Random numbers that belong to (seed, epoch, stream), until this thread asks for others."""
    if not hasattr(_own, "generator"):
        # To make one asks the system for entropy, which takes longer than what is drawn from it.
        _own.generator = np.random.Generator(np.random.Philox(key=np.zeros(2, np.uint64)))
        _own.fresh = _own.generator.bit_generator.state
    key = np.array([seed, (epoch << 32) | stream], dtype=np.uint64)
    fresh = _own.fresh
    _own.generator.bit_generator.state = {**fresh, "state": {**fresh["state"], "key": key}}
    generator: np.random.Generator = _own.generator
    return generator
