"""From the latent to the parameters of each gene: hidden layers, then heads that can give some genes only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from atlasvi.likelihoods.base import Head
from atlasvi.nn.layers import MLP, Covariates
from atlasvi.nn.ranks import BatchNorm, summed, world_size
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

    def heads(self, h: torch.Tensor) -> tuple[nn.Linear, nn.Linear | None]:
        """Of the logits and of dropout, as they are for the rows of ``h``."""
        return self.scale, self.pi

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

    The norm is folded into weight and constant, in training too: of logits that are linear in h, the mean is
    ``W m`` and the variance ``diag(W C W')``, m and C the mean and covariance of the rows of h. So no
    cells x genes are made for it.

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
        return F.linear(h, *self.folded(h))

    def folded(self, h: torch.Tensor | None = None) -> Head:
        """``(n_vars, n_in)`` weight and ``(n_vars,)`` constant with the norm in them.

        By its running moments; in training, where ``h`` is given, by those of its rows, which they take up.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if bias is None:
            bias = weight.new_zeros(len(weight))
        if self.norm is None:
            return Head(weight, bias)
        mean, var = self.norm.running_mean, self.norm.running_var
        if h is not None and self.norm.training:
            mean, var = self._moments(h, weight, bias, self.norm)
        assert mean is not None and var is not None
        scale = self.norm.weight * (var + self.norm.eps).rsqrt()
        return Head(weight * scale.unsqueeze(1), (bias - mean) * scale + self.norm.bias)

    @staticmethod
    def _moments(
        h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: BatchNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n_vars,)`` mean and variance of the logits of all processes' rows."""
        if len(h) == 1 and world_size() == 1:
            raise ValueError("Expected more than 1 value per channel when training, got 1 cell")
        n = summed(h.new_tensor(float(len(h))))
        centre = summed(h.sum(0)) / n
        apart = h - centre
        covariance = summed(apart.T @ apart) / n
        mean, variance = weight @ centre + bias, ((weight @ covariance) * weight).sum(1)
        norm.take_up(mean, variance, n)
        return mean, variance


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

    def heads(self, h: torch.Tensor) -> tuple[Head, Head | None]:
        """Of the logits and of dropout, as they are for the rows of ``h``."""
        return self.scale.folded(h), None if self.pi is None else self.pi.folded(h)

    def genes(self, head: Any, h: torch.Tensor, genes: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, len(genes))`` of a head; for some genes only, with the running moments of its norm."""
        if genes is None:
            result: torch.Tensor = head(h)
            return result
        weight, bias = head.folded()
        return F.linear(h, weight[genes], bias[genes])

    def scale_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(n_vars, n_latent + covariates)`` weight and ``(n_vars,)`` bias of the logits, norm included."""
        head = self.scale.folded()
        return head.weight, head.bias

    def log_normaliser(self, h: torch.Tensor, tile: int = 4096) -> torch.Tensor:
        """``(B, 1)`` log of the sum over all genes of exp(logits), a tile of genes at a time."""
        return _log_normaliser(h, *self.scale_weights(), tile)


def _log_normaliser(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tile: int) -> torch.Tensor:
    tiles = [
        F.linear(h, w, b).logsumexp(-1, keepdim=True)
        for w, b in zip(weight.split(tile), bias.split(tile), strict=True)
    ]
    return torch.cat(tiles, -1).logsumexp(-1, keepdim=True)
