"""`norm_relu_dropout`: checks, choice of backend, registration with torch, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend, differentiable, registered
from . import cpu, reference


def norm_relu_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kept: Tensor | None = None,
    rate: float = 0.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu((x - m) / sqrt(v + eps) * weight + bias) * kept / (1 - rate)``, m and v the moments of the rows.

    What a hidden layer does in training after its product: batch norm (Ioffe and Szegedy 2015) by the moments
    of the minibatch, ReLU, and dropout of the units that were drawn before.

    Args:
        x: ``(B, H)`` float, B at least 2.
        weight: ``(H,)`` float, the norm's scale.
        bias: ``(H,)`` float, its shift.
        kept: ``(B, H)`` bool, units that do not drop out; all when ``None``.
        rate: in [0, 1), that they were drawn with.
        eps: added to the variance.
        backend: ``"auto"``, ``"numba"`` (float32 on the CPU), or ``"reference"``, torch's own operations.

    Returns:
        ``(B, H)``; and, without gradients, ``(H,)`` means and ``(H,)`` variances, the latter divided by B.

    Raises:
        ValueError: shapes and types that do not fit, by name; fewer than 2 rows.

    Example:
        >>> y, mean, variance = norm_relu_dropout(torch.tensor([[1.0], [3.0]]), torch.ones(1), torch.zeros(1))
        >>> mean, variance
        (tensor([2.]), tensor([1.]))
    """
    _check(x, weight, bias, kept, rate, backend)
    rate = 0.0 if kept is None else rate
    if backend == "auto" and x.device.type != "cpu":
        backend = "reference"
    if choose_backend("norm_relu_dropout", backend, x, weight, bias) == "reference":
        return reference.run(x, weight, bias, kept, rate, eps)
    y, mean, variance = _differentiable(x, weight, bias, kept, rate, eps)
    return y, mean, variance


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, rate: float, backend: str
) -> None:
    if backend == "triton":
        raise ValueError("norm_relu_dropout has no backend 'triton'; pass backend='reference' or 'auto'")
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must be (B, H) with B of at least 2 to have a variance, is {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[1:] or tensor.dtype != x.dtype:
            raise ValueError(
                f"{name} must be ({x.shape[1]},) {x.dtype}, is {tuple(tensor.shape)} {tensor.dtype}"
            )
    if kept is not None and (kept.shape != x.shape or kept.dtype != torch.bool):
        raise ValueError(f"kept must be {tuple(x.shape)} bool, is {tuple(kept.shape)} {kept.dtype}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), is {rate}")


@registered
def norm_relu_dropout_forward(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, rate: float, eps: float
) -> list[Tensor]:
    """``[y, mean, variance]``, compiled."""
    return cpu.forward(
        x.detach().contiguous(), weight.detach(), bias.detach(),
        None if kept is None else kept.contiguous(), rate, eps,
    )  # fmt: skip


@registered
def norm_relu_dropout_backward(
    upstream: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, rate: float,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """``[dx, dweight, dbias]``."""
    return cpu.backward(upstream, x.detach().contiguous(), y, weight.detach(), mean, variance, rate, eps)


@torch.library.register_fake("atlasvi_kernels::norm_relu_dropout_forward")
def _(x: Any, weight: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)]


@torch.library.register_fake("atlasvi_kernels::norm_relu_dropout_backward")
def _(upstream: Any, x: Any, y: Any, weight: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight, _, _, ctx.rate, ctx.eps = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, y, weight, mean, variance)


def _backward(ctx: Any, upstreams: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    g_x, g_weight, g_bias = torch.ops.atlasvi_kernels.norm_relu_dropout_backward(
        upstreams[0], *ctx.saved_tensors, ctx.rate, ctx.eps
    )
    return g_x, g_weight, g_bias, None, None, None


_differentiable = differentiable(
    torch.ops.atlasvi_kernels.norm_relu_dropout_forward.default,
    norm_relu_dropout_forward,
    _setup_context,
    _backward,
)
