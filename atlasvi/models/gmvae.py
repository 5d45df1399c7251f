"""GMVAE (Grønbech et al. 2020, Bioinformatics 36, 4415): scVAE with a mixture of Gaussians as prior.

Generative model of cell n with K components; what is not said is as in `atlasvi.models.scvae`::

    y_n ~ Categorical(1 / K)                         component                                  (1)
    z_n ~ N(m_y, diag v_y)                           latent, by component                       (2)
    x_n ~ p(x | z_n, l_n, s_n)                       Poisson, NB, ZIP or ZINB                   (3)

Inference: q(y|x) is categorical and q(z|x,y) normal, by networks that share their first layers. The negative
ELBO of a cell is a sum over all components::

    sum over y of q(y|x) [ - E log p(x|z) + KL(q(z|x,y) || p(z|y)) ] + KL(q(y|x) || p(y))       (4)

with one draw of z from each q(z|x,y). Each component costs a decoding, so with ``bound="sampled"`` training
draws ``n_draws`` components from q(y|x) instead and keeps the divergences exact. Values and gradients are
then unbiased: that of q(y|x) is by its score, with the mean of the other draws as baseline (Kool et al.
2019)::

    1/S sum over s of [ r_s + (r_s - mean of the other r) log q(y_s|x) ],   r_s = - log p(x|z_s)  (5)

whose second factor is not differentiated. Validation and every answer are by (4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from atlasvi_kernels import CSR
from torch import nn

from atlasvi.errors import OptionError
from atlasvi.infer.classify import probability_blocks
from atlasvi.models.arguments import at_least_one, one_of, refuse
from atlasvi.models.base import CountModel
from atlasvi.models.scvae import SCVAEConfig, SCVAEModule
from atlasvi.models.scvi import covariates
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, Covariates, NoiseByLabel, by_label
from atlasvi.train.schedule import TrainingPlan
from atlasvi.types import FieldMap, LossTerms, Minibatch, Mixture, Noise, Posterior, StepWeights

if TYPE_CHECKING:
    from atlasvi.models.data import Data, LibraryMoments

# Noise streams, apart from those of scVI.
_Z, _COMPONENT = 0, 3
_Z_DROPOUT = 80


@dataclass(frozen=True, slots=True)
class GMVAEConfig(SCVAEConfig):
    """What `GMVAE` is made of; the arguments are `GMVAE`'s own."""

    n_components: int = 10
    bound: str = "exact"
    n_draws: int = 2

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        SCVAEConfig.__post_init__(self)
        one_of("bound", self.bound, ("exact", "sampled"))
        at_least_one("n_components", self.n_components)
        if self.n_draws < 2:
            raise OptionError(f"n_draws must be at least 2, one to hold against the other, is {self.n_draws}")


class GMVAEModule(SCVAEModule):
    """The networks of `GMVAE`.

    Args:
        config: sizes and choices.
        fields: what is known of the data.
        library: as in `SCVIModule`.
    """

    config: GMVAEConfig
    posterior_parts = (*SCVAEModule.posterior_parts, "trunk", "assign")

    def __init__(self, config: GMVAEConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__(config, fields, library)
        self.component_loc = nn.Parameter(torch.randn(config.n_components, config.n_latent))
        self.component_log_scale = nn.Parameter(torch.zeros(config.n_components, config.n_latent))

    @property
    def rows_per_cell(self) -> int:
        """Components that each cell is decoded for at a look, if not in training."""
        return self.config.n_components

    def make_encoder(self, fields: FieldMap) -> Encoder:
        """Hidden layers on counts, shared; from there q(y | x), and with y as a covariate q(z | x, y)."""
        config = self.config
        self.trunk = self.count_mlp(fields, config.n_layers)
        self.assign = nn.Linear(config.n_hidden, config.n_components)
        mlp = MLP(
            config.n_hidden, config.n_hidden, 1, (config.n_components,), 0, inject=False,
            dropout_rate=config.dropout_rate, batch_norm=config.use_batch_norm in ("encoder", "both"),
            layer_norm=config.use_layer_norm in ("encoder", "both"), stream=_Z_DROPOUT,
        )  # fmt: skip
        return Encoder(mlp, config.n_hidden, config.n_latent)

    def prior(self) -> Mixture:
        """p(z), over components."""
        n = self.config.n_components
        log_weights = self.component_loc.new_full((n,), -math.log(n))
        return Mixture(log_weights, Posterior(self.component_loc, self.component_log_scale.exp()))

    def class_logits(self, minibatch: Minibatch, noise: Noise | None = None) -> torch.Tensor:
        """``(B, K)`` logits of q(y | x)."""
        logits: torch.Tensor = self.assign(self.trunk(minibatch.counts, covariates(minibatch), None))
        return logits

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(z | x, y) for the most probable y."""
        h = self.trunk(minibatch.counts, covariates(minibatch), noise)
        y = self.assign(h).argmax(1, keepdim=True)
        posterior: Posterior = self.encoder(h, _only(y, h), noise)
        return posterior

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """(4) of a minibatch, or in training (5), if the bound is sampled."""
        weights = weights or StepWeights()
        n_components, n_cells = self.config.n_components, len(minibatch)
        h = self.trunk(minibatch.counts, covariates(minibatch), noise)
        log_q = self.assign(h).log_softmax(-1)
        q = log_q.exp()
        codes = torch.arange(n_components, device=h.device).repeat_interleave(n_cells).unsqueeze(1)
        hs = h.repeat(n_components, 1)
        qz: Posterior = self.encoder(hs, _only(codes, hs), NoiseByLabel(noise, n_components))
        y = codes.squeeze(1)
        kl_z = qz.kl_divergence(self.component_loc[y], self.component_log_scale.exp()[y])
        kl = (q * kl_z.view(n_components, n_cells).T).sum(1) + (q * log_q).sum(1) + math.log(n_components)
        library, kl_library = self.library(minibatch, noise)
        if self.training and self.config.bound == "sampled":
            reconstruction, surrogate = self._sampled(minibatch, qz, log_q, library, noise, weights)
        else:
            z = qz.rsample(by_label(noise.normal(n_components * qz.loc.shape[1], _Z), n_components))
            each = -self.log_likelihood(
                z, library.repeat(n_components), repeated(minibatch, n_components), weights.matmul_dtype
            )
            reconstruction = surrogate = (q * each.view(n_components, n_cells).T).sum(1)
        total = (surrogate + weights.kl * kl + kl_library).mean()
        return LossTerms(total, reconstruction.detach(), kl.detach(), kl_library.detach())

    def _sampled(
        self,
        minibatch: Minibatch,
        qz: Posterior,
        log_q: torch.Tensor,
        library: torch.Tensor,
        noise: Noise,
        weights: StepWeights,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B,)`` mean reconstruction of some components drawn from q(y | x), and (5)."""
        n_draws, n_cells = self.config.n_draws, len(minibatch)
        below = noise.uniform(n_draws, _COMPONENT).T.unsqueeze(2) > log_q.detach().exp().cumsum(1)
        y = below.sum(2).clamp(max=self.config.n_components - 1)  # (S, B)
        row = (y * n_cells + torch.arange(n_cells, device=y.device)).flatten()
        drawn = Posterior(qz.loc[row], qz.scale[row])
        z = drawn.rsample(by_label(noise.normal(n_draws * qz.loc.shape[1], _Z), n_draws))
        each = -self.log_likelihood(
            z, library.repeat(n_draws), repeated(minibatch, n_draws), weights.matmul_dtype
        ).view(n_draws, n_cells)
        fixed = each.detach()
        baseline = (fixed.sum(0) - fixed) / (n_draws - 1)
        score = (fixed - baseline) * log_q.gather(1, y.T).T
        return each.mean(0), (each + score).mean(0)


def repeated(minibatch: Minibatch, n: int) -> Minibatch:
    """The same cells ``n`` times over."""
    counts = minibatch.counts
    steps = torch.arange(n, device=counts.device).unsqueeze(1) * counts.indptr[-1]
    indptr = torch.cat([counts.indptr[:1], (counts.indptr[1:] + steps).flatten()])
    return replace(
        minibatch,
        counts=CSR(indptr, counts.indices.repeat(n), counts.data.repeat(n), counts.n_vars),
        rows=minibatch.rows.repeat(n),
        batch_index=minibatch.batch_index.repeat(n),
        labels=minibatch.labels.repeat(n),
        cat_covs=minibatch.cat_covs.repeat(n, 1),
        cont_covs=minibatch.cont_covs.repeat(n, 1),
        size_factor=None if minibatch.size_factor is None else minibatch.size_factor.repeat(n),
    )


def _only(codes: torch.Tensor, like: torch.Tensor) -> Covariates:
    return Covariates(codes, like.new_empty(len(codes), 0))


class GMVAE(CountModel[GMVAEConfig, GMVAEModule]):
    """scVAE with a mixture of Gaussians as prior: latents and soft clusters of cells, learnt together.

    K is chosen by the bound on held-out cells: ``get_elbo(indices=model.validation_indices)``, higher is
    better. The latent of a cell is that of its most probable component. The divergences have their full
    weight from the first epoch. The model is at the head of this file; Grønbech et al. 2020.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_components: K.
        n_hidden: width of the hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of decoder and encoder, whose last one with y comes besides.
        dropout_rate: in the encoder.
        gene_likelihood: ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``.
        dispersion: one theta for each ``"gene-cell"``, ``"gene"``, ``"gene-batch"`` or ``"gene-label"``.
        mean: ``"softmax"``, or ``"exp"``, as published.
        bound: in training, ``"exact"``, which decodes each cell once for each component, or ``"sampled"``.
        n_draws: components that ``"sampled"`` draws for a cell, at least 2.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range, or a size factor that was set up.

    Example:
        >>> GMVAE.setup_anndata(atlas)
        >>> model = GMVAE(atlas, n_components=3, n_latent=5)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> set(model.predict()) <= {0, 1, 2}
        True
    """

    config_type = GMVAEConfig
    module_type = GMVAEModule

    def __init__(
        self,
        adata: Data,
        n_components: int = 10,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        gene_likelihood: str = "nb",
        dispersion: str = "gene-cell",
        *,
        mean: str = "softmax",
        bound: str = "exact",
        n_draws: int = 2,
        use_batch_norm: str = "both",
        seed: int = 0,
    ) -> None:
        config = GMVAEConfig(
            n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood,
            use_batch_norm=use_batch_norm, mean=mean, seed=seed, n_components=n_components, bound=bound,
            n_draws=n_draws,
        )  # fmt: skip
        super().__init__(adata, config, needs_library=False)
        # With no weight on the divergences at first, components form that they then cannot leave.
        self.plan = TrainingPlan(n_epochs_kl_warmup=None)

    def predict(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        **unsupported: object,
    ) -> Any:
        """``(n_obs,)`` int64, the most probable component of each cell, by q(y|x).

        Args:
            adata: other data; that of the model when ``None``. It need not have been set up.
            indices: positions of the cells.
            soft: a data frame of probabilities, cells x components, instead.
            batch_size: cells at a time; does not change the result.
            **unsupported: refused by name.

        Raises:
            NotTrainedError: before training.

        Example:
            >>> GMVAE.setup_anndata(atlas)
            >>> model = GMVAE(atlas, n_components=4)
            >>> model.train(max_epochs=1, enable_progress_bar=False)
            >>> model.predict(soft=True).shape == (atlas.n_obs, 4)
            True
        """
        refuse("predict", unsupported)
        self._must_be_trained()
        minibatches = self._minibatches(adata, indices, batch_size)
        probabilities = np.concatenate(list(probability_blocks(self.module, minibatches, self._device)))
        if not soft:
            return probabilities.argmax(1)
        import pandas as pd

        return pd.DataFrame(probabilities, index=self._names(adata, indices))
