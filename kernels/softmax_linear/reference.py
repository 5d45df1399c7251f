"""The definition, in float64."""

from __future__ import annotations

import torch


def softmax_linear(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, G)`` softmax of ``h weight' + bias`` over genes, and ``(B,)`` the log of its denominator."""
    logits = h.double() @ weight.double().T + bias.double()
    return logits.softmax(-1), logits.logsumexp(-1)
