"""log p(x) of cells, by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from atlasvi.types import Minibatch, Noise, Weighs

# Draws of a seed of their own: those of the ELBO are draw 0 of theirs.
_SEED = 1 << 41


@torch.no_grad()
def marginal_blocks(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    *,
    n_samples: int,
    seed: int,
) -> Iterator[torch.Tensor]:
    """``(B,)`` float64 of each minibatch: the log of the mean of p(x, z) / q(z | x) over draws of z."""
    assert isinstance(module, Weighs)
    module.eval()
    for minibatch in minibatches:
        minibatch = minibatch.to(device)
        total = torch.full((len(minibatch),), -math.inf, dtype=torch.float64, device=device)
        for sample in range(n_samples):
            weight = module.log_weight(minibatch, Noise(seed + _SEED, sample, minibatch.rows))
            total = torch.logaddexp(total, weight.double())
        yield (total - math.log(n_samples)).cpu()
