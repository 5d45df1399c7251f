"""LDVAE (Svensson et al. 2020, Bioinformatics 36, 3418): scVI with a linear decoder, to read its weights.

Generative model of cell n with batch s_n, for genes g; what is not said is as in `atlasvi.models.scvi`::

    z_n ~ N(0, I)                                    latent                              (1)
    l_n ~ LogNormal(mean_s, var_s)                   library size, or observed           (2)
    rho_n = softmax(norm(W z_n + V s_n))             normalised expression               (3)
    x_ng ~ NB(l_n rho_ng, theta_g)                   counts; or ZINB, ZIP, Poisson       (4)

``norm`` is a batch normalisation of each gene's logit over cells: ``(a - m_g) b_g + c_g``, with m_g the
running mean and b_g the learnt scale over the running deviation. The loadings are ``b_g W_gk``: a cell that
moves by one along z_k changes the log of gene g's expression by that much, up to a constant of the cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atlasvi.errors import OptionError
from atlasvi.models.base import CountModel
from atlasvi.models.scvi import SCVIConfig, SCVIModule, levels_of
from atlasvi.nn.decoder import LinearDecoder
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    import pandas as pd

    from atlasvi.models.data import Data


@dataclass(frozen=True, slots=True)
class LinearSCVIConfig(SCVIConfig):
    """What `LinearSCVI` is made of; the arguments are `LinearSCVI`'s own."""

    gene_likelihood: str = "nb"
    use_observed_lib_size: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        SCVIConfig.__post_init__(self)
        if self.dispersion == "gene-cell":
            raise OptionError(
                "dispersion 'gene-cell' needs hidden layers, and a linear decoder has none; use 'gene', "
                "'gene-batch' or 'gene-label', or SCVI"
            )


class LinearSCVIModule(SCVIModule):
    """The networks of `LinearSCVI`: those of `SCVI` with a linear decoder."""

    config: LinearSCVIConfig
    decoder: LinearDecoder

    def make_decoder(self, fields: FieldMap) -> LinearDecoder:
        """From z to logits."""
        config = self.config
        return LinearDecoder(
            config.n_latent,
            levels_of(fields),
            len(fields.continuous_covariate_keys),
            fields.n_vars,
            has_pi=self.likelihood.has_pi,
            bias=config.bias,
            batch_norm=config.use_batch_norm in ("decoder", "both"),
        )


class LinearSCVI(CountModel[LinearSCVIConfig, LinearSCVIModule]):
    """scVI with a linear decoder: latents whose dimensions are weighted sums of genes.

    The defaults are scvi-tools'. The model is at the head of this file; Svensson et al. 2020.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the encoder's hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of the encoder.
        dropout_rate: in the encoder.
        dispersion: one theta for each ``"gene"``, ``"gene-batch"`` or ``"gene-label"``.
        gene_likelihood: ``"zinb"``, ``"nb"``, ``"zip"`` or ``"poisson"``.
        use_observed_lib_size: take a cell's total as its library size, or infer it.
        latent_distribution: ``"normal"``.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        bias: a constant for each gene besides that of the norm.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range.
        GenesError, ObsError: data that was not set up, or does not fit its set-up.

    Example:
        >>> LinearSCVI.setup_anndata(atlas, batch_key="batch")
        >>> model = LinearSCVI(atlas, n_latent=5)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> model.get_loadings().shape == (atlas.n_vars, 5)
        True
    """

    config_type = LinearSCVIConfig
    module_type = LinearSCVIModule

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "nb",
        use_observed_lib_size: bool = False,
        latent_distribution: str = "normal",
        *,
        use_batch_norm: str = "both",
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        config = LinearSCVIConfig(
            n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, latent_distribution,
            use_observed_lib_size, use_batch_norm=use_batch_norm, bias=bias, seed=seed,
        )  # fmt: skip
        super().__init__(adata, config, needs_library=not use_observed_lib_size)

    def get_loadings(self) -> pd.DataFrame:
        """Genes x ``n_latent``: the change of each gene's log expression along each dimension of z.

        Those of batches are left out. Dimensions are named ``Z_0``, ``Z_1``, ..., as in scvi-tools.

        Raises:
            NotTrainedError: before training.

        Example:
            >>> LinearSCVI.setup_anndata(atlas)
            >>> model = LinearSCVI(atlas, n_latent=2)
            >>> model.train(max_epochs=1, enable_progress_bar=False)
            >>> list(model.get_loadings().columns)
            ['Z_0', 'Z_1']
        """
        import pandas as pd

        self._must_be_trained()
        weight, _ = self.module.decoder.scale.folded()
        n = self.config.n_latent
        return pd.DataFrame(
            weight[:, :n].detach().cpu().numpy(),
            index=list(self.fields.var_names),
            columns=[f"Z_{k}" for k in range(n)],
        )
