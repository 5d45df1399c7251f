"""The marginal log p(x) of cells, by importance sampling from their posteriors (Burda et al. 2016).

Of S draws of each cell::

    p(x) = 1 / S  sum over draws z_s ~ q(z | x) of  p(x | z_s) p(z_s) / q(z_s | x)

and likewise over l, where it is latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from atlasvi.infer.encoded import EncodedBlock, encode_block
from atlasvi.types import GeneratesCounts, HasPrior, Minibatch, Posterior

# Draws of a seed of their own: those of the ELBO are draw 0 of theirs.
_SEED = 1 << 41


def has_marginal(module: object) -> bool:
    """Whether p(z) has a density by which draws of z can be weighed."""
    return isinstance(module, HasPrior) and module.prior_has_density


@torch.no_grad()
def marginal_log_likelihood(module: Any, block: EncodedBlock, n_samples: int, seed: int) -> torch.Tensor:
    """``(B,)`` float64 log p(x) in nats, by importance sampling from q(z|x) (and q(l|x) where it is latent).

    Args:
        module: satisfies `types.GeneratesCounts`.
        block: cells with their counts.
        n_samples: draws.
        seed: of the draws.
    """
    prior = module.prior()
    total = block.library.new_full((len(block.library),), -math.inf, dtype=torch.float64)
    for sample in range(n_samples):
        z = block.draw(seed, sample)
        library = block.draw_library(seed, sample)
        log_w = module.log_likelihood(z, library, block.cells) + prior.log_prob(z) - block.qz.log_prob(z)
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
    return prior.log_prob(log_l) - q.log_prob(log_l)


@torch.no_grad()
def marginal_blocks(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    *,
    n_samples: int,
    seed: int,
) -> Iterator[torch.Tensor]:
    """``(B,)`` float64 of each minibatch: log p(x) in nats."""
    assert isinstance(module, GeneratesCounts)
    module.eval()
    for minibatch in minibatches:
        block = encode_block(module, minibatch.to(device), np.arange(len(minibatch)))
        yield marginal_log_likelihood(module, block, n_samples, seed + _SEED).cpu()
