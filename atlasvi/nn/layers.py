"""Layers on sparse counts, covariates as rows of weight, and a perceptron with keyed dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from atlasvi_kernels import CSR, csr_linear
from torch import nn

from atlasvi.nn.ranks import BatchNorm
from atlasvi.types import Noise


@dataclass(frozen=True, slots=True)
class Covariates:
    """Codes and numbers that a layer adds to its input.

    Args:
        codes: ``(B, k)`` int64, a level of each categorical covariate.
        continuous: ``(B, c)`` float32.
    """

    codes: torch.Tensor
    continuous: torch.Tensor


def by_label(values: torch.Tensor, n_labels: int) -> torch.Tensor:
    """``(B, K n)`` to ``(K B, n)``, all cells of the first label first: rows that are cells within labels."""
    n_cells = len(values)
    return values.view(n_cells, n_labels, -1).transpose(0, 1).reshape(n_labels * n_cells, -1)


@dataclass(frozen=True, slots=True)
class NoiseByLabel:
    """Noise of rows that are cells within labels, a draw of its own for each.

    Args:
        noise: of the B cells.
        n_labels: K.
    """

    noise: Noise
    n_labels: int

    def kept(self, n: int, stream: int, rate: float) -> torch.Tensor:
        """``(K B, n)`` bool, as `Noise.kept`."""
        return by_label(self.noise.kept(n * self.n_labels, stream, rate), self.n_labels)


class InputLinear(nn.Module):
    """``y = x W + covariates V + b``: the one-hot product of scvi-tools, without the one-hot.

    A categorical covariate selects a row of ``V``, which is the same as concatenating its one-hot code
    to ``x``. ``x`` is dense, or a `CSR` of counts on which log1p is taken in flight.

    Args:
        n_in: width of ``x``.
        n_out: width of ``y``.
        n_levels: number of levels of each categorical covariate added here; one level says nothing
            and gets no row, as in scvi-tools.
        n_continuous: number of continuous covariates added here.
    """

    offsets: torch.Tensor

    def __init__(self, n_in: int, n_out: int, n_levels: tuple[int, ...] = (), n_continuous: int = 0) -> None:
        super().__init__()
        self.used = [i for i, n in enumerate(n_levels) if n > 1]
        # Number of rows of the first categorical covariate, the batch, which come first among these.
        self.n_sees_batch = n_levels[0] if n_levels and n_levels[0] > 1 else 0
        sizes = [n_levels[i] for i in self.used]
        n_extra = n_continuous + sum(sizes)
        self.n_continuous = n_continuous
        # (n_in, n_out), a row for each input: a non-zero count touches one line of memory.
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.covariate_weight = nn.Parameter(torch.empty(n_extra, n_out)) if n_extra else None
        offsets = torch.tensor([n_continuous, *sizes[:-1]] if sizes else [], dtype=torch.int64)
        self.register_buffer("offsets", offsets.cumsum(0), persistent=False)
        bound = 1 / math.sqrt(n_in + n_extra)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor | CSR, covariates: Covariates) -> torch.Tensor:
        """``(B, n_out)``."""
        constant = self.constant(covariates)
        if isinstance(x, CSR):
            return csr_linear(x, self.weight, transform="log1p") + constant
        return torch.addmm(constant, x, self.weight)

    def constant(self, covariates: Covariates) -> torch.Tensor:
        """``covariates V + b``, ``(B, n_out)``; ``(n_out,)`` where there are none."""
        if self.covariate_weight is None:
            return self.bias
        rows = [covariates.codes[:, i] + n for i, n in zip(self.used, self.offsets.unbind(), strict=True)]
        y = self.bias
        if rows:  # the bias is added to the few rows that there are to choose from
            y = F.embedding(rows[0], self.covariate_weight + self.bias)
        for chosen in rows[1:]:
            y = y + F.embedding(chosen, self.covariate_weight)
        if self.n_continuous:
            y = y + covariates.continuous @ self.covariate_weight[: self.n_continuous]
        return y


class StandardisedLinear(InputLinear):
    """``y = ((log(1 + x / s) - m) / d) W + b``, s the cell's total over the median total: DCA's first layer.

    The counts stay sparse: d is divided out of W, and what m takes off is a constant.

    Args:
        n_in: width of ``x``.
        n_out: width of ``y``.
    """

    median_total: torch.Tensor
    gene_mean: torch.Tensor
    gene_deviation: torch.Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("median_total", torch.ones(()))
        self.register_buffer("gene_mean", torch.zeros(n_in))
        self.register_buffer("gene_deviation", torch.ones(n_in))

    def size_factor(self, x: CSR) -> torch.Tensor:
        """``(B,)``; a cell without counts has that of one count."""
        return x.row_sums().clamp(min=1) / self.median_total

    def forward(self, x: torch.Tensor | CSR, covariates: Covariates) -> torch.Tensor:
        """``(B, n_out)``."""
        assert isinstance(x, CSR)
        weight = self.weight / self.gene_deviation.unsqueeze(1)
        bias = self.bias - self.gene_mean @ weight
        return csr_linear(x, weight, bias, transform="log1p", scale=1 / self.size_factor(x))


class MLP(nn.Module):
    """Hidden layers as scvi-tools lays them: linear, batch norm, layer norm, ReLU, dropout.

    Args:
        n_in: width of the input.
        n_hidden: width of each hidden layer.
        n_layers: number of hidden layers.
        n_levels: levels of the categorical covariates.
        n_continuous: continuous covariates, added to the first layer only.
        inject: whether categorical covariates are added to every layer, or to the first only.
        dropout_rate: share of hidden units set to zero in training.
        batch_norm: with scvi-tools' momentum 0.01 and epsilon 0.001.
        layer_norm: without learnt scale and shift.
        stream: first number of the noise streams that dropout may use, one a layer.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        n_levels: tuple[int, ...],
        n_continuous: int,
        *,
        inject: bool,
        dropout_rate: float,
        batch_norm: bool,
        layer_norm: bool,
        stream: int,
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.stream = stream
        self.linears = nn.ModuleList()
        self.batch_norms = nn.ModuleList()
        self.layer_norm = layer_norm
        for i in range(n_layers):
            first = i == 0
            self.linears.append(
                InputLinear(
                    n_in if first else n_hidden,
                    n_hidden,
                    n_levels if first or inject else (),
                    n_continuous if first else 0,
                )
            )
            if batch_norm:
                self.batch_norms.append(BatchNorm(n_hidden, momentum=0.01, eps=0.001))

    def forward(
        self,
        x: torch.Tensor | CSR,
        covariates: Covariates,
        noise: Noise | NoiseByLabel | None,
        *,
        own_moments: bool = False,
    ) -> torch.Tensor:
        """``(B, n_hidden)``; without ``noise`` nothing is dropped out.

        ``own_moments``: batch norms take the moments of these rows, whether it is trained or not, and the
        rows leave no trace in them.
        """
        for i, linear in enumerate(self.linears):
            h = linear(x, covariates)
            kept = None
            if self.training and self.dropout_rate > 0 and noise is not None:
                kept = noise.kept(h.shape[1], self.stream + i, self.dropout_rate)
            norm: Any = self.batch_norms[i] if len(self.batch_norms) else None
            if norm is not None and norm.is_fused(h) and not (self.layer_norm or own_moments):
                x = norm.relu_dropout(h, kept, self.dropout_rate)
                continue
            if norm is not None:
                h = norm.by_own_moments(h) if own_moments else norm(h)
            if self.layer_norm:
                h = F.layer_norm(h, h.shape[1:])
            x = F.relu(h) if kept is None else F.relu(h) * kept / (1 - self.dropout_rate)
        assert isinstance(x, torch.Tensor)
        return x
