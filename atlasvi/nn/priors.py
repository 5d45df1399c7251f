"""Priors p(z) of a latent: the standard normal, and two mixtures that are learnt with the rest.

Each gives a `Mixture` of K diagonal normals, ``p(z) = sum over k of w_k N(z; m_k, diag v_k)``::

    "normal"   K = 1, m = 0, v = 1
    "mog"      w, m and v are parameters
    "vamp"     N(m_k, v_k) = q(z | u_k), the encoder at a pseudo-input u_k; w and u are parameters

The last is the VampPrior (Tomczak and Welling 2018, AISTATS, PMLR 84, 1214), with weights of the components
as in scvi-tools. u_k stands on the scale that the encoder sees, log(1 + counts). The encoder reads them as a
minibatch of their own, without dropout, in training and after it: batch norms take the moments of the
pseudo-inputs, and keep those of cells as they are. (With running moments, which lag, training diverges.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from atlasvi.nn.layers import Covariates
from atlasvi.types import CSR, Mixture, Posterior

Encode = Callable[[torch.Tensor, Covariates], Posterior]


class NormalPrior(nn.Module):
    """``z ~ N(0, I)``.

    Args:
        n_latent: dimensions of z.
    """

    zero: torch.Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        # Not saved: there is nothing to remember.
        self.register_buffer("zero", torch.zeros(1, n_latent), persistent=False)

    def forward(self, encode: Encode) -> Mixture:
        """p(z); ``encode`` plays no part."""
        return Mixture(self.zero[:, 0], Posterior(self.zero, self.zero + 1))


class MixturePrior(nn.Module):
    """``z ~ sum over k of w_k N(m_k, diag v_k)``; m begins at draws of the standard normal, v at 1.

    Args:
        n_components: K.
        n_latent: dimensions of z.
    """

    def __init__(self, n_components: int, n_latent: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.loc = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n_components, n_latent))

    def forward(self, encode: Encode) -> Mixture:
        """p(z); ``encode`` plays no part."""
        return Mixture(self.logits.log_softmax(-1), Posterior(self.loc, self.log_scale.exp()))


class VampPrior(nn.Module):
    """``z ~ sum over k of w_k q(z | u_k)``; pseudo-inputs begin at cells, and keep their covariates.

    Args:
        n_components: K.
        n_vars: number of genes.
        n_codes: categorical covariates, the batch among them.
        n_continuous: continuous covariates.
    """

    codes: torch.Tensor
    continuous: torch.Tensor

    def __init__(self, n_components: int, n_vars: int, n_codes: int, n_continuous: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.inputs = nn.Parameter(torch.zeros(n_components, n_vars))
        self.register_buffer("codes", torch.zeros(n_components, n_codes, dtype=torch.int64))
        self.register_buffer("continuous", torch.zeros(n_components, n_continuous))

    @torch.no_grad()
    def start_at(self, counts: CSR, covariates: Covariates) -> None:
        """Let the pseudo-inputs be these K cells."""
        self.inputs.copy_(counts.to_dense().log1p())
        self.codes.copy_(covariates.codes)
        self.continuous.copy_(covariates.continuous)

    def forward(self, encode: Encode) -> Mixture:
        """p(z); ``encode`` gives q(z | u) of log(1 + counts) and covariates."""
        posterior = encode(self.inputs, Covariates(self.codes, self.continuous))
        return Mixture(self.logits.log_softmax(-1), posterior)
