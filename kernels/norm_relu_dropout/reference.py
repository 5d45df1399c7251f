"""The definition, by torch's own operations; any float type and device, differentiable by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def run(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, rate: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, variance)`` of the op."""
    mean = x.mean(0)
    variance = (x - mean).square().mean(0)
    y = ((x - mean) * torch.rsqrt(variance + eps) * weight + bias).relu()
    y = y if kept is None else y * kept / (1 - rate)
    return y, mean.detach(), variance.detach()
