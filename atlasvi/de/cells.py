"""One pass over the cells: sums of the raw counts of each group, and q(z|x) of the cells chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.infer.on_cluster import READ_ROWS, send_module, tasks
from atlasvi.progress import Advance
from atlasvi.store import cluster
from atlasvi.stream import Epochs, pack, pack_uncounted
from atlasvi.types import Encodes, Minibatch, Posterior

if TYPE_CHECKING:
    import distributed

    from atlasvi.de.groups import Groups
    from atlasvi.infer.encoded import Encoded as StoredLatents
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

# Always the same, so that a cell is encoded beside the same others whatever the reading.
_BATCH = 1024
# Counts of a cell are scaled to this total, as scvi-tools' raw_normalized_mean has them.
_SCALE = 1e4
COUNT, DETECTED, NORMALISED = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class RawMeans:
    """Means over the cells of a set, gene by gene.

    Args:
        mean: ``(G,)`` of the counts.
        non_zero: ``(G,)`` share of the cells with a count.
        normalised: ``(G,)`` of the counts scaled to 10,000 a cell.
    """

    mean: NDArray[np.float64]
    non_zero: NDArray[np.float64]
    normalised: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RawSums:
    """Sums over the cells of each group.

    Args:
        sums: ``(n_groups, G, 3)`` float64: counts, cells with one, counts scaled to 10,000 a cell.
        sizes: ``(n_groups,)`` cells of each.
    """

    sums: NDArray[np.float64]
    sizes: NDArray[np.int64]

    def of(self, comparison: tuple[int, int | None]) -> tuple[RawMeans, RawMeans]:
        """Means of the two sides."""
        one, two = comparison
        rest = np.arange(len(self.sizes)) != one if two is None else np.arange(len(self.sizes)) == two
        return self._means(np.arange(len(self.sizes)) == one), self._means(rest)

    def _means(self, which: NDArray[np.bool_]) -> RawMeans:
        # Of integers up to 2^53 the sums are exact.
        total = self.sums[which].sum(0) / self.sizes[which].sum()
        return RawMeans(total[:, COUNT], total[:, DETECTED], total[:, NORMALISED])


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """q(z|x) of some cells.

    Args:
        cells: ``(n,)`` int64, their positions, in increasing order.
        loc: ``(n, n_latent)`` float32.
        scale: ``(n, n_latent)`` float32.
    """

    cells: NDArray[np.int64]
    loc: torch.Tensor
    scale: torch.Tensor

    def at(self, cells: NDArray[np.int64]) -> Posterior:
        """Of some of them, by position."""
        where = torch.from_numpy(np.searchsorted(self.cells, cells))
        return Posterior(self.loc[where], self.scale[where])


def stored(latents: StoredLatents, cells: NDArray[np.int64]) -> Encoded:
    """Some cells, by position in increasing order, of those that were encoded before."""
    q = latents.take(cells, torch.device("cpu")).qz
    return Encoded(cells, q.loc, q.scale)


@torch.no_grad()
def read_cells(
    atlas: Atlas,
    codes: Codes,
    module: torch.nn.Module,
    groups: Groups,
    cells: NDArray[np.int64],
    *,
    raw: bool,
    advance: Advance,
    client: distributed.Client | None = None,
) -> tuple[Encoded, RawSums | None]:
    """Encode some cells, and add up the raw counts of all that are in a group if ``raw``.

    Args:
        atlas: where the counts are.
        codes: of its cells.
        module: satisfies `types.Encodes`; in evaluation mode.
        groups: of the cells.
        cells: ``(n,)`` int64, positions to encode, in increasing order.
        raw: whether to read the cells of all groups, or those to encode only.
        advance: told the number of cells so far.
        client: of a Dask cluster whose workers read, encode and add up.
    """
    assert isinstance(module, Encodes)
    sums = np.zeros((len(groups.names), len(codes.gene_columns), 3))
    how = _read_here if client is None else partial(_read_on, client)
    positions = _positions(atlas, groups, cells, raw=raw)
    found: list[Posterior] = []
    for last, q in how(atlas, codes, module, groups, cells, positions, sums if raw else None):
        found.append(q)
        advance(last + 1, "")
    loc, scale = (torch.cat([getattr(q, name) for q in found]).cpu() for name in ("loc", "scale"))
    return Encoded(cells, loc, scale), RawSums(sums, groups.sizes) if raw else None


def _positions(atlas: Atlas, groups: Groups, cells: NDArray[np.int64], *, raw: bool) -> NDArray[Any]:
    """Of the cells to read: those to encode, or all that take part."""
    if raw:
        taking_part = groups.codes >= 0
        cells = np.arange(atlas.n_obs) if taking_part.all() else np.flatnonzero(taking_part)
    # They are held throughout: 4 bytes a cell rather than 8.
    return np.asarray(cells, np.int32 if atlas.n_obs < 1 << 31 else np.int64)


def _read_here(
    atlas: Atlas,
    codes: Codes,
    module: Any,
    groups: Groups,
    cells: NDArray[np.int64],
    positions: NDArray[Any],
    sums: NDArray[np.float64] | None,
) -> Iterator[tuple[int, Posterior]]:
    """The last position so far, and q(z|x) of those of ``cells`` that were read since."""
    device = next(module.parameters()).device
    for minibatch, at in _minibatches(atlas, codes, positions):
        if sums is not None:
            _add_raw(*minibatch.counts.numpy(), groups.codes[at], sums)
            at, local = _among(at, cells)
            if not len(at):
                continue
            minibatch = pack(minibatch.counts.take_rows(local), at, codes, atlas.numbers_of(at))
        yield int(at[-1]), module.encode(minibatch.to(device))


def _read_on(
    client: distributed.Client,
    atlas: Atlas,
    codes: Codes,
    module: torch.nn.Module,
    groups: Groups,
    cells: NDArray[np.int64],
    positions: NDArray[Any],
    sums: NDArray[np.float64] | None,
) -> Iterator[tuple[int, Posterior]]:
    """`_read_here` on a cluster: sums and latents come back, no counts."""
    n_workers = cluster.count_readers(client)
    cluster.check_places(atlas)
    sent, view = send_module(client, module), atlas[:, codes.gene_columns]

    def located(part: slice) -> list[Part]:
        found = []
        for start in range(part.start, part.stop, READ_ROWS):
            at = positions[start : min(start + READ_ROWS, part.stop)].astype(np.int64)
            inside, local = _among(at, cells)
            known = pack_uncounted(inside, codes, atlas.numbers_of(inside))
            found.append(Part(cluster.locate(view, at), local, known, groups.codes[at]))
        return found

    ranges = tasks(len(positions), n_workers)
    calls = ((sent, located(part), len(groups.names), sums is not None) for part in ranges)
    with closing(cluster.in_order(client, _read_task, calls, ahead=2 * n_workers)) as results:
        for part, (q, added) in zip(ranges, results, strict=True):
            if sums is not None and added is not None:
                sums += added
            if q is not None:
                yield int(positions[part.stop - 1]), q


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some cells, for a worker of a cluster.

    Args:
        block: where they are.
        chosen: ``(n,)`` int64, rows of those to encode.
        known: of these, all but their counts.
        groups: ``(B,)`` of all.
    """

    block: cluster.Block
    chosen: NDArray[np.int64]
    known: Minibatch
    groups: NDArray[Any]


@torch.no_grad()
def _read_task(
    module: Any, parts: Sequence[Part], n_groups: int, raw: bool
) -> tuple[Posterior | None, NDArray[np.float64] | None]:
    """The task: q(z|x) of the cells chosen, and ``(n_groups, G, 3)`` sums of the counts of all if ``raw``."""
    found: list[Posterior] = []
    sums = None
    for part in parts:
        counts = part.block.read()
        if raw:
            sums = np.zeros((n_groups, counts.n_vars, 3)) if sums is None else sums
            _add_raw(*counts.numpy(), part.groups, sums)
        if len(part.chosen):
            found.append(module.encode(replace(part.known, counts=counts.take_rows(part.chosen))))
    q = [torch.cat([getattr(one, name) for one in found]) for name in ("loc", "scale")] if found else None
    return None if q is None else Posterior(*q), sums


def _minibatches(
    atlas: Atlas, codes: Codes, positions: NDArray[Any]
) -> Iterator[tuple[Minibatch, NDArray[np.int64]]]:
    """Minibatches in the order of the cells, with their positions."""
    done = 0
    for minibatch in Epochs(atlas, codes, batch_size=_BATCH, shuffle=False, positions=positions)():
        yield minibatch, positions[done : done + len(minibatch)].astype(np.int64)
        done += len(minibatch)


def _among(at: NDArray[np.int64], cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of ``at`` that are among ``cells``, and where in ``at`` they are; both are increasing."""
    inside = cells[np.searchsorted(cells, at[0]) : np.searchsorted(cells, at[-1], side="right")]
    return inside, np.searchsorted(at, inside)


@numba.njit(nogil=True, cache=True)
def _add_raw(indptr, indices, data, groups, sums):  # type: ignore[no-untyped-def]
    for b in range(len(indptr) - 1):
        total = np.float64(0)
        for k in range(indptr[b], indptr[b + 1]):
            total += np.float64(data[k])
        if total == 0:
            continue
        of_group, scale = sums[groups[b]], _SCALE / total
        for k in range(indptr[b], indptr[b + 1]):
            value = np.float64(data[k])
            if value > 0:
                of_gene = of_group[indices[k]]
                of_gene[0] += value
                of_gene[1] += 1.0
                of_gene[2] += value * scale
