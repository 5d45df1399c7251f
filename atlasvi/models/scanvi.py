"""scANVI (Xu et al. 2021, Molecular Systems Biology 17, e9620): scVI with labels that part of the cells have.

Generative model of cell n with batch s_n; what is not said is as in `atlasvi.models.scvi`::

    y_n ~ Categorical(uniform)                       label, known for some cells                (1)
    u_n ~ N(0, I)                                    what the label does not say                (2)
    z_n ~ N(m(u_n, y_n), v(u_n, y_n))                latent                                     (3)
    x_n ~ p(x | z_n, l_n, s_n)                       as in scVI                                 (4)

Inference: q(z|x) as in scVI, q(y|z) the classifier, q(u|z,y) a network. For each cell the negative ELBO is::

    - log p(x|z,l,s) + log q(z|x) + sum over y of q(y|z) [ - log p(z|u,y) + KL(q(u|z,y) || p(u)) ]
    + KL(q(y|z) || p(y)) + KL(q(l|x) || p(l))                                                   (5)

with one draw of z, and of u for each label; the divergences are weighted as the schedule says. To (5) is
added ``classification_ratio`` times the cross-entropy of q(y|z) at the mean of q(z|x), over a minibatch of
labelled cells of its own: every step has one, however few cells are labelled. This is scvi-tools' objective.

The classifier has no word for a type without labels. Such cells are told by where they lie: at squared
Mahalanobis distance::

    (m - m_y)' C_y^-1 (m - m_y)                                                                 (6)

of the mean m of q(z|x) from the cells of label y, whose own have mean m_y and covariance C_y, the posterior's
variance added, in units that 99 % of them are within (Lee et al. 2018, NeurIPS, measure a classifier's
features so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from atlasvi.errors import NotTrainedError, ObsError, OptionError
from atlasvi.infer.classify import distance_blocks, label_regions, probability_blocks
from atlasvi.infer.latent import latent_blocks
from atlasvi.models.arguments import checked_seed, refuse
from atlasvi.models.base import CountModel
from atlasvi.models.data import LibraryMoments, registered_as, with_cells
from atlasvi.models.scvi import SCVI, SCVIConfig, SCVIModule
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, Covariates, NoiseByLabel, by_label
from atlasvi.store.atlas import Atlas, as_atlas
from atlasvi.store.fields import (
    UNS_KEY,
    Codes,
    as_level,
    codes_of_known,
    from_uns,
    level_codes,
    resolve,
    uns_entry,
)
from atlasvi.stream import Epochs
from atlasvi.train.schedule import PLANS, TrainingPlan, default_epochs
from atlasvi.types import FieldMap, LossTerms, Minibatch, Noise, Posterior, StepWeights

if TYPE_CHECKING:
    import anndata
    import pandas as pd

    from atlasvi.models.data import Data

# Noise streams, apart from those of scVI.
_Z, _U, _LABEL = 0, 2, 4
_CLASSIFIER_DROPOUT, _U_DROPOUT = 48, 64
# Cells of a label from which its mean and covariance are taken.
_CELLS_PER_LABEL = 2_000


@dataclass(frozen=True, slots=True)
class SCANVIConfig(SCVIConfig):
    """What `SCANVI` is made of; the arguments are `SCANVI`'s own."""

    linear_classifier: bool = False
    classifier_n_layers: int | None = None
    classifier_n_hidden: int | None = None
    classifier_dropout_rate: float | None = None
    classification_ratio: float = 50.0
    balance_labels: bool = False

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        SCVIConfig.__post_init__(self)
        if self.dispersion == "gene-label":
            raise OptionError(
                "dispersion 'gene-label' needs the label of every cell; use 'gene', 'gene-batch' or "
                "'gene-cell'"
            )
        if self.classification_ratio < 0:
            raise OptionError(f"classification_ratio must be at least 0, is {self.classification_ratio}")
        for name in ("classifier_n_layers", "classifier_n_hidden"):
            value = getattr(self, name)
            if value is not None and (value < 1 or self.linear_classifier):
                raise OptionError(
                    f"{name}={value}: must be at least 1, and a linear classifier has no hidden layers"
                )


class Classifier(nn.Module):
    """``q(y | z) = softmax(MLP(z) W + b)``.

    Args:
        mlp: the hidden layers, or ``None`` for a linear one.
        n_in: width of what the last layer takes.
        n_labels: number of labels.
    """

    def __init__(self, mlp: MLP | None, n_in: int, n_labels: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.out = nn.Linear(n_in, n_labels)

    def forward(self, z: torch.Tensor, noise: Noise | None) -> torch.Tensor:
        """``(B, n_labels)`` logits."""
        if self.mlp is not None:
            z = self.mlp(z, Covariates(z.new_empty(len(z), 0).long(), z.new_empty(len(z), 0)), noise)
        logits: torch.Tensor = self.out(z)
        return logits


class SCANVIModule(SCVIModule):
    """The networks of `SCANVI`: those of `SCVI`, a classifier, and u given z and y and back.

    Args:
        config: sizes and choices.
        fields: what is known of the data; the last label stands for cells without one.
        library: as in `SCVIModule`.
    """

    config: SCANVIConfig
    # Not the classifier: what it says of labels was learnt from labels.
    posterior_parts = (*SCVIModule.posterior_parts, "u_encoder")
    # `prior` stays N(0, I), by which scvi-tools too weighs draws: that of (3) has none in closed form.
    prior_has_density = False
    # What neither latents nor rho depend on.
    aside = ("label_mean", "label_covariance")
    label_prior: torch.Tensor
    label_mean: torch.Tensor
    label_covariance: torch.Tensor

    def __init__(self, config: SCANVIConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__(config, fields, library)
        if fields.unlabeled_category is None or fields.n_labels < 2:
            raise OptionError(
                "SCANVI needs labels; call SCANVI.setup_anndata(adata, labels_key, unlabeled_category)"
            )
        self.n_labels = fields.n_labels - 1
        n_latent, n_hidden = config.n_latent, config.n_hidden

        def mlp(
            part: str, n_hidden: int, n_layers: int, levels: tuple[int, ...], rate: float, stream: int
        ) -> MLP:
            return MLP(
                n_latent, n_hidden, n_layers, levels, 0, inject=True, dropout_rate=rate,
                batch_norm=config.use_batch_norm in (part, "both"),
                layer_norm=config.use_layer_norm in (part, "both"), stream=stream,
            )  # fmt: skip

        if config.linear_classifier:
            self.classifier = Classifier(None, n_latent, self.n_labels)
        else:
            width, depth = (
                config.classifier_n_hidden or n_hidden,
                config.classifier_n_layers or config.n_layers,
            )
            rate = config.classifier_dropout_rate
            rate = config.dropout_rate if rate is None else rate
            hidden = mlp("encoder", width, depth, (), rate, _CLASSIFIER_DROPOUT)
            self.classifier = Classifier(hidden, width, self.n_labels)
        labels = (self.n_labels,)
        self.u_encoder = Encoder(
            mlp("encoder", n_hidden, config.n_layers, labels, config.dropout_rate, _U_DROPOUT),
            n_hidden,
            n_latent,
        )
        self.u_decoder = Encoder(
            mlp("decoder", n_hidden, config.n_layers, labels, 0.0, 0), n_hidden, n_latent, floor=0.0
        )
        self.register_buffer("label_prior", torch.full((self.n_labels,), 1 / self.n_labels))
        # m_y and C_y of (6); zeros until they are known.
        self.register_buffer("label_mean", torch.zeros(self.n_labels, n_latent))
        self.register_buffer("label_covariance", torch.zeros(self.n_labels, n_latent, n_latent))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Folders of earlier versions, and scvi-tools, do not have them.
        for name in self.aside:
            state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def class_logits(self, minibatch: Minibatch, noise: Noise | None = None) -> torch.Tensor:
        """``(B, n_labels)`` logits of q(y | z) at the mean of q(z | x), or with ``noise`` at a draw."""
        qz = self.encode(minibatch)
        z = qz.loc if noise is None else qz.rsample(noise.normal(qz.loc.shape[1], _Z))
        logits: torch.Tensor = self.classifier(z, None)
        return logits

    def from_prior(self, noise: Noise) -> Posterior:
        """p(z | u, y) of (3), for each of B new cells a draw of u and y."""
        y = torch.searchsorted(self.label_prior.cumsum(0)[:-1], noise.uniform(1, _LABEL))
        u = noise.normal(self.config.n_latent, _U)
        pz: Posterior = self.u_decoder(u, Covariates(y, u.new_empty(len(u), 0)), None)
        return pz

    def label_terms(self, z: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B,)`` the expectation of -log p(z|u,y) over q(y|z) of (5), and of the divergences of u and y."""
        n_labels, n_cells = self.n_labels, len(z)
        log_q = self.classifier(z, noise).log_softmax(-1)
        q = log_q.exp()
        codes = torch.arange(n_labels, device=z.device).repeat_interleave(n_cells).unsqueeze(1)
        labels = Covariates(codes, z.new_empty(len(codes), 0))
        zs = z.repeat(n_labels, 1)
        qu: Posterior = self.u_encoder(zs, labels, NoiseByLabel(noise, n_labels))
        u = qu.rsample(by_label(noise.normal(n_labels * z.shape[1], _U), n_labels))
        pz: Posterior = self.u_decoder(u, labels, None)
        log_pz = pz.log_prob(zs).view(n_labels, n_cells).T
        kl_u = qu.kl_divergence().view(n_labels, n_cells).T
        kl_y = (q * (log_q - self.label_prior.log())).sum(1)
        return -(q * log_pz).sum(1), (q * kl_u).sum(1) + kl_y

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """(5) of a minibatch, and the cross-entropy of the labelled cells that come with it."""
        weights = weights or StepWeights()
        qz = self.encode(minibatch, noise)
        z = qz.rsample(noise.normal(qz.loc.shape[1], _Z))
        library, kl_library = self.library(minibatch, noise)
        reconstruction = -self.log_likelihood(z, library, minibatch, weights.matmul_dtype)
        cross, divergence = self.label_terms(z, noise)
        latent = qz.log_prob(z) + cross
        total = (reconstruction + latent + weights.kl * (divergence + kl_library)).mean()
        total = total + self.penalty(z, minibatch)
        classification = self.classification_loss(minibatch, qz.loc, noise)
        if len(classification):
            total = total + classification.mean()
        kl_z = (latent + divergence).detach()
        return LossTerms(total, reconstruction.detach(), kl_z, kl_library.detach(), classification.detach())

    def classification_loss(self, minibatch: Minibatch, loc: torch.Tensor, noise: Noise) -> torch.Tensor:
        """``(L,)`` weighted cross-entropy of the labelled cells that come with a minibatch, in nats.

        Outside of training none come with it: it is that of the cells with labels in the minibatch itself,
        whose means of q(z|x) are ``loc``.
        """
        if minibatch.labelled is not None:
            labels = minibatch.labelled.labels
            noise = Noise(noise.seed, noise.step, minibatch.labelled.rows)
            logits = self.classifier(self.encode(minibatch.labelled, noise).loc, noise)
        elif not self.training:
            known = minibatch.labels < self.n_labels
            labels, logits = minibatch.labels[known], self.classifier(loc[known], None)
        else:  # a query without labels
            return loc.new_zeros(0)
        return self.config.classification_ratio * F.cross_entropy(logits, labels, reduction="none")


class WithLabelled:
    """Epochs in which a minibatch of labelled cells comes with every minibatch.

    The labelled cells are gone through as often as it takes, each time in an order of its own.

    Args:
        full: epochs of all cells to train on.
        labelled: epochs of those among them that have a label.
    """

    def __init__(self, full: Epochs, labelled: Epochs) -> None:
        self.full, self.labelled = full, labelled
        self.kept = full.kept
        # Each round has a minibatch at least.
        self._most_rounds = full.plan(0).n_minibatches

    def __call__(self, epoch: int = 0, start: int = 0) -> Iterator[Minibatch]:
        """The minibatches of an epoch from ``start``, each with a `Minibatch.labelled`."""

        def cells() -> Iterator[Minibatch]:
            skip = start
            for i in count(epoch * self._most_rounds):
                # Rounds of balanced cells, some of which come repeatedly, differ in length.
                n_minibatches = self.labelled.plan(i).n_minibatches
                if skip < n_minibatches:
                    yield from self.labelled(i, skip)
                skip = max(0, skip - n_minibatches)

        for minibatch, labelled in zip(self.full(epoch, start), cells(), strict=False):
            yield replace(minibatch, labelled=labelled)


class SCANVI(CountModel[SCANVIConfig, SCANVIModule]):
    """scVI with labels that part of the cells have: latents that separate them, and labels for the rest.

    The defaults are scvi-tools' but for the schedule of training, adaptive and told by ``validation_loss``:
    (5) and the cross-entropy of the cells kept for validation. Cells of a type that has no label get one of
    the others, often with certainty: `label_distances` tells them. The model is at the head of this file;
    Xu et al. 2021.

    Args:
        adata: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was called.
        n_hidden: width of the hidden layers.
        n_latent: dimensions of the latent.
        n_layers: hidden layers of encoder, decoder, classifier.
        dropout_rate: in the encoder and the classifier.
        dispersion: one theta for each ``"gene"``, ``"gene-batch"`` or ``"gene-cell"``.
        gene_likelihood: ``"zinb"``, ``"nb"``, ``"zip"`` or ``"poisson"``.
        use_observed_lib_size: take a cell's total as its library size, or infer it.
        linear_classifier: classify by one linear layer.
        latent_distribution: ``"normal"``.
        encode_covariates: show batch and covariates to the encoder too.
        deeply_inject_covariates: add them to every hidden layer, or to the first only.
        use_batch_norm: in ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
        use_layer_norm: likewise.
        classifier_n_layers: hidden layers of the classifier, if other than ``n_layers``.
        classifier_n_hidden: their width, if other than ``n_hidden``.
        classifier_dropout_rate: in the classifier, if other than ``dropout_rate``.
        classification_ratio: weight of the cross-entropy.
        balance_labels: let labelled cells come equally often from each label.
        adversary: as in `SCVI`.
        mmd: as in `SCVI`.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range, or data set up without labels.

    Example:
        >>> SCANVI.setup_anndata(atlas, "cell_type", "Unknown", batch_key="batch")
        >>> model = SCANVI(atlas, n_latent=5)
        >>> model.train(max_epochs=2, enable_progress_bar=False)
        >>> set(model.predict()) <= {"T", "B"}
        True
    """

    config_type = SCANVIConfig
    module_type = SCANVIModule
    # The ELBO says nothing of the labels: after a pretrained SCVI it is best when the classifier has hardly
    # learnt.
    _monitor = "validation_loss"

    def __init__(
        self,
        adata: Data,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_observed_lib_size: bool = True,
        linear_classifier: bool = False,
        *,
        latent_distribution: str = "normal",
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        classifier_n_layers: int | None = None,
        classifier_n_hidden: int | None = None,
        classifier_dropout_rate: float | None = None,
        classification_ratio: float = 50.0,
        balance_labels: bool = False,
        adversary: float = 0.0,
        mmd: float = 0.0,
        seed: int = 0,
    ) -> None:
        config = SCANVIConfig(
            n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, latent_distribution,
            use_observed_lib_size, encode_covariates, deeply_inject_covariates,
            use_batch_norm, use_layer_norm, seed, adversary, mmd, linear_classifier=linear_classifier,
            classifier_n_layers=classifier_n_layers, classifier_n_hidden=classifier_n_hidden,
            classifier_dropout_rate=classifier_dropout_rate, classification_ratio=classification_ratio,
            balance_labels=balance_labels,
        )  # fmt: skip
        super().__init__(adata, config, needs_library=not use_observed_lib_size)

    @classmethod
    def setup_anndata(  # type: ignore[override]
        cls,
        adata: Data,
        labels_key: str | None = None,
        unlabeled_category: str | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        *,
        gene_mask: str | None = "auto",
    ) -> None:
        """Say which columns the model should use; see `CountModel.setup_anndata`.

        Args:
            adata: an AnnData or an opened `Atlas`.
            labels_key: column of obs with labels.
            unlabeled_category: its level of cells without one, such as ``"Unknown"``.
            layer: where the counts of an AnnData are.
            batch_key: column of obs with the batch.
            size_factor_key: column of obs with a size factor > 0.
            categorical_covariate_keys: further columns with levels to remove.
            continuous_covariate_keys: further columns with numbers to remove.
            gene_mask: boolean column of var that chooses the genes.

        Raises:
            OptionError: no labels, or no name for what has none.
            ObsError: a column is missing, or no cell has a label.
        """
        if labels_key is None or unlabeled_category is None:
            raise OptionError(
                "SCANVI needs labels_key=, the column with labels, and unlabeled_category=, its level of "
                "cells that have none, such as 'Unknown'"
            )
        super().setup_anndata(
            adata, layer, batch_key, labels_key, size_factor_key, categorical_covariate_keys,
            continuous_covariate_keys, gene_mask=gene_mask,
        )  # fmt: skip
        fields = adata.registration if isinstance(adata, Atlas) else from_uns(adata)  # type: ignore[arg-type]
        assert fields is not None
        _register(adata, with_unlabeled(fields, unlabeled_category))

    @classmethod
    def from_scvi_model(
        cls,
        scvi_model: SCVI,
        unlabeled_category: str,
        labels_key: str | None = None,
        adata: Data | None = None,
        *,
        linear_classifier: bool = False,
        classifier_n_layers: int | None = None,
        classifier_n_hidden: int | None = None,
        classifier_dropout_rate: float | None = None,
        classification_ratio: float = 50.0,
        balance_labels: bool = False,
    ) -> SCANVI:
        """A model with the weights of a trained `SCVI`; the rest has to be trained, for few epochs.

        Its schedule is scvi-tools', 2 to 10 epochs by default: so little training hardly changes the latent,
        and leaves the classifier unsure of cells of a type that has no label. ``schedule="adaptive"``
        trains on to where the cells kept for validation gain no more.

        Args:
            scvi_model: whose options, genes, columns and weights are taken.
            unlabeled_category: level of the labels' column of cells without one.
            labels_key: column of obs with labels, if the `SCVI` was set up without.
            adata: data to train on; those of the `SCVI` when ``None``.
            linear_classifier: as in `SCANVI`, and so are the rest.
            classifier_n_layers: see there.
            classifier_n_hidden: see there.
            classifier_dropout_rate: see there.
            classification_ratio: see there.
            balance_labels: see there.

        Raises:
            NotTrainedError: the `SCVI` is not trained.
            OptionError: no labels' column.

        Example:
            >>> SCVI.setup_anndata(atlas, batch_key="batch")
            >>> scvi = SCVI(atlas, n_latent=5)
            >>> scvi.train(max_epochs=1, enable_progress_bar=False)
            >>> model = SCANVI.from_scvi_model(scvi, "Unknown", "cell_type")
            >>> model.train(max_epochs=1, enable_progress_bar=False)
            >>> model.predict(soft=True).shape == (atlas.n_obs, 2)
            True
        """
        if not scvi_model.is_trained:
            raise NotTrainedError("the SCVI is not trained; call its train() first")
        key = labels_key or scvi_model.fields.labels_key
        if key is None:
            raise OptionError("from_scvi_model needs labels_key=, the column of obs with labels")
        atlas, _ = scvi_model._data(adata)
        _, levels = level_codes(atlas, key)
        fields = replace(scvi_model.fields, labels_key=key, labels_categories=levels)
        c = scvi_model.config
        with registered_as(atlas, with_unlabeled(fields, unlabeled_category)):
            model = cls(
                atlas, c.n_hidden, c.n_latent, c.n_layers, c.dropout_rate, c.dispersion, c.gene_likelihood,
                c.use_observed_lib_size, linear_classifier, latent_distribution=c.latent_distribution,
                encode_covariates=c.encode_covariates, deeply_inject_covariates=c.deeply_inject_covariates,
                use_batch_norm=c.use_batch_norm, use_layer_norm=c.use_layer_norm,
                classifier_n_layers=classifier_n_layers, classifier_n_hidden=classifier_n_hidden,
                classifier_dropout_rate=classifier_dropout_rate, classification_ratio=classification_ratio,
                balance_labels=balance_labels, seed=c.seed,
            )  # fmt: skip
        # Its prior and the critic that it was played against stay behind.
        theirs = scvi_model.module.state_dict()
        model.module.load_state_dict(
            {name: theirs.get(name, own) for name, own in model.module.state_dict().items()}
        )
        model._was_pretrained = True
        # Trained to the end, it gives cells of a type that nobody labelled to another with certainty.
        model.plan = PLANS["scvi-tools"]
        return model

    @classmethod
    def load_query_data(
        cls,
        adata: Data,
        reference_model: SCANVI | str | Path,
        *,
        unfrozen: bool = False,
        freeze_batchnorm_encoder: bool = True,
        freeze_batchnorm_decoder: bool = False,
        freeze_classifier: bool = True,
    ) -> SCANVI:
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
            freeze_classifier: leave the classifier as it is.

        Raises:
            ModelError: the reference is of another class.
            GenesError, ObsError: genes or columns that the query lacks.

        Example:
            >>> SCANVI.setup_anndata(atlas, "cell_type", "Unknown", batch_key="batch")
            >>> reference = SCANVI(atlas, n_latent=5, encode_covariates=True)
            >>> reference.train(max_epochs=1, enable_progress_bar=False)
            >>> query = SCANVI.load_query_data(atlas, reference)
            >>> query.train(max_epochs=1, enable_progress_bar=False)
            >>> query.get_latent_representation().shape == (atlas.n_obs, 5)
            True
        """
        from atlasvi.models.frozen import Freeze
        from atlasvi.models.query import map_query

        freeze = Freeze(
            batchnorm_encoder=freeze_batchnorm_encoder and not unfrozen,
            batchnorm_decoder=freeze_batchnorm_decoder and not unfrozen,
            classifier=freeze_classifier and not unfrozen,
            everything_else=not unfrozen,
        )
        model: SCANVI = map_query(cls, adata, reference_model, freeze)
        return model

    @staticmethod
    def prepare_query_anndata(
        adata: anndata.AnnData, reference_model: SCANVI | str | Path
    ) -> anndata.AnnData:
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

    _was_pretrained = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it knows, in the order of `predict`'s columns."""
        return self.fields.labels_categories[:-1]

    def predict(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        use_posterior_mean: bool = True,
        *,
        max_distance: float | None = None,
        seed: int = 0,
        **unsupported: object,
    ) -> Any:
        """A label for each cell; those it has are not looked at, and other data need have none.

        Args:
            adata: other data; that of the model when ``None``. It need not have been set up.
            indices: positions of the cells.
            soft: a data frame of probabilities, cells x labels, instead.
            batch_size: cells at a time; does not change the result.
            use_posterior_mean: classify the mean of q(z|x), or a draw.
            max_distance: cells that lie farther from every label, not only from the one that they are
                called by, get the name of those without one; see `label_distances`. Not with ``soft``.
            seed: of the draw.
            **unsupported: refused by name.

        Raises:
            NotTrainedError: before training.
            OptionError: a distance with ``soft``, or one that is not above 0.

        Example:
            >>> SCANVI.setup_anndata(atlas, "cell_type", "Unknown")
            >>> model = SCANVI(atlas)
            >>> model.train(max_epochs=1, enable_progress_bar=False)
            >>> bool(np.allclose(model.predict(soft=True).sum(axis=1), 1))
            True
        """
        refuse("predict", unsupported)
        self._must_be_trained()
        if max_distance is not None and (soft or not max_distance > 0):
            raise OptionError(
                f"max_distance={max_distance}: must be above 0, and is for labels, not for probabilities "
                "(soft=True); label_distances() has the distances themselves"
            )
        blocks = probability_blocks(
            self.module, self._minibatches(adata, indices, batch_size), self._device,
            seed=None if use_posterior_mean else seed,
        )  # fmt: skip
        probabilities = np.concatenate(list(blocks))
        if not soft:
            called = np.array(self.labels, dtype=object)[probabilities.argmax(1)]
            if max_distance is not None:
                far = [far.min(1) for far in self._distance_blocks(adata, indices, batch_size)]
                called[np.concatenate(far) > max_distance] = self.fields.unlabeled_category
            return called
        import pandas as pd

        return pd.DataFrame(probabilities, index=self._names(adata, indices), columns=list(self.labels))

    def label_distances(
        self, adata: Data | None = None, indices: Sequence[int] | None = None, batch_size: int | None = None
    ) -> pd.DataFrame:
        """How far each cell lies from the labelled cells of each label: cells x labels, float64.

        The root of (6): 99 % of the cells that have a label are within 1 of it. A cell beyond 1 of all
        labels is unlike nearly all that have one: of a type without label, or measured otherwise. A
        probability does not say so: it compares labels with each other. A label of which no cell was seen is
        infinitely far.

        Args:
            adata: other data; that of the model when ``None``. It need not have been set up.
            indices: positions of the cells.
            batch_size: cells at a time; does not change the result.

        Raises:
            NotTrainedError: before training.
            OptionError: it is not known where labels lie: call `locate_labels`.

        Example:
            >>> SCANVI.setup_anndata(atlas, "cell_type", "Unknown")
            >>> model = SCANVI(atlas)
            >>> model.train(max_epochs=2, enable_progress_bar=False)
            >>> is_t = atlas.obs["cell_type"] == "T"
            >>> bool((model.label_distances()["T"].to_numpy()[is_t] <= 1).mean() > 0.95)
            True
        """
        import pandas as pd

        self._must_be_trained()
        far = np.concatenate(list(self._distance_blocks(adata, indices, batch_size)))
        return pd.DataFrame(far, index=self._names(adata, indices), columns=list(self.labels))

    def locate_labels(self, adata: Data | None = None, *, seed: int = 0) -> None:
        """Find where the labels' cells lie, for `label_distances`: m_y and C_y of (6).

        `train` ends with it. It is for models that were trained before there was this, or by scvi-tools.
        Of each label up to 2,000 cells are taken, at random; one without cells is infinitely far from all.

        Args:
            adata: cells with labels; those of the model when ``None``.
            seed: of the choice.

        Raises:
            NotTrainedError: before training.
            ObsError: no cell has one of the model's labels.

        Example:
            >>> SCANVI.setup_anndata(atlas, "cell_type", "Unknown")
            >>> model = SCANVI(atlas)
            >>> model.train(max_epochs=2, enable_progress_bar=False)
            >>> model.locate_labels(seed=1)
        """
        self._must_be_trained()
        _, codes = self._data(adata)
        rng = np.random.Generator(np.random.Philox(key=checked_seed(seed)))
        n_most = _CELLS_PER_LABEL
        of_label = (np.flatnonzero(codes.labels == k) for k in range(self.module.n_labels))
        few = (of if len(of) <= n_most else rng.choice(of, n_most, replace=False) for of in of_label)
        some = np.sort(np.concatenate(list(few)))
        if not len(some):
            raise ObsError(
                f"no cell has one of the labels {', '.join(map(repr, self.labels[:3]))} in obs column "
                f"{self.fields.labels_key!r}; give cells that have"
            )
        means, covariances = label_regions(
            self.module, self._minibatches(adata, some, None), self._device, codes.labels[some],
            self.module.n_labels,
        )  # fmt: skip
        self.module.label_mean.copy_(torch.from_numpy(means))
        self.module.label_covariance.copy_(torch.from_numpy(covariances))

    def _distance_blocks(
        self, data: Data | None, indices: Any, batch_size: int | None
    ) -> Iterator[NDArray[np.float64]]:
        means, covariances = (
            values.double().cpu().numpy() for values in (self.module.label_mean, self.module.label_covariance)
        )
        if not covariances.any():
            raise OptionError(
                "it is not known where the cells of each label lie: training did not reach its end, moved "
                "latents without labels, or was by an earlier version or scvi-tools; call the model's "
                "locate_labels() with cells that have labels, and save it"
            )
        blocks = latent_blocks(self.module, self._minibatches(data, indices, batch_size), self._device)
        return distance_blocks((loc for loc, _ in blocks), means, covariances)

    def _data(self, data: Data | None) -> tuple[Atlas, Codes]:
        """As of any model; cells of other data that have other labels, or none, count as without one."""
        if data is None:
            return super()._data(None)
        atlas, fields = with_cells(as_atlas(data, layer=self.fields.layer)), self.fields
        labels = codes_of_known(atlas, fields.labels_key, fields.labels_categories, self.module.n_labels)
        return atlas, replace(resolve(replace(fields, labels_key=None), atlas), labels=labels)

    def _training_epochs(self, epochs: Callable[..., Epochs], training: NDArray[np.integer]) -> Any:
        _, codes = self._data(None)
        labels = codes.labels[training]
        has_label = labels < self.module.n_labels
        if has_label.sum() < 3 and self.origin is not None:
            # A query may have none, or too few for a minibatch: what there is to learn of labels is learnt.
            return epochs(positions=training)
        if has_label.sum() < 3:
            raise ObsError(
                f"{has_label.sum()} of the {len(training):,} cells to train on have a label in obs column "
                f"{self.fields.labels_key!r}; at least 3 are needed: raise train_size, or label some cells"
            )
        labels = labels[has_label]
        weights = None
        if self.config.balance_labels:
            weights = (1 / np.bincount(labels, minlength=self.module.n_labels).clip(1))[labels]
        # Of several processes each has all that are labelled, few as they may be: the mean over them is that
        # of one process.
        labelled = epochs(positions=training[has_label], weights=weights, rank=0, world_size=1)
        return WithLabelled(epochs(positions=training), labelled)

    @property
    def _starts_afresh(self) -> bool:
        return not (self.is_trained or self._was_pretrained)

    def _forget_latents(self) -> None:
        self.module.label_mean.zero_()
        self.module.label_covariance.zero_()

    def _learn_latents(self) -> None:
        _, codes = self._data(None)
        # A query may have cells of some labels alone.
        if len(np.unique(codes.labels[codes.labels < self.module.n_labels])) == self.module.n_labels:
            self.locate_labels()

    def _default_epochs(self, n_obs: int, plan: TrainingPlan) -> int:
        most = default_epochs(n_obs)
        # Of a model that is mostly trained already, scvi-tools' rule, unless training ends by itself.
        ends_late = self._was_pretrained and plan.patience is None
        return min(10, max(2, round(most / 3))) if ends_late else most


def with_unlabeled(fields: FieldMap, unlabeled_category: str) -> FieldMap:
    """With the level of cells without a label last, whether or not the data have such cells.

    Raises:
        ObsError: no other level is left.
    """
    level = as_level(unlabeled_category)
    known = tuple(name for name in fields.labels_categories if name != level)
    if not known:
        raise ObsError(
            f"obs column {fields.labels_key!r} has no level but {level!r}, that of cells without a label; "
            "label some cells"
        )
    return replace(fields, labels_categories=(*known, level), unlabeled_category=level)


def _register(adata: Data, fields: FieldMap) -> None:
    if isinstance(adata, Atlas):
        adata.registration = fields
    else:
        assert not isinstance(adata, str | Path)
        adata.uns[UNS_KEY] = uns_entry(fields)
