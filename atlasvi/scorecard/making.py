"""Make a scorecard: one pass over the counts, then questions to the few cells that were kept from it.

The pass takes the checksum of all counts, the ELBO of the cells kept apart from training, and keeps the
counts of two seeded samples, of so many cells and no more. Latents, PCA, importance sampling and predictive
checks are asked of these. Differential expression reads the few hundred cells that it compares again. So
memory does not grow with the cells, but for a few bytes each (codes of columns, the split).

Cells are always cut in the same places, whoever reads them, and numbers are rounded to six digits: the same
call gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi import metrics
from atlasvi.de.groups import check_level
from atlasvi.errors import CellsError, OptionError
from atlasvi.files import plain_number
from atlasvi.models import load
from atlasvi.models.arguments import at_least_one
from atlasvi.models.base import CountModel
from atlasvi.progress import Advance, bar
from atlasvi.report import package_versions
from atlasvi.scorecard import measures
from atlasvi.scorecard.card import Likelihood, NotApplicable, Pictures, Provenance, Scorecard
from atlasvi.scorecard.cells import CELLS_AT_ONCE, Cells, Column, OnePass, kept_apart
from atlasvi.store.fields import as_level, level_codes
from atlasvi.stream import Epochs

if TYPE_CHECKING:
    from atlasvi.models.data import Data
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured; the numbers are arguments of `evaluate`."""

    n_cells: int = 5_000
    n_held_out: int = 1_000
    n_mc_samples: int = 100
    n_replicates: int = 10
    n_splits: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name, value in asdict(self).items():
            at_least_one(name, value)


THOROUGH = Effort()
QUICK = Effort(n_cells=1_000, n_held_out=200, n_mc_samples=20, n_replicates=5, n_splits=3)


def evaluate(
    model: CountModel | str | Path,
    atlas: Data | None = None,
    *,
    label_key: str | None = None,
    batch_key: str | None = None,
    group: str | None = None,
    n_cells: int = THOROUGH.n_cells,
    n_held_out: int = THOROUGH.n_held_out,
    n_mc_samples: int = THOROUGH.n_mc_samples,
    n_replicates: int = THOROUGH.n_replicates,
    n_splits: int = THOROUGH.n_splits,
    picture: bool = True,
    seed: int = 0,
    num_workers: int | None = None,
    memory_budget: int | str | None = None,
    silent: bool = True,
) -> Scorecard:
    """What a model is worth on an atlas, in one pass over its counts; `Scorecard` says what is measured.

    Likelihood and predictive checks are of the cells kept apart from training where the atlas is the one that
    the model was trained on (`CountModel.was_trained_on`), and of all cells elsewhere; the result says which.
    What the model has no answer to stands in ``not_applicable`` with the reason.

    Args:
        model: any model of atlasvi, trained; or its folder.
        atlas: the data; those of the model when ``None``. They need not have been set up.
        label_key: column of obs with labels that should stay apart; the model's own when ``None``.
        batch_key: column of obs with batches that should mix; the model's own when ``None``.
        group: label whose cells are compared with each other; the largest when ``None``.
        n_cells: cells at most on which mixing and labels are measured.
        n_held_out: cells at most on which counts are drawn and log p(x) is estimated.
        n_mc_samples: draws for log p(x) of each.
        n_replicates: replicates of them for the predictive checks.
        n_splits: random splits of the group.
        picture: also make a 2-D view for the page, which takes seconds.
        seed: of samples, draws and splits.
        num_workers: threads that read; ``None``: cores less one, up to 4.
        memory_budget: bytes, or ``"500MB"``, that blocks may take; 256 MiB when ``None``.
        silent: show no progress bar.

    Raises:
        ObsError: a column or label that is not there, with near names.
        GenesError: genes of the model that the atlas lacks.
        NotTrainedError: before training.
        ModelError: the folder is not a model's.
        OptionError: a number below 1.

    Example:
        >>> card = evaluate(model, atlas, label_key="cell_type", n_splits=2, picture=False)
        >>> card.likelihood.kept_apart, card.calibration.share_called
        (True, 0.0)
    """
    effort = Effort(n_cells, n_held_out, n_mc_samples, n_replicates, n_splits)
    model = load(model) if isinstance(model, str | Path) else model
    model._must_be_trained()
    data, codes = model._data(atlas)
    if data.n_obs < 3:
        raise CellsError(f"{data!r} has too few cells to evaluate a model on; give at least 3")
    batch, labels = _batches(model, data, batch_key), _labels(model, data, label_key)
    chosen, of_chosen = _group(data, labels, group)
    epochs = Epochs(
        data, codes, batch_size=CELLS_AT_ONCE, shuffle=False, num_workers=num_workers,
        memory_budget=memory_budget,
    )  # fmt: skip
    with bar("evaluate", data.n_obs, "cells", enabled=not silent) as advance:
        read = _read(model, data, codes, epochs, effort, seed, advance)

    missing: list[NotApplicable] = []

    def there(part: Part | NotApplicable) -> Part | None:
        """The part, or ``None`` with the reason noted."""
        if isinstance(part, NotApplicable):
            missing.append(part)
            return None
        return part

    likelihood = there(read.likelihood)
    if likelihood is not None:
        more = there(measures.with_marginal(model, likelihood, read.held_out, n_mc_samples, seed))
        likelihood = more or likelihood
    predictive, pictures = there(measures.predictive(model, read.held_out, batch, n_replicates, seed)) or (
        None,
        Pictures(),
    )
    mine = None if atlas is None else data
    calibration = there(measures.calibration(model, mine, chosen, of_chosen, n_splits, seed))
    latents, view, reasons = measures.latents(model, read.sample, batch, labels, seed, picture=picture)
    options = {"label_key": label_key, "batch_key": batch_key, "group": group, **asdict(effort), "seed": seed}
    return Scorecard(
        model=type(model).__name__,
        config=json.loads(json.dumps(asdict(model.config), default=plain_number)),
        atlas=Path(data.name).name,
        n_obs=data.n_obs,
        n_vars=model.fields.n_vars,
        likelihood=likelihood,
        predictive=predictive,
        calibration=calibration,
        latents=latents,
        not_applicable=(*missing, *reasons),
        provenance=_provenance(model, data, read.checksum, options),
        pictures=replace(pictures, embedding=view and replace(view, n_total=data.n_obs)),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """What the pass leaves: the likelihood, the counts of two samples, and the checksum of all counts."""

    likelihood: Likelihood | NotApplicable
    held_out: Cells
    sample: Cells
    checksum: str


def _read(
    model: CountModel,
    atlas: Atlas,
    codes: Codes,
    epochs: Epochs,
    effort: Effort,
    seed: int,
    advance: Advance,
) -> _Read:
    apart, which = kept_apart(model, atlas)
    held_out = np.arange(atlas.n_obs) if apart is None else apart
    wanted = (
        held_out[metrics.subsample(len(held_out), effort.n_held_out, seed=seed)].astype(np.int64),
        metrics.subsample(atlas.n_obs, effort.n_cells, seed=seed),
    )
    one_pass = OnePass(model, epochs(), held_out, wanted, advance)
    likelihood: Likelihood | NotApplicable | None = measures.no_likelihood(model)
    if likelihood is not None:
        one_pass.run()
    else:
        terms = one_pass.elbo(seed)
        likelihood = measures.likelihood(
            model, terms, one_pass.nonzeros, kept_apart=apart is not None, which=which
        )
    kept = [
        Cells(positions, counts, codes, atlas.numbers_of(positions))
        for positions, counts in zip(wanted, one_pass.kept(), strict=True)
    ]
    return _Read(likelihood, kept[0], kept[1], one_pass.checksum.hexdigest())


def _provenance(model: CountModel, atlas: Atlas, checksum: str, options: dict[str, Any]) -> Provenance:
    return Provenance(
        counts_sha256=checksum,
        weights_sha256=weights_sha256(model.module),
        order_seed=None if model._split is None else int(model._split["seed"]),
        is_shuffled=atlas.lies_at_random(),
        versions=dict(package_versions("atlasvi", "torch", "numpy", "scikit-learn")),
        options=options,
    )


def weights_sha256(module: torch.nn.Module) -> str:
    """SHA-256 of the weights as safetensors: that of ``weights.safetensors`` in a model folder."""
    from safetensors.torch import save

    return hashlib.sha256(save({k: v.contiguous().cpu() for k, v in module.state_dict().items()})).hexdigest()


def _batches(model: CountModel, atlas: Atlas, key: str | None) -> Column | None:
    key = model.fields.batch_key if key is None else key
    return None if key is None else Column(key, *level_codes(atlas, key))


def _labels(model: CountModel, atlas: Atlas, key: str | None) -> Column | None:
    """Labels of the cells; the level that stands for none in a model that learns labels is no label."""
    own, none = model.fields.labels_key, model.fields.unlabeled_category
    # A query of a model that learns labels may have none.
    key = own if key is None and own in atlas.obs_keys else key
    if key is None:
        return None
    codes, levels = level_codes(atlas, key)
    if key == own and none in levels:
        codes = np.where(codes == levels.index(none), -1, codes)
    return Column(key, codes, levels)


def _group(atlas: Atlas, labels: Column | None, name: str | None) -> tuple[str | None, NDArray[np.int64]]:
    """The label whose cells are split, the largest unless one is named, and its cells; all without labels."""
    if labels is None:
        if name is not None:
            raise OptionError(
                f"group={name!r} names a label, and there are none; say their column with label_key"
            )
        return None, np.arange(atlas.n_obs)
    if name is None:
        code = int(np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.levels)).argmax())
    else:
        check_level(atlas, labels.key, as_level(name), labels.levels)
        code = labels.levels.index(as_level(name))
    return labels.levels[code], np.flatnonzero(labels.codes == code)


__all__ = ["QUICK", "THOROUGH", "Effort", "evaluate", "weights_sha256"]
