"""rho of the rows of a design, a few rows of all pools at a time; nothing larger is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.de.sampling import OWN, Design, Segment
from atlasvi.stream import pack
from atlasvi.types import Decodes, Minibatch
from atlasvi_kernels import CSR, counter_normal
from atlasvi_kernels.products import fast_products

if TYPE_CHECKING:
    from atlasvi.de.cells import Encoded
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

# Noise stream of z, as in `infer.decode`: a draw of a cell is the same in both.
_Z = 0
# Logits of the rows decoded at once; they are gone through several times.
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some rows, decoded.

    Args:
        rho: ``(R, G)`` float32.
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
        atlas: of the cells, for their numbers.
        codes: of the cells, for their batches and covariates.
        design: which rows.
        z: ``(P, m, n_latent)`` float32, their draws.
    """

    module: Any
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
        n_pools, design = len(self.design.cells), self.design
        k = np.arange(len(design.ones)) if comparisons is None else comparisons
        n_rows = max(1, _PIECE_BYTES // (4 * self.n_vars * n_pools))
        for segment in design.segments:
            for start in range(segment.start, segment.stop, n_rows):
                stop = min(start + n_rows, segment.stop)
                needed = np.ones((n_pools, stop - start), bool)
                if comparisons is not None:
                    needed[:] = False
                    needed[design.ones[k]] = True
                    needed[design.twos[k, start:stop], np.arange(stop - start)] = True
                row_of = needed.cumsum().reshape(needed.shape) - 1
                pool, row = np.nonzero(needed)
                yield Piece(
                    self._rho(pool, start + row, genes),
                    row_of[design.ones[k]],
                    row_of[design.twos[k, start:stop], np.arange(stop - start)],
                    pool, start, segment, stop == segment.stop,
                )  # fmt: skip

    @torch.no_grad()
    def _rho(self, pool: NDArray[np.int64], row: NDArray[np.int64], genes: slice) -> NDArray[np.float32]:
        """``(R, G)`` of some rows."""
        device = next(self.module.parameters()).device
        minibatch = self._minibatch(self.design.cells[pool, row], self.design.batches[pool, row])
        with fast_products():
            log_rho = self.module.decode_log_rho(self.z[pool, row].to(device), minibatch.to(device))
        found: NDArray[np.float32] = log_rho[:, genes].exp().cpu().numpy()
        return found

    def _minibatch(self, cells: NDArray[np.int64], batches: NDArray[np.int64]) -> Minibatch:
        """Cells without counts, which decoding does not ask for, under the batches they are decoded as."""
        nothing = np.zeros(0, np.int32)
        counts = CSR.from_numpy(np.zeros(len(cells) + 1, np.int64), nothing, nothing, self.n_vars)
        minibatch = pack(counts, cells, self.codes, self.atlas.numbers_of(cells))
        batch = torch.from_numpy(batches)
        return replace(minibatch, batch_index=torch.where(batch == OWN, minibatch.batch_index, batch))


def decoding(
    module: torch.nn.Module, atlas: Atlas, codes: Codes, design: Design, encoded: Encoded, seed: int
) -> Decoding:
    """Draw z of every row: a draw depends on (seed, cell, draw) alone."""
    assert isinstance(module, Decodes)
    pools = []
    for cells, draws in zip(design.cells, design.draws, strict=True):
        q = encoded.at(cells)
        numbers = torch.from_numpy(atlas.numbers_of(cells).astype(np.int64))
        noise = counter_normal(seed, torch.from_numpy(draws), _Z, numbers, q.loc.shape[1])
        pools.append(q.rsample(noise))
    return Decoding(module, atlas, codes, design, torch.stack(pools))
