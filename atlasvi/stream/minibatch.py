"""Rows of decoded blocks, gathered into minibatches, and packed with their codes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import pairwise
from typing import Protocol, TypeAlias, TypeVar

import numba
import numpy as np
import torch
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.store.fields import Codes
from atlasvi.stream.plan import EpochPlan, Unit
from atlasvi.types import Minibatch

Positions: TypeAlias = NDArray[np.int64]
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Pool(Protocol[T_contra]):
    """What rows are taken from: a `RowPool` of decoded blocks, or what is `OnDevice`."""

    def add(self, unit: T_contra, /) -> int:
        """Hold the rows of a unit, and return the number by which the others know it."""
        ...

    def drop(self, slot: int, /) -> None:
        """Let go of them."""
        ...

    def take(self, slots: Positions, rows: Positions, /, *, alone: bool) -> CSR:
        """Row ``rows[i]`` of unit ``slots[i]``, for all i."""
        ...


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
        is_done = self._last <= done[self._lane]
        if not is_done.any():
            return []
        ended: list[int] = self._slot[is_done].tolist()
        self._units = [held for held, gone in zip(self._units, is_done.tolist(), strict=True) if not gone]
        self._index()
        return ended

    def draw(self, taken: Positions) -> tuple[Positions, Positions, Positions, Positions]:
        """The cells of some minibatches: slot, row and position of each, and where each minibatch begins.

        Args:
            taken: ``(n + 1, n_lanes)``, the rows of each lane that come before minibatch ``i``.
        """
        drawn: tuple[Positions, Positions, Positions, Positions] = _draw(
            taken, self._lane, self._first, self._last, self._start, self._slot, self._orders
        )
        return drawn

    def _index(self) -> None:
        table = [(unit.lane, unit.first, unit.last, unit.start, slot) for unit, slot, _ in self._units]
        columns = np.array(table, np.int64).reshape(-1, 5).T
        self._lane, self._first, self._last, self._start, self._slot = columns
        self._orders = np.concatenate([np.empty(0, np.int64), *(order for _, _, order in self._units)])


@numba.njit(error_model="numpy", nogil=True, cache=True)
def _draw(taken, lane, first, last, start, slot, orders):  # type: ignore[no-untyped-def]
    n = len(taken) - 1
    begins = np.zeros(n + 1, np.int64)
    for i in range(n):
        begins[i + 1] = begins[i]
        for u in range(len(lane)):
            each = min(taken[i + 1, lane[u]], last[u]) - max(taken[i, lane[u]], first[u])
            begins[i + 1] += max(each, 0)
    slots, rows, positions = np.empty((3, begins[n]), np.int64)
    k = 0
    for i in range(n):
        order = 0
        for u in range(len(lane)):
            low = max(taken[i, lane[u]], first[u]) - first[u]
            high = min(taken[i + 1, lane[u]], last[u]) - first[u]
            for row in orders[order + low : order + max(high, low)]:
                slots[k], rows[k], positions[k] = slot[u], row, start[u] + row
                k += 1
            order += last[u] - first[u]
    return slots, rows, positions, begins


def gather(
    read: Generator[T],
    units: list[Unit],
    pool: Pool[T],
    plan: EpochPlan,
    lanes: range,
    start: int,
    together: int = 1,
    *,
    alone: bool = False,
) -> Generator[tuple[CSR, Positions]]:
    """Minibatches drawn from the lanes, lane after lane; a unit is let go when its last row is drawn.

    Args:
        read: the units, as the pool takes them.
        units: of these lanes, as `EpochPlan.schedule` has them.
        pool: what holds their rows; empty, or one that needs nothing read.
        plan: of the epoch.
        lanes: to draw from.
        start: minibatch to begin with.
        together: minibatches that are gathered in one go, and share their memory.
        alone: whether nobody reads beside.
    """
    held, coming = _Held(), iter(units)
    mine = np.array(lanes, np.int64)
    with closing(read):
        before = plan.taken(start)
        come = before.copy()  # rows of each lane in the units that have come
        for first in range(start, plan.n_minibatches, together):
            stop = min(first + together, plan.n_minibatches)
            taken = np.stack([before, *(plan.taken(i + 1) for i in range(first, stop))])
            before, new = taken[-1], []
            while (before[mine] > come[mine]).any():
                unit = next(coming)
                new.append((unit, pool.add(next(read)), plan.order(unit)))
                come[unit.lane] = unit.last
            held.add(new)
            slots, rows, positions, begins = held.draw(taken)
            piece = pool.take(slots, rows, alone=alone or come.sum() >= plan.n_visits)
            for slot in held.let_go(before):
                pool.drop(slot)
            for low, high in pairwise(begins.tolist()):
                yield piece.row_range(low, high), positions[low:high]
            del piece


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


def pack_uncounted(positions: Positions, codes: Codes, rows: NDArray[np.int64]) -> Minibatch:
    """What is known of some cells besides their counts, of which there are none; arguments as `pack`."""
    nothing = np.zeros(0, np.int32)
    counts = CSR.from_numpy(np.zeros(len(positions) + 1, np.int64), nothing, nothing, len(codes.gene_columns))
    return pack(counts, positions, codes, rows)
