"""Results as tidy data frames: a row a gene and comparison, columns named as scvi-tools names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from atlasvi.de.cells import RawMeans
    from atlasvi.de.change import Change
    from atlasvi.de.groups import Groups
    from atlasvi.de.vanilla import Vanilla

Columns = dict[str, Any]
# In change mode K is of shares of the pairs; of scvi-tools.
_BOUND = 1e-8


def expected_fdr_calls(proba_de: NDArray[np.float64], fdr_target: float) -> NDArray[np.bool_]:
    """The largest set of genes whose expected share of false calls is at most ``fdr_target``.

    The expected share of a set is the mean of 1 - p over it; genes enter by falling p.

    Example:
        >>> expected_fdr_calls(np.array([0.2, 0.99, 0.93]), 0.05)
        array([False,  True,  True])
    """
    order = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[order]) / np.arange(1, len(proba_de) + 1)
    called = np.zeros(len(proba_de), bool)
    called[order[: int((expected <= fdr_target).sum())]] = True
    return called


def vanilla_columns(found: Vanilla, k: int) -> Columns:
    """Of one comparison."""
    return {
        "proba_m1": found.p[k],
        "proba_m2": 1 - found.p[k],
        "bayes_factor": found.k[k],
        "scale1": found.scale1[k],
        "scale2": found.scale2[k],
    }


def change_columns(
    change: Change,
    scale1: NDArray[np.float64],
    scale2: NDArray[np.float64],
    offset: float,
    delta: float,
    test_mode: str,
) -> Columns:
    """Of one comparison."""  # fmt: skip
    p = change.higher + change.lower if test_mode == "two" else np.maximum(change.higher, change.lower)
    columns: Columns = {
        "proba_de": p,
        "proba_not_de": 1 - p,
        "bayes_factor": np.log(p + _BOUND) - np.log(1 - p + _BOUND),
        "scale1": scale1,
        "scale2": scale2,
        "pseudocounts": offset,
        "delta": delta,
        "lfc_mean": change.mean,
        "lfc_median": change.median,
        "lfc_std": change.std,
        "lfc_min": change.low,
        "lfc_max": change.high,
    }
    for level, ends in change.intervals.items():
        for i, end in enumerate(("min", "max")):
            columns[f"lfc_confidence_interval_{str(level)[:5]}_{end}"] = ends[:, i].astype(np.float64)
    return columns


def raw_columns(means: tuple[RawMeans, RawMeans]) -> Columns:
    """Means and detection of the raw counts on both sides."""
    names = {"raw_mean": "mean", "non_zeros_proportion": "non_zero", "raw_normalized_mean": "normalised"}
    return {
        f"{column}{side + 1}": getattr(means[side], field)
        for column, field in names.items()
        for side in range(2)
    }


def joined(
    comparisons: Sequence[Columns],
    var_names: Sequence[str],
    groups: Groups,
    calls: tuple[str, float],
) -> pd.DataFrame:
    """One frame, comparison after comparison, each by falling evidence.

    Args:
        comparisons: columns of each.
        var_names: index.
        groups: which name the comparisons.
        calls: ``("fdr", target)`` or ``("bf", threshold)``: how genes are called.
    """
    rule, limit = calls
    index, frames = pd.Index(list(var_names), dtype=object), []
    for pair, columns in zip(groups.comparisons, comparisons, strict=True):
        frame = pd.DataFrame(columns, index=index)
        if rule == "fdr":
            called = expected_fdr_calls(frame["proba_de"].to_numpy(), limit)
        else:
            called = frame["bayes_factor"].abs().to_numpy() > limit
        frame[f"is_de_{rule}_{limit:g}"] = called
        if groups.by_label:
            one, two = groups.name(pair)
            frame["comparison"], frame["group1"], frame["group2"] = f"{one} vs {two}", one, two
        by = "proba_de" if rule == "fdr" else "bayes_factor"
        frames.append(frame.sort_values(by, ascending=False, kind="stable"))
    return pd.concat(frames)
