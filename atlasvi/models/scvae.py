"""scVAE (Grønbech et al. 2020, Bioinformatics 36, 4415): a variational autoencoder of raw counts.

Generative model of cell n, for genes g; what is not said is as in `atlasvi.models.scvi`::

    z_n ~ N(0, I)                                    latent                                     (1)
    rho_n = exp(f(z_n, s_n)), or softmax(f(z_n, s_n))                                           (2)
    mu_ng = l_n rho_ng                               l_n the cell's count sum                   (3)
    x_ng ~ Poisson, NB, ZIP or ZINB of mean mu_ng    theta and pi of each cell and gene         (4)

As published the mean is by ``exp``, where the softmax of scVI makes the means of a cell sum to its count sum.
`atlasvi.models.gmvae` has the same likelihoods under a mixture of Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atlasvi.errors import OptionError
from atlasvi.models.arguments import one_of
from atlasvi.models.base import CountModel
from atlasvi.models.scvi import SCVIConfig, SCVIModule
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    from atlasvi.models.data import Data, LibraryMoments


@dataclass(frozen=True, slots=True)
class SCVAEConfig(SCVIConfig):
    """What `SCVAE` is made of; the arguments are `SCVAE`'s own."""

    gene_likelihood: str = "nb"
    dispersion: str = "gene-cell"
    mean: str = "softmax"

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        SCVIConfig.__post_init__(self)
        one_of("mean", self.mean, ("softmax", "exp"))


class SCVAEModule(SCVIModule):
    """The networks of `SCVAE`: those of `SCVI`, whose mean may be by exp."""

    config: SCVAEConfig

    def __init__(self, config: SCVAEConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        if fields.size_factor_key is not None:
            raise OptionError(
                "the count sum is the size factor here; set up without "
                f"size_factor_key={fields.size_factor_key!r}"
            )
        super().__init__(config, fields, library)

    @property
    def mean(self) -> str:
        """``"softmax"`` or ``"exp"``."""
        return self.config.mean


class SCVAE(CountModel[SCVAEConfig, SCVAEModule]):
    """scVAE: a variational autoencoder of raw counts with a choice of likelihoods.

    The model is at the head of this file; Grønbech et al. 2020.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of encoder and decoder.
        dropout_rate: in the encoder.
        gene_likelihood: ``"poisson"``, ``"nb"``, ``"zip"`` or ``"zinb"``.
        dispersion: one theta for each ``"gene-cell"``, as published, ``"gene"``, ``"gene-batch"`` or
            ``"gene-label"``.
        mean: ``"softmax"``, or ``"exp"``, as published; then `expression` need not sum to one.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range, or a size factor that was set up.

    Example:
        >>> SCVAE.setup_anndata(atlas)
        >>> model = SCVAE(atlas, n_latent=5, gene_likelihood="poisson", mean="exp")
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> model.get_latent_representation().shape == (atlas.n_obs, 5)
        True
    """

    config_type = SCVAEConfig
    module_type = SCVAEModule

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        gene_likelihood: str = "nb",
        dispersion: str = "gene-cell",
        *,
        mean: str = "softmax",
        use_batch_norm: str = "both",
        seed: int = 0,
    ) -> None:
        config = SCVAEConfig(
            n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood,
            use_batch_norm=use_batch_norm, mean=mean, seed=seed,
        )  # fmt: skip
        super().__init__(adata, config, needs_library=False)
