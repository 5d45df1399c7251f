"""Zero-inflated Poisson: 0 with probability ``pi``, else Poisson; mean ``(1 - pi) mu``."""

from __future__ import annotations

import torch

from atlasvi.likelihoods import poisson
from atlasvi.likelihoods.base import Likelihood, drop_out


def sample(
    mu: torch.Tensor, theta: torch.Tensor | None, pi_logits: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """A draw for each ``mu`` and ``pi_logits``."""
    assert pi_logits is not None
    return drop_out(poisson.sample(mu, None, None, generator), pi_logits, generator)


ZIP = Likelihood("zip", has_theta=False, has_pi=True, sample=sample)
