"""Importance of posterior draws: how well each explains many of the cells (Boyeau et al. 2019).

Of a pool of draws z_i from the posteriors of the cells, with anchors a among these cells::

    w_i = sum over a of  p(z_i) p(x_a | z_i) / (p(x_a) sum over a' of q(z_i | x_a'))

as scvi-tools 1.4.2 has it. p(x_a) is estimated by importance sampling from q(z | x_a)::

    p(x_a) = 1 / S  sum over draws z_s ~ q(z | x_a) of  p(x_a | z_s) p(z_s) / q(z_s | x_a)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.decode import Request, in_batch
from atlasvi.infer.encoded import EncodedBlock, Source
from atlasvi.types import GeneratesCounts, Posterior

_ROWS = 512
# Draws for p(x_a) are of another seed than those that they weigh.
_OTHER_SEED = 1 << 40


def log_normal(z: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """Log density of a diagonal normal at ``z``, summed over the last axis."""
    deviation = (z - posterior.loc) / posterior.scale
    constant = 0.5 * math.log(2 * math.pi) * z.shape[-1]
    return -0.5 * deviation.square().sum(-1) - posterior.scale.log().sum(-1) - constant


def _log_prior(z: torch.Tensor) -> torch.Tensor:
    return log_normal(z, Posterior(torch.zeros_like(z), torch.ones_like(z)))


@torch.no_grad()
def marginal_log_likelihood(module: Any, block: EncodedBlock, n_samples: int, seed: int) -> torch.Tensor:
    """``(B,)`` float64 log p(x) in nats, by importance sampling from q(z|x) (and q(l|x) where it is latent).

    Args:
        module: satisfies `types.GeneratesCounts`.
        block: cells with their counts.
        n_samples: draws.
        seed: of the draws.
    """
    total = block.library.new_full((len(block.library),), -math.inf, dtype=torch.float64)
    for sample in range(n_samples):
        z = block.draw(seed, sample)
        library = block.draw_library(seed, sample)
        log_w = module.log_likelihood(z, library, block.cells) + _log_prior(z) - log_normal(z, block.qz)
        if block.library_scale is not None:
            log_w += _log_library_ratio(module, block, library)
        total = torch.logaddexp(total, log_w.double())
    return total - math.log(n_samples)


def _log_library_ratio(module: Any, block: EncodedBlock, library: torch.Tensor) -> torch.Tensor:
    """Log p(l) - log q(l|x), both log-normal: what they have in common cancels."""
    assert block.library_scale is not None
    batch = block.cells.batch_index
    prior = Posterior(
        module.library_log_mean[batch].unsqueeze(1), module.library_log_var[batch].sqrt().unsqueeze(1)
    )
    q = Posterior(block.library.log().unsqueeze(1), block.library_scale.unsqueeze(1))
    log_l = library.log().unsqueeze(1)
    return log_normal(log_l, prior) - log_normal(log_l, q)


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
    loc = torch.cat([block.qz.loc for block in blocks])
    scale = torch.cat([block.qz.scale for block in blocks])
    code = request.batches[0] if request.batches else None
    log_w = torch.empty((n_samples, n_obs), dtype=torch.float64)
    for start in range(0, n_obs, _ROWS):
        stop = min(start + _ROWS, n_obs)
        block = source.read(start, stop, device)
        cells = in_batch(block.cells, code)
        for sample in range(n_samples):
            z = block.draw(request.seed, sample)
            log_q = log_normal(z.unsqueeze(1), Posterior(loc, scale)).double().logsumexp(1)
            total = torch.full_like(log_q, -math.inf)
            for anchor, px in zip(blocks, log_px, strict=True):
                # The anchor's counts, under the draw, dispersion and batch of each cell.
                counts = anchor.cells.counts
                same = replace(cells, counts=counts.take_rows(np.zeros(len(z), np.int64)))
                library = counts.row_sums().clamp(min=1).expand(len(z)).contiguous()
                total = torch.logaddexp(total, module.log_likelihood(z, library, same).double() - px)
            log_w[sample, start:stop] = (total + _log_prior(z).double() - log_q).cpu()
    flat = log_w.reshape(-1)
    if truncation:
        flat = flat.clamp(min=float(flat.logsumexp(0)) - math.log(len(flat)))
    weights: NDArray[np.float64] = (flat - flat.logsumexp(0)).exp().numpy()
    weights /= weights.sum()
    return weights


__all__ = ["importance_weights", "log_normal", "marginal_log_likelihood"]
