"""What all count likelihoods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from atlasvi_kernels import CSR, count_log_likelihood, linear_count_log_likelihood
from torch import nn

Sampler = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Generator], torch.Tensor]


class Head(NamedTuple):
    """What a linear layer is made of.

    Args:
        weight: ``(G, H)``.
        bias: ``(G,)``.
    """

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A distribution of counts given a mean, an inverse dispersion and a dropout probability.

    Args:
        name: as in ``gene_likelihood=`` and in `atlasvi_kernels.count_log_likelihood`.
        has_theta: whether it has an inverse dispersion.
        has_pi: whether it is zero-inflated.
        sample: ``(mu, theta, pi_logits, generator) -> counts``, all of one shape.
    """

    name: str
    has_theta: bool
    has_pi: bool
    sample: Sampler

    def log_prob(
        self,
        counts: CSR,
        logits: torch.Tensor,
        library: torch.Tensor,
        theta: torch.Tensor | None,
        pi_logits: torch.Tensor | None,
        *,
        theta_index: torch.Tensor | None = None,
        mean: str = "softmax",
    ) -> torch.Tensor:
        """``(B,)`` log-likelihood in nats, by the fused kernel; shapes as there.

        For a loss that is the mean over cells of what is taken from it, and logits that nobody else looks at:
        where gradients are asked for, they are written over logits and pi_logits.
        """
        return count_log_likelihood(
            counts, logits, library, theta, pi_logits=pi_logits, theta_index=theta_index,
            likelihood=self.name, mean=mean, inplace=True, upstream=-1 / max(len(logits), 1),
        )  # fmt: skip

    def log_prob_of_heads(
        self,
        counts: CSR,
        h: torch.Tensor,
        library: torch.Tensor,
        scale: nn.Linear | Head,
        pi: nn.Linear | Head | None,
        theta: torch.Tensor | nn.Linear | None,
        *,
        theta_index: torch.Tensor | None = None,
        mean: str = "softmax",
        matmul_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """``(B,)`` `log_prob` of linear heads on ``h``, done with them in one so that B x G is never made.

        Args:
            counts: (B x G).
            h: ``(B, H)``, what the heads take.
            library: ``(B,)``.
            scale: head of the logits.
            pi: head of the dropout logits.
            theta: inverse dispersion as in `log_prob`, or the head of its logarithm.
            theta_index: as in `log_prob`.
            mean: as in `log_prob`.
            matmul_dtype: type that the factors of the heads' products are rounded to.
        """
        head = theta if isinstance(theta, nn.Linear) else None
        return linear_count_log_likelihood(
            counts, h, scale.weight, library, None if isinstance(theta, nn.Linear) else theta,
            bias=scale.bias,
            pi_weight=None if pi is None else pi.weight, pi_bias=None if pi is None else pi.bias,
            theta_weight=None if head is None else head.weight,
            theta_bias=None if head is None else head.bias,
            theta_index=theta_index, likelihood=self.name, mean=mean, matmul_dtype=matmul_dtype,
            upstream=-1 / max(len(h), 1),
        )  # fmt: skip

    def mean(self, mu: torch.Tensor, pi_logits: torch.Tensor | None) -> torch.Tensor:
        """Expected count, dropout included: ``mu``, or ``(1 - pi) mu``."""
        return mu if pi_logits is None else mu * torch.sigmoid(-pi_logits)


def drop_out(counts: torch.Tensor, pi_logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Set each count to zero with probability ``sigmoid(pi_logits)``."""
    return counts * torch.bernoulli(torch.sigmoid(-pi_logits), generator=generator)
