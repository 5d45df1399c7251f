"""rho of the rows of a design, a few rows of all pools at a time; nothing larger is ever held."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from atlasvi_kernels import SoftmaxLinear, counter_normal
from atlasvi_kernels.products import fast_products
from numpy.typing import NDArray

from atlasvi.de.sampling import OWN, Design, Segment
from atlasvi.infer.decode import softmax_linear
from atlasvi.stream import pack_uncounted
from atlasvi.types import Decodes, Minibatch

if TYPE_CHECKING:
    from atlasvi.de.cells import Encoded
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

# Noise stream of z, as in `infer.decode`: a draw of a cell is the same in both.
_Z = 0
# rho of the rows compared at once, which stay in the caches from the product to the comparison.
_PIECE_BYTES = 5 << 20
# Rows whose hidden units, a few bytes each, are made at once.
_HIDDEN_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some rows, decoded.

    Args:
        rho: ``(R, G)`` float32, until the next piece is asked for.
        one: ``(K, q)`` int64, row of ``rho`` of the first side of each pair.
        two: ``(K, q)`` int64, of the second.
        pools: ``(R,)`` int64, pool of each row.
        start: number of the first pair in the design.
        segment: that the pairs are of.
        last: whether the segment is at its end.
    """

    rho: NDArray[np.float32]
    one: NDArray[np.int64]
    two: NDArray[np.int64]
    pools: NDArray[np.int64]
    start: int
    segment: Segment
    last: bool


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """Decodes the rows of a design.

    Args:
        module: satisfies `types.Decodes`; in evaluation mode.
        head: its last layer, where rho is the softmax of one.
        atlas: of the cells, for their numbers.
        codes: of the cells, for their batches and covariates.
        design: which rows.
        z: ``(P, m, n_latent)`` float32, their draws.
    """

    module: Any
    head: SoftmaxLinear | None
    atlas: Atlas
    codes: Codes
    design: Design
    z: torch.Tensor

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.codes.gene_columns)

    def pieces(
        self, comparisons: NDArray[np.int64] | None = None, genes: slice = slice(None)
    ) -> Iterator[Piece]:
        """All rows, or those that some comparisons need; of all genes, or some.

        Args:
            comparisons: numbers of them, to which ``one`` and ``two`` of the pieces then belong.
            genes: to give out; rho is normalised over all of them.
        """
        design, (n_pools, m) = self.design, self.design.cells.shape
        k = np.arange(len(design.ones)) if comparisons is None else comparisons
        needed = np.ones((m, n_pools), bool)
        if comparisons is not None:
            needed[:] = False
            needed[:, design.ones[k]] = True
            needed[np.arange(m), design.twos[k]] = True
        row, pool = np.nonzero(needed)
        row_of = needed.cumsum().reshape(needed.shape) - 1
        ends = np.searchsorted(row, np.arange(m + 1))
        n_rows = max(1, _PIECE_BYTES // (4 * self.n_vars * int(needed.sum(1).max())))
        stops = [segment.stop for segment in design.segments]
        edges = np.union1d(np.arange(0, m, n_rows), stops)
        decoded = self._rho(row, pool, ends[edges])
        for (start, stop), rho in zip(pairwise(edges.tolist()), decoded, strict=True):
            pairs, segment = np.arange(start, stop), design.segments[bisect_right(stops, start)]
            yield Piece(
                np.ascontiguousarray(rho[:, genes]),
                row_of[pairs[None], design.ones[k, None]] - ends[start],
                row_of[pairs, design.twos[k, start:stop]] - ends[start],
                pool[ends[start] : ends[stop]], start, segment, stop == segment.stop,
            )  # fmt: skip

    @torch.no_grad()
    def _rho(
        self, row: NDArray[np.int64], pool: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> Iterator[NDArray[np.float32]]:
        """``(R, G)`` of the rows from each end to the next."""
        if self.head is None:
            for a, b in pairwise(ends):
                with fast_products():
                    log_rho = self.module.decode_log_rho(*self._latent(row[a:b], pool[a:b]))
                yield log_rho.exp_().cpu().numpy()
            return
        out = np.empty((np.diff(ends).max(), self.n_vars), np.float32)
        done = 0
        for a, b in pairwise(ends):
            if b > done:
                first, done = a, max(b, ends[np.searchsorted(ends, a + _HIDDEN_ROWS, side="right") - 1])
                h = self.module.hidden(*self._latent(row[first:done], pool[first:done]))
            self.head.into(out[: b - a], h[a - first : b - first])
            yield out[: b - a]

    def _latent(self, row: NDArray[np.int64], pool: NDArray[np.int64]) -> tuple[torch.Tensor, Minibatch]:
        """Draws of z of some rows, and their cells in the batches that they are decoded under."""
        device = next(self.module.parameters()).device
        cells, batch = self.design.cells[pool, row], torch.from_numpy(self.design.batches[pool, row])
        minibatch = pack_uncounted(cells, self.codes, self.atlas.numbers_of(cells))
        minibatch = replace(minibatch, batch_index=torch.where(batch == OWN, minibatch.batch_index, batch))
        return self.z[pool, row].to(device), minibatch.to(device)


def decoding(
    module: torch.nn.Module,
    atlas: Atlas,
    codes: Codes,
    design: Design,
    encoded: Encoded,
    *,
    precision: str,
    seed: int,
) -> Decoding:
    """Draw z of every row: a draw depends on (seed, cell, draw) alone."""
    assert isinstance(module, Decodes)
    pools = []
    for cells, draws in zip(design.cells, design.draws, strict=True):
        q = encoded.at(cells)
        numbers = torch.from_numpy(atlas.numbers_of(cells).astype(np.int64))
        noise = counter_normal(seed, torch.from_numpy(draws), _Z, numbers, q.loc.shape[1])
        pools.append(q.rsample(noise))
    return Decoding(module, softmax_linear(module, precision), atlas, codes, design, torch.stack(pools))
