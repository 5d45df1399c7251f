"""Which draws of which cells are compared: a seeded reservoir of cells a group, and rows paired by number.

Nothing here looks at counts. A cell is chosen by a random number that belongs to it, and a draw of z by
(seed, cell, draw), so that neither chunks nor the order of reading change anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi_kernels import counter_uniform

if TYPE_CHECKING:
    from atlasvi.de.groups import Groups
    from atlasvi.store.atlas import Atlas

# Noise stream of the choice of cells; draws of z have 0, as everywhere.
_CHOICE = 64
_CHUNK = 1 << 16
OWN = -1
"""In the place of a batch: decode each cell under its own."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of all pools that are decoded under one batch.

    Args:
        start: first row.
        stop: after the last one.
        weight: of the probability found in them, within the pair of cells that they belong to.
        ends: whether a pair of cells is complete with them.
    """

    start: int
    stop: int
    weight: float
    ends: bool


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """Rows of draws, one pool for each group (and for each side, where the sides' batches differ).

    Row i of one pool is compared with row i of another, whichever two they are: so all comparisons can
    be made of a few rows at a time, each decoded once.

    Args:
        cells: ``(P, m)`` int64, position in the atlas.
        draws: ``(P, m)`` int64, number of the draw of z.
        batches: ``(P, m)`` int64, code of the batch to decode under, or `OWN`.
        ones: ``(K,)`` int64, pool of the first side of each comparison.
        twos: ``(K, m)`` int64, pool of the second side, row by row: of the rest it changes.
        shares: ``(K, P)`` float64, how much of the second side each pool is; sums to one.
        segments: of the rows.
    """

    cells: NDArray[np.int64]
    draws: NDArray[np.int64]
    batches: NDArray[np.int64]
    ones: NDArray[np.int64]
    twos: NDArray[np.int64]
    shares: NDArray[np.float64]
    segments: tuple[Segment, ...]


def choose_cells(
    atlas: Atlas, codes: NDArray[Any], n_groups: int, n_each: int, seed: int
) -> list[NDArray[np.int64]]:
    """At most ``n_each`` positions of each group, in random order: those with the smallest random numbers."""
    held = [(np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in range(n_groups)]
    for start in range(0, len(codes), _CHUNK):
        at = np.arange(start, min(start + _CHUNK, len(codes)))
        at = at[codes[at] >= 0]
        rows = torch.from_numpy(np.ascontiguousarray(atlas.numbers_of(at)))
        u = (counter_uniform(seed, 0, _CHOICE, rows, 2).double().numpy() * (1 << 24)).astype(np.int64)
        keys = (u[:, 0] << 24) + u[:, 1]
        group = codes[at]
        for g in np.unique(group):
            mine = group == g
            key, where = np.append(held[g][0], keys[mine]), np.append(held[g][1], at[mine])
            order = np.lexsort((where, key))[:n_each]
            held[g] = key[order], where[order]
    return [where for _, where in held]


def pooled_design(
    groups: Groups,
    chosen: list[NDArray[np.int64]],
    n_samples: int,
    sides: tuple[NDArray[np.int64], ...],
    seed: int,
) -> Design:
    """``n_samples`` rows, each a draw of a cell of its own where there are so many cells.

    Args:
        groups: who is compared.
        chosen: cells of each group, from `choose_cells`.
        n_samples: rows, shared equally among the batches.
        sides: batches to decode under on the first and on the second side; `OWN` for each cell's own.
        seed: of the order in which cells are paired.
    """  # fmt: skip
    most = max(map(len, sides))
    rows = max(1, n_samples // most) * most
    batches = [side[np.arange(rows) * len(side) // rows] for side in sides]
    pools, ones = _pools(groups, sides)
    cells, draws = np.empty((len(pools), rows), np.int64), np.empty((len(pools), rows), np.int64)
    for p, (g, _) in enumerate(pools):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, p], np.uint64)))
        n, n_cycles = len(chosen[g]), -(-rows // len(chosen[g]))
        # In each cycle another order, so that two small groups are not paired in one way only.
        orders = [np.arange(n) if cycle == 0 else rng.permutation(n) for cycle in range(n_cycles)]
        cells[p], draws[p] = chosen[g][np.concatenate(orders)[:rows]], np.arange(rows) // n
    twos, shares = _second_sides(groups, pools, rows, seed)
    return Design(
        cells, draws, np.stack([batches[side] for _, side in pools]), ones, twos, shares,
        (Segment(0, rows, 1.0, ends=True),),
    )  # fmt: skip


def paper_design(
    groups: Groups,
    chosen: list[NDArray[np.int64]],
    n_cells: int,
    n_draws: int,
    weights: dict[int, float],
    seed: int,
) -> Design:
    """``n_cells`` pairs of cells, and for each pair ``n_draws`` rows under every batch.

    Args:
        groups: who is compared.
        chosen: cells of each group, from `choose_cells`.
        n_cells: pairs of cells.
        n_draws: draws of z for each.
        weights: of the batches' codes, in sum 1; `OWN` for each cell's own.
        seed: of the rest's composition.
    """  # fmt: skip
    batches = np.array(list(weights), np.int64)
    pools, ones = _pools(groups, (batches, batches))
    pair, batch, draw = np.indices((n_cells, len(batches), n_draws)).reshape(3, -1)
    cells = np.stack([chosen[g][pair % len(chosen[g])] for g, _ in pools])
    draws = np.stack([draw + n_draws * (pair // len(chosen[g])) for g, _ in pools])
    twos, shares = _second_sides(groups, pools, n_cells, seed)
    starts = range(0, len(pair), n_draws)
    segments = tuple(
        Segment(start, start + n_draws, weights[code], ends=(i + 1) % len(batches) == 0)
        for i, start in enumerate(starts)
        for code in [int(batches[i % len(batches)])]
    )
    return Design(
        cells, draws, np.broadcast_to(batches[batch], cells.shape), ones, twos[:, pair], shares, segments
    )


def _pools(
    groups: Groups, sides: tuple[NDArray[np.int64], ...]
) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """``(group, side)`` of each pool, and the pool of the first side of each comparison."""
    same = np.array_equal(sides[0], sides[1])
    first = dict.fromkeys((one, 0) for one, _ in groups.comparisons)
    seconds = range(len(groups.names)) if groups.comparisons[0][1] is None else [groups.comparisons[0][1]]
    second = dict.fromkeys((two, 0 if same else 1) for two in seconds)
    pools = list({**first, **second})
    return pools, np.array([pools.index((one, 0)) for one, _ in groups.comparisons])


def _second_sides(
    groups: Groups, pools: list[tuple[int, int]], rows: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pool of the second side, row by row: of the rest, the other groups in proportion to their cells."""
    side = max(side for _, side in pools)
    at = {g: p for p, (g, s) in enumerate(pools) if s == side}
    sizes = groups.sizes
    twos = np.empty((len(groups.comparisons), rows), np.int64)
    shares = np.zeros((len(groups.comparisons), len(pools)))
    for k, (one, two) in enumerate(groups.comparisons):
        others = [g for g in at if g != one] if two is None else [two]
        of = np.array([at[g] for g in others])
        share = sizes[others] / sizes[others].sum()
        shares[k, of] = share
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, (1 << 32) + one], np.uint64)))
        twos[k] = rng.permutation(np.repeat(of, _apportion(share, rows)))
    return twos, shares


def _apportion(share: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to shares, in sum ``n`` (largest remainders)."""
    exact = share * n
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: n - int(whole.sum())]] += 1
    return whole
