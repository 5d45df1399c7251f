"""Rows of decoded blocks, gathered into minibatches with their codes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch
from atlasvi_kernels import CSR, RowPool
from numpy.typing import NDArray

from atlasvi.errors import CellsError, GenesError, OptionError
from atlasvi.store.fields import Codes
from atlasvi.stream.plan import (
    MEMORY_BUDGET,
    EpochPlan,
    Unit,
    blocks_ahead,
    default_sizes,
    ordered_rows,
    plan_epoch,
)
from atlasvi.stream.read import ReadBlock, default_workers, read_units
from atlasvi.types import Minibatch

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas

Positions: TypeAlias = NDArray[np.int64]
T = TypeVar("T")


def stream_minibatches(
    atlas: Atlas,
    codes: Codes,
    *,
    batch_size: int = 128,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    positions: Positions | None = None,
    num_workers: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    pin_memory: bool | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Minibatch]:
    """The minibatches of one epoch, ready for a model: its genes in its order, and codes.

    The sequence depends on (number of cells, sizes, seed, epoch) and not on ``num_workers``.

    Args:
        atlas: where the cells are.
        codes: of its cells and genes, from `resolve`.
        batch_size: cells a minibatch; a tail of fewer than 3 cells joins the minibatch before.
        seed: of the run.
        epoch: number of the epoch, from 0.
        shuffle: ``False`` visits the cells in order.
        positions: ``(n,)`` int64, the cells to visit (a training split), as positions in ``atlas``;
            in increasing order they are read fastest. All when ``None``.
        num_workers: threads that read; 0 reads in the calling thread; ``None`` one a core, at most 4.
        memory_budget: bytes that the decoded blocks may take.
        pin_memory: lay minibatches into page-locked memory; ``None`` where there is a CUDA device.
        start: minibatch to begin with; those before are neither read nor made.
        rank: number of this reader among ``world_size``, from 0.
        world_size: readers that share the epoch. Each has some of the lanes, reads their part of the store
            alone, and gives its part of every minibatch.

    Raises:
        OptionError: an argument outside its range.
        CellsError: positions or codes that do not fit the atlas.
        GenesError: genes that the atlas does not have.
        CorruptError: while reading, where a checksum fails.
    """
    if len(codes.batch_index) != atlas.n_obs:
        raise CellsError(
            f"codes are for {len(codes.batch_index)} cells but the atlas has {atlas.n_obs}; "
            "make them with resolve(field_map, atlas)"
        )
    columns = np.asarray(codes.gene_columns, np.int64)
    if len(columns) and not 0 <= columns.min() <= columns.max() < atlas.n_vars:
        raise GenesError(
            f"codes name gene {columns.max()} but the atlas has {atlas.n_vars}; "
            "make them with resolve(field_map, atlas)"
        )
    # Genes are put in the model's order as a block is read: once, and in the reading threads.
    view = atlas if np.array_equal(columns, np.arange(atlas.n_vars)) else atlas[:, columns]
    pin = _decide_pinning(pin_memory)
    pieces = _stream(
        view, batch_size, seed, epoch, shuffle, positions, num_workers, memory_budget, start, rank, world_size
    )
    return _each(pieces, lambda counts, at: pack(counts, at, codes, atlas.numbers_of(at), pin_memory=pin))


def stream_counts(
    atlas: Atlas,
    *,
    batch_size: int = 128,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    positions: Positions | None = None,
    num_workers: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    pin_memory: bool | None = None,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
    """What `Atlas.stream` gives: CSR minibatches with the cells' numbers in the store.

    The arguments are those of `stream_minibatches`.
    """
    pin = _decide_pinning(pin_memory)
    pieces = _stream(
        atlas,
        batch_size,
        seed,
        epoch,
        shuffle,
        positions,
        num_workers,
        memory_budget,
        start,
        rank,
        world_size,
    )
    return _each(pieces, lambda counts, at: (counts.pin_memory() if pin else counts, atlas.numbers_of(at)))


def stream_blocks(
    atlas: Atlas,
    *,
    positions: Positions | None = None,
    num_workers: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
    """All cells in order, in blocks as large as the budget allows, with their positions in ``atlas``.

    For passes over everything that need no minibatches: moments, statistics.
    """
    at = _check_positions(atlas, positions)
    n_rows = atlas.n_obs if at is None else len(at)
    workers = default_workers() if num_workers is None else num_workers
    plan = plan_epoch(
        n_rows, batch_size=1, block_rows=ordered_rows(atlas.bytes_per_row, workers, memory_budget), seed=0,
        epoch=0, shuffle=False,
    )  # fmt: skip
    units = plan.schedule()
    blocks = _whole(read_units(_reader(atlas, at), units, num_workers=workers), units)
    return blocks if at is None else _each(blocks, lambda counts, p: (counts, at[p].astype(np.int64)))


def pack(
    counts: CSR,
    positions: Positions,
    codes: Codes,
    rows: NDArray[np.int64],
    *,
    pin_memory: bool = False,
) -> Minibatch:
    """Counts of some cells with what is known of these cells.

    Args:
        counts: (B x G) of the model's genes.
        positions: ``(B,)`` int64, positions of the cells in the atlas that ``codes`` belong to.
        codes: of all cells of that atlas.
        rows: ``(B,)`` int64, number in the store of each of these cells.
        pin_memory: lay it into page-locked memory.
    """
    minibatch = Minibatch(
        counts,
        torch.from_numpy(rows.astype(np.int64)),
        torch.from_numpy(codes.batch_index[positions].astype(np.int64)),
        torch.from_numpy(codes.labels[positions].astype(np.int64)),
        torch.from_numpy(codes.cat_covs[positions].astype(np.int64)),
        torch.from_numpy(codes.cont_covs[positions].astype(np.float32)),
        None if codes.size_factor is None
        else torch.from_numpy(codes.size_factor[positions].astype(np.float32)),
    )  # fmt: skip
    return minibatch.pin_memory() if pin_memory else minibatch


def _stream(
    atlas: Atlas,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    positions: Positions | None,
    num_workers: int | None,
    memory_budget: int,
    start: int,
    rank: int,
    world_size: int,
) -> Generator[tuple[CSR, Positions]]:
    """Minibatches of counts with their positions in ``atlas``. Arguments are checked before the first."""
    at = _check_positions(atlas, positions)
    workers = default_workers() if num_workers is None else num_workers
    if shuffle:
        block_rows, n_lanes = default_sizes(atlas.bytes_per_row, memory_budget)
        ahead = blocks_ahead(atlas.bytes_per_row, block_rows, workers, memory_budget)
    else:
        block_rows, n_lanes = ordered_rows(atlas.bytes_per_row, workers, memory_budget), 1
        ahead = max(1, 2 * workers)
    plan = plan_epoch(
        atlas.n_obs if at is None else len(at), batch_size=batch_size, block_rows=block_rows,
        n_lanes=n_lanes, seed=seed, epoch=epoch, shuffle=shuffle,
    )  # fmt: skip
    if not 0 <= start <= plan.n_minibatches:
        raise OptionError(f"start={start} of an epoch of {plan.n_minibatches} minibatches")
    if not 0 <= rank < world_size:
        raise OptionError(f"rank={rank} of world_size={world_size}; ranks count from 0")
    lanes = range(rank, plan.n_lanes, world_size)
    units = plan.schedule(lanes, start)
    read = read_units(_reader(atlas, at), units, num_workers=workers, ahead=ahead)
    pieces = gather(read, units, plan, atlas.n_vars, lanes, start)
    return pieces if at is None else _each(pieces, lambda counts, p: (counts, at[p].astype(np.int64)))


class _Held:
    """The units whose rows are being visited, in the order of their lanes, and where they lie in the pool."""

    def __init__(self) -> None:
        self._units: list[tuple[Unit, int, Positions]] = []
        self._index()

    def add(self, new: list[tuple[Unit, int, Positions]]) -> None:
        """Take in units, each with its slot in the pool and the order of its rows."""
        if new:
            self._units = sorted(self._units + new, key=lambda held: (held[0].lane, held[0].first))
            self._index()

    def let_go(self, done: Positions) -> list[int]:
        """Forget the units that were visited to their ends, and return their slots."""
        ended = [slot for unit, slot, _ in self._units if unit.last <= done[unit.lane]]
        if ended:
            self._units = [held for held in self._units if held[0].last > done[held[0].lane]]
            self._index()
        return ended

    def draw(self, before: Positions, after: Positions) -> tuple[Positions, Positions, Positions]:
        """Slot, row and position of the cells that come after ``before`` and up to ``after``, by lane."""
        low = np.maximum(before[self._lane], self._first)
        each = np.maximum(np.minimum(after[self._lane], self._last) - low, 0)
        begin = low - self._first
        runs = zip(self._orders, begin.tolist(), (begin + each).tolist(), strict=True)
        rows = np.concatenate([np.empty(0, np.int64), *(order[a:b] for order, a, b in runs)])
        return np.repeat(self._slot, each), rows, np.repeat(self._start, each) + rows

    def _index(self) -> None:
        table = [(unit.lane, unit.first, unit.last, unit.start, slot) for unit, slot, _ in self._units]
        columns = np.array(table, np.int64).reshape(-1, 5).T
        self._lane, self._first, self._last, self._start, self._slot = columns
        self._orders = [order for _, _, order in self._units]


def gather(
    read: Generator[CSR], units: list[Unit], plan: EpochPlan, n_vars: int, lanes: range, start: int
) -> Generator[tuple[CSR, Positions]]:
    """Minibatches drawn from the lanes, lane after lane; a unit is let go when its last row is drawn."""
    pool, held, coming = RowPool(n_vars), _Held(), iter(units)
    mine = np.array(lanes, np.int64)
    with closing(read):
        before = plan.taken(start)
        come = before.copy()  # rows of each lane in the units that have come
        for i in range(start, plan.n_minibatches):
            after = plan.taken(i + 1)
            new = []
            while (after[mine] > come[mine]).any():
                unit = next(coming)
                new.append((unit, pool.add(next(read)), plan.order(unit)))
                come[unit.lane] = unit.last
            held.add(new)
            slots, rows, positions = held.draw(before, after)
            piece = pool.take(slots, rows)
            for slot in held.let_go(after):
                pool.drop(slot)
            before = after
            yield piece, positions
            del piece


def _whole(blocks: Generator[CSR], units: list[Unit]) -> Generator[tuple[CSR, Positions]]:
    with closing(blocks):
        for unit in units:
            counts = next(blocks)
            yield counts, np.arange(unit.start, unit.stop)
            # Else it is kept alive while the next one is waited for.
            del counts


def _each(pieces: Generator[tuple[CSR, Positions]], make: Callable[[CSR, Positions], T]) -> Generator[T]:
    """``make`` of each piece; whoever closes this closes the reader beneath, at once."""
    with closing(pieces):
        for counts, positions in pieces:
            yield make(counts, positions)


def _reader(atlas: Atlas, positions: Positions | None) -> ReadBlock:
    if positions is None:
        return lambda start, stop: atlas.read_rows(slice(start, stop))
    return lambda start, stop: atlas.read_rows(positions[start:stop])


def _check_positions(atlas: Atlas, positions: Positions | None) -> Positions | None:
    if positions is None:
        return None
    positions = np.asarray(positions)
    if positions.ndim != 1 or (len(positions) and positions.dtype.kind not in "iu"):
        raise CellsError(f"positions must be one vector of integers, not {positions.dtype} {positions.shape}")
    # Not widened as a whole: there is one for each cell.
    if len(positions) and not 0 <= positions.min() <= positions.max() < atlas.n_obs:
        raise CellsError(
            f"positions {positions.min()} to {positions.max()} asked of {atlas.n_obs} cells; "
            "they count from 0 within the atlas or view given"
        )
    return positions


def _decide_pinning(pin_memory: bool | None) -> bool:
    if pin_memory and not torch.cuda.is_available():
        raise OptionError("pin_memory=True needs a CUDA device and there is none; leave it out or pass False")
    return torch.cuda.is_available() if pin_memory is None else pin_memory
