"""The definition, in plain torch: dense, of any floating type, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..csr import CSR


def log_likelihood(
    counts: CSR,
    logits: Tensor,
    library: Tensor,
    theta: Tensor | None,
    pi_logits: Tensor | None,
    *,
    likelihood: str,
    mean: str,
) -> Tensor:
    """``(B,)`` log p(x | logits, library, theta, pi); ``theta`` is (1, G) or (B, G) here."""
    x = counts.to_dense(logits.dtype)
    log_p, _ = entries(x, logits, library, theta, pi_logits, likelihood=likelihood, mean=mean)
    return log_p.sum(-1)


def entries(
    x: Tensor,
    logits: Tensor,
    library: Tensor,
    theta: Tensor | None,
    pi_logits: Tensor | None,
    *,
    likelihood: str,
    mean: str,
) -> tuple[Tensor, Tensor | None]:
    """``(B, G)`` log p of each entry of dense counts, and the probability that a zero is a dropout."""
    log_scale = F.log_softmax(logits, dim=-1) if mean == "softmax" else logits
    log_mu = library.log().unsqueeze(-1) + log_scale
    mu = log_mu.exp()
    if likelihood in ("poisson", "zip"):
        zero_case = -mu
        log_p = torch.where(x > 0, x * log_mu, 0) - mu - torch.lgamma(x + 1)
    else:
        assert theta is not None
        log1p_ratio = torch.log1p(mu / theta)
        zero_case = -theta * log1p_ratio
        log_p = (
            torch.lgamma(x + theta)
            - torch.lgamma(theta)
            - torch.lgamma(x + 1)
            + zero_case
            + torch.where(x > 0, x * (log_mu - theta.log() - log1p_ratio), 0)
        )
    if pi_logits is None:
        return log_p, None
    log_p = torch.where(x > 0, log_p, torch.logaddexp(pi_logits, zero_case)) - F.softplus(pi_logits)
    return log_p, torch.where(x > 0, 0, torch.sigmoid(pi_logits - zero_case))
