"""From the latent to the parameters of each gene: hidden layers, then heads that can give some genes only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from atlasvi.nn.layers import MLP, Covariates
from atlasvi.nn.ranks import BatchNorm
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

    def genes(self, head: Any, h: torch.Tensor, genes: torch.Tensor | None = None) -> torch.Tensor:
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
        return _log_normaliser(h, *self.scale_weights(), tile)


class LinearHead(nn.Module):
    """``y = BatchNorm(h W')``: one row of weight, one scale and one shift a gene.

    Args:
        n_in: width of ``h``.
        n_vars: number of genes.
        bias: whether there is a constant besides the norm's.
        batch_norm: whether logits are normalised over cells, with scvi-tools' momentum and epsilon.
    """

    def __init__(self, n_in: int, n_vars: int, *, bias: bool, batch_norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_vars, bias=bias)
        self.norm = BatchNorm(n_vars, momentum=0.01, eps=0.001) if batch_norm else None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """``(B, n_vars)``."""
        y: torch.Tensor = self.linear(h)
        return y if self.norm is None else self.norm(y)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n_vars, n_in)`` weight and ``(n_vars,)`` constant with the norm's running moments folded in."""
        weight, bias = self.linear.weight, self.linear.bias
        if bias is None:
            bias = weight.new_zeros(len(weight))
        if self.norm is None:
            return weight, bias
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        scale = self.norm.weight * (var + self.norm.eps).rsqrt()
        return weight * scale.unsqueeze(1), (bias - mean) * scale + self.norm.bias


class LinearDecoder(nn.Module):
    """A `Decoder` without hidden layers: the heads are linear in ``h = [z, covariates]``.

    Args:
        n_latent: dimensions of z.
        n_levels: levels of each categorical covariate; one level says nothing and gets no column.
        n_continuous: continuous covariates.
        n_vars: number of genes.
        has_pi: whether there is a dropout head.
        bias: see `LinearHead`.
        batch_norm: see `LinearHead`.
    """

    def __init__(
        self,
        n_latent: int,
        n_levels: tuple[int, ...],
        n_continuous: int,
        n_vars: int,
        *,
        has_pi: bool,
        bias: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.n_levels = n_levels
        n_in = n_latent + n_continuous + sum(n for n in n_levels if n > 1)
        self.scale = LinearHead(n_in, n_vars, bias=bias, batch_norm=batch_norm)
        self.pi = LinearHead(n_in, n_vars, bias=bias, batch_norm=batch_norm) if has_pi else None
        self.log_theta: nn.Linear | None = None

    def hidden(self, z: torch.Tensor, covariates: Covariates, noise: Noise | None = None) -> torch.Tensor:
        """``(B, n_latent + covariates)``: z, continuous covariates, one-hot codes."""
        codes = [
            F.one_hot(covariates.codes[:, i], n).to(z.dtype) for i, n in enumerate(self.n_levels) if n > 1
        ]
        return torch.cat([z, covariates.continuous, *codes], dim=1)

    def genes(self, head: Any, h: torch.Tensor, genes: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, len(genes))`` of a head; for some genes only, with the running moments of its norm."""
        if genes is None:
            result: torch.Tensor = head(h)
            return result
        weight, bias = head.folded()
        return F.linear(h, weight[genes], bias[genes])

    def scale_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n_vars, n_latent + covariates)`` weight and ``(n_vars,)`` bias of the logits, norm included."""
        return self.scale.folded()

    def log_normaliser(self, h: torch.Tensor, tile: int = 4096) -> torch.Tensor:
        """``(B, 1)`` log of the sum over all genes of exp(logits), a tile of genes at a time."""
        return _log_normaliser(h, *self.scale_weights(), tile)


def _log_normaliser(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tile: int) -> torch.Tensor:
    tiles = [
        F.linear(h, w, b).logsumexp(-1, keepdim=True)
        for w, b in zip(weight.split(tile), bias.split(tile), strict=True)
    ]
    return torch.cat(tiles, -1).logsumexp(-1, keepdim=True)
