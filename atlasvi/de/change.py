"""Effect sizes of Boyeau et al. 2019: the posterior of the log2 fold change, its share beyond delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlasvi.de.cells import RawMeans
from atlasvi.de.compare import add_change, add_rho, describe, keep_highest, median, over_genes, take_change
from atlasvi.de.decoding import Decoding

# Changes of all pairs that are held for medians and intervals; beyond it rows are decoded again.
_CHANGE_BYTES = 256 << 20
# Of scvi-tools: below it there is no offset; quantile of the genes that are not expressed.
_LEAST_OFFSET, _QUANTILE = 1e-10, 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Highest:
    """What a first pass over the rows finds.

    Args:
        one: ``(K, G)`` float32, highest rho of the first side.
        two: ``(K, G)`` float32, of the second.
        scale1: ``(K, G)`` float64, mean rho of the first side.
        scale2: ``(K, G)`` float64, of the second.
    """

    one: NDArray[np.float32]
    two: NDArray[np.float32]
    scale1: NDArray[np.float64]
    scale2: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The posterior of one comparison's log2 fold changes.

    Args:
        higher: ``(G,)`` share of the pairs with a change of delta or more.
        lower: ``(G,)`` share of those below minus delta.
        mean: ``(G,)`` of the changes, these with a thousandth of the offset.
        median: ``(G,)``.
        std: ``(G,)``.
        low: ``(G,)`` lowest.
        high: ``(G,)`` highest.
        intervals: for each level ``(G, 2)``, the shortest interval with that share of the pairs.
    """

    higher: NDArray[np.float64]
    lower: NDArray[np.float64]
    mean: NDArray[np.float64]
    median: NDArray[np.float64]
    std: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    intervals: dict[float, NDArray[np.float32]]


def highest(decoding: Decoding) -> Highest:
    """Mean and highest rho of each side of each comparison."""
    design, n_vars = decoding.design, decoding.n_vars
    one, two = (np.zeros((len(design.ones), n_vars), np.float32) for _ in range(2))
    scale = np.zeros((len(design.cells), n_vars))
    for piece in decoding.pieces():
        over_genes(keep_highest, n_vars, piece.rho, piece.one, one)
        over_genes(keep_highest, n_vars, piece.rho, piece.two, two)
        over_genes(add_rho, n_vars, piece.rho, piece.pools, scale)
    scale /= design.cells.shape[1]
    return Highest(one, two, scale[design.ones], design.shares @ scale)


def estimate_offset(found: Highest, k: int, raw: tuple[RawMeans, RawMeans], threshold_counts: float) -> float:
    """The pseudocount of scvi-tools: from the highest rho of genes that have next to no counts.

    It is the 0.9 quantile, over the genes with a mean count below ``threshold_counts`` in a group, of the
    highest rho; the larger of both groups, divided by the number of genes.
    """
    sides = zip((found.one[k], found.two[k]), raw, strict=True)
    silent = [top[means.mean < threshold_counts] for top, means in sides]
    largest = max(float(np.quantile(rho, _QUANTILE)) if len(rho) else _LEAST_OFFSET for rho in silent)
    n_vars: int = found.one.shape[1]
    return max(_LEAST_OFFSET, largest / n_vars)


def mean_change(decoding: Decoding, offsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(K, G)`` mean log2 fold change, with the offset of each comparison."""
    design, n_vars = decoding.design, decoding.n_vars
    sums = np.zeros((len(design.ones), n_vars))
    for piece in decoding.pieces():
        over_genes(add_change, n_vars, piece.rho, piece.one, piece.two, offsets.astype(np.float32), sums)
    sums /= design.cells.shape[1]
    return sums


def estimate_delta(mean: NDArray[np.float64], seed: int) -> float:
    """The threshold of scvi-tools for ``delta=None``: 0.6 of how far apart the genes' outer modes lie.

    Three normals are fitted to the genes' mean changes; the result is at least 0.1.
    """
    from sklearn.mixture import GaussianMixture

    centres = np.sort(GaussianMixture(3, random_state=seed % (1 << 32)).fit(mean[:, None]).means_.ravel())
    return max(0.1, 0.6 * float(np.abs(centres[[0, -1]]).mean()))


def compare_change(
    decoding: Decoding,
    offsets: NDArray[np.float64],
    deltas: NDArray[np.float64],
    levels: Sequence[float],
) -> list[Change]:
    """Changes of all pairs of all comparisons, a few comparisons (or some genes of one) at a time.

    Args:
        decoding: of the design.
        offsets: ``(K,)`` added to rho.
        deltas: ``(K,)`` log2 fold changes that count.
        levels: of credible intervals.
    """
    n_vars, m = decoding.n_vars, decoding.design.cells.shape[1]
    parts: dict[int, list[Change]] = {}
    for k, genes in _slabs(len(offsets), n_vars, m):
        for one, change in zip(k, _of_slab(decoding, k, genes, offsets, deltas, levels), strict=True):
            parts.setdefault(int(one), []).append(change)
    return [_joined(parts[k]) for k in range(len(offsets))]


def _slabs(n_comparisons: int, n_vars: int, m: int) -> Iterator[tuple[NDArray[np.int64], slice]]:
    at_once = _CHANGE_BYTES // (4 * n_vars * m)
    if at_once:
        for first in range(0, n_comparisons, at_once):
            yield np.arange(first, min(first + at_once, n_comparisons)), slice(0, n_vars)
        return
    n_genes = max(1, _CHANGE_BYTES // (4 * m))
    for k in range(n_comparisons):
        for start in range(0, n_vars, n_genes):
            yield np.array([k]), slice(start, min(start + n_genes, n_vars))


def _of_slab(
    decoding: Decoding,
    k: NDArray[np.int64],
    genes: slice,
    offsets: NDArray[np.float64],
    deltas: NDArray[np.float64],
    levels: Sequence[float],
) -> Iterator[Change]:
    m, n_genes = decoding.design.cells.shape[1], genes.stop - genes.start
    change = np.empty((len(k), n_genes, m), np.float32)
    higher, lower = np.zeros((len(k), n_genes), np.int32), np.zeros((len(k), n_genes), np.int32)
    offset, factor = offsets[k].astype(np.float32), np.exp2(deltas[k]).astype(np.float32)
    for piece in decoding.pieces(k, genes):
        over_genes(
            take_change, n_genes, piece.rho, piece.one, piece.two, offset, factor, piece.start, higher,
            lower, change,
        )  # fmt: skip
    for i in range(len(k)):
        mean, std, low, high = np.empty((4, n_genes))
        over_genes(describe, n_genes, change[i], mean, std, low, high)
        middle = median(change[i])
        if levels:
            change[i].sort(axis=1)
        yield Change(
            higher[i] / m, lower[i] / m, mean, middle, std, low, high,
            {level: shortest_interval(change[i], level) for level in levels},
        )  # fmt: skip


def shortest_interval(ordered: NDArray[np.float32], level: float) -> NDArray[np.float32]:
    """``(G, 2)`` ends of the shortest interval with a share ``level`` of each sorted row (G, m)."""
    inside = int(np.floor(level * ordered.shape[1]))
    widths = ordered[:, inside:] - ordered[:, : ordered.shape[1] - inside]
    first = widths.argmin(1)
    rows = np.arange(len(ordered))
    return np.stack([ordered[rows, first], ordered[rows, first + inside]], 1)


def _joined(parts: list[Change]) -> Change:
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(Change) if field.name != "intervals"]
    joined: Any = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    levels = parts[0].intervals
    return Change(
        **joined,
        intervals={level: np.concatenate([part.intervals[level] for part in parts]) for level in levels},
    )
