"""`csr_linear`: log1p of the non-zeros times a weight, without a dense copy of the counts."""

from __future__ import annotations

from typing import Any

import torch

from ..csr import CSR
from ..dispatch import choose_backend
from . import cpu

TRANSFORMS = ("log1p", "none")


def csr_linear(
    counts: CSR,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: str = "log1p",
    backend: str = "auto",
) -> torch.Tensor:
    """``transform(counts) @ weight + bias``, differentiable in weight and bias.

    Args:
        counts: (B x G) `CSR`.
        weight: ``(G, H)`` float: a row for each gene, so that a non-zero touches one line of memory.
        bias: ``(H,)`` float.
        transform: ``"log1p"`` (of the non-zeros; zeros stay zero) or ``"none"``.
        backend: ``"auto"``, ``"numba"`` (float32 on CPU) or ``"reference"`` (makes the minibatch dense).

    Returns:
        ``(B, H)`` float.

    Raises:
        ValueError: an unknown option, or shapes and devices that do not fit, by name.

    Example:
        >>> counts = CSR.from_torch(torch.tensor([[0.0, 2.0]]))
        >>> csr_linear(counts, torch.tensor([[5.0], [3.0]]), transform="none")
        tensor([[6.]])
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform {transform!r} is not one of {TRANSFORMS}")
    if weight.dim() != 2 or weight.shape[0] != counts.n_vars:
        raise ValueError(f"weight must be ({counts.n_vars}, H), is {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must be ({weight.shape[1]},), is {tuple(bias.shape)}")
    if weight.device != counts.device:
        raise ValueError(f"weight is on {weight.device}, counts are on {counts.device}")
    values = counts.data.to(weight.dtype)
    if transform == "log1p":
        values = torch.log1p(values)
    if choose_backend("csr_linear", backend, weight) == "reference":
        out = CSR(counts.indptr, counts.indices, values, counts.n_vars).to_dense(weight.dtype) @ weight
    else:
        out = _Numba.apply(counts.indptr, counts.indices.to(torch.int32), values, weight)
    return out if bias is None else out + bias


class _Numba(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: torch.Tensor) -> torch.Tensor:
        indptr, indices, values, weight = args
        ctx.save_for_backward(indptr, indices, values)
        ctx.n_vars = len(weight)
        out = torch.empty(len(indptr) - 1, weight.shape[1])
        cpu.forward(
            indptr.numpy(), indices.numpy(), values.numpy(), weight.detach().contiguous().numpy(), out.numpy()
        )
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        indptr, indices, values = ctx.saved_tensors
        g_weight = torch.zeros(ctx.n_vars, upstream[0].shape[1])
        cpu.backward(
            indptr.numpy(),
            indices.numpy(),
            values.numpy(),
            upstream[0].contiguous().numpy(),
            g_weight.numpy(),
        )
        return None, None, None, g_weight
