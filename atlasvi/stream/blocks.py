"""All cells in order, a block at a time, for passes that need no minibatches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import CellsError
from atlasvi.stream.plan import Unit, as_budget, ordered_rows, plan_epoch
from atlasvi.stream.read import ReadBlock, count_workers, read_units, read_units_on
from atlasvi_kernels import CSR

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

Positions: TypeAlias = NDArray[np.int64]
T = TypeVar("T")


def stream_blocks(
    atlas: Atlas,
    *,
    positions: Positions | None = None,
    num_workers: int | None = None,
    memory_budget: int | str | None = None,
    client: distributed.Client | None = None,
) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
    """All cells in order, in blocks as large as the budget allows, with their positions in ``atlas``.

    For passes over everything that need no minibatches: moments, statistics. The arguments are those of
    `Atlas.iter_blocks`.
    """
    at = check_positions(atlas, positions)
    n_rows = atlas.n_obs if at is None else len(at)
    workers = count_workers(num_workers, client)
    block_rows = ordered_rows(atlas.bytes_per_row, workers, as_budget(memory_budget))
    plan = plan_epoch(n_rows, batch_size=1, block_rows=block_rows, seed=0, epoch=0, shuffle=False)
    units = plan.schedule()
    if client is None:
        read = read_units(reader(atlas, at), units, num_workers=workers)
    else:
        read = read_units_on(client, atlas, at, units, ahead=2 * workers)
    return in_atlas(_whole(read, units), at)


def each(pieces: Generator[tuple[CSR, Positions]], make: Callable[[CSR, Positions], T]) -> Generator[T]:
    """``make`` of each piece; whoever closes this closes the reader beneath, at once."""
    with closing(pieces):
        for counts, positions in pieces:
            yield make(counts, positions)


def in_atlas(
    pieces: Generator[tuple[CSR, Positions]], at: Positions | None
) -> Generator[tuple[CSR, Positions]]:
    """Pieces with positions in the atlas, for those among the cells to visit (``None``: all of it)."""
    return pieces if at is None else each(pieces, lambda counts, p: (counts, at[p].astype(np.int64)))


def reader(atlas: Atlas, positions: Positions | None) -> ReadBlock:
    """What reads a block of ``atlas``, or of the cells at ``positions``."""
    if positions is None:
        return lambda start, stop: atlas.read_rows(slice(start, stop))
    return lambda start, stop: atlas.read_rows(positions[start:stop])


def check_positions(atlas: Atlas, positions: Positions | None) -> Positions | None:
    """Positions of cells of ``atlas``, checked; ``None`` means all of them."""
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


def _whole(blocks: Generator[CSR], units: list[Unit]) -> Generator[tuple[CSR, Positions]]:
    with closing(blocks):
        for unit in units:
            counts = next(blocks)
            yield counts, np.arange(unit.start, unit.stop)
            # Else it is kept alive while the next one is waited for.
            del counts
