"""`count_log_likelihood`: checks, choice of backend, autograd."""

from __future__ import annotations

from typing import Any

import torch

from ..csr import CSR
from ..dispatch import choose_backend
from . import cpu, reference

LIKELIHOODS = ("poisson", "zip", "nb", "zinb")
MEANS = ("softmax", "exp")


def count_log_likelihood(
    counts: CSR,
    logits: torch.Tensor,
    library: torch.Tensor,
    theta: torch.Tensor | None = None,
    *,
    pi_logits: torch.Tensor | None = None,
    theta_index: torch.Tensor | None = None,
    likelihood: str = "zinb",
    mean: str = "softmax",
    backend: str = "auto",
) -> torch.Tensor:
    r"""Log-likelihood of each cell's counts, differentiable in all parameters, counts never made dense.

    The mean is ``mu = library * softmax(logits)`` as in scVI (Lopez et al. 2018, eq. 2) or
    ``library * exp(logits)`` as in DCA (Eraslan et al. 2019). With ``pi = sigmoid(pi_logits)``,

    ``p(x) = pi [x = 0] + (1 - pi) NB(x; mu, theta)``, ``Var NB = mu + mu^2 / theta``;

    ``"nb"`` and ``"poisson"`` have no pi, ``"zip"`` and ``"poisson"`` no theta.

    Args:
        counts: (B x G) `CSR`.
        logits: ``(B, G)`` float.
        library: ``(B,)`` float, > 0, total counts (or the size factor).
        theta: ``(G,)``, ``(B, G)``, or ``(T, G)`` with ``theta_index``; float, > 0, inverse dispersion.
        pi_logits: ``(B, G)`` float, log-odds that an entry dropped out.
        theta_index: ``(B,)`` int64 in ``[0, T)``, the row of ``theta`` that each cell takes.
        likelihood: ``"poisson"``, ``"zip"``, ``"nb"`` or ``"zinb"``.
        mean: ``"softmax"`` or ``"exp"``.
        backend: ``"auto"``, ``"numba"`` (float32 on CPU, never densifies the counts) or ``"reference"``.

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
    _check(counts, logits, library, theta, pi_logits, theta_index, likelihood, mean)
    given = [t for t in (logits, library, theta, pi_logits) if t is not None]
    if choose_backend("count_log_likelihood", backend, *given) == "reference":
        if theta is not None:
            theta = theta.unsqueeze(0) if theta.dim() == 1 else theta
            theta = theta if theta_index is None else theta[theta_index]
        return reference.log_likelihood(
            counts, logits, library, theta, pi_logits, likelihood=likelihood, mean=mean
        )
    result: torch.Tensor = _Numba.apply(
        counts, logits, library, theta, pi_logits, theta_index, likelihood, mean
    )
    return result


class _Numba(torch.autograd.Function):
    """Gradients are made in forward for an upstream gradient of one; backward scales them.

    That is exact whenever the upstream gradient is the same for all cells, as in every mean or sum
    over cells. Otherwise theta's gradient, a sum over cells, needs the weights: backward runs again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        log_p, ctx.gradients = cpu.run(*args, weights=None, with_gradient=any(ctx.needs_input_grad))
        ctx.counts, ctx.options = args[0], args[6:]
        ctx.save_for_backward(*args[1:6])
        return log_p

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        (weights,) = upstream
        gradients, ctx.gradients = ctx.gradients, None
        uniform = len(weights) == 0 or bool((weights == weights[0]).all())
        if gradients is not None and uniform:
            if len(weights) and weights[0] != 1:
                gradients = [None if g is None else g.mul_(weights[0]) for g in gradients]
        else:
            _, gradients = cpu.run(
                ctx.counts, *ctx.saved_tensors, *ctx.options, weights=weights.contiguous(), with_gradient=True
            )
        assert gradients is not None
        return None, *gradients, None, None, None


def _check(
    counts: CSR,
    logits: torch.Tensor,
    library: torch.Tensor,
    theta: torch.Tensor | None,
    pi_logits: torch.Tensor | None,
    theta_index: torch.Tensor | None,
    likelihood: str,
    mean: str,
) -> None:
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
    b, g = counts.shape
    shapes: dict[str, tuple[torch.Tensor, list[tuple[int, ...]]]]
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
        if b and not 0 <= int(theta_index.min()) <= int(theta_index.max()) < theta.shape[0]:
            raise ValueError(
                f"theta_index must lie in [0, {theta.shape[0]}), reaches {int(theta_index.max())}"
            )
    for name, (tensor, allowed) in shapes.items():
        if tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} must be of shape {' or '.join(map(str, allowed))}, is {tuple(tensor.shape)}"
            )
        if tensor.dtype != logits.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype}, logits are {logits.dtype}; one floating type is needed"
            )
        if tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts are on {counts.device}")
