"""What one pass over an atlas tells: moments of genes, totals of cells, library sizes; and cells that pass.

Counts are integers, so sums and sums of squares are kept in integers and come out exact: the result does
not depend on how the cells were cut into blocks, nor on how many threads read them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import CellsError, GenesError, OptionError
from atlasvi.store import cluster
from atlasvi.store.fields import level_codes
from atlasvi_kernels import CSR

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

logger = logging.getLogger("atlasvi")

GeneSet: TypeAlias = "str | Sequence[str] | NDArray[Any]"

# The sets that need not be said, by how their genes' symbols start (human, mouse, rat).
KNOWN_SETS = {"mt": ("MT-", "mt-", "Mt-")}

# What is added up for each gene, side by side so that an entry touches one cache line: the sum of the
# counts, that of their squares (modulo 2^64, and how often that was passed), and the number of cells.
SUM, SQUARE, CARRY, CELLS = range(4)

# Cells of a task on a cluster, and of them at a time in a worker's memory.
_TASK_ROWS = 1 << 14
_READ_ROWS = 1 << 11


@dataclass(frozen=True, slots=True)
class LibraryMoments:
    """Empirical mean and variance of the log of the cells' totals, batch by batch (natural log)."""

    log_mean: tuple[float, ...]
    log_var: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What one pass over the counts of an atlas tells.

    Args:
        var_names: ``(n_vars,)`` names of the genes.
        mean: ``(n_vars,)`` float64, mean count of each gene.
        variance: ``(n_vars,)`` float64, with n - 1; NaN where there is one cell only.
        n_cells: ``(n_vars,)`` int64, cells in which each gene is detected (a count > 0).
        total_counts: ``(n_obs,)`` int64, library size of each cell.
        n_genes: ``(n_obs,)`` int32, genes detected in each cell.
        shares: for each gene set ``(n_obs,)`` float64, its share of the cell's counts; 0 in a cell
            without counts.
        batches: levels of the batch key, or ``("0",)``.
        batch_cells: cells of each batch.
        library: log-mean and log-variance of the library sizes of each batch, as `SCVI` uses them:
            over cells with counts, and a variance of at least 1e-4.
    """

    var_names: NDArray[Any]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    n_cells: NDArray[np.int64]
    total_counts: NDArray[np.int64]
    n_genes: NDArray[np.int32]
    shares: Mapping[str, NDArray[np.float64]]
    batches: tuple[str, ...]
    batch_cells: tuple[int, ...]
    library: LibraryMoments

    @property
    def nnz(self) -> int:
        """Number of counts > 0."""
        return int(self.n_cells.sum())

    @property
    def density(self) -> float:
        """Share of the entries that are not zero."""
        return self.nnz / (len(self.total_counts) * max(len(self.mean), 1))

    @property
    def genes(self) -> pd.DataFrame:
        """``mean``, ``variance`` and ``n_cells`` by name."""
        columns = {"mean": self.mean, "variance": self.variance, "n_cells": self.n_cells}
        return pd.DataFrame(columns, index=pd.Index(self.var_names.astype(object)))


def statistics(
    atlas: Atlas,
    *,
    batch_key: str | None = None,
    gene_sets: Mapping[str, GeneSet] | None = None,
    num_workers: int | None = None,
    memory_budget: int | str | None = None,
    client: distributed.Client | None = None,
) -> Statistics:
    """The body of `Atlas.statistics`, which says what the arguments are."""
    refuse_no_cells(atlas)
    names, member = find_gene_sets(atlas, gene_sets or {})
    codes, batches = level_codes(atlas, batch_key)
    sums, moments = gene_sums(1, atlas.n_vars), LogTotals(len(batches))
    totals, n_genes = np.zeros(atlas.n_obs, np.int64), np.zeros(atlas.n_obs, np.int32)
    shares = {name: np.zeros(atlas.n_obs) for name in names}
    for cells, at in _counted(atlas, member, sums, num_workers, memory_budget, client):
        moments.add(cells.totals, codes[at])
        totals[at], n_genes[at] = cells.totals, cells.n_genes
        for s, name in enumerate(names):
            shares[name][at] = cells.share(s)
    mean, variance = moments_of(sums[0], atlas.n_obs)
    return Statistics(
        atlas.var_names, mean, variance, sums[0, :, CELLS].astype(np.int64), totals, n_genes, shares,
        batches, tuple(np.bincount(codes, minlength=len(batches)).tolist()), moments.result(),
    )  # fmt: skip


def _counted(
    atlas: Atlas,
    member: NDArray[np.bool_],
    sums: NDArray[np.uint64] | None,
    num_workers: int | None,
    memory_budget: int | str | None,
    client: distributed.Client | None,
) -> Iterator[tuple[CellCounts, NDArray[np.int64]]]:
    """Totals of the cells, block after block in their order; genes are added to ``sums`` if it is given."""
    if client is not None:
        yield from _counted_on(client, atlas, member, sums, num_workers)
        return
    for counts, at in atlas.iter_blocks(num_workers=num_workers, memory_budget=memory_budget):
        if sums is not None:
            add_genes(counts, np.zeros(counts.n_obs, np.int64), sums)
        yield count_cells(counts, member), at


def _counted_on(
    client: distributed.Client,
    atlas: Atlas,
    member: NDArray[np.bool_],
    sums: NDArray[np.uint64] | None,
    num_workers: int | None,
) -> Iterator[tuple[CellCounts, NDArray[np.int64]]]:
    """The same on a cluster: workers add up, and no count is sent here."""
    n_workers = cluster.count_readers(client, num_workers)
    cluster.check_places(atlas)
    # Large, for 32 bytes a gene come back of each; but some for every worker.
    rows = min(_TASK_ROWS, max(_READ_ROWS, -(-atlas.n_obs // (4 * n_workers))))
    ranges = [(start, min(start + rows, atlas.n_obs)) for start in range(0, atlas.n_obs, rows)]
    calls = ((_blocks(atlas, *cells), member, sums is not None) for cells in ranges)
    results = cluster.in_order(client, _count_blocks, calls, ahead=2 * n_workers)
    with closing(results):
        for (start, stop), (cells, part) in zip(ranges, results, strict=True):
            if sums is not None:
                sums[0] = merged(np.stack([sums[0], part]))
            yield cells, np.arange(start, stop)


def _blocks(atlas: Atlas, start: int, stop: int) -> list[cluster.Block]:
    firsts = range(start, stop, _READ_ROWS)
    return [cluster.locate(atlas, np.arange(first, min(first + _READ_ROWS, stop))) for first in firsts]


def _count_blocks(
    blocks: list[cluster.Block], member: NDArray[np.bool_], genes: bool
) -> tuple[CellCounts, NDArray[np.uint64]]:
    """The task: totals of the cells of some blocks, and ``(n_vars, 4)`` sums of their genes, or of none."""
    sums = gene_sums(1, member.shape[1] if genes else 0)
    parts = []
    for block in blocks:
        counts = block.read()
        if genes:
            add_genes(counts, np.zeros(counts.n_obs, np.int64), sums)
        parts.append(count_cells(counts, member))
    return CellCounts.concatenate(parts), sums[0]


def refuse_no_cells(atlas: Atlas) -> None:
    """Raise a `CellsError` where there is nothing to count."""
    if atlas.n_obs == 0:
        raise CellsError(f"{atlas!r} has no cells to count; choose at least one")


# --- cells that pass --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Criterion:
    """One reason to leave cells out: what it says of them, and which of a block it holds for."""

    says: str
    fails: Callable[[CellCounts], NDArray[np.bool_]]


def filter_cells(
    atlas: Atlas,
    *,
    min_counts: int | None = None,
    max_counts: int | None = None,
    min_genes: int | None = None,
    max_genes: int | None = None,
    max_share: Mapping[str, float] | None = None,
    gene_sets: Mapping[str, GeneSet] | None = None,
    num_workers: int | None = None,
    memory_budget: int | str | None = None,
    client: distributed.Client | None = None,
) -> Atlas:
    """The body of `Atlas.filter`, which says what the arguments are."""
    refuse_no_cells(atlas)
    limits = dict(max_share or {})
    names, member = find_gene_sets(atlas, _sets_for(limits, gene_sets or {}))
    criteria = [
        *_range_criteria("counts", min_counts, max_counts, lambda cells: cells.totals),
        *_range_criteria("genes", min_genes, max_genes, lambda cells: cells.n_genes),
        *(_share_criterion(name, limits[name], s) for s, name in enumerate(names)),
    ]
    if not criteria:
        raise OptionError("filter was given nothing to filter by; pass min_counts=, max_share= or the like")
    keep, failed = np.ones(atlas.n_obs, bool), [0] * len(criteria)
    for cells, at in _counted(atlas, member, None, num_workers, memory_budget, client):
        for c, criterion in enumerate(criteria):
            fails = criterion.fails(cells)
            failed[c] += int(fails.sum())
            keep[at] &= ~fails
    n_kept = int(keep.sum())
    reasons = ", ".join(f"{n:,} have {c.says}" for c, n in zip(criteria, failed, strict=True))
    if n_kept == 0:
        raise CellsError(
            f"no cell of {atlas.name} passes the filter: of {atlas.n_obs:,}, {reasons}; loosen one of these"
        )
    logger.info(
        "filter keeps %s of %s cells of %s; of all, %s%s", f"{n_kept:,}", f"{atlas.n_obs:,}", atlas.name,
        reasons, " (a cell may fail several)" if len(criteria) > 1 else "",
    )  # fmt: skip
    return atlas[keep] if n_kept < atlas.n_obs else atlas[:]


def _range_criteria(
    what: str, low: int | None, high: int | None, number: Callable[[CellCounts], NDArray[Any]]
) -> Iterator[_Criterion]:
    for name, value in ((f"min_{what}", low), (f"max_{what}", high)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise OptionError(f"{name}={value} cannot be: give a number of {what}, at least 0")
    if low is not None and high is not None and low > high:
        raise OptionError(f"min_{what}={low} is above max_{what}={high}, so no cell can pass; swap them?")
    if low is not None:
        yield _Criterion(f"fewer than {low:,} {what}", lambda cells: number(cells) < low)
    if high is not None:
        yield _Criterion(f"more than {high:,} {what}", lambda cells: number(cells) > high)


def _share_criterion(name: str, limit: float, s: int) -> _Criterion:
    return _Criterion(f"a share of {name!r} above {limit:g}", lambda cells: cells.share(s) > limit)


def _sets_for(limits: Mapping[str, float], gene_sets: Mapping[str, GeneSet]) -> dict[str, GeneSet]:
    """The definition of each set that has a limit; a known one stands for itself."""
    idle = [name for name in gene_sets if name not in limits]
    if idle:
        raise OptionError(f"gene_sets has {idle[0]!r} but max_share has no limit for it; give one")
    sets: dict[str, GeneSet] = {}
    for name, limit in limits.items():
        if not 0 <= limit <= 1:
            raise OptionError(f"max_share of {name!r} is {limit}; give a share from 0 to 1: 0.2 is 20 %")
        if name not in gene_sets and name not in KNOWN_SETS:
            raise OptionError(
                f"max_share has the gene set {name!r}, which is not known; say which genes it has: "
                f"gene_sets={{{name!r}: a prefix, names or a mask}}; known without: "
                f"{', '.join(map(repr, KNOWN_SETS))}"
            )
        sets[name] = gene_sets[name] if name in gene_sets else name
    return sets


# --- sets of genes ----------------------------------------------------------------------------------


def find_gene_sets(
    atlas: Atlas, gene_sets: Mapping[str, GeneSet]
) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """Names of the sets and ``(n_sets, n_vars)`` bool, which genes each has.

    Raises:
        GenesError: a set with no gene of the atlas, names it lacks, or a mask that does not fit.
    """
    names = tuple(gene_sets)
    member = np.zeros((len(names), atlas.n_vars), bool)
    if not names:
        return names, member
    have = atlas.var_names
    for s, name in enumerate(names):
        member[s] = _members(atlas, have, name, gene_sets[name])
    return names, member


def starts_with(names: NDArray[Any], prefixes: Sequence[str]) -> NDArray[np.bool_]:
    """Which names start with any of the prefixes."""
    found = np.zeros(len(names), bool)
    for prefix in prefixes:
        found |= np.strings.startswith(names, prefix)
    return found


def _members(atlas: Atlas, have: NDArray[Any], name: str, genes: GeneSet) -> NDArray[np.bool_]:
    if isinstance(genes, str):
        prefixes = KNOWN_SETS.get(genes, (genes,))
        found = starts_with(have, prefixes)
        if not found.any():
            raise GenesError(
                f"gene set {name!r}: no gene of {atlas.name} starts with {' or '.join(map(repr, prefixes))}, "
                f"the first is {str(have[0])!r}; pass gene_sets={{{name!r}: names or a mask}}"
                if len(have) else f"gene set {name!r}: {atlas.name} has no genes"
            )  # fmt: skip
        return found
    given = np.asarray(genes)
    if given.dtype == bool:
        if given.shape != have.shape:
            raise GenesError(
                f"gene set {name!r} is a mask {given.shape} for {len(have)} genes; give one entry a gene"
            )
        found = given
    elif given.ndim == 1 and (given.dtype.kind in "UTO" or not len(given)):
        wanted = {str(gene) for gene in given}
        known = have.tolist()
        lacking = sorted(wanted.difference(known))
        if lacking:
            raise GenesError(
                f"gene set {name!r} names {len(lacking)} genes that {atlas.name} lacks, such as "
                f"{', '.join(map(repr, lacking[:3]))}; leave them out"
            )
        found = np.fromiter((gene in wanted for gene in known), bool, len(known))
    else:
        raise GenesError(
            f"gene set {name!r} is {given.dtype} {given.shape}; give a prefix, names of genes or a mask"
        )
    if not found.any():
        raise GenesError(f"gene set {name!r} has no gene; name at least one, or leave it out")
    return found


# --- adding up --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CellCounts:
    """Totals of the cells of a block.

    Args:
        totals: ``(B,)`` int64, counts.
        n_genes: ``(B,)`` int32, genes with a count > 0.
        of_sets: ``(B, n_sets)`` int64, counts in each gene set.
    """

    totals: NDArray[np.int64]
    n_genes: NDArray[np.int32]
    of_sets: NDArray[np.int64]

    @staticmethod
    def concatenate(parts: Sequence[CellCounts]) -> CellCounts:
        """Of one block after the other."""
        return CellCounts(
            np.concatenate([part.totals for part in parts]), np.concatenate([part.n_genes for part in parts]),
            np.concatenate([part.of_sets for part in parts]),
        )  # fmt: skip

    def share(self, s: int) -> NDArray[np.float64]:
        """Share of set ``s`` in each cell's counts; 0 where a cell has none."""
        return self.of_sets[:, s] / np.maximum(self.totals, 1)


def count_cells(counts: CSR, member: NDArray[np.bool_]) -> CellCounts:
    """Totals of each cell, and of each gene set in it (``member`` as `find_gene_sets` gives it)."""
    n_obs = counts.n_obs
    cells = CellCounts(
        np.zeros(n_obs, np.int64), np.zeros(n_obs, np.int32), np.zeros((n_obs, len(member)), np.int64)
    )
    indptr, indices, data = counts.numpy()
    _count_cells(indptr, indices, data, member, cells.totals, cells.n_genes, cells.of_sets)
    return cells


def gene_sums(n_groups: int, n_vars: int) -> NDArray[np.uint64]:
    """``(n_groups, n_vars, 4)`` zeros to add up in; 32 bytes a gene and group."""
    return np.zeros((n_groups, n_vars, 4), np.uint64)


def add_genes(counts: CSR, groups: NDArray[Any], sums: NDArray[np.uint64]) -> None:
    """Add each gene's counts, squares and detections to the sums of the cell's group.

    Args:
        counts: (B x G).
        groups: ``(B,)`` integer, the group of each cell.
        sums: from `gene_sums`.
    """
    indptr, indices, data = counts.numpy()
    _add_genes(indptr, indices, data, groups, sums)


def merged(sums: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """``(n_vars, 4)``: the sums of all groups together."""
    total: NDArray[np.uint64] = sums[0].copy()
    for one in sums[1:]:
        total += one
        total[:, CARRY] += total[:, SQUARE] < one[:, SQUARE]
    return total


def moments_of(sums: NDArray[np.uint64], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (with n - 1; NaN for one cell) of each gene, from exact sums over ``n`` cells."""
    total, square = sums[:, SUM], sums[:, SQUARE]
    mean = total / n
    if n < 2:
        return mean, np.full(len(sums), np.nan)
    largest = int(square.max(initial=0))
    if not sums[:, CARRY].any() and n * largest < 1 << 64:
        # total**2 <= n * square, so nothing here passes 2^64.
        spread = np.uint64(n) * square - total * total
        return mean, spread / (n * (n - 1))
    exact = (
        n * ((int(carry) << 64) + int(low)) - int(one) ** 2
        for one, low, carry in zip(total, square, sums[:, CARRY], strict=True)
    )
    return mean, np.fromiter((spread / (n * (n - 1)) for spread in exact), float, len(sums))


class LogTotals:
    """Mean and variance of the log library sizes of each batch, cell after cell (Welford 1962).

    One cell at a time and not block by block: the last bit is then the same however cells were cut.
    """

    def __init__(self, n_batch: int) -> None:
        self._n, self._mean, self._spread = np.zeros(n_batch), np.zeros(n_batch), np.zeros(n_batch)

    def add(self, totals: NDArray[np.int64], batch: NDArray[Any]) -> None:
        """The next cells; those without counts are left out, as scvi-tools does."""
        _add_log_totals(totals, batch, self._n, self._mean, self._spread)

    def result(self) -> LibraryMoments:
        """What it comes to; 0 for a batch without counts."""
        var = self._spread / np.maximum(self._n, 1)
        # A batch of one cell has no spread; a prior of no width would be a division by zero.
        return LibraryMoments(tuple(self._mean.tolist()), tuple(np.maximum(var, 1e-4).tolist()))


@numba.njit(nogil=True, cache=True)
def _count_cells(indptr, indices, data, member, totals, n_genes, of_sets):  # type: ignore[no-untyped-def]
    for b in range(len(indptr) - 1):
        total, detected = np.int64(0), np.int32(0)
        for k in range(indptr[b], indptr[b + 1]):
            value = np.int64(data[k])
            total += value
            detected += value > 0
            for s in range(len(member)):
                if member[s, indices[k]]:
                    of_sets[b, s] += value
        totals[b] = total
        n_genes[b] = detected


@numba.njit(nogil=True, cache=True)
def add_entry(sums, value):  # type: ignore[no-untyped-def]
    """Add one count to the four sums of its gene."""
    # All of one type: with an int64 numba would go by way of float64.
    one, square = np.uint64(1), value * value
    low = sums[1] + square
    sums[0] += value
    sums[1] = low
    if low < square:
        sums[2] += one
    sums[3] += one


@numba.njit(nogil=True, cache=True)
def _add_genes(indptr, indices, data, groups, sums):  # type: ignore[no-untyped-def]
    for b in range(len(indptr) - 1):
        of_group = sums[groups[b]]
        for k in range(indptr[b], indptr[b + 1]):
            value = np.uint64(data[k])
            if value != 0:
                add_entry(of_group[indices[k]], value)


@numba.njit(nogil=True, cache=True)
def _add_log_totals(totals, batch, n, mean, spread):  # type: ignore[no-untyped-def]
    for b in range(len(totals)):
        if totals[b] > 0:
            x, g = np.log(np.float64(totals[b])), batch[b]
            n[g] += 1
            delta = x - mean[g]
            mean[g] += delta / n[g]
            spread[g] += delta * (x - mean[g])


__all__ = [
    "KNOWN_SETS",
    "GeneSet",
    "LibraryMoments",
    "LogTotals",
    "Statistics",
    "filter_cells",
    "find_gene_sets",
    "statistics",
]
