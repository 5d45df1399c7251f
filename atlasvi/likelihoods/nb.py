"""Negative binomial: mean ``mu``, variance ``mu + mu^2 / theta``; a Poisson whose rate is
Gamma(shape theta, rate theta / mu), as in Lopez et al. 2018, eqs. 3 and 4.
"""

from __future__ import annotations

import torch

from atlasvi.likelihoods.base import Likelihood


def sample(
    mu: torch.Tensor, theta: torch.Tensor | None, pi_logits: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """A draw for each ``mu`` and ``theta``."""
    assert theta is not None
    rate = torch._standard_gamma(theta.expand_as(mu).contiguous(), generator=generator) * mu / theta
    return torch.poisson(rate, generator=generator)


NB = Likelihood("nb", has_theta=True, has_pi=False, sample=sample)
