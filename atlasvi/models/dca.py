"""DCA (Eraslan et al. 2019, Nature Communications 10, 390): a deterministic autoencoder that denoises counts.

Model of cell n, for genes g (equations of the paper's Methods)::

    s_n = total_n / median of the totals                       size factor                           (1)
    y_n = (log(1 + x_n / s_n) - m) / d                         input, standardised by gene           (2)
    b_n = relu(relu(y_n W_1) W_2),  h_n = relu(b_n W_3)        64, 32 and 64 units, batch norm       (3)
    mu_n = s_n exp(h_n W_mu)                                   mean                                  (4)
    theta_n = exp(h_n W_theta), or one theta a gene            inverse dispersion                    (5)
    pi_n = sigmoid(h_n W_pi)                                   dropout, in ZINB                      (6)
    x_ng ~ ZINB(mu_ng, theta_ng, pi_ng)                                                              (7)

What is minimised is ``-log p(x) + ridge * sum over g of pi_ng^2``, the mean over cells. ``exp(h W_mu)`` is
held between 1e-5 and 1e6 and theta between 1e-4 and 1e4, as published. Otherwise than published: theta is an
exponential (5), where the authors' code has softplus for one of a cell and gene; batch norms have a scale;
the optimiser is Adam.

The denoised counts are mu; those of cells as deep as the median are ``exp(h W_mu)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from atlasvi_kernels import CSR
from torch import nn

from atlasvi.errors import OptionError
from atlasvi.likelihoods import by_name
from atlasvi.models.arguments import at_least_one, one_of
from atlasvi.models.base import CountModel
from atlasvi.models.data import LibraryMoments
from atlasvi.nn.decoder import Decoder
from atlasvi.nn.layers import MLP, Covariates, StandardisedLinear
from atlasvi.types import FieldMap, LossTerms, Minibatch, Noise, Posterior, StepWeights

if TYPE_CHECKING:
    from atlasvi.models.data import Data

_LOG_MEAN = math.log(1e-5), math.log(1e6)
_LOG_THETA = math.log(1e-4), math.log(1e4)
_DROPOUT = 16


@dataclass(frozen=True, slots=True)
class DCAConfig:
    """What `DCA` is made of; the arguments are `DCA`'s own."""

    n_hidden: int = 64
    n_latent: int = 32
    gene_likelihood: str = "zinb"
    dispersion: str = "gene-cell"
    ridge: float = 0.0
    dropout_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        by_name(self.gene_likelihood)
        one_of("dispersion", self.dispersion, ("gene", "gene-cell"))
        for name in ("n_hidden", "n_latent"):
            at_least_one(name, getattr(self, name))
        if not 0 <= self.dropout_rate < 1:
            raise OptionError(f"dropout_rate must be in [0, 1), is {self.dropout_rate}")
        if not self.ridge >= 0:
            raise OptionError(f"ridge must be at least 0, is {self.ridge}")
        if self.ridge and not by_name(self.gene_likelihood).has_pi:
            raise OptionError(f"ridge is on dropout, which {self.gene_likelihood!r} has not; leave it out")


class DCAModule(nn.Module):
    """The networks of `DCA`, and what they say of a minibatch.

    Args:
        config: sizes and choices.
        fields: what is known of the data.
        library: not used.
    """

    def __init__(self, config: DCAConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__()
        self.config = config
        self.likelihood = by_name(config.gene_likelihood)

        def mlp(n_in: int, n_out: int, stream: int) -> MLP:
            return MLP(
                n_in, n_out, 1, (), 0, inject=False, dropout_rate=config.dropout_rate,
                batch_norm=True, layer_norm=False, stream=stream,
            )  # fmt: skip

        self.input = mlp(1, config.n_hidden, _DROPOUT)
        self.input.linears[0] = StandardisedLinear(fields.n_vars, config.n_hidden)
        self.bottleneck = mlp(config.n_hidden, config.n_latent, _DROPOUT + 1)
        self.decoder = Decoder(
            mlp(config.n_latent, config.n_hidden, _DROPOUT + 2),
            config.n_hidden,
            fields.n_vars,
            has_pi=self.likelihood.has_pi,
            has_theta=self.likelihood.has_theta and config.dispersion == "gene-cell",
        )
        if self.likelihood.has_theta and config.dispersion == "gene":
            self.log_theta = nn.Parameter(torch.zeros(fields.n_vars))

    @property
    def standardise(self) -> StandardisedLinear:
        """The first layer, which knows the median of the totals and the moments of (2)."""
        first = self.input.linears[0]
        assert isinstance(first, StandardisedLinear)
        return first

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """The bottleneck b of (3), with nothing left to chance."""
        nothing = _nothing(minibatch)
        b = self.bottleneck(self.input(minibatch.counts, nothing, noise), nothing, noise)
        return Posterior(b, torch.zeros_like(b))

    def library(self, minibatch: Minibatch, noise: Noise | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B,)`` size factor of (1), and 0: it is observed."""
        size_factor = self.standardise.size_factor(minibatch.counts)
        return size_factor, torch.zeros_like(size_factor)

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """Negative log-likelihood of a minibatch, and the ridge on dropout."""
        h = self.decoder.hidden(self.encode(minibatch, noise).loc, _nothing(minibatch), noise)
        theta = None
        if self.decoder.log_theta is not None:
            theta = self.decoder.log_theta(h).clamp(*_LOG_THETA).exp()
        elif self.likelihood.has_theta:
            theta = self.log_theta.clamp(*_LOG_THETA).exp()
        pi_logits = None if self.decoder.pi is None else self.decoder.pi(h)
        ridge = torch.zeros(())
        if pi_logits is not None and self.config.ridge:
            # Before the likelihood, which writes over the logits.
            ridge = self.config.ridge * pi_logits.sigmoid().square().sum(1).mean()
        size_factor, nothing = self.library(minibatch)
        reconstruction = -self.likelihood.log_prob(
            minibatch.counts,
            self.decoder.scale(h).clamp(*_LOG_MEAN),
            size_factor,
            theta,
            pi_logits,
            mean="exp",
        )
        total = reconstruction.mean() + ridge
        return LossTerms(total, reconstruction.detach(), nothing, nothing)

    def decode_log_rho(
        self, z: torch.Tensor, minibatch: Minibatch, genes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, len(genes))`` log of the mean of (4) for a size factor of 1."""
        h = self.decoder.hidden(z, _nothing(minibatch))
        return self.decoder.genes(self.decoder.scale, h, genes).clamp(*_LOG_MEAN)


def _nothing(minibatch: Minibatch) -> Covariates:
    return Covariates(minibatch.cat_covs[:, :0], minibatch.cont_covs[:, :0])


class DCA(CountModel[DCAConfig, DCAModule]):
    """Deep count autoencoder: counts in, the parameters of their distribution out.

    `expression` gives what is denoised: counts of cells as deep as the median one, and with
    ``library_size="latent"`` counts at each cell's own depth. It does not sum to one. The latent is the
    bottleneck. Batches are not removed: columns that were set up play no part. The model is at the head of
    this file; Eraslan et al. 2019.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the layers before and behind the bottleneck.
        n_latent: width of the bottleneck.
        gene_likelihood: ``"zinb"``, ``"nb"``, ``"zip"`` or ``"poisson"``.
        dispersion: one theta for each ``"gene-cell"`` or ``"gene"``.
        ridge: weight of the squared dropout probabilities; 0 as published.
        dropout_rate: of hidden units, in training.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range, or a size factor that was set up.

    Example:
        >>> DCA.setup_anndata(atlas)
        >>> model = DCA(atlas)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> denoised = model.expression(library_size="latent")
        >>> denoised.shape == (atlas.n_obs, atlas.n_vars)
        True
    """

    config_type = DCAConfig
    module_type = DCAModule
    loss_name = "-log-likelihood"

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 64,
        n_latent: int = 32,
        gene_likelihood: str = "zinb",
        dispersion: str = "gene-cell",
        *,
        ridge: float = 0.0,
        dropout_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        config = DCAConfig(n_hidden, n_latent, gene_likelihood, dispersion, ridge, dropout_rate, seed)
        super().__init__(adata, config, needs_library=False)
        if self.fields.size_factor_key is not None:
            raise OptionError(
                f"DCA has size factors of its own, total over median; set up without size_factor_key="
                f"{self.fields.size_factor_key!r}"
            )
        self._standardise()

    def _standardise(self) -> None:
        """Two passes over the cells: their totals, then the moments of (2)."""
        atlas, codes = self._data(None)
        layer = self.module.standardise

        def blocks() -> Iterator[CSR]:
            return (counts for counts, _ in atlas.iter_blocks(columns=codes.gene_columns))

        totals = np.concatenate([counts.row_sums().numpy() for counts in blocks()])
        layer.median_total.fill_(max(float(np.median(totals)), 1.0))
        total, squares = np.zeros(self.fields.n_vars), np.zeros(self.fields.n_vars)
        for counts in blocks():
            y = counts.to_scipy().astype(np.float64)
            y.data /= np.repeat(layer.size_factor(counts).double().numpy(), np.diff(y.indptr))
            np.log1p(y.data, out=y.data)
            total += y.sum(0).A1
            squares += y.multiply(y).sum(0).A1
        n = len(totals)
        variance = np.maximum(squares - total**2 / n, 0) / max(n - 1, 1)
        deviation = np.sqrt(variance)
        layer.gene_mean.copy_(torch.from_numpy(total / n))
        layer.gene_deviation.copy_(torch.from_numpy(np.where(deviation > 0, deviation, 1)))
