"""`linear_count_log_likelihood`: checks, choice of backend, registration with torch, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..count_ll.op import check_options, count_log_likelihood, is_uniform
from ..csr import CSR
from ..dispatch import choose_backend, differentiable, registered
from ..products import fast_products
from . import blocks
from .blocks import Heads

_HALF = (torch.bfloat16, torch.float16)


def linear_count_log_likelihood(
    counts: CSR,
    hidden: Tensor,
    weight: Tensor,
    library: Tensor,
    theta: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    pi_weight: Tensor | None = None,
    pi_bias: Tensor | None = None,
    theta_weight: Tensor | None = None,
    theta_bias: Tensor | None = None,
    theta_index: Tensor | None = None,
    likelihood: str = "zinb",
    mean: str = "softmax",
    backend: str = "auto",
    matmul_dtype: torch.dtype | None = None,
    upstream: float = 1.0,
) -> Tensor:
    """`count_log_likelihood` of linear heads on ``hidden``, without ever holding cells x genes.

    ``logits = hidden @ weight.T + bias``, ``pi_logits = hidden @ pi_weight.T + pi_bias`` and, where theta is
    a head too, ``theta = exp(hidden @ theta_weight.T + theta_bias)``. Heads, likelihood and gradients are
    done for a few cells at a time, in the forward pass; only the gradients of what is given are kept. It is
    there for memory: the sums are those of layers and `count_log_likelihood`, in another order.

    Args:
        counts: (B x G) `CSR`.
        hidden: ``(B, H)`` float.
        weight: ``(G, H)`` float, of the head of the mean.
        library: ``(B,)`` float, > 0.
        theta: ``(G,)``, ``(B, G)``, or ``(T, G)`` with ``theta_index``; float, > 0.
        bias: ``(G,)`` float.
        pi_weight: ``(G, H)`` float, of the dropout head.
        pi_bias: ``(G,)`` float.
        theta_weight: ``(G, H)`` float, of the head of log theta; then ``theta`` is left out.
        theta_bias: ``(G,)`` float.
        theta_index: ``(B,)`` int64 in ``[0, T)``.
        likelihood: ``"poisson"``, ``"zip"``, ``"nb"`` or ``"zinb"``.
        mean: ``"softmax"`` or ``"exp"``.
        backend: ``"auto"``, ``"numba"``, ``"triton"``, or ``"reference"``, which is layers and the reference.
        matmul_dtype: type that the factors of matrix products are rounded to; sums are of float32. By default
            that of ``hidden``, or under `torch.autocast` its type. ``torch.bfloat16`` uses the matrix units
            of CPUs (AMX, AVX512-BF16) and GPUs, at about three digits.
        upstream: the gradient that backward is expected to come with, as of `count_log_likelihood`.

    Returns:
        ``(B,)`` float32, nats.

    Raises:
        ValueError: an unknown option, or shapes, types and devices that do not fit, by name.

    Example:
        >>> counts = CSR.from_torch(torch.tensor([[0.0, 2.0]]))
        >>> ll = linear_count_log_likelihood(counts, torch.ones(1, 3), torch.zeros(2, 3), torch.tensor([2.0]),
        ...                                  likelihood="poisson")
        >>> round(ll.item(), 4)
        -2.6931
    """
    if matmul_dtype is None and torch.is_autocast_enabled(hidden.device.type):
        matmul_dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden = hidden.float() if hidden.dtype in _HALF else hidden
    heads = Heads(weight, bias, pi_weight, pi_bias, theta, theta_weight, theta_bias)
    _check(counts, hidden, library, heads, theta_index, likelihood, mean)
    tensors = [t for t in (hidden, library, *heads.tensors()) if t is not None]
    chosen = choose_backend("linear_count_log_likelihood", backend, *tensors)
    if chosen == "reference":
        return _reference(counts, hidden, library, heads, theta_index, likelihood, mean)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    made: list[Tensor] = _differentiable(
        counts.indptr, counts.indices, counts.data, hidden, library, *heads.tensors(), theta_index,
        likelihood, mean, chosen, matmul_dtype or hidden.dtype, float(upstream), with_gradient,
    )  # fmt: skip
    return made[0]


def _reference(
    counts: CSR, hidden: Tensor, library: Tensor, heads: Heads, theta_index: Tensor | None, likelihood: str,
    mean: str,
) -> Tensor:  # fmt: skip
    assert heads.weight is not None
    theta, pi_logits = heads.theta, None
    if heads.theta_weight is not None:
        theta = F.linear(hidden, heads.theta_weight, heads.theta_bias).exp()
    if heads.pi_weight is not None:
        pi_logits = F.linear(hidden, heads.pi_weight, heads.pi_bias)
    return count_log_likelihood(
        counts, F.linear(hidden, heads.weight, heads.bias), library, theta, pi_logits=pi_logits,
        theta_index=theta_index, likelihood=likelihood, mean=mean, backend="reference",
    )  # fmt: skip


@registered
def linear_count_ll(
    indptr: Tensor, indices: Tensor, data: Tensor, hidden: Tensor, library: Tensor, weight: Tensor,
    bias: Tensor | None, pi_weight: Tensor | None, pi_bias: Tensor | None, theta: Tensor | None,
    theta_weight: Tensor | None, theta_bias: Tensor | None, theta_index: Tensor | None, likelihood: str,
    mean: str, backend: str, matmul_dtype: torch.dtype, upstream: float, with_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """``[log_p, d hidden, d library, d of each head]``, the gradients empty where there are none."""
    heads = Heads(weight, bias, pi_weight, pi_bias, theta, theta_weight, theta_bias)
    with fast_products():
        log_p, g_hidden, g_library, g_heads = blocks.run(
            backend, CSR(indptr, indices, data, len(weight)), hidden, library, heads, theta_index, likelihood,
            mean, dtype=matmul_dtype, weights=None, scale=upstream, with_gradient=with_gradient,
        )  # fmt: skip
    return [log_p, *_flat(log_p, g_hidden, g_library, g_heads)]


@registered
def linear_count_ll_backward(
    weights: Tensor, gradients: Sequence[Tensor], indptr: Tensor, indices: Tensor, data: Tensor,
    hidden: Tensor, library: Tensor, weight: Tensor, bias: Tensor | None, pi_weight: Tensor | None,
    pi_bias: Tensor | None, theta: Tensor | None, theta_weight: Tensor | None, theta_bias: Tensor | None,
    theta_index: Tensor | None, likelihood: str, mean: str, backend: str, matmul_dtype: torch.dtype,
    upstream: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients for what backward comes with, ``weights``, from those made for ``upstream``."""
    if is_uniform(weights) and upstream != 0:
        factor = weights[0].item() / upstream if len(weights) else 1.0
        return [g * factor for g in gradients]
    heads = Heads(weight, bias, pi_weight, pi_bias, theta, theta_weight, theta_bias)
    with fast_products():
        _, g_hidden, g_library, g_heads = blocks.run(
            backend, CSR(indptr, indices, data, len(weight)), hidden, library, heads, theta_index, likelihood,
            mean, dtype=matmul_dtype, weights=weights.contiguous(), scale=1.0, with_gradient=True,
        )  # fmt: skip
    return _flat(weights, g_hidden, g_library, g_heads)


def _flat(
    like: Tensor, g_hidden: Tensor | None, g_library: Tensor | None, g_heads: Heads | None
) -> list[Tensor]:
    found = [g_hidden, g_library, *([None] * 7 if g_heads is None else g_heads.tensors())]
    return [like.new_empty(0) if g is None else g for g in found]


@torch.library.register_fake("atlasvi_kernels::linear_count_ll")
def _(indptr: Any, indices: Any, data: Any, hidden: Any, library: Any, *rest: Any) -> list[Tensor]:
    heads, with_gradient = rest[:7], rest[-1]
    made = [hidden, library, *heads] if with_gradient else [None] * 9
    return [
        torch.empty_like(library),
        *(library.new_empty(0) if t is None else torch.empty_like(t) for t in made),
    ]


@torch.library.register_fake("atlasvi_kernels::linear_count_ll_backward")
def _(weights: Any, gradients: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13], *output[1:])
    ctx.options = inputs[13:18]


def _backward(ctx: Any, upstreams: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    (weights, *_) = upstreams
    if weights is None:
        return (None,) * 19
    inputs, gradients = ctx.saved_tensors[:13], list(ctx.saved_tensors[13:])
    # Where torch traces, a value cannot be looked at: there the op does, when it runs.
    if type(weights) is not Tensor or not bool((weights == ctx.options[4]).all()):
        gradients = torch.ops.atlasvi_kernels.linear_count_ll_backward(
            weights, gradients, *inputs, *ctx.options
        )
    of_inputs = [None if t is None else g for t, g in zip(inputs[3:12], gradients, strict=True)]
    return None, None, None, *of_inputs, *(None,) * 7


_differentiable = differentiable(
    torch.ops.atlasvi_kernels.linear_count_ll.default, linear_count_ll, _setup_context, _backward
)


def _check(
    counts: CSR, hidden: Tensor, library: Tensor, heads: Heads, theta_index: Tensor | None, likelihood: str,
    mean: str,
) -> None:  # fmt: skip
    if heads.theta is not None and heads.theta_weight is not None:
        raise ValueError("theta and theta_weight are both given; theta is one or the other")
    for name in ("theta", "pi"):
        if getattr(heads, f"{name}_bias") is not None and getattr(heads, f"{name}_weight") is None:
            raise ValueError(f"{name}_bias is given without {name}_weight")
    check_options(
        heads.theta if heads.theta is not None else heads.theta_weight, heads.pi_weight, likelihood, mean
    )
    b, g = counts.shape
    if hidden.dim() != 2 or len(hidden) != b:
        raise ValueError(f"hidden must be ({b}, H), is {tuple(hidden.shape)}")
    n_hidden = hidden.shape[1]
    shapes: dict[str, list[tuple[int, ...]]] = {"library": [(b,)], "theta": [(g,), (b, g)]}
    shapes |= {name: [(g, n_hidden)] for name in ("weight", "pi_weight", "theta_weight")}
    shapes |= {name: [(g,)] for name in ("bias", "pi_bias", "theta_bias")}
    if theta_index is not None:
        if heads.theta is None:
            raise ValueError("theta_index is given without theta")
        shapes["theta"] = [(len(heads.theta), g)]
        if theta_index.shape != (b,) or theta_index.dtype != torch.int64:
            raise ValueError(
                f"theta_index must be ({b},) int64, is {tuple(theta_index.shape)} {theta_index.dtype}"
            )
    for name, allowed in shapes.items():
        tensor = library if name == "library" else getattr(heads, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} must be of shape {' or '.join(map(str, allowed))}, is {tuple(tensor.shape)}"
            )
        if tensor.dtype != hidden.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden is {hidden.dtype}; one floating type is needed"
            )
    for name, tensor in {"hidden": hidden, "library": library, **heads.named()}.items():
        if tensor is not None and tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts are on {counts.device}")
