"""ACTINN (Ma and Pellegrini 2020, Bioinformatics 36, 533): a classifier of cells from labelled ones.

Model of cell n with label y, for genes g that reference and query share and that are neither among the
highest and lowest 1 % by mean, nor, of those left, among those by standard deviation of (2)::

    x_ng = log2(10,000 (c_ng + 1) / total_n)         as in lectures ("lecture"), or                   (1)
    x_ng = log2(1 + 10,000 c_ng / total_n)           as published ("published")                       (2)
    h = relu(relu(relu(x W_1) W_2) W_3)              100, 50 and 25 units                             (3)
    y ~ Categorical(softmax(h W_4))                                                                   (4)

``total_n`` is the cell's count over all genes shared. (1) is not 0 where the count is, but log2(c + 1) plus a
number of the cell, log2(10,000 / total): with w the sum over genes of W_1 the first layer is
``log2(c + 1) W_1 + log2(10,000 / total) w``, and the counts stay sparse.

What is minimised is the cross-entropy, with an L2 penalty as published (here on biases too). Probabilities
are calibrated by one temperature T, fitted to the cells kept for validation (Guo et al. 2017, Proceedings of
ICML 70, 1321): softmax(h W_4 / T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from atlasvi_kernels import CSR, csr_linear
from numpy.typing import NDArray
from torch import nn

from atlasvi.errors import GenesError, ObsError, OptionError
from atlasvi.infer.classify import probability_blocks
from atlasvi.models.arguments import cell_positions, one_of, refuse
from atlasvi.models.base import CountModel
from atlasvi.models.data import registered, registered_as, with_cells
from atlasvi.store.atlas import Atlas, as_atlas
from atlasvi.store.fields import Codes, codes_of_known, resolve
from atlasvi.stream import Epochs
from atlasvi.train.schedule import TrainingPlan
from atlasvi.types import FieldMap, LossTerms, Minibatch, Noise, StepWeights

if TYPE_CHECKING:
    from atlasvi.models.data import Data, LibraryMoments

_SCALE = 1e4
_DROPOUT = 16
_QUANTILES = (1.0, 99.0)


@dataclass(frozen=True, slots=True)
class ACTINNConfig:
    """What `ACTINN` is made of; the arguments are `ACTINN`'s own."""

    transform: str = "published"
    filter_genes: bool = True
    dropout_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the model cannot be."""
        one_of("transform", self.transform, ("published", "lecture"))
        if not 0 <= self.dropout_rate < 1:
            raise OptionError(f"dropout_rate must be in [0, 1), is {self.dropout_rate}")


class ACTINNModule(nn.Module):
    """The network of `ACTINN`.

    Args:
        config: sizes and choices.
        fields: what is known of the data; its labels are those to tell apart.
        library: not used.
    """

    uses: torch.Tensor
    temperature: torch.Tensor

    def __init__(self, config: ACTINNConfig, fields: FieldMap, library: LibraryMoments | None) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(fields.n_vars, 100))
        self.bias = nn.Parameter(torch.zeros(100))
        hidden = [nn.Linear(100, 50), nn.Linear(50, 25), nn.Linear(25, fields.n_labels)]
        nn.init.xavier_uniform_(self.weight)
        for layer in hidden:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        # 1 for genes that are looked at, 0 for those that are left out.
        self.register_buffer("uses", torch.ones(fields.n_vars))
        self.register_buffer("temperature", torch.ones(()))

    def first(self, counts: CSR) -> torch.Tensor:
        """``(B, 100)``: (1) or (2) times W_1, plus its bias."""
        weight = self.weight * self.uses.unsqueeze(1)
        # log2(y) is log(y) / log(2).
        per_log = weight / math.log(2)
        per_total = _SCALE / counts.row_sums().clamp(min=1)
        if self.config.transform == "published":
            return csr_linear(counts, per_log, self.bias, transform="log1p", scale=per_total)
        out = csr_linear(counts, per_log, self.bias, transform="log1p")
        return out + per_total.log2().unsqueeze(1) * weight.sum(0)

    def class_logits(self, minibatch: Minibatch, noise: Noise | None = None) -> torch.Tensor:
        """``(B, n_labels)`` logits over T."""
        h = self.first(minibatch.counts)
        for i, layer in enumerate(self.hidden):
            h = F.relu(h)
            if self.training and self.config.dropout_rate > 0 and noise is not None:
                kept = noise.kept(h.shape[1], _DROPOUT + i, self.config.dropout_rate)
                h = h * kept / (1 - self.config.dropout_rate)
            h = layer(h)
        return h / self.temperature

    def loss(self, minibatch: Minibatch, noise: Noise, weights: StepWeights | None = None) -> LossTerms:
        """Cross-entropy of a minibatch, in nats."""
        loss = F.cross_entropy(self.class_logits(minibatch, noise), minibatch.labels, reduction="none")
        nothing = torch.zeros_like(loss)
        return LossTerms(loss.mean(), loss.detach(), nothing, nothing)


class ACTINN(CountModel[ACTINNConfig, ACTINNModule]):
    """A small classifier of cells: labels of a reference for the cells of a query.

    The model is at the head of this file; Ma and Pellegrini 2020. ``elbo_*`` of its history is cross-entropy.

    Args:
        adata: the labelled reference: an `Atlas`, the path of one, or an AnnData on which `setup_anndata` was
            called with ``labels_key``.
        query: data whose genes the model is to make do with: of the reference's genes, those that the query
            lacks are left out.
        transform: ``"published"``, equation (2), or ``"lecture"``, equation (1).
        filter_genes: leave out the genes that are extreme in mean, then in standard deviation.
        dropout_rate: of hidden units in training; 0 as published.
        seed: of the initial weights.

    Raises:
        OptionError: an argument out of its range, or data set up without ``labels_key``.
        ObsError: one label only.
        GenesError: no gene is shared with the query.

    Example:
        >>> ACTINN.setup_anndata(atlas, labels_key="cell_type")
        >>> model = ACTINN(atlas)
        >>> model.train(max_epochs=5, enable_progress_bar=False)
        >>> set(model.predict()) <= {"T", "B"}
        True
    """

    config_type = ACTINNConfig
    module_type = ACTINNModule
    needs_many_cells = False
    loss_name = "cross-entropy"

    def __init__(
        self,
        adata: Data,
        query: Data | None = None,
        *,
        transform: str = "published",
        filter_genes: bool = True,
        dropout_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        atlas, fields = registered(adata, "ACTINN")
        if fields.labels_key is None:
            raise OptionError(
                "ACTINN learns labels; set up with labels_key=, the column of obs that has them"
            )
        if fields.n_labels < 2:
            raise ObsError(
                f"obs column {fields.labels_key!r} has one label, {fields.labels_categories[0]!r}; there is "
                "nothing to tell apart"
            )
        if query is not None:
            fields = replace(fields, var_names=_shared(fields, as_atlas(query, layer=fields.layer)))
        config = ACTINNConfig(transform, filter_genes, dropout_rate, seed)
        with registered_as(atlas, fields):
            super().__init__(atlas, config, needs_library=False)
        # As published, but for a rate that does not fall.
        self.plan = TrainingPlan(lr=1e-4, eps=1e-8, weight_decay=0.01, n_epochs_kl_warmup=None)
        if filter_genes:
            self.module.uses.copy_(torch.from_numpy(self._without_extremes()))

    def _without_extremes(self) -> NDArray[np.bool_]:
        """``(G,)`` whether a gene is between the 1st and 99th percentile of mean, then of deviation."""
        atlas, codes = self._data(None)
        n_vars = self.fields.n_vars
        n, total, squares = 0, np.zeros(n_vars), np.zeros(n_vars)
        for counts, _ in atlas.iter_blocks(columns=codes.gene_columns):
            y = counts.to_scipy().astype(np.float64)
            per_total = _SCALE / counts.row_sums().clamp(min=1).double().numpy()
            y.data = np.log2(1 + y.data * np.repeat(per_total, np.diff(y.indptr)))
            n += y.shape[0]
            total += y.sum(0).A1
            squares += y.multiply(y).sum(0).A1
        deviation = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
        uses = np.ones(n_vars, bool)
        for of_gene in (total / n, deviation):
            low, high = np.percentile(of_gene[uses], _QUANTILES)
            uses = uses & (of_gene >= low) & (of_gene <= high)
            if not uses.any():
                raise GenesError(
                    f"of {n_vars} genes that both have, none is left once the extremes are dropped; ACTINN "
                    "needs more genes in common"
                )
        return uses

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it knows, in the order of `predict`'s columns."""
        return self.fields.labels_categories

    @property
    def genes(self) -> tuple[str, ...]:
        """The genes that it looks at."""
        uses = self.module.uses.bool().tolist()
        return tuple(name for name, is_used in zip(self.fields.var_names, uses, strict=True) if is_used)

    def calibrate(self) -> float:
        """Fit the temperature to the cells kept for validation, and return it; 1 before.

        Raises:
            NotTrainedError: before training.
            OptionError: no cells were kept: train with ``train_size`` below 1.

        Example:
            >>> ACTINN.setup_anndata(atlas, labels_key="cell_type")
            >>> model = ACTINN(atlas)
            >>> model.train(max_epochs=5, enable_progress_bar=False)
            >>> model.calibrate() > 0
            True
        """
        self._must_be_trained()
        if not len(self.validation_indices):
            raise OptionError("calibrate needs cells kept for validation; train with train_size below 1")
        self._must_have_labels(None, self.validation_indices)
        self.module.temperature.fill_(1)
        logits, labels = [], []
        with torch.no_grad():
            for minibatch in self._minibatches(None, self.validation_indices, None):
                logits.append(self.module.class_logits(minibatch.to(self._device)).double().cpu())
                labels.append(minibatch.labels)
        temperature = _best_temperature(torch.cat(logits), torch.cat(labels))
        self.module.temperature.fill_(temperature)
        return temperature

    def predict(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        *,
        threshold: float = 0.0,
        unknown: str = "unknown",
        **unsupported: object,
    ) -> Any:
        """A label for each cell; other data need no labels, and only the genes of `genes`.

        Args:
            adata: the query; the reference itself when ``None``. It need not have been set up.
            indices: positions of the cells.
            soft: a data frame of probabilities, cells x labels, instead.
            batch_size: cells at a time; does not change the result.
            threshold: cells whose highest probability is below it are called ``unknown``.
            unknown: their label.
            **unsupported: refused by name.

        Raises:
            NotTrainedError: before training.
            GenesError: genes that the model looks at and the query lacks.

        Example:
            >>> ACTINN.setup_anndata(atlas, labels_key="cell_type")
            >>> model = ACTINN(atlas)
            >>> model.train(max_epochs=5, enable_progress_bar=False)
            >>> set(model.predict(threshold=1.1))
            {'unknown'}
        """
        refuse("predict", unsupported)
        self._must_be_trained()
        blocks: Iterator[NDArray[np.float32]] = probability_blocks(
            self.module, self._minibatches(adata, indices, batch_size), self._device
        )
        probabilities = np.concatenate(list(blocks))
        if soft:
            import pandas as pd

            return pd.DataFrame(probabilities, index=self._names(adata, indices), columns=list(self.labels))
        best = np.array(self.labels, dtype=object)[probabilities.argmax(1)]
        best[probabilities.max(1) < threshold] = unknown
        return best

    def _default_epochs(self, n_obs: int, plan: TrainingPlan) -> int:
        return 50  # as published

    def _data(self, data: Data | None) -> tuple[Atlas, Codes]:
        """As of any model; -1 is the label of cells of other data that have none of the model's."""
        if data is None:
            return super()._data(None)
        atlas, fields = with_cells(as_atlas(data, layer=self.fields.layer)), self.fields
        labels = codes_of_known(atlas, fields.labels_key, fields.labels_categories, -1)
        return atlas, replace(resolve(replace(fields, labels_key=None), atlas), labels=labels)

    def _must_have_labels(self, data: Data | None, indices: Any) -> None:
        atlas, codes = self._data(data)
        chosen = np.arange(atlas.n_obs) if indices is None else cell_positions(indices, atlas.n_obs)
        without = chosen[codes.labels[chosen] < 0]
        if len(without):
            raise ObsError(
                f"{len(without)} cells of {atlas.name}, the first {str(atlas.obs_names[without[0]])!r}, have "
                f"none of the labels that this ACTINN knows in obs column {self.fields.labels_key!r}; leave "
                "them out: predict() alone needs no labels"
            )

    def _training_epochs(self, epochs: Callable[..., Epochs], training: NDArray[np.integer]) -> Any:
        self._must_have_labels(None, None)
        return super()._training_epochs(epochs, training)

    def _terms(self, data: Data | None, indices: Any, batch_size: int | None, seed: int) -> list[LossTerms]:
        self._must_have_labels(data, indices)
        return super()._terms(data, indices, batch_size, seed)


def _shared(fields: FieldMap, query: Atlas) -> tuple[str, ...]:
    known = set(query.var_names.astype(object))
    shared = tuple(name for name in fields.var_names if name in known)
    if not shared:
        raise GenesError(
            f"{query.name} has none of the reference's {fields.n_vars} genes, the first "
            f"{fields.var_names[0]!r}; give both the same kind of names"
        )
    return shared


def _best_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """T of least cross-entropy, between 1/20 and 20."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_t), labels))

    found = minimize_scalar(loss, bounds=(-math.log(20), math.log(20)), method="bounded")
    return float(math.exp(found.x))
