"""Poisson: ``p(x) = mu^x exp(-mu) / x!``; mean and variance ``mu``."""

from __future__ import annotations

import torch

from atlasvi.likelihoods.base import Likelihood


def sample(
    mu: torch.Tensor, theta: torch.Tensor | None, pi_logits: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """A draw for each ``mu``."""
    return torch.poisson(mu, generator=generator)


POISSON = Likelihood("poisson", has_theta=False, has_pi=False, sample=sample)
