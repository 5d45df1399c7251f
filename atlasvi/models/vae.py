"""The variational autoencoder of log counts that lectures begin with (Kingma and Welling 2014, ICLR).

Generative model of cell n, for y = log(1 + x); what is not said is as in `atlasvi.models.scvi`::

    z_n ~ N(0, I)                                    latent                                     (1)
    m_n = W h(z_n, s_n) + b                          mean, h hidden layers                      (2)
    y_ng ~ N(m_ng, v_g)                              a variance for each gene                   (3)
    log p(x_n) = log p(y_n) - sum over g of log(1 + x_ng)          change of variables         (4)

(4) is the Jacobian of log(1 + x): with it the ELBO stands in one table with those of counts, and with the
log-likelihoods of `atlasvi.models.factor`. It is `atlasvi.models.factor` with (2) in the place of a line.

The sum of squares is written out, and the B x G means are never made: with W and b as one matrix, V for the
diagonal of the v_g, and h with a 1 behind it::

    sum over g of (y_g - m_g)^2 / v_g  =  y' V^-1 y  -  2 (y' V^-1 W) h  +  h' (W' V^-1 W) h         (5)

What is with y are sparse products, and the last is with a matrix as wide as h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from atlasvi_kernels import CSR, csr_linear
from torch import nn

from atlasvi.errors import OptionError
from atlasvi.models.arguments import at_least_one, one_of
from atlasvi.models.base import CountModel
from atlasvi.models.scvi import covariates, levels_of
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP
from atlasvi.types import FieldMap, LossTerms, Minibatch, Noise, Posterior, StepWeights

if TYPE_CHECKING:
    from atlasvi.models.data import Data, LibraryMoments

_Z, _DROPOUT = 0, 16
# Added to v: a gene that no cell of a minibatch has would else have a density without bound.
_LEAST_VARIANCE = 1e-3


@dataclass(frozen=True, slots=True)
class GaussianVAEConfig:
    """What `GaussianVAE` is made of; the arguments are `GaussianVAE`'s own."""

    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    use_batch_norm: str = "both"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        one_of("use_batch_norm", self.use_batch_norm, ("encoder", "decoder", "none", "both"))
        for name in ("n_hidden", "n_latent", "n_layers"):
            at_least_one(name, getattr(self, name))
        if not 0 <= self.dropout_rate < 1:
            raise OptionError(f"dropout_rate must be in [0, 1), is {self.dropout_rate}")


class GaussianVAEModule(nn.Module):
    """The networks of `GaussianVAE`, and what they say of a minibatch.

    Args:
        config: sizes and choices.
        fields: what is known of the data.
        library: not used.
    """

    posterior_parts: tuple[str, ...] = ("encoder",)
    fuses_heads = True

    def __init__(self, config: GaussianVAEConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__()

        def mlp(part: str, n_in: int, n_levels: tuple[int, ...], n_continuous: int) -> MLP:
            return MLP(
                n_in, config.n_hidden, config.n_layers, n_levels, n_continuous, inject=True,
                dropout_rate=config.dropout_rate if part == "encoder" else 0.0,
                batch_norm=config.use_batch_norm in (part, "both"), layer_norm=False, stream=_DROPOUT,
            )  # fmt: skip

        self.encoder = Encoder(mlp("encoder", fields.n_vars, (), 0), config.n_hidden, config.n_latent)
        n_continuous = len(fields.continuous_covariate_keys)
        self.hidden = mlp("decoder", config.n_latent, levels_of(fields), n_continuous)
        self.mean = nn.Linear(config.n_hidden, fields.n_vars)
        self.log_variance = nn.Parameter(torch.zeros(fields.n_vars))

    def encode(self, minibatch: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(z | x)."""
        posterior: Posterior = self.encoder(minibatch.counts, covariates(minibatch), noise)
        return posterior

    def log_likelihood(self, z: torch.Tensor, minibatch: Minibatch) -> torch.Tensor:
        """``(B,)`` log p(x | z, s) by (3), (4) and (5)."""
        counts = minibatch.counts
        y = CSR(counts.indptr, counts.indices, counts.data.float().log1p(), counts.n_vars)
        y2 = CSR(counts.indptr, counts.indices, y.data.square(), counts.n_vars)
        h = self.hidden(z, covariates(minibatch), None)
        h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        weight = torch.cat([self.mean.weight, self.mean.bias.unsqueeze(1)], dim=1)  # (G, H + 1)
        variance = (self.log_variance.exp() + _LEAST_VARIANCE).unsqueeze(1)
        scaled = weight / variance
        squares = csr_linear(y2, 1 / variance, transform="none").squeeze(1)
        squares = squares - 2 * (csr_linear(y, scaled, transform="none") * h).sum(1)
        squares = squares + (h @ (weight.T @ scaled) * h).sum(1)
        log_py = -0.5 * (squares + variance.log().sum() + counts.n_vars * math.log(2 * math.pi))
        return log_py - y.row_sums()

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """Negative ELBO of a minibatch from one draw of z."""
        weights = weights or StepWeights()
        qz = self.encode(minibatch, noise)
        z = qz.rsample(noise.normal(qz.loc.shape[1], _Z))
        reconstruction = -self.log_likelihood(z, minibatch)
        kl_z = qz.kl_divergence()
        total = (reconstruction + weights.kl * kl_z).mean()
        return LossTerms(total, reconstruction.detach(), kl_z.detach(), torch.zeros_like(kl_z))


class GaussianVAE(CountModel[GaussianVAEConfig, GaussianVAEModule]):
    """A variational autoencoder of log(1 + counts) with normal likelihood: the baseline of count models.

    It has latents and an ELBO, and no expression of cells. Leave out genes that hardly any cell has: their
    variance, and a held-out cell that has them, would decide the likelihood. The model is at the head of this
    file.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of encoder and decoder.
        dropout_rate: in the encoder.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range.

    Example:
        >>> GaussianVAE.setup_anndata(atlas, batch_key="batch")
        >>> model = GaussianVAE(atlas, n_latent=5)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> model.get_elbo(indices=model.validation_indices) < 0  # nats a cell, of counts
        True
    """

    config_type = GaussianVAEConfig
    module_type = GaussianVAEModule

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        *,
        use_batch_norm: str = "both",
        seed: int = 0,
    ) -> None:
        config = GaussianVAEConfig(n_hidden, n_latent, n_layers, dropout_rate, use_batch_norm, seed)
        super().__init__(adata, config, needs_library=False)
