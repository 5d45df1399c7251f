"""`count_log_likelihood`: checks, choice of backend, registration with torch, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..csr import CSR
from ..dispatch import choose_backend, differentiable, registered
from . import cpu, reference

LIKELIHOODS = ("poisson", "zip", "nb", "zinb")
MEANS = ("softmax", "exp")
_HALF = (torch.bfloat16, torch.float16)


def count_log_likelihood(
    counts: CSR,
    logits: Tensor,
    library: Tensor,
    theta: Tensor | None = None,
    *,
    pi_logits: Tensor | None = None,
    theta_index: Tensor | None = None,
    likelihood: str = "zinb",
    mean: str = "softmax",
    backend: str = "auto",
    inplace: bool = False,
    upstream: float = 1.0,
) -> Tensor:
    r"""Log-likelihood of each cell's counts, differentiable in all parameters, counts never made dense.

    The mean is ``mu = library * softmax(logits)`` as in scVI (Lopez et al. 2018, eq. 2) or
    ``library * exp(logits)`` as in DCA (Eraslan et al. 2019). With ``pi = sigmoid(pi_logits)``,

    ``p(x) = pi [x = 0] + (1 - pi) NB(x; mu, theta)``, ``Var NB = mu + mu^2 / theta``;

    ``"nb"`` and ``"poisson"`` have no pi, ``"zip"`` and ``"poisson"`` no theta.

    The gradient is made in the forward pass. It works under `torch.compile` and `torch.autocast`
    (half-precision logits are widened), and can be differentiated once.

    Args:
        counts: (B x G) `CSR`.
        logits: ``(B, G)`` float.
        library: ``(B,)`` float, > 0, total counts (or the size factor).
        theta: ``(G,)``, ``(B, G)``, or ``(T, G)`` with ``theta_index``; float, > 0, inverse dispersion.
        pi_logits: ``(B, G)`` float, log-odds that an entry dropped out.
        theta_index: ``(B,)`` int64 in ``[0, T)``, the row of ``theta`` that each cell takes.
        likelihood: ``"poisson"``, ``"zip"``, ``"nb"`` or ``"zinb"``.
        mean: ``"softmax"`` or ``"exp"``.
        backend: ``"auto"``; ``"numba"`` (CPU, float32), ``"triton"`` (GPU), neither of which makes the counts
            dense; or ``"reference"`` (any device and float type, dense).
        inplace: write the gradients of logits and pi_logits into their own memory, which saves two matrices.
            What they held is lost, also to the caller; for outputs of a linear layer that is no loss. Without
            gradients (`torch.no_grad`) nothing is overwritten.
        upstream: the gradient that backward is expected to come with, the same for every cell: ``1`` for a
            sum, ``-1 / B`` for the loss ``-log_p.mean()``. Backward then costs nothing. Any other is right
            too, and costs a multiplication or, where it differs among cells, another run.

    Returns:
        ``(B,)`` float, nats.

    Raises:
        ValueError: an unknown option, or shapes, types and devices that do not fit, by name.

    Example:
        >>> counts = CSR.from_torch(torch.tensor([[0.0, 2.0]]))
        >>> ll = count_log_likelihood(counts, torch.zeros(1, 2), torch.tensor([2.0]), likelihood="poisson")
        >>> round(ll.item(), 4)  # log Poisson(0; 1) + log Poisson(2; 1)
        -2.6931
    """
    logits, library = _widen(logits), _widen(library)
    theta = None if theta is None else _widen(theta)
    pi_logits = None if pi_logits is None else _widen(pi_logits)
    check_arguments(counts, logits, library, theta, pi_logits, theta_index, likelihood, mean)
    given = [t for t in (logits, library, theta, pi_logits) if t is not None]
    chosen = choose_backend("count_log_likelihood", backend, *given)
    if chosen == "reference":
        return _reference(counts, logits, library, theta, pi_logits, theta_index, likelihood, mean)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    options = (likelihood, mean, chosen, float(upstream), with_gradient)
    arguments = (counts.indptr, counts.indices, counts.data, logits, library, theta, pi_logits, theta_index)
    if inplace and with_gradient:
        if torch.compiler.is_compiling():
            raise ValueError(
                "inplace=True is for eager mode; torch.compile plans memory itself: leave it out"
            )
        log_p: Tensor = _InPlace.apply(*arguments, *options)
        return log_p
    made: list[Tensor] = _differentiable(*arguments, *options)
    return made[0]


def _widen(t: Tensor) -> Tensor:
    """Half precision is for storage on the CPU: no kernel computes in it. On a GPU the kernel widens."""
    return t.float() if t.dtype in _HALF and not t.is_cuda else t


def _reference(
    counts: CSR, logits: Tensor, library: Tensor, theta: Tensor | None, pi_logits: Tensor | None,
    theta_index: Tensor | None, likelihood: str, mean: str,
) -> Tensor:  # fmt: skip
    if theta is not None:
        theta = theta.unsqueeze(0) if theta.dim() == 1 else theta
        theta = theta if theta_index is None else theta[theta_index]
    return reference.log_likelihood(
        counts, logits, library, theta, pi_logits, likelihood=likelihood, mean=mean
    )


def run(backend: str, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """The compiled backend's own `run`."""
    if backend == "numba":
        return cpu.run(*args, **options)
    from . import gpu

    return gpu.run(*args, **options)


@registered
def count_ll(
    indptr: Tensor, indices: Tensor, data: Tensor, logits: Tensor, library: Tensor, theta: Tensor | None,
    pi_logits: Tensor | None, theta_index: Tensor | None, likelihood: str, mean: str, backend: str,
    upstream: float, with_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """``[log_p, d logits, d library, d theta, d pi_logits]``, the gradients empty where there are none."""
    counts = CSR(indptr, indices, data, logits.shape[1])
    log_p, gradients = run(
        backend, counts, logits, library, theta, pi_logits, theta_index, likelihood, mean,
        weights=None, scale=upstream, with_gradient=with_gradient, inplace=False,
    )  # fmt: skip
    return [log_p, *(log_p.new_empty(0) if g is None else g for g in gradients or [None] * 4)]


@registered
def count_ll_backward(
    weights: Tensor, gradients: Sequence[Tensor], indptr: Tensor, indices: Tensor, data: Tensor,
    logits: Tensor, library: Tensor, theta: Tensor | None, pi_logits: Tensor | None,
    theta_index: Tensor | None, likelihood: str, mean: str, backend: str, upstream: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients for what backward comes with, ``weights``, from those made for ``upstream``."""
    if is_uniform(weights) and upstream != 0:
        factor = weights[0].item() / upstream if len(weights) else 1.0
        return [g * factor for g in gradients]
    # theta's gradient is a sum over cells, which no factor can mend: again, with the weights.
    _, again = run(
        backend, CSR(indptr, indices, data, logits.shape[1]), logits, library, theta, pi_logits, theta_index,
        likelihood, mean, weights=weights.contiguous(), scale=1.0, with_gradient=True, inplace=False,
    )  # fmt: skip
    assert again is not None
    return [weights.new_empty(0) if g is None else g for g in again]


def is_uniform(weights: Tensor) -> bool:
    """Whether all are the same."""
    return len(weights) == 0 or bool((weights == weights[0]).all())


@torch.library.register_fake("atlasvi_kernels::count_ll")
def _(
    indptr: Any, indices: Any, data: Any, logits: Any, library: Any, theta: Any, pi_logits: Any,
    theta_index: Any, likelihood: str, mean: str, backend: str, upstream: float, with_gradient: bool,
) -> list[Tensor]:  # fmt: skip
    log_p = logits.new_empty(logits.shape[0], dtype=torch.float32)
    given = (logits, library, theta, pi_logits) if with_gradient else (None,) * 4
    return [log_p, *(log_p.new_empty(0) if t is None else _like(t) for t in given)]


@torch.library.register_fake("atlasvi_kernels::count_ll_backward")
def _(weights: Any, gradients: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients]


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.options = inputs[8:12]


def _backward(ctx: Any, upstreams: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    (weights, *_) = upstreams
    if weights is None:
        return (None,) * 13
    inputs, gradients = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    # Where torch traces, a value cannot be looked at: there the op does, when it runs.
    traced = type(weights) is not Tensor
    if traced or not bool((weights == ctx.options[3]).all()):
        gradients = torch.ops.atlasvi_kernels.count_ll_backward(weights, gradients, *inputs, *ctx.options)
    return _as_inputs(gradients, inputs)


def _as_inputs(gradients: list[Tensor], inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Gradients in the places of the arguments of the op."""
    g_logits, g_library, g_theta, g_pi = gradients
    theta, pi_logits = inputs[5], inputs[6]
    return (
        None, None, None, g_logits, g_library, None if theta is None else g_theta,
        None if pi_logits is None else g_pi, *(None,) * 6,
    )  # fmt: skip


_differentiable = differentiable(
    torch.ops.atlasvi_kernels.count_ll.default, count_ll, _setup_context, _backward
)


class _InPlace(torch.autograd.Function):
    """The same, with the gradients of logits and pi_logits in these tensors' own memory."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        (indptr, indices, data, logits, library, theta, pi_logits, theta_index, likelihood, mean, backend,
         upstream, _) = args  # fmt: skip
        for name, t in (("logits", logits), ("pi_logits", pi_logits)):
            if t is not None and not t.is_contiguous():
                raise ValueError(f"inplace=True needs contiguous {name}, strides are {t.stride()}")
        log_p, gradients = run(
            backend, CSR(indptr, indices, data, logits.shape[1]), logits, library, theta, pi_logits,
            theta_index, likelihood, mean, weights=None, scale=upstream, with_gradient=True, inplace=True,
        )  # fmt: skip
        assert gradients is not None
        # Whoever else saved these tensors for a backward pass of its own is told that they changed.
        torch.autograd.graph.increment_version([t for t in (logits, pi_logits) if t is not None])
        ctx.gradients, ctx.upstream = gradients, upstream
        return log_p

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        (weights,) = upstreams
        if ctx.gradients is None:
            raise RuntimeError("inplace=True keeps gradients for one backward pass; this is the second")
        if not is_uniform(weights) or (ctx.upstream == 0 and len(weights)):
            raise RuntimeError(
                "inplace=True needs the same upstream gradient for every cell, as of a sum or mean; "
                "it differs: leave inplace out"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if len(weights) and weights[0] != ctx.upstream:
            factor = weights[0].item() / ctx.upstream
            gradients = [None if g is None else g.mul_(factor) for g in gradients]
        g_logits, g_library, g_theta, g_pi = gradients
        return None, None, None, g_logits, g_library, g_theta, g_pi, *(None,) * 6


def check_options(theta: object, pi_logits: object, likelihood: str, mean: str) -> None:
    """Raise `ValueError` for an unknown likelihood or mean, or parameters that it does not have."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood {likelihood!r} is not one of {LIKELIHOODS}")
    if mean not in MEANS:
        raise ValueError(f"mean {mean!r} is not one of {MEANS}")
    if (theta is None) != (likelihood in ("poisson", "zip")):
        raise ValueError(f"likelihood {likelihood!r} {'needs' if theta is None else 'takes no'} theta")
    if (pi_logits is None) != (likelihood in ("poisson", "nb")):
        raise ValueError(
            f"likelihood {likelihood!r} {'needs' if pi_logits is None else 'takes no'} pi_logits"
        )


def check_arguments(
    counts: CSR, logits: Tensor, library: Tensor, theta: Tensor | None, pi_logits: Tensor | None,
    theta_index: Tensor | None, likelihood: str, mean: str,
) -> None:  # fmt: skip
    """Raise `ValueError` for what does not fit, by name."""
    check_options(theta, pi_logits, likelihood, mean)
    b, g = counts.shape
    shapes: dict[str, tuple[Tensor, list[tuple[int, ...]]]]
    shapes = {"logits": (logits, [(b, g)]), "library": (library, [(b,)])}
    if pi_logits is not None:
        shapes["pi_logits"] = (pi_logits, [(b, g)])
    if theta is not None and theta_index is None:
        shapes["theta"] = (theta, [(g,), (b, g)])
    elif theta is not None and theta_index is not None:
        shapes["theta"] = (theta, [(theta.shape[0], g)])
        if theta_index.shape != (b,) or theta_index.dtype != torch.int64:
            raise ValueError(
                f"theta_index must be ({b},) int64, is {tuple(theta_index.shape)} {theta_index.dtype}"
            )
    elif theta_index is not None:
        raise ValueError("theta_index is given without theta")
    for name, (tensor, allowed) in shapes.items():
        if tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} must be of shape {' or '.join(map(str, allowed))}, is {tuple(tensor.shape)}"
            )
        fits = tensor.dtype == logits.dtype or (tensor.dtype == torch.float32 and logits.dtype in _HALF)
        if not fits or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype}, logits are {logits.dtype}; one floating type is needed"
            )
        if tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts are on {counts.device}")
