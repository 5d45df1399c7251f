"""Importance of posterior draws: how well each explains many of the cells (Boyeau et al. 2019).

Of a pool of draws z_i from the posteriors of the cells, with anchors a among these cells::

    w_i = sum over a of  p(z_i) p(x_a | z_i) / (p(x_a) sum over a' of q(z_i | x_a'))

as scvi-tools 1.4.2 has it. p(x_a) is that of `atlasvi.infer.marginal`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.decode import Request, in_batch
from atlasvi.infer.encoded import Source
from atlasvi.infer.marginal import marginal_log_likelihood
from atlasvi.types import GeneratesCounts, Posterior

_ROWS = 512
# Draws for p(x_a) are of another seed than those that they weigh.
_OTHER_SEED = 1 << 40


@torch.no_grad()
def importance_weights(
    module: torch.nn.Module,
    source: Source,
    n_samples: int,
    request: Request,
    *,
    max_cells: int,
    truncation: bool,
    n_mc_samples: int,
) -> NDArray[np.float64]:
    """``(n_samples * n_obs,)`` weights that sum to one, of the draws of each cell, sample after sample.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells, with counts.
        n_samples: draws of each cell.
        request: seed of the draws, and the batch they are decoded under.
        max_cells: anchors at most, chosen at random.
        truncation: bring the smallest weights up to the mean (Ionides 2008).
        n_mc_samples: draws for the likelihood of each anchor.

    Raises:
        OptionError: there are no counts, or the model has no count likelihood.
    """
    if source.is_stored or not isinstance(module, GeneratesCounts):
        raise OptionError(
            "importance weights are measured on counts; give the data and not their latents, or "
            "weights='uniform'"
        )
    device = next(module.parameters()).device
    generator = np.random.Generator(np.random.Philox(key=request.seed + _OTHER_SEED))
    n_obs = source.n_obs
    anchors = np.arange(n_obs)
    if n_obs > max_cells:
        anchors = np.sort(generator.choice(n_obs, max_cells, replace=False))
    blocks = [source.read(a, a + 1, device) for a in anchors.tolist()]
    log_px = torch.cat(
        [marginal_log_likelihood(module, block, n_mc_samples, request.seed + _OTHER_SEED) for block in blocks]
    )
    anchored = Posterior(
        torch.cat([block.qz.loc for block in blocks]), torch.cat([block.qz.scale for block in blocks])
    )
    prior = module.prior()
    code = request.batches[0] if request.batches else None
    log_w = torch.empty((n_samples, n_obs), dtype=torch.float64)
    for start in range(0, n_obs, _ROWS):
        stop = min(start + _ROWS, n_obs)
        block = source.read(start, stop, device)
        cells = in_batch(block.cells, code)
        for sample in range(n_samples):
            z = block.draw(request.seed, sample)
            log_q = anchored.log_prob(z.unsqueeze(1)).double().logsumexp(1)
            total = torch.full_like(log_q, -math.inf)
            for anchor, px in zip(blocks, log_px, strict=True):
                # The anchor's counts, under the draw, dispersion and batch of each cell.
                counts = anchor.cells.counts
                same = replace(cells, counts=counts.take_rows(np.zeros(len(z), np.int64)))
                library = counts.row_sums().clamp(min=1).expand(len(z)).contiguous()
                total = torch.logaddexp(total, module.log_likelihood(z, library, same).double() - px)
            log_w[sample, start:stop] = (total + prior.log_prob(z).double() - log_q).cpu()
    flat = log_w.reshape(-1)
    if truncation:
        flat = flat.clamp(min=float(flat.logsumexp(0)) - math.log(len(flat)))
    weights: NDArray[np.float64] = (flat - flat.logsumexp(0)).exp().numpy()
    weights /= weights.sum()
    return weights


__all__ = ["importance_weights", "marginal_log_likelihood"]
