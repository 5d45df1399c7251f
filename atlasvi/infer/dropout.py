"""Which zeros are technical: the probability of dropout given that a zero was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.decode import Request, lazy, rows_of_chunks
from atlasvi.infer.encoded import EncodedBlock, Source
from atlasvi.infer.sample import generates, parameters, rows_at_once

if TYPE_CHECKING:
    import dask.array as da


class TechnicalZeros:
    """Answers with ``p(h = 1 | x = 0) = pi / (pi + (1 - pi) p(y = 0))``, the mean over draws of z.

    Where the counts are there, it is 0 for those that are not zero.

    Args:
        module: satisfies `types.GeneratesCounts`, with dropout.
        request: genes, batch, number of samples, seed.
    """

    def __init__(self, module: Any, request: Request) -> None:
        self._module, self._request = module, request

    def __call__(self, block: EncodedBlock, out: NDArray[np.float32]) -> None:
        """Write ``(B, k)``."""
        request = self._request
        code = request.batches[0] if request.batches else None
        out[:] = 0
        for k in range(request.n_samples):
            found = parameters(self._module, block, request, request.first_sample + k, code)
            assert found.pi_logits is not None
            # -log p(y = 0), which is added to the logit of the prior.
            rarity = found.mu if found.theta is None else found.theta * torch.log1p(found.mu / found.theta)
            out += (found.pi_logits + rarity).sigmoid_().cpu().numpy() / np.float32(request.n_samples)
        if block.cells.counts.nnz:
            seen = block.cells.counts.to_scipy()
            genes = slice(None) if request.genes is None else request.genes.cpu().numpy()
            rows, columns = seen[:, genes].nonzero()
            out[rows, columns] = 0


def technical_zeros(
    module: torch.nn.Module,
    source: Source,
    n_vars: int,
    request: Request,
    memory_budget: int | str | None = None,
) -> da.Array:
    """A ``dask.array`` of the probability that a zero is technical, ``(n_obs, k)`` float32.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells.
        n_vars: genes of the model.
        request: what is asked.
        memory_budget: see `decode.chunk_bytes`.

    Raises:
        OptionError: the likelihood has no dropout, or several batches are asked for.
    """
    likelihood = generates(module).likelihood
    if not likelihood.has_pi:
        raise OptionError(
            f"gene_likelihood {likelihood.name!r} has no dropout: none of its zeros is technical; "
            "train with 'zinb' or 'zip'"
        )
    if len(request.batches) > 1:
        raise OptionError(
            "zeros under several batches have no one probability; give transform_batch one, or none"
        )
    module.eval()
    n_out = n_vars if request.genes is None else len(request.genes)
    return lazy(
        TechnicalZeros(module, request), source, next(module.parameters()).device, n_out,
        rows_per_chunk=rows_of_chunks(source, n_vars, n_out, memory_budget),
        rows_per_piece=rows_at_once(n_out),
    )  # fmt: skip
