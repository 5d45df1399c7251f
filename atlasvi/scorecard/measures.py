"""What is measured, part by part: each gives its part of a `Scorecard`, or says why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from numpy.typing import NDArray

from atlasvi import metrics
from atlasvi.errors import CellsError
from atlasvi.infer.decode import Request
from atlasvi.infer.elbo import elbo_blocks
from atlasvi.infer.latent import latent_blocks
from atlasvi.infer.marginal import has_marginal, marginal_blocks
from atlasvi.infer.predictive import check_table, predictive_sums
from atlasvi.infer.sample import rows_at_once
from atlasvi.report import Embedding, embed
from atlasvi.scorecard.card import (
    Calibration,
    Check,
    GeneGap,
    Latents,
    LatentScore,
    Likelihood,
    NotApplicable,
    Pictures,
    Predictive,
    Split,
)
from atlasvi.scorecard.cells import CELLS_AT_ONCE, Cells, Column, Terms
from atlasvi.types import Decodes, Encodes, GeneratesCounts

if TYPE_CHECKING:
    from atlasvi.models.base import CountModel
    from atlasvi.store.atlas import Atlas

# Cells compared on each side, the fewest worth comparing, and the |K| beyond which a gene is called.
_EACH, _FEWEST, _THRESHOLD = 100, 20, 3.0
_NEIGHBORS = 50
_SHOWN = 2_000
_FARTHEST = 5
# Of genes that fewer cells have, ratios are noise, and below 1: those that no cell has by luck are left out.
_DETECTED = 0.05


# --- likelihood ---------------------------------------------------------------------------------


def no_likelihood(model: CountModel) -> NotApplicable | None:
    """Why the model's loss is no likelihood of counts, if it is none."""
    name, part = type(model).__name__, "likelihood"
    if model.loss_name not in ("-ELBO", "-log-likelihood"):
        return NotApplicable(part, f"{name} is fitted by {model.loss_name}: it has no likelihood of counts")
    if getattr(model.config, "transform", None) == "cp10k":
        return NotApplicable(
            part, f"{name} was fitted to counts over their totals, which are no counts any more"
        )
    return None


def likelihood(model: CountModel, terms: Terms, nonzeros: int, *, kept_apart: bool, which: str) -> Likelihood:
    """From the sums over the held-out cells, and the entries above zero that they have."""
    return Likelihood(
        name=model.loss_name.removeprefix("-"),
        kept_apart=kept_apart,
        which=which,
        n_cells=terms.n,
        zero_share=rounded(1 - nonzeros / (terms.n * model.fields.n_vars)),
        elbo=rounded(terms.mean),
        elbo_error=None if terms.error is None else rounded(terms.error),
        reconstruction=rounded(terms.reconstruction / terms.n),
        kl=rounded(terms.kl / terms.n),
    )


def with_marginal(
    model: CountModel, found: Likelihood, cells: Cells, n_draws: int, seed: int
) -> Likelihood | NotApplicable:
    """The likelihood with log p(x) of some cells added, where the model offers it."""
    name, part = type(model).__name__, "marginal likelihood"
    if found.name != "ELBO":
        what = "of a deterministic code" if isinstance(model.module, Decodes) else "exact already"
        return NotApplicable(part, f"{name} has no posterior to draw from: its log-likelihood is {what}")
    if not has_marginal(model.module):
        return NotApplicable(part, f"the prior of {name} has no density that is known")
    device, minibatches = model._device, list(cells.minibatches(CELLS_AT_ONCE // 4))
    marginal = torch.cat(
        list(marginal_blocks(model.module, iter(minibatches), device, n_samples=n_draws, seed=seed))
    )
    terms = elbo_blocks(model.module, iter(minibatches), device, seed=seed)
    elbo = torch.cat([-term.elbo.double().cpu() for term in terms])
    return replace(
        found, marginal=rounded(float(marginal.mean())), marginal_elbo=rounded(float(elbo.mean())),
        marginal_cells=len(marginal), marginal_draws=n_draws,
    )  # fmt: skip


# --- predictive checks --------------------------------------------------------------------------


def predictive(
    model: CountModel, cells: Cells, batch: Column | None, n_replicates: int, seed: int
) -> tuple[Predictive, Pictures] | NotApplicable:
    """Counts drawn from the model beside the counts, of all these cells and of each batch; and its tables."""
    module = model.module
    if not isinstance(module, GeneratesCounts):
        reason = f"{type(model).__name__} offers no draws of counts"
        return NotApplicable("predictive checks", reason)
    levels = ("0",) if batch is None else batch.levels
    groups = np.zeros(len(cells.positions), np.int64) if batch is None else batch.codes[cells.positions]
    n_vars, names = model.fields.n_vars, list(model.fields.var_names)
    request = Request(library_size=None, n_samples=n_replicates, seed=seed)
    sums = predictive_sums(
        model.module,
        cells.minibatches(rows_at_once(n_vars)),
        model._device,
        groups,
        len(levels),
        n_vars,
        request,
    )
    sizes = np.bincount(groups, minlength=len(levels))
    whole = check_table(sums.sum(1, keepdims=True), np.array([len(groups)]), names, None)
    by_batch = check_table(sums, sizes, names, levels) if (sizes > 0).sum() > 1 else None
    found = Predictive(
        n_replicates=n_replicates,
        n_genes=n_vars,
        all_cells=_check(whole, None, len(groups)),
        batches=tuple(_checks(by_batch, sizes, levels)),
        farthest=tuple(_farthest(whole, "variance") + _farthest(whole, "zero_share")),
    )
    return found, Pictures(check=whole, by_batch=by_batch)


def _checks(
    by_batch: pd.DataFrame | None, sizes: NDArray[np.int64], levels: tuple[str, ...]
) -> Iterator[Check]:
    if by_batch is not None:
        for level, table in by_batch.groupby("group", sort=False):
            yield _check(table, str(level), int(sizes[levels.index(str(level))]))


def _check(table: pd.DataFrame, group: str | None, n_cells: int) -> Check:
    of = {str(name): part for name, part in table.groupby("statistic")}
    zeros = of["zero_share"]
    detected = zeros["observed"].to_numpy() <= 1 - _DETECTED
    beyond = {name: rounded(float(part["p"].isin([0, 1]).mean())) for name, part in of.items()}
    return Check(
        group=group,
        n_cells=n_cells,
        zeros=rounded(float(zeros["observed"].mean())),
        zeros_replicated=rounded(float(zeros["replicated"].mean())),
        zeros_gap=rounded(float((zeros["replicated"] - zeros["observed"]).abs().mean())),
        n_detected=int(detected.sum()),
        mean_ratio=_median_ratio(of["mean"][detected]),
        variance_ratio=_median_ratio(of["variance"][detected]),
        mean_beyond=beyond["mean"],
        variance_beyond=beyond["variance"],
        zeros_beyond=beyond["zero_share"],
    )


def _median_ratio(part: pd.DataFrame) -> float | None:
    # Cells that are alike have no variance, nor has a single one.
    part = part[part["observed"] > 0]
    return rounded(float((part["replicated"] / part["observed"]).median())) if len(part) else None


def _farthest(table: pd.DataFrame, statistic: str) -> list[GeneGap]:
    """Of the genes that some cells have, and that are beyond all replicates, those farthest off."""
    zeros = table.loc[table["statistic"] == "zero_share", "observed"].to_numpy()
    part = table[table["statistic"] == statistic]
    part = part[(zeros <= 1 - _DETECTED) & part["p"].isin([0, 1]).to_numpy()]
    if statistic == "variance":
        part = part[(part["observed"] > 0) & (part["replicated"] > 0)]
        distance = np.log(part["replicated"] / part["observed"]).abs().to_numpy()
    else:
        distance = (part["replicated"] - part["observed"]).abs().to_numpy()
    part = part.iloc[np.argsort(-distance, kind="stable")[:_FARTHEST]]
    return [
        GeneGap(str(gene), statistic, rounded(float(observed)), rounded(float(replicated)))
        for gene, observed, replicated in zip(part.index, part["observed"], part["replicated"], strict=True)
    ]


# --- calibration --------------------------------------------------------------------------------


def calibration(
    model: CountModel,
    atlas: Atlas | None,
    group: str | None,
    cells: NDArray[np.int64],
    n_splits: int,
    seed: int,
) -> Calibration | NotApplicable:
    """What is called between random cells of a group and others of it.

    Args:
        model: any.
        atlas: ``None`` for the model's own.
        group: the label, or ``None`` for cells of any kind.
        cells: ``(n,)`` its positions.
        n_splits: how often.
        seed: of the splits.
    """
    part = "calibration of differential expression"
    if not isinstance(model.module, Encodes) or not isinstance(model.module, Decodes):
        return NotApplicable(part, f"{type(model).__name__} has no expression of cells to compare")
    n_each = min(_EACH, len(cells) // 2)
    if n_each < _FEWEST:
        whose = "the atlas has" if group is None else f"the label {group!r} has"
        return NotApplicable(
            part, f"{whose} {len(cells)} cells, too few to compare {_FEWEST} with {_FEWEST} others"
        )
    found = model.calibration(
        atlas, idx=cells, n_splits=n_splits, n_cells=n_each, bf_threshold=_THRESHOLD, seed=seed
    )
    splits = tuple(
        Split(int(row.n_called), rounded(float(row.share_called)), rounded(float(row.largest)), str(row.gene))
        for row in found.itertuples()
    )
    share, largest = rounded(float(found["share_called"].mean())), rounded(float(found["largest"].max()))
    return Calibration(group, len(cells), n_each, _THRESHOLD, share, largest, splits)


# --- mixing and labels --------------------------------------------------------------------------


def latents(
    model: CountModel,
    sample: Cells,
    batch: Column | None,
    labels: Column | None,
    seed: int,
    *,
    picture: bool,
) -> tuple[Latents | None, Embedding | None, list[NotApplicable]]:
    """How batches mix and labels hold together, in the model's latent and PCA's; a 2-D view; what lacks."""
    name, module = type(model).__name__, model.module
    parts = ("batch mixing", "label conservation")
    if not isinstance(module, Encodes):
        return None, None, [NotApplicable(part, f"{name} has no latent") for part in parts]
    latent = _latent(model, sample)
    batches, types, missing = _to_measure(sample, batch, labels)
    n_dims = min(latent.shape[1], model.fields.n_vars)
    # On one thread: sums of several come in any order, which k-means would carry on.
    with _one_thread():
        pca = metrics.pca_latent(lambda: [sample.counts], n_components=n_dims, seed=seed).latent
        n_neighbors = min(_NEIGHBORS, len(latent) - 1)
        scores = tuple(
            _score(of, values, batches, types, n_neighbors, seed)
            for of, values in ((name, latent), ("PCA baseline", pca))
        )
        view = _view(latent, sample, batches, labels, seed) if picture else None
    found = Latents(
        n_cells=len(latent),
        n_labelled=0 if labels is None else int((labels.codes[sample.positions] >= 0).sum()),
        n_dims=n_dims,
        batch_key=None if batch is None else batch.key,
        n_batches=0 if batches is None else len(batches.categories),
        ceiling=None if batches is None else rounded(float(scipy.stats.entropy(np.bincount(batches.codes)))),
        n_neighbors=n_neighbors,
        label_key=None if labels is None else labels.key,
        n_labels=0 if types is None else len(types.categories),
        scores=scores,
    )
    return found, view, missing


def _latent(model: CountModel, sample: Cells) -> NDArray[np.float32]:
    blocks = latent_blocks(model.module, sample.minibatches(CELLS_AT_ONCE), model._device)
    return np.concatenate([loc for loc, _ in blocks])


def _to_measure(
    sample: Cells, batch: Column | None, labels: Column | None
) -> tuple[pd.Categorical | None, pd.Categorical | None, list[NotApplicable]]:
    """Batches and labels of the sample, ``None`` where there are too few to tell apart; and why."""
    columns: list[pd.Categorical | None] = []
    missing = []
    for part, column, option in (
        ("batch mixing", batch, "batch_key"),
        ("label conservation", labels, "label_key"),
    ):
        found = None if column is None else column.at(sample.positions)
        if column is None:
            missing.append(NotApplicable(part, f"no column was named, and the model has none: give {option}"))
        elif found is not None and not 2 <= len(found.categories) < len(found):
            levels = ", ".join(map(repr, found.categories[:3])) or "none"
            missing.append(
                NotApplicable(
                    part,
                    f"{len(found)} cells have {len(found.categories)} levels of {column.key!r}: {levels}",
                )
            )
            found = None
        columns.append(found)
    return columns[0], columns[1], missing


def _score(
    name: str,
    latent: NDArray[Any],
    batches: pd.Categorical | None,
    types: pd.Categorical | None,
    n_neighbors: int,
    seed: int,
) -> LatentScore:
    n = len(latent)
    entropy = spread = of_batch = ari = nmi = of_label = None
    if batches is not None:
        mixing = metrics.entropy_of_batch_mixing(
            latent, batches, seed=seed, n_neighbors=n_neighbors, max_cells=n
        )
        entropy, spread = rounded(mixing.entropy), rounded(mixing.spread)
        of_batch = rounded(metrics.silhouette(latent, batches, seed=seed, max_cells=n)[0])
    if types is not None:
        known = types.codes >= 0
        of_known, types = latent[known], types[known]
        clusters = metrics.clustering_scores(of_known, types, seed=seed, max_cells=n)
        ari, nmi = rounded(clusters.ari), rounded(clusters.nmi)
        of_label = rounded(metrics.silhouette(of_known, types, seed=seed, max_cells=n)[0])
    return LatentScore(name, entropy, spread, of_batch, ari, nmi, of_label)


def _view(
    latent: NDArray[Any], sample: Cells, batches: pd.Categorical | None, labels: Column | None, seed: int
) -> Embedding | None:
    if len(latent) < 5:
        return None
    types = None if labels is None else labels.at(sample.positions)
    if types is not None and (types.codes < 0).any():
        types = types.add_categories(["unknown"]).fillna("unknown")
    of_view = pd.Categorical(["all"] * len(latent)) if batches is None else batches
    return embed(latent, of_view, types, seed=seed, max_cells=_SHOWN)


def _one_thread() -> Any:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def rounded(value: float) -> float:
    """To six digits, in which neither threads nor machines differ.

    Raises:
        CellsError: not a finite number.
    """
    if not math.isfinite(value):
        raise CellsError(f"a score came out as {value}; are the model's weights and all counts finite?")
    return float(f"{value:.6g}")
