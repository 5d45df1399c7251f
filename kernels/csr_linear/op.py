"""`csr_linear`: log1p of the non-zeros times a weight, without a dense copy of the counts."""

from __future__ import annotations

from typing import Any

import torch

from ..csr import CSR
from ..dispatch import choose_backend, differentiable
from . import cpu, reference

TRANSFORMS = ("log1p", "none")


def csr_linear(
    counts: CSR,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: str = "log1p",
    scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``transform(scale * counts) @ weight + bias``, differentiable in weight and bias.

    Normalisation to a library of 10,000 is ``scale = 1e4 / counts.row_sums()``. Under autocast all is
    computed, and returned, in float32.

    Args:
        counts: (B x G) `CSR`; no gradient.
        weight: ``(G, H)`` float: a row for each gene, so that a non-zero touches one line of memory.
        bias: ``(H,)`` float.
        transform: ``"log1p"`` (of the non-zeros; zeros stay zero) or ``"none"``.
        scale: ``(B,)`` float, a factor of each row's counts before the transform; no gradient.
        backend: ``"auto"``, ``"numba"`` (float32 on the CPU), ``"triton"`` (GPU) or ``"reference"``
            (makes the minibatch dense).

    Returns:
        ``(B, H)`` float.

    Raises:
        ValueError: an unknown option; shapes, types and devices that do not fit, by name; a gradient
            asked of the counts or of the scale.

    Example:
        >>> counts = CSR.from_torch(torch.tensor([[0.0, 2.0]]))
        >>> csr_linear(counts, torch.tensor([[5.0], [3.0]]), transform="none")
        tensor([[6.]])
    """
    _check(counts, weight, bias, transform, scale)
    values = _transformed(counts, weight.dtype, transform, scale)
    out: torch.Tensor = _product(counts.indptr, counts.indices, values, weight, backend)
    return out if bias is None else out + bias


def _transformed(counts: CSR, dtype: torch.dtype, transform: str, scale: torch.Tensor | None) -> torch.Tensor:
    # In float32 at least: bfloat16 has 8 bits, and counts more.
    values = counts.data.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        each = torch.repeat_interleave(scale, counts.indptr.diff(), output_size=counts.nnz)
        values = values * each.to(values.dtype)
    if transform == "none":
        return values
    return torch.log1p(values) if values is counts.data else values.log1p_()


def _check(
    counts: CSR,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: str,
    scale: torch.Tensor | None,
) -> None:
    if transform not in TRANSFORMS:
        raise ValueError(f"transform {transform!r} is not one of {TRANSFORMS}")
    if weight.dim() != 2 or weight.shape[0] != counts.n_vars:
        raise ValueError(f"weight must be ({counts.n_vars}, H), is {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must be ({weight.shape[1]},), is {tuple(bias.shape)}")
    if scale is not None and scale.shape != (counts.n_obs,):
        raise ValueError(f"scale must be ({counts.n_obs},), is {tuple(scale.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("scale", scale)):
        if tensor is None:
            continue
        if tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts are on {counts.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float type, is {tensor.dtype}")
    for name, tensor in (("counts.data", counts.data), ("scale", scale)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient and csr_linear has none for it; detach() it")


def _backend(name: str, *tensors: torch.Tensor) -> Any:
    """The module that has ``forward`` and ``backward``."""
    chosen = choose_backend("csr_linear", name, *tensors)
    if chosen == "triton":
        from . import gpu

        return gpu
    return cpu if chosen == "numba" else reference


# Not `torch.library.custom_op`: its first call imports torch's compiler, 1.3 s and 74 MB of memory.
torch.library.define(
    "atlasvi_kernels::csr_linear",
    "(Tensor indptr, Tensor indices, Tensor values, Tensor weight, str backend) -> Tensor",
)
torch.library.define(
    "atlasvi_kernels::csr_linear_backward",
    "(Tensor indptr, Tensor indices, Tensor values, Tensor upstream, SymInt n_vars, str backend) -> Tensor",
)
_product_op = torch.ops.atlasvi_kernels.csr_linear.default
_transposed_product_op = torch.ops.atlasvi_kernels.csr_linear_backward.default


def _run(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, backend: str
) -> torch.Tensor:
    out: torch.Tensor = _backend(backend, values, weight).forward(indptr, indices, values, weight)
    return out.to(weight.dtype)


def _run_transposed(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    upstream: torch.Tensor,
    n_vars: int,
    backend: str,
) -> torch.Tensor:
    module = _backend(backend, values, upstream)
    out: torch.Tensor = module.backward(indptr, indices, values, upstream, n_vars)
    return out.to(upstream.dtype)


torch.library.impl(_product_op.name(), "default", _run)
torch.library.impl(_transposed_product_op.name(), "default", _run_transposed)


@torch.library.register_fake(_product_op)
def _(indptr: Any, indices: Any, values: Any, weight: Any, backend: str) -> Any:
    return weight.new_empty(indptr.shape[0] - 1, weight.shape[1])


@torch.library.register_fake(_transposed_product_op)
def _(indptr: Any, indices: Any, values: Any, upstream: Any, n_vars: int, backend: str) -> Any:
    return upstream.new_empty(n_vars, upstream.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    indptr, indices, values, weight, ctx.backend = inputs
    ctx.save_for_backward(indptr, indices, values)
    ctx.n_vars = weight.shape[0]


def _gradient(ctx: Any, upstream: torch.Tensor) -> Any:
    g_weight = _transposed_product(*ctx.saved_tensors, upstream, ctx.n_vars, ctx.backend)
    return None, None, None, g_weight, None


def _keep_transposed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.backend = inputs[-1]


def _gradient_transposed(ctx: Any, upstream: torch.Tensor) -> Any:
    # Each is the other's gradient, as both are linear: second derivatives come for nothing.
    return None, None, None, _product(*ctx.saved_tensors, upstream, ctx.backend), None, None


for _device in ("cpu", "cuda"):
    torch.library.register_autocast(_product_op, _device, torch.float32)
_product = differentiable(_product_op, _run, _keep, _gradient)
_transposed_product = differentiable(
    _transposed_product_op, _run_transposed, _keep_transposed, _gradient_transposed
)
