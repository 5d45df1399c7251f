"""scVI (Lopez et al. 2018, Nature Methods 15, 1053): a variational autoencoder of raw counts.

Generative model of cell n with batch s_n, for genes g (equation numbers of the paper's Methods)::

    z_n ~ N(0, I)                                   latent, n_latent dimensions           (1)
    l_n ~ LogNormal(mean_s, var_s)                  library size, or observed             (2)
    rho_n = softmax(f_w(z_n, s_n))                  normalised expression, sums to 1      (3)
    w_ng ~ Gamma(shape theta_g, mean rho_ng)        overdispersion                        (4)
    y_ng ~ Poisson(l_n w_ng)                                                              (5)
    h_ng ~ Bernoulli(sigmoid(f_h(z_n, s_n)))        dropout, in ZINB and ZIP              (6)
    x_ng = 0 if h_ng else y_ng                                                            (7)

w, y and h are integrated out: x is ZINB. Inference: q(z|x) and q(log l|x) are normals whose means and
variances are networks of log(1 + x). The loss is the negative ELBO, with a weight on KL(q(z|x)||p(z))
that the schedule warms up, and, if asked for, penalties on a latent that tells batches apart (`nn.critics`).
In the place of (1) a mixture can be learnt (`nn.priors`), with log q(z|x) - log p(z) at the draw as its KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from atlasvi.errors import OptionError
from atlasvi.likelihoods import by_name
from atlasvi.models.arguments import at_least_one, one_of
from atlasvi.models.base import CountModel
from atlasvi.models.data import LibraryMoments
from atlasvi.nn.critics import BatchCritic, mmd
from atlasvi.nn.decoder import Decoder, LinearDecoder
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, Covariates
from atlasvi.nn.priors import MixturePrior, NormalPrior, VampPrior
from atlasvi.train.schedule import TrainingPlan
from atlasvi.types import (
    CountParameters,
    FieldMap,
    LossTerms,
    Minibatch,
    Mixture,
    Noise,
    Posterior,
    StepWeights,
)

if TYPE_CHECKING:
    import anndata

    from atlasvi.models.data import Data

# Noise streams of a step: what is drawn apart from dropout, and the first of each network's layers.
_Z, _LIBRARY, _PRIOR = 0, 1, 4
_ENCODER_DROPOUT, _LIBRARY_DROPOUT = 16, 32


@dataclass(frozen=True, slots=True)
class SCVIConfig:
    """What `SCVI` is made of; the arguments are `SCVI`'s own."""

    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    dispersion: str = "gene"
    gene_likelihood: str = "zinb"
    latent_distribution: str = "normal"
    use_observed_lib_size: bool = True
    encode_covariates: bool = False
    deeply_inject_covariates: bool = True
    use_batch_norm: str = "both"
    use_layer_norm: str = "none"
    seed: int = 0
    adversary: float = 0.0
    mmd: float = 0.0
    prior: str = "normal"
    n_prior_components: int = 50

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        one_of("dispersion", self.dispersion, ("gene", "gene-batch", "gene-label", "gene-cell"))
        one_of("latent_distribution", self.latent_distribution, ("normal",))
        one_of("prior", self.prior, ("normal", "mog", "vamp"))
        by_name(self.gene_likelihood)
        for name in ("use_batch_norm", "use_layer_norm"):
            one_of(name, getattr(self, name), ("encoder", "decoder", "none", "both"))
        for name in ("n_hidden", "n_latent", "n_layers", "n_prior_components"):
            at_least_one(name, getattr(self, name))
        if not 0 <= self.dropout_rate < 1:
            raise OptionError(f"dropout_rate must be in [0, 1), is {self.dropout_rate}")
        if self.prior == "vamp" and self.n_prior_components < 2:
            raise OptionError("n_prior_components must be at least 2 for prior='vamp', is 1")
        for name in ("adversary", "mmd"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} is a weight and must be at least 0, is {getattr(self, name)}")


class SCVIModule(nn.Module):
    """The networks of `SCVI`, and what they say of a minibatch.

    Args:
        config: sizes and choices.
        fields: what is known of the data: numbers of genes, batches, labels, covariates.
        library: empirical mean and variance of the log library size of each batch; needed, and used,
            only where the library size is latent.
    """

    posterior_parts: tuple[str, ...] = ("encoder", "library_encoder")
    prior_has_density = True
    library_log_mean: torch.Tensor
    library_log_var: torch.Tensor

    def __init__(self, config: SCVIConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__()
        self.config = config
        self.likelihood = by_name(config.gene_likelihood)
        self.has_size_factor = fields.size_factor_key is not None
        self.library_is_latent = not (config.use_observed_lib_size or self.has_size_factor)

        self.n_batch = fields.n_batch
        if (config.adversary or config.mmd) and fields.n_batch < 2:
            raise OptionError(
                "adversary and mmd hold batches against each other, and there is one; set up batch_key="
            )
        self.encoder = self.make_encoder(fields)
        self.decoder = self.make_decoder(fields)
        self.z_prior = self.make_prior(fields)
        if isinstance(self.z_prior, VampPrior):
            self.posterior_parts = ()  # the encoder is in the prior too
        if self.likelihood.has_theta and config.dispersion != "gene-cell":
            rows = {"gene": 1, "gene-batch": fields.n_batch, "gene-label": fields.n_labels}
            self.log_theta = nn.Parameter(torch.randn(rows[config.dispersion], fields.n_vars))
        if self.library_is_latent:
            assert library is not None
            self.library_encoder = Encoder(
                self.count_mlp(fields, 1, _LIBRARY_DROPOUT),
                config.n_hidden,
                1,
            )
            self.register_buffer("library_log_mean", torch.tensor(library.log_mean, dtype=torch.float32))
            self.register_buffer("library_log_var", torch.tensor(library.log_var, dtype=torch.float32))
        if config.adversary:
            self.critic = BatchCritic(config.n_latent, config.n_hidden, fields.n_batch)

    @torch.no_grad()
    def start_at(self, shares: torch.Tensor) -> None:
        """Let rho start near the genes' shares, so that no steps are spent on finding them."""
        # Where the mean is no softmax, or a linear decoder has no intercept, there is nothing to set.
        if not self.has_size_factor and isinstance(self.decoder.scale, nn.Linear):
            self.decoder.scale.bias.copy_(shares.log())

    def mlp(self, part: str, n_in: int, n_layers: int, covariates: FieldMap | None, stream: int = 0) -> MLP:
        """Hidden layers of the ``"encoder"`` or ``"decoder"``; only those of encoders drop out."""
        config = self.config
        return MLP(
            n_in, config.n_hidden, n_layers,
            levels_of(covariates) if covariates else (),
            len(covariates.continuous_covariate_keys) if covariates else 0,
            inject=config.deeply_inject_covariates,
            dropout_rate=config.dropout_rate if part == "encoder" else 0.0,
            batch_norm=config.use_batch_norm in (part, "both"),
            layer_norm=config.use_layer_norm in (part, "both"),
            stream=stream,
        )  # fmt: skip

    def count_mlp(self, fields: FieldMap, n_layers: int, stream: int = _ENCODER_DROPOUT) -> MLP:
        """Hidden layers of an encoder, on counts and, if asked for, covariates."""
        encoded = fields if self.config.encode_covariates else None
        return self.mlp("encoder", fields.n_vars, n_layers, encoded, stream)

    def make_encoder(self, fields: FieldMap) -> Encoder:
        """From counts to q(z | x)."""
        config = self.config
        return Encoder(self.count_mlp(fields, config.n_layers), config.n_hidden, config.n_latent)

    def make_decoder(self, fields: FieldMap) -> Decoder | LinearDecoder:
        """From z to logits: hidden layers, then heads."""
        config = self.config
        return Decoder(
            self.mlp("decoder", config.n_latent, config.n_layers, fields),
            config.n_hidden,
            fields.n_vars,
            has_pi=self.likelihood.has_pi,
            has_theta=self.likelihood.has_theta and config.dispersion == "gene-cell",
        )

    def make_prior(self, fields: FieldMap) -> NormalPrior | MixturePrior | VampPrior:
        """p(z)."""
        config = self.config
        if config.prior == "mog":
            return MixturePrior(config.n_prior_components, config.n_latent)
        if config.prior == "vamp":
            n_codes, n_continuous = len(levels_of(fields)), len(fields.continuous_covariate_keys)
            return VampPrior(config.n_prior_components, fields.n_vars, n_codes, n_continuous)
        return NormalPrior(config.n_latent)

    def prior(self) -> Mixture:
        """p(z), a mixture of one or more normals."""
        found: Mixture = self.z_prior(self._encode_pseudo_inputs)
        return found

    def _encode_pseudo_inputs(self, log_counts: torch.Tensor, covariates: Covariates) -> Posterior:
        posterior: Posterior = self.encoder(log_counts, covariates, None, own_moments=True)
        return posterior

    def from_prior(self, noise: Noise) -> Posterior:
        """For each of B new cells the component of p(z) that its z is to be drawn from."""
        return self.prior().chosen(noise.uniform(1, _PRIOR))

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(z | x)."""
        posterior: Posterior = self.encoder(minibatch.counts, covariates(minibatch), noise)
        return posterior

    def encode_library(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(log l | x); only where the library size is latent."""
        posterior: Posterior = self.library_encoder(minibatch.counts, covariates(minibatch), noise)
        return posterior

    def library(self, minibatch: Minibatch, noise: Noise | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B,)`` library size and ``(B,)`` its KL; without ``noise``, the median of q(l | x)."""
        if minibatch.size_factor is not None:
            return minibatch.size_factor, torch.zeros_like(minibatch.size_factor)
        if not self.library_is_latent:
            # A cell without counts has no log total; one count keeps the mean finite.
            total = minibatch.counts.row_sums().clamp(min=1)
            return total, torch.zeros_like(total)
        ql = self.encode_library(minibatch, noise)
        log_library = ql.loc if noise is None else ql.rsample(noise.normal(1, _LIBRARY))
        kl = ql.kl_divergence(
            self.library_log_mean[minibatch.batch_index].unsqueeze(1),
            self.library_log_var[minibatch.batch_index].sqrt().unsqueeze(1),
        )
        return log_library.squeeze(1).exp(), kl

    @property
    def mean(self) -> str:
        """How the mean is made of logits: library times ``"softmax"``, or times ``"exp"`` of `log_scale`."""
        # scvi-tools gives up the softmax here: mu = size factor * softplus.
        return "exp" if self.has_size_factor else "softmax"

    def log_scale(self, logits: torch.Tensor) -> torch.Tensor:
        """What stands in the place of the logits where they are not the head's own."""
        return F.softplus(logits).log() if self.has_size_factor else logits

    @property
    def fuses_heads(self) -> bool:
        """Whether heads and likelihood are one op, which makes no cells x genes."""
        return not self.has_size_factor

    def theta(self, minibatch: Minibatch) -> tuple[torch.Tensor | nn.Linear | None, torch.Tensor | None]:
        """Inverse dispersion, or the head of its logarithm, and the row of it that each cell takes."""
        if not self.likelihood.has_theta:
            return None, None
        if self.config.dispersion == "gene-cell":
            return self.decoder.log_theta, None
        theta = self.log_theta.exp()
        if self.config.dispersion == "gene":
            return theta.squeeze(0), None
        return theta, minibatch.batch_index if self.config.dispersion == "gene-batch" else minibatch.labels

    def log_likelihood(
        self,
        z: torch.Tensor,
        library: torch.Tensor,
        minibatch: Minibatch,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """``(B,)`` log p(x | z, l, s)."""
        decoder = self.decoder
        h = decoder.hidden(z, covariates(minibatch))
        theta, theta_index = self.theta(minibatch)
        if self.fuses_heads:
            scale, pi = decoder.heads(h)
            return self.likelihood.log_prob_of_heads(
                minibatch.counts, h, library, scale, pi, theta,
                theta_index=theta_index, mean=self.mean, matmul_dtype=matmul_dtype,
            )  # fmt: skip
        return self.likelihood.log_prob(
            minibatch.counts, self.log_scale(decoder.scale(h)), library,
            theta(h).exp() if isinstance(theta, nn.Linear) else theta,
            None if decoder.pi is None else decoder.pi(h),
            theta_index=theta_index, mean=self.mean,
        )  # fmt: skip

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """Negative ELBO of a minibatch from one draw of z (and of l): what training minimises."""
        weights = weights or StepWeights()
        qz = self.encode(minibatch, noise)
        z = qz.rsample(noise.normal(qz.loc.shape[1], _Z))
        library, kl_library = self.library(minibatch, noise)
        reconstruction = -self.log_likelihood(z, library, minibatch, weights.matmul_dtype)
        kl_z = self.prior().kl_divergence(qz, z)
        total = (reconstruction + weights.kl * kl_z + kl_library).mean() + self.penalty(z, minibatch)
        return LossTerms(total, reconstruction.detach(), kl_z.detach(), kl_library.detach())

    def penalty(self, z: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
        """What is added to the loss for a latent that tells batches apart; 0 by default."""
        config, total = self.config, z.new_zeros(())
        if config.adversary:
            guess, confusion = self.critic(z, minibatch.batch_index)
            total = total + guess + config.adversary * confusion
        if config.mmd:
            total = total + config.mmd * mmd(z, minibatch.batch_index, self.n_batch)
        return total

    def decode_log_rho(
        self, z: torch.Tensor, minibatch: Minibatch, genes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B, len(genes))`` log rho, normalised over all genes whichever are asked for."""
        return self._log_rho(self.hidden(z, minibatch), genes)

    def _log_rho(self, h: torch.Tensor, genes: torch.Tensor | None) -> torch.Tensor:
        decoder = self.decoder
        if self.mean == "exp":
            return self.log_scale(decoder.genes(decoder.scale, h, genes))
        if genes is None:
            return F.log_softmax(decoder.scale(h), dim=-1)
        return decoder.genes(decoder.scale, h, genes) - decoder.log_normaliser(h)

    def hidden(self, z: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
        """``(B, H)`` hidden units of the decoder."""
        return self.decoder.hidden(z, covariates(minibatch))

    def softmax_head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of which rho is the softmax; with size factors it is none."""
        return None if self.mean == "exp" else self.decoder.scale_weights()

    def count_parameters(
        self,
        z: torch.Tensor,
        library: torch.Tensor,
        minibatch: Minibatch,
        genes: torch.Tensor | None = None,
    ) -> CountParameters:
        """Mean before dropout, inverse dispersion and dropout logits of p(x | z, l, s)."""
        h = self.hidden(z, minibatch)
        mu = self._log_rho(h, genes).exp_() * library.unsqueeze(1)
        theta, index = self.theta(minibatch)
        if isinstance(theta, nn.Linear):
            theta = self.decoder.genes(theta, h, genes).exp()
        elif theta is not None:
            theta = theta if genes is None else theta[..., genes]
            theta = theta if index is None else theta[index]
        pi = self.decoder.pi
        return CountParameters(mu, theta, None if pi is None else self.decoder.genes(pi, h, genes))


def levels_of(fields: FieldMap) -> tuple[int, ...]:
    """Number of levels of each of the codes in `covariates`."""
    return (fields.n_batch, *fields.n_levels)


def covariates(minibatch: Minibatch) -> Covariates:
    """What is known of the cells of a minibatch besides their counts: batches, then further covariates."""
    codes = torch.cat([minibatch.batch_index.unsqueeze(1), minibatch.cat_covs], dim=1)
    return Covariates(codes, minibatch.cont_covs)


class SCVI(CountModel[SCVIConfig, SCVIModule]):
    """Single-cell variational inference: latents, normalised expression, batch removal by conditioning.

    The defaults are scvi-tools'. `SCVI.paper` has the published setting. The model is at the head of
    this file; Lopez et al. 2018.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of encoder and decoder.
        dropout_rate: in the encoder.
        dispersion: one theta for each ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
        gene_likelihood: ``"zinb"``, ``"nb"``, ``"zip"`` or ``"poisson"``.
        latent_distribution: ``"normal"``.
        use_observed_lib_size: take a cell's total as its library size, or infer it.
        encode_covariates: show batch and covariates to the encoder too.
        deeply_inject_covariates: add them to every hidden layer, or to the first only.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        use_layer_norm: likewise.
        adversary: weight, in nats a cell, of a critic that guesses batches from z and is played against.
        mmd: weight of the squared maximum mean discrepancy of z between batches; 0 as published.
        prior: of z: ``"normal"`` as published, or learnt: ``"mog"``, a mixture of normals, or ``"vamp"``,
            one of posteriors of pseudo-inputs, which begin at cells chosen at random (Tomczak and Welling
            2018).
        n_prior_components: of the mixture.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range.
        GenesError, ObsError: data that was not set up, or does not fit its set-up.

    Example:
        >>> SCVI.setup_anndata(atlas, batch_key="batch")
        >>> model = SCVI(atlas, n_latent=5)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> model.get_latent_representation().shape == (atlas.n_obs, 5)
        True
    """

    config_type = SCVIConfig
    module_type = SCVIModule

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        latent_distribution: str = "normal",
        *,
        use_observed_lib_size: bool = True,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        adversary: float = 0.0,
        mmd: float = 0.0,
        prior: str = "normal",
        n_prior_components: int = 50,
        seed: int = 0,
    ) -> None:
        config = SCVIConfig(
            n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, latent_distribution,
            use_observed_lib_size, encode_covariates, deeply_inject_covariates,
            use_batch_norm, use_layer_norm, seed, adversary, mmd, prior, n_prior_components,
        )  # fmt: skip
        super().__init__(adata, config, needs_library=not use_observed_lib_size)
        if isinstance(self.module.z_prior, VampPrior):
            self._start_pseudo_inputs(self.module.z_prior)

    def _start_pseudo_inputs(self, prior: VampPrior) -> None:
        """At cells chosen at random; with replacement where there are fewer."""
        n_obs, n = self._data(None)[0].n_obs, self.config.n_prior_components
        generator = np.random.Generator(np.random.Philox(key=self.config.seed))
        chosen = generator.choice(n_obs, n, replace=n_obs < n)
        minibatch = next(self._minibatches(None, chosen, n))
        prior.start_at(minibatch.counts, covariates(minibatch))

    @classmethod
    def paper(cls, adata: Data, *, n_latent: int = 10, gene_likelihood: str = "zinb", seed: int = 0) -> SCVI:
        """The setting of Lopez et al. 2018: batch in the encoder, latent library size, and a training
        plan of minibatches of 128 with Adam (rate 0.001, epsilon 0.01) and a KL warm-up over 400 epochs.

        Example:
            >>> SCVI.setup_anndata(atlas)
            >>> SCVI.paper(atlas).config.use_observed_lib_size
            False
        """
        model = cls(
            adata,
            n_latent=n_latent,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=False,
            encode_covariates=True,
            seed=seed,
        )
        model.plan = TrainingPlan(lr=1e-3, eps=0.01, weight_decay=1e-6, n_epochs_kl_warmup=400)
        return model

    @classmethod
    def load_query_data(
        cls,
        adata: Data,
        reference_model: SCVI | str | Path,
        *,
        unfrozen: bool = False,
        freeze_batchnorm_encoder: bool = True,
        freeze_batchnorm_decoder: bool = False,
    ) -> SCVI:
        """A model of new cells that starts from a trained one: new batches are added, the rest is frozen.

        Train it for some epochs on the query. Cells of batches that the reference knows are encoded as by
        the reference. For the query to be seen through its batch the reference needs
        ``encode_covariates=True``. What is frozen stays so when the model was saved and loaded.

        Args:
            adata: the query; it need not have been set up. Genes are matched by name; `prepare_query_anndata`
                fills missing ones.
            reference_model: the trained model, or its folder.
            unfrozen: train everything.
            freeze_batchnorm_encoder: leave the encoder's batch norms as they are.
            freeze_batchnorm_decoder: leave the decoder's batch norms as they are.

        Raises:
            ModelError: the reference is of another class.
            GenesError, ObsError: genes or columns that the query lacks.

        Example:
            >>> SCVI.setup_anndata(atlas, batch_key="batch")
            >>> reference = SCVI(atlas, n_latent=5, encode_covariates=True)
            >>> reference.train(max_epochs=1, enable_progress_bar=False)
            >>> query = SCVI.load_query_data(atlas, reference)
            >>> query.train(max_epochs=1, enable_progress_bar=False)
            >>> query.get_latent_representation().shape == (atlas.n_obs, 5)
            True
        """
        from atlasvi.models.frozen import Freeze
        from atlasvi.models.query import map_query

        freeze = Freeze(
            batchnorm_encoder=freeze_batchnorm_encoder and not unfrozen,
            batchnorm_decoder=freeze_batchnorm_decoder and not unfrozen,
            classifier=True,
            everything_else=not unfrozen,
        )
        model: SCVI = map_query(cls, adata, reference_model, freeze)
        return model

    @staticmethod
    def prepare_query_anndata(adata: anndata.AnnData, reference_model: SCVI | str | Path) -> anndata.AnnData:
        """A copy of the query with the reference's genes in their order; genes that it lacks are zero.

        Layers, obs, obsm, obsp, uns and var of the shared genes are kept; varm, varp and raw are not.

        Args:
            adata: counts in memory.
            reference_model: a model, or its folder.

        Raises:
            GenesError: no gene is shared, or one that the reference has stands twice.
            OptionError: counts that are not in memory, or an `Atlas`.
        """
        from atlasvi.models.query import prepare_query

        return prepare_query(adata, reference_model)
