"""q(z | x): from sparse counts, or another latent, to a diagonal normal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from atlasvi_kernels import CSR
from torch import nn

from atlasvi.nn.layers import MLP, Covariates, NoiseByLabel
from atlasvi.types import Noise, Posterior

VARIANCE_FLOOR = 1e-4  # added to the variance, as scvi-tools does


class Encoder(nn.Module):
    """``h = MLP(log(1 + x), s)``; ``q = N(h W_m + b_m, exp(h W_v + b_v) + 1e-4)``.

    Args:
        mlp: the hidden layers.
        n_hidden: their width.
        n_out: dimensions of the latent.
        floor: added to the variance.
    """

    def __init__(self, mlp: MLP, n_hidden: int, n_out: int, *, floor: float = VARIANCE_FLOOR) -> None:
        super().__init__()
        self.mlp = mlp
        self.floor = floor
        self.loc = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)

    def forward(
        self,
        x: CSR | torch.Tensor,
        covariates: Covariates,
        noise: Noise | NoiseByLabel | None,
        *,
        own_moments: bool = False,
    ) -> Posterior:
        """The posterior of B cells; ``own_moments`` as in `MLP`."""
        h = self.mlp(x, covariates, noise, own_moments=own_moments)
        # One product: of few columns each takes as long as both.
        weight = torch.cat([self.loc.weight, self.log_variance.weight])
        bias = torch.cat([self.loc.bias, self.log_variance.bias])
        loc, log_variance = F.linear(h, weight, bias).chunk(2, dim=1)
        return Posterior(loc, torch.sqrt(log_variance.exp() + self.floor))
