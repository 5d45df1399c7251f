"""Which cells come when: a pure function of (number of cells, sizes, seed, epoch).

Positions ``0 .. n_rows`` are cut into blocks of neighbours, because neighbours are cheap to read
together. The blocks are permuted and every few of them make a buffer, and the rows of a buffer are
permuted again. A minibatch is a slice of the resulting order, so it may begin in one buffer and end
in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import OptionError

MEMORY_BUDGET = 128 << 20
"""Bytes that the buffers of one stream may take together, unless told otherwise."""

# Cells in order need no wide buffers, which are there to mix them.
_ORDERED_BUDGET = 8 << 20
_MIN_BLOCK_ROWS = 512
_MAX_BLOCK_ROWS = 4096
# Batch norm divides by the variance over a minibatch: a last one of 1 or 2 cells would upset it.
_MIN_TAIL = 3


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """The order of one epoch, worked out buffer by buffer when asked for.

    Args:
        n_rows: number of positions to visit.
        batch_size: cells a minibatch.
        block_rows: neighbours that are read together.
        buffer_blocks: blocks that are decoded and shuffled together.
        seed: of the run.
        epoch: number of the epoch, from 0.
        shuffle: whether the order is random at all.
        blocks: ``(n_blocks,)`` int64, the blocks in the order they are visited.

    Example:
        >>> plan = plan_epoch(10, batch_size=4, block_rows=2, buffer_blocks=2, seed=0, epoch=0)
        >>> sorted(int(i) for k in range(plan.n_buffers) for i in plan.positions(k)) == list(range(10))
        True
        >>> [stop - start for start, stop in plan.minibatches()]
        [4, 6]
    """

    n_rows: int
    batch_size: int
    block_rows: int
    buffer_blocks: int
    seed: int
    epoch: int
    shuffle: bool
    blocks: NDArray[np.int64]

    @property
    def n_buffers(self) -> int:
        """Number of buffers."""
        return -(-len(self.blocks) // self.buffer_blocks)

    @property
    def n_minibatches(self) -> int:
        """Number of minibatches."""
        return count_minibatches(self.n_rows, self.batch_size)

    def block_ranges(self, buffer: int) -> list[tuple[int, int]]:
        """The blocks of a buffer as ``(start, stop)`` positions, in the order they are laid side by side."""
        first = buffer * self.buffer_blocks
        starts = self.blocks[first : first + self.buffer_blocks] * self.block_rows
        return [(int(start), min(int(start) + self.block_rows, self.n_rows)) for start in starts]

    def order(self, buffer: int) -> NDArray[np.int64]:
        """The order in which the rows of a buffer, laid side by side, are visited."""
        n = sum(stop - start for start, stop in self.block_ranges(buffer))
        if not self.shuffle:
            return np.arange(n, dtype=np.int64)
        return _generator(self.seed, self.epoch, buffer + 1).permutation(n)

    def positions(self, buffer: int) -> NDArray[np.int64]:
        """The positions of a buffer in the order they are visited."""
        return self.side_by_side(buffer)[self.order(buffer)]

    def side_by_side(self, buffer: int) -> NDArray[np.int64]:
        """The positions of a buffer, block after block, before the rows are permuted."""
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in self.block_ranges(buffer)])

    def minibatches(self) -> Iterator[tuple[int, int]]:
        """Each minibatch as ``(start, stop)`` in the order of the whole epoch."""
        last = self.n_minibatches - 1
        for i in range(last + 1):
            yield i * self.batch_size, self.n_rows if i == last else (i + 1) * self.batch_size


def plan_epoch(
    n_rows: int,
    *,
    batch_size: int,
    block_rows: int,
    buffer_blocks: int,
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
        buffer_blocks: blocks that are shuffled together, >= 1.
        seed: of the run, in [0, 2^64).
        epoch: number of the epoch, in [0, 2^32).
        shuffle: ``False`` visits the positions in order.

    Raises:
        OptionError: a number outside its range.
    """
    for name, value, low, high in (
        ("n_rows", n_rows, 0, 1 << 62),
        ("batch_size", batch_size, 1, 1 << 31),
        ("block_rows", block_rows, 1, 1 << 31),
        ("buffer_blocks", buffer_blocks, 1, 1 << 31),
        ("seed", seed, 0, 1 << 64),
        ("epoch", epoch, 0, 1 << 32),
    ):
        if not low <= value < high:
            raise OptionError(f"{name}={value} cannot be: it must be at least {low} and below {high}")
    n_blocks = -(-n_rows // block_rows)
    blocks = _generator(seed, epoch, 0).permutation(n_blocks) if shuffle else np.arange(n_blocks)
    return EpochPlan(
        int(n_rows), int(batch_size), int(block_rows), int(buffer_blocks), int(seed), int(epoch),
        bool(shuffle), blocks.astype(np.int64, copy=False),
    )  # fmt: skip


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


def default_sizes(
    bytes_per_row: float, batch_size: int, memory_budget: int = MEMORY_BUDGET
) -> tuple[int, int]:
    """``(block_rows, buffer_blocks)`` such that the buffers of a stream stay within a budget.

    Two buffers are in flight, one consumed and one decoding; a third share is left for what decoding
    and laying the blocks side by side need on the way. A budget that is too small for two blocks gives
    buffers of two blocks all the same, since fewer would not shuffle.

    Args:
        bytes_per_row: mean size of a decoded cell.
        batch_size: cells a minibatch.
        memory_budget: bytes for the stream.

    Example:
        >>> default_sizes(3000.0, 128)
        (512, 29)
    """
    if memory_budget < 1:
        raise OptionError(f"memory_budget={memory_budget} cannot be: give it in bytes, at least 1")
    buffer_rows = max(1, int(memory_budget / 3 / max(bytes_per_row, 1.0)))
    # Thirty-two blocks a buffer mix enough; beyond that larger blocks mean fewer, longer reads.
    block_rows = min(max(_MIN_BLOCK_ROWS, buffer_rows // 32), _MAX_BLOCK_ROWS)
    return block_rows, max(2, buffer_rows // block_rows)


def ordered_sizes(
    bytes_per_row: float, workers: int, memory_budget: int = MEMORY_BUDGET
) -> tuple[int, int]:
    """``(block_rows, buffer_blocks)`` for cells that are visited in order: a few blocks for each reader.

    Args:
        bytes_per_row: mean size of a decoded cell.
        workers: threads that read.
        memory_budget: bytes for the stream, of which at most 8 MiB are used.

    Example:
        >>> ordered_sizes(1000.0, 2)
        (699, 4)
    """
    if memory_budget < 1:
        raise OptionError(f"memory_budget={memory_budget} cannot be: give it in bytes, at least 1")
    buffer_blocks = 2 * max(workers, 1)
    buffer_rows = int(min(memory_budget, _ORDERED_BUDGET) / 3 / max(bytes_per_row, 1.0))
    return min(max(_MIN_BLOCK_ROWS, buffer_rows // buffer_blocks), _MAX_BLOCK_ROWS), buffer_blocks


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Random numbers that belong to (seed, epoch, stream), whatever was drawn before."""
    key = np.array([seed, (epoch << 32) | stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
