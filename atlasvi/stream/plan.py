"""Which cells come when: a pure function of (number of cells, sizes, seed, epoch).

Positions ``0 .. n_rows`` are cut into blocks of neighbours, because neighbours are cheap to read together.
The blocks are dealt to a fixed number of lanes, once for all epochs. In an epoch each lane goes through its
blocks in an order of its own, through the rows of a block in a random order, and every minibatch draws from
all lanes in proportion to their lengths. So what a minibatch holds does not depend on who reads: a reader,
or one of several machines, takes some of the lanes and reads the blocks of these alone; and any minibatch
can be asked for without the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import OptionError

MEMORY_BUDGET = 128 << 20
"""Bytes that the decoded blocks of one stream may take together, unless told otherwise."""

MAX_LANES = 64
# Cells in order need no wide reading, which is there to mix them.
_ORDERED_BUDGET = 8 << 20
_MIN_BLOCK_ROWS = 512
_MAX_BLOCK_ROWS = 4096
# Batch norm divides by the variance over a minibatch: a last one of 1 or 2 cells would upset it.
_MIN_TAIL = 3
_DEAL, _LANE, _ROWS = 0, 1, 1 << 31  # streams of random numbers

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unit:
    """Neighbouring rows that a lane reads together: a block, or a part of its first block.

    Args:
        lane: whose it is.
        first: rows of the lane that come before.
        start: first position.
        stop: position after the last.
    """

    lane: int
    first: int
    start: int
    stop: int

    @property
    def last(self) -> int:
        """Rows of the lane up to and with this unit."""
        return self.first + self.stop - self.start


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
    _lanes: dict[int, list[Unit]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_minibatches(self) -> int:
        """Number of minibatches."""
        return count_minibatches(self.n_rows, self.batch_size)

    def minibatches(self) -> Iterator[tuple[int, int]]:
        """Each minibatch as ``(start, stop)`` in the order of the whole epoch."""
        for i in range(self.n_minibatches):
            yield self.bounds(i)

    def bounds(self, i: int) -> tuple[int, int]:
        """Cells that come before minibatch ``i``, and those that have come with it."""
        last = self.n_minibatches - 1
        return i * self.batch_size, self.n_rows if i == last else (i + 1) * self.batch_size

    @cached_property
    def lane_rows(self) -> Positions:
        """``(n_lanes,)`` int64, number of rows of each lane."""
        n_blocks = len(self._dealt)
        blocks = (n_blocks - np.arange(self.n_lanes) + self.n_lanes - 1) // self.n_lanes
        rows = blocks * self.block_rows
        # The last block of the positions may be short.
        short = np.flatnonzero(self._dealt == n_blocks - 1) % self.n_lanes
        rows[short] -= n_blocks * self.block_rows - self.n_rows
        return rows.astype(np.int64)

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
        total = self.n_rows if i >= self.n_minibatches else i * self.batch_size
        n = self.lane_rows
        if total in (0, self.n_rows):
            return n.copy() if total else np.zeros_like(n)
        # Those that surely come before, then the earliest of the next few of each lane.
        spare = 2 + n * len(n) // self.n_rows
        counts: Positions = np.maximum(np.ceil(total / self.n_rows * n - 0.5).astype(np.int64) - spare, 0)
        while (missing := total - int(counts.sum())) > 0:
            ahead = counts[:, None] + np.arange(8)
            when = np.where(ahead < n[:, None], (ahead + 0.5) / n[:, None], np.inf)
            # What lies behind the last row looked at of some lane waits for the next round.
            horizon = np.where(ahead[:, -1] < n - 1, when[:, -1], np.inf).min()
            order = np.argsort(when, axis=None, kind="stable")[:missing]
            chosen = order[when.ravel()[order] <= horizon]
            counts += np.bincount(chosen // 8, minlength=len(n))
        return counts

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
        """The order in which the rows of a unit are visited, counted from its first."""
        n = unit.stop - unit.start
        if not self.shuffle:
            return np.arange(n, dtype=np.int64)
        return _generator(self.seed, self.epoch, _ROWS + unit.start).permutation(n)

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
            units.append(Unit(lane, first, start, stop))
            first += stop - start
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
) -> EpochPlan:
    """The order of one epoch, in which every position comes exactly once.

    It depends on the arguments alone: not on the number of readers, nor on earlier epochs.

    Args:
        n_rows: number of positions to visit, >= 0.
        batch_size: cells a minibatch, >= 1; a tail of fewer than 3 cells joins the minibatch before.
        block_rows: neighbours that are read together, >= 1.
        n_lanes: lanes that the blocks are dealt to, >= 1; no more are used than there are blocks.
        seed: of the run, in [0, 2^64).
        epoch: number of the epoch, in [0, 2^32).
        shuffle: ``False`` visits the positions in order.

    Raises:
        OptionError: a number outside its range.
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
    return EpochPlan(
        int(n_rows), int(batch_size), int(block_rows), int(n_lanes), int(seed), int(epoch), bool(shuffle)
    )


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


def default_sizes(bytes_per_row: float, memory_budget: int = MEMORY_BUDGET) -> tuple[int, int]:
    """``(block_rows, n_lanes)`` such that the decoded blocks of a stream stay within a budget.

    A block of each lane is held. A third of the budget is left for blocks that are being decoded.

    Args:
        bytes_per_row: mean size of a decoded cell.
        memory_budget: bytes for the stream.

    Example:
        >>> default_sizes(3000.0)
        (512, 58)
    """
    if memory_budget < 1:
        raise OptionError(f"memory_budget={memory_budget} cannot be: give it in bytes, at least 1")
    rows = max(1, int(memory_budget / 1.5 / max(bytes_per_row, 1.0)))
    # All lanes there may be, before blocks grow: beyond that larger blocks mean fewer, longer reads.
    block_rows = min(max(_MIN_BLOCK_ROWS, rows // MAX_LANES), _MAX_BLOCK_ROWS)
    return block_rows, min(MAX_LANES, max(2, rows // block_rows))


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
    if memory_budget < 1:
        raise OptionError(f"memory_budget={memory_budget} cannot be: give it in bytes, at least 1")
    rows = int(min(memory_budget, _ORDERED_BUDGET) / 3 / max(bytes_per_row, 1.0))
    return min(max(_MIN_BLOCK_ROWS, rows // (2 * max(workers, 1))), _MAX_BLOCK_ROWS)


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Random numbers that belong to (seed, epoch, stream), whatever was drawn before."""
    key = np.array([seed, (epoch << 32) | stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
