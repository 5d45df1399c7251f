"""From the latent to the parameters of each gene: hidden layers, then heads that can give some genes only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from atlasvi.nn.layers import MLP, Covariates
from atlasvi.types import Noise


class Decoder(nn.Module):
    """``h = MLP(z, s)``; a linear head for the mean, and one for dropout and for dispersion if asked.

    Args:
        mlp: the hidden layers.
        n_hidden: their width.
        n_vars: number of genes.
        has_pi: whether there is a dropout head.
        has_theta: whether there is a dispersion head (``dispersion="gene-cell"``).
    """

    def __init__(self, mlp: MLP, n_hidden: int, n_vars: int, *, has_pi: bool, has_theta: bool) -> None:
        super().__init__()
        self.mlp = mlp
        self.scale = nn.Linear(n_hidden, n_vars)
        self.pi = nn.Linear(n_hidden, n_vars) if has_pi else None
        self.log_theta = nn.Linear(n_hidden, n_vars) if has_theta else None

    def hidden(self, z: torch.Tensor, covariates: Covariates, noise: Noise | None = None) -> torch.Tensor:
        """``(B, n_hidden)``, all that the heads need."""
        h: torch.Tensor = self.mlp(z, covariates, noise)
        return h

    def genes(self, head: nn.Linear, h: torch.Tensor, genes: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, len(genes))`` of a head, reading only those genes' rows of its weight."""
        if genes is None:
            result: torch.Tensor = head(h)
            return result
        return F.linear(h, head.weight[genes], head.bias[genes])

    def scale_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n_vars, n_hidden)`` weight and ``(n_vars,)`` bias of the logits."""
        return self.scale.weight, self.scale.bias

    def log_normaliser(self, h: torch.Tensor, tile: int = 4096) -> torch.Tensor:
        """``(B, 1)`` log of the sum over all genes of exp(logits), a tile of genes at a time."""
        tiles = [
            F.linear(h, weight, bias).logsumexp(-1, keepdim=True)
            for weight, bias in zip(self.scale.weight.split(tile), self.scale.bias.split(tile), strict=True)
        ]
        return torch.cat(tiles, -1).logsumexp(-1, keepdim=True)
