"""Zero-inflated negative binomial: 0 with probability ``pi``, else NB; mean ``(1 - pi) mu``.
Lopez et al. 2018, eqs. 3 to 7.
"""

from __future__ import annotations

import torch

from atlasvi.likelihoods import nb
from atlasvi.likelihoods.base import Likelihood, drop_out


def sample(
    mu: torch.Tensor, theta: torch.Tensor | None, pi_logits: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """A draw for each ``mu``, ``theta`` and ``pi_logits``."""
    assert pi_logits is not None
    return drop_out(nb.sample(mu, theta, None, generator), pi_logits, generator)


ZINB = Likelihood("zinb", has_theta=True, has_pi=True, sample=sample)
