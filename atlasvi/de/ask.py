"""Differential expression from a trained module: choose cells, read once, decode rows, make tables."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.de.cells import RawMeans, read_cells, stored
from atlasvi.de.change import compare_change, estimate_delta, estimate_offset, highest, mean_change
from atlasvi.de.decoding import Decoding, decoding
from atlasvi.de.groups import Groups
from atlasvi.de.outliers import without_outliers
from atlasvi.de.sampling import OWN, Design, choose_cells, paper_design, pooled_design
from atlasvi.de.table import Columns, change_columns, joined, raw_columns, vanilla_columns
from atlasvi.de.vanilla import compare_vanilla
from atlasvi.errors import CellsError, ObsError, OptionError
from atlasvi.progress import Advance
from atlasvi.store.fields import as_level
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    import distributed
    import pandas as pd

    from atlasvi.infer.encoded import Encoded as StoredLatents
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

# Of scvi-tools; keeps K of all pairs on one side at 18.4.
_POOLED_BOUND = 1e-8
_ALLOWED = {
    "mode": ("vanilla", "change"), "estimator": ("pooled", "paper"), "test_mode": ("two", "three"),
    "precision": ("float32", "bfloat16"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, apart from the groups.

    Args:
        mode: ``"vanilla"`` or ``"change"``.
        estimator: of ``"vanilla"``: ``"pooled"`` or ``"paper"``.
        delta: log2 fold change that counts, or ``None`` to estimate it.
        all_stats: whether to add means and detection of the raw counts.
        batches1: codes to decode the first side under; ``None`` for each cell's own.
        batches2: codes to decode the second side under.
        fdr_target: expected share of false calls.
        filter_outlier_cells: leave out cells far from their group in the latent space.
        n_samples_overall: draws a group, of the pooled estimator.
        n_cells: pairs of cells, of the paper's estimator.
        n_draws: draws for each of these.
        p_bound: added to p and 1 - p in K; ``None`` for the estimator's own.
        bf_threshold: Bayes factor beyond which a gene is called.
        pseudocounts: added to rho in fold changes, or ``None`` to estimate it.
        threshold_counts: mean count below which a gene counts as not expressed, for that estimate.
        test_mode: ``"three"`` tells up from down, ``"two"`` does not.
        cred_interval_lvls: levels of credible intervals to add.
        precision: of the product with the last layer, ``"float32"`` or ``"bfloat16"``.
        seed: of cells and draws.
    """

    mode: str = "vanilla"
    estimator: str = "pooled"
    delta: float | None = 0.25
    all_stats: bool = True
    batches1: tuple[int, ...] | None = None
    batches2: tuple[int, ...] | None = None
    fdr_target: float = 0.05
    filter_outlier_cells: bool = False
    n_samples_overall: int = 5000
    n_cells: int = 100
    n_draws: int = 200
    p_bound: float | None = None
    bf_threshold: float = 3.0
    pseudocounts: float | None = None
    threshold_counts: float = 0.01
    test_mode: str = "three"
    cred_interval_lvls: tuple[float, ...] = ()
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("n_samples_overall", "n_cells", "n_draws"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, is {value!r}")
        if self.estimator == "paper" and self.mode == "change":
            raise OptionError("estimator='paper' averages Bayes factors, of mode='vanilla'; leave one out")
        if not 0 < self.fdr_target < 1:
            raise OptionError(f"fdr_target must be between 0 and 1, is {self.fdr_target}")
        for name in ("delta", "pseudocounts", "p_bound"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be a number > 0, is {value}")
        for level in self.cred_interval_lvls:
            if not 0 < level < 1:
                raise OptionError(f"cred_interval_lvls must be between 0 and 1, one is {level}")
        one, two = self.batches1, self.batches2
        if self.estimator == "paper" and one != two:
            raise OptionError("estimator='paper' compares under the same batches; name the same in batchid2")
        if one is not None and two is not None and set(one) != set(two) and set(one) & set(two):
            raise OptionError(
                "batchid1 and batchid2 share some batches and not all, so that pairs have no common batch; "
                "name the same for both, or none in common"
            )

    @property
    def bound(self) -> float:
        """Added to p and 1 - p: half a draw in the paper's estimator, where K of few draws are averaged."""
        if self.p_bound is not None:
            return self.p_bound
        return _POOLED_BOUND if self.estimator == "pooled" else 0.5 / self.n_draws

    @property
    def sides(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Batches to decode the two sides under."""
        one, two = ((OWN,) if codes is None else codes for codes in (self.batches1, self.batches2))
        return np.array(one), np.array(two)


def differential_expression(
    module: torch.nn.Module,
    atlas: Atlas,
    codes: Codes,
    var_names: Sequence[str],
    groups: Groups,
    question: Question,
    advance: Advance,
    client: distributed.Client | None = None,
    latents: StoredLatents | None = None,
) -> pd.DataFrame:
    """The body of `CountModel.differential_expression`, which says what the arguments are."""
    _check_sizes(groups)
    module.eval()
    raw = question.all_stats or (question.mode == "change" and question.pseudocounts is None)
    if raw and latents is not None:
        raise OptionError(
            "stored latents have no counts: pass all_stats=False and, with mode='change', pseudocounts="
        )
    sampled = groups
    if question.filter_outlier_cells:
        sampled = without_outliers(atlas, codes, module, groups, question.seed, latents)
    design = _design(atlas, codes, sampled, question)
    cells, sums = np.unique(design.cells), None
    if latents is not None:
        encoded = stored(latents, cells)
    else:
        encoded, sums = read_cells(
            atlas, codes, module, groups, cells, raw=raw, advance=advance, client=client
        )
    rows = decoding(module, atlas, codes, design, encoded, precision=question.precision, seed=question.seed)
    means = None if sums is None else [sums.of(pair) for pair in groups.comparisons]
    if question.mode == "vanilla":
        found = compare_vanilla(rows, question.bound)
        tables = [vanilla_columns(found, k) for k in range(len(groups.comparisons))]
    else:
        tables = _change(rows, means, question)
    if question.all_stats and means is not None:
        tables = [{**columns, **raw_columns(pair)} for columns, pair in zip(tables, means, strict=True)]
    calls = ("fdr", question.fdr_target) if question.mode == "change" else ("bf", question.bf_threshold)
    return joined(tables, var_names, groups, calls)


def _change(
    rows: Decoding, means: list[tuple[RawMeans, RawMeans]] | None, question: Question
) -> list[Columns]:
    found, n = highest(rows), len(rows.design.ones)
    if question.pseudocounts is not None:
        offsets = np.full(n, question.pseudocounts)
    else:
        assert means is not None
        offsets = np.array([estimate_offset(found, k, means[k], question.threshold_counts) for k in range(n)])
    if question.delta is not None:
        deltas = np.full(n, question.delta)
    else:
        deltas = np.array([estimate_delta(mean, question.seed) for mean in mean_change(rows, offsets)])
    changes = compare_change(rows, offsets, deltas, question.cred_interval_lvls)
    return [
        change_columns(change, found.scale1[k], found.scale2[k], offsets[k], deltas[k], question.test_mode)
        for k, change in enumerate(changes)
    ]


def _design(atlas: Atlas, codes: Codes, groups: Groups, question: Question) -> Design:
    n_groups, seed = len(groups.names), question.seed
    if question.estimator == "pooled":
        chosen = choose_cells(atlas, groups.codes, n_groups, question.n_samples_overall, seed)
        return pooled_design(groups, chosen, question.n_samples_overall, question.sides, seed)
    chosen = choose_cells(atlas, groups.codes, n_groups, question.n_cells, seed)
    weights = {OWN: 1.0}
    if question.batches1 is not None:
        asked = list(question.batches1)
        counts = np.bincount(codes.batch_index, minlength=max(asked) + 1)[asked]
        if not counts.sum():
            raise CellsError("no cell is of a batch in batchid1, so that they have no weights; name others")
        weights = dict(zip(asked, (counts / counts.sum()).tolist(), strict=True))
    return paper_design(groups, chosen, question.n_cells, question.n_draws, weights, seed)


def decode_batches(
    fields: FieldMap,
    estimator: str,
    batch_correction: bool | None,
    batchid1: str | Sequence[str] | None,
    batchid2: str | Sequence[str] | None,
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Codes of the batches to decode each side under; ``None`` for each cell's own.

    Raises:
        OptionError: batches without ``batch_correction``, or of a model that has none.
        ObsError: a batch that the model does not know.
    """
    given = batchid1 is not None or batchid2 is not None
    if fields.batch_key is None and (given or batch_correction):
        raise OptionError(
            "the model was set up without batch_key, so there is no batch to decode under; leave out "
            "batch_correction, batchid1 and batchid2"
        )
    if batch_correction is None:
        # The paper integrates over batches; scvi-tools does so on demand.
        batch_correction = estimator == "paper" and fields.batch_key is not None
    if not batch_correction:
        if given:
            raise OptionError(
                "batchid1 and batchid2 need batch_correction=True: else cells keep their own batch"
            )
        return None, None
    every = tuple(range(fields.n_batch))
    one, two = (
        every if names is None else _batch_codes(fields, name, names)
        for name, names in (("batchid1", batchid1), ("batchid2", batchid2))
    )
    return one, two


def _batch_codes(fields: FieldMap, argument: str, names: str | Sequence[str]) -> tuple[int, ...]:
    known = list(fields.batch_categories)
    levels = [as_level(name) for name in np.atleast_1d(np.asarray(names, dtype=object))]
    if not levels:
        raise OptionError(f"{argument} is empty; name batches, or leave it out for all")
    for level in levels:
        if level not in known:
            near = difflib.get_close_matches(level, known, 3) or known[:10]
            raise ObsError(f"{argument} {level!r} is not a batch of the model; near it: {', '.join(near)}")
    return tuple(sorted({known.index(level) for level in levels}))


def _check_sizes(groups: Groups) -> None:
    for name, size in zip(groups.names, groups.sizes.tolist(), strict=True):
        if size == 0:
            raise CellsError(f"group {name!r} has no cells; choose one that has some")
