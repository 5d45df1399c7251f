"""rho on demand: a lazy cells x genes array of which only the chunks asked for are ever made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.types import Decodes, Encodes, Minibatch, Noise

if TYPE_CHECKING:
    import dask.array as da

# Noise stream of the latent draw; models use the same for theirs, at training steps of another seed.
_Z = 0
# A chunk is made piece by piece, for a piece needs its logits for all genes several times over.
CHUNK_BYTES = 16 << 20
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Request:
    """What is asked of each cell.

    Args:
        genes: ``(k,)`` int64, the model's genes wanted, or ``None`` for all.
        batches: codes of the batches to decode under, averaged; empty for each cell's own.
        library_size: rho is multiplied by it; ``None`` for each cell's own library size.
        n_samples: draws of z averaged over.
        seed: of those draws.
    """

    genes: torch.Tensor | None
    batches: tuple[int, ...]
    library_size: float | None
    n_samples: int
    seed: int


@torch.no_grad()
def decode(module: torch.nn.Module, minibatch: Minibatch, request: Request) -> NDArray[np.float32]:
    """``(B, k)`` rho of some cells, averaged over draws of z and over batches.

    A draw depends on (seed, sample, cell) alone: however the cells are cut, they get the same.
    """
    assert isinstance(module, Encodes)
    qz = module.encode(minibatch)
    decoder: Any = module
    assert isinstance(decoder, Decodes)
    variants = [minibatch]
    if request.batches:
        variants = [
            replace(minibatch, batch_index=torch.full_like(minibatch.batch_index, code))
            for code in request.batches
        ]
    total: torch.Tensor | None = None
    for sample in range(request.n_samples):
        z = qz.rsample(Noise(request.seed, sample, minibatch.rows).normal(qz.loc.shape[1], _Z))
        for variant in variants:
            rho = decoder.decode_log_rho(z, variant, request.genes).exp_()
            total = rho if total is None else total.add_(rho)
    assert total is not None
    total /= request.n_samples * len(variants)
    if request.library_size is None:
        total *= decoder.library(minibatch)[0].unsqueeze(1)
    elif request.library_size != 1:
        total *= request.library_size
    return total.cpu().numpy()


def chunk_rows(n_obs: int, n_vars: int) -> int:
    """Cells a chunk, so that a dense block of them is about `CHUNK_BYTES`."""
    return int(np.clip(CHUNK_BYTES // (4 * max(n_vars, 1)), 64, max(64, n_obs)))


def piece_rows(n_vars: int) -> int:
    """Cells that are decoded at once, so that their logits are about `PIECE_BYTES`."""
    return max(64, PIECE_BYTES // (4 * max(n_vars, 1)))


def lazy_expression(
    module: torch.nn.Module,
    read: Callable[[int, int], Minibatch],
    n_obs: int,
    n_genes: int,
    request: Request,
    *,
    rows_per_chunk: int,
    rows_per_piece: int,
) -> da.Array:
    """A ``dask.array`` of rho, ``(n_obs, n_genes)`` float32; each chunk reads, encodes and decodes its cells.

    Args:
        module: satisfies `types.Encodes` and `types.Decodes`; on its device, in evaluation mode.
        read: ``(start, stop) -> Minibatch`` of those cells, from any thread.
        n_obs: cells.
        n_genes: genes asked for.
        request: what is asked.
        rows_per_chunk: cells a chunk.
        rows_per_piece: cells that are decoded at once.
    """
    import dask.array as da

    module.eval()
    device = next(module.parameters()).device

    def block(block_info: Any) -> NDArray[np.float32]:
        (start, stop), _ = block_info[None]["array-location"]
        rho = np.empty((stop - start, n_genes), np.float32)
        for a in range(start, stop, rows_per_piece):
            b = min(a + rows_per_piece, stop)
            rho[a - start : b - start] = decode(module, read(a, b).to(device), request)
        return rho

    sizes: Sequence[int] = [
        min(rows_per_chunk, n_obs - start) for start in range(0, n_obs, rows_per_chunk)
    ] or [0]
    rho: da.Array = da.map_blocks(
        block,
        chunks=(tuple(sizes), (n_genes,)),
        dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
        name=f"expression-{np.random.default_rng().integers(1 << 62):x}",
    )
    return rho
