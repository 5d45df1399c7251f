"""scvi-tools' likelihoods as scVI calls them: `benchmarks.kernels` starts this with the peer's Python.

Contenders: ``eager``, the distributions as `scvi.module.VAE` uses them; ``formula``, the functions that they
call, without the check of the counts that ``ZeroInflatedNegativeBinomial.log_prob`` always makes; ``compile``
and ``compile autotuned``, these functions with the softmax under `torch.compile`. Compiling the distributions
themselves gives a slower program (44 ns an entry where the functions took 28): the check breaks the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive

from benchmarks.common import Arrays, Case, Run, Setup, dense_counts, serve, tensors

Entry = Callable[..., torch.Tensor]


def _distribution(x: torch.Tensor, mu: torch.Tensor, theta: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    if theta is None:
        return Poisson(mu).log_prob(x)
    if pi is None:
        return NegativeBinomial(mu=mu, theta=theta).log_prob(x)
    return ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=pi).log_prob(x)


def _formula(x: torch.Tensor, mu: torch.Tensor, theta: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    if theta is None:
        return Poisson(mu, validate_args=False).log_prob(x)
    return log_nb_positive(x, mu, theta) if pi is None else log_zinb_positive(x, mu, theta, pi)


def _setup(entry: Entry, dtype: torch.dtype = torch.float32, mode: str | None = None) -> Setup:
    """A setup whose likelihood of each entry is ``entry``, compiled if there is a ``mode``."""

    def setup(case: Case, arrays: Arrays) -> Run:
        x = dense_counts(case, arrays, dtype)

        def log_p(logits, library, px_r=None, pi_logits=None):  # type: ignore[no-untyped-def]
            scale = F.softmax(logits, dim=-1) if case.mean == "softmax" else logits.exp()
            theta = None if px_r is None else px_r.exp()
            return entry(x, library[:, None] * scale, theta, pi_logits).sum(-1)

        def from_hidden(  # type: ignore[no-untyped-def]
            hidden, weight, bias, library, px_r=None, pi_weight=None, pi_bias=None
        ):
            pi = None if pi_weight is None else F.linear(hidden, pi_weight, pi_bias)
            return log_p(F.linear(hidden, weight, bias), library, px_r, pi)

        forward = log_p if case.op == "count_log_likelihood" else from_hidden
        if mode is not None:
            forward = torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)
        return Run(case, tensors(case, arrays, dtype), forward)

    return setup


SETUPS = {
    "oracle": _setup(_distribution, torch.float64),
    "eager": _setup(_distribution),
    "formula": _setup(_formula),
    "compile": _setup(_formula, mode="default"),
    "compile autotuned": _setup(_formula, mode="max-autotune-no-cudagraphs"),
}

if __name__ == "__main__":
    torch._dynamo.config.recompile_limit = 1_000  # each case and mode compiles the same few functions anew
    serve(
        {"count_log_likelihood": SETUPS, "linear_count_log_likelihood": SETUPS},
        ("scvi-tools", "torch", "numpy"),
    )
