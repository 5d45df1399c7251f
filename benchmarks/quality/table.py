"""The table of `docs/quality.md`, from the two results files: ``python -m benchmarks.quality.table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.quality.splits import DATASETS

HERE = Path(__file__).parent
COLUMNS = (
    ("elbo", "ELBO", 1),
    ("reconstruction_error", "-log p(x given z)", 1),
    ("ari", "ARI", 3),
    ("nmi", "NMI", 3),
)
HIGHER_IS_BETTER = {"elbo": True, "reconstruction_error": False, "ari": True, "nmi": True}


def values(results: dict[str, Any], dataset: str, metric: str) -> np.ndarray:
    """One value a seed."""
    return np.array([run[metric] for run in results["runs"] if run["dataset"] == dataset])


def compare(ours: np.ndarray, theirs: np.ndarray, higher: bool, digits: int) -> str:
    """Gain of ours with its 95 % interval (Welch's t over seeds), and a word if it excludes no difference."""
    sign = 1 if higher else -1
    test = scipy.stats.ttest_ind(sign * ours, sign * theirs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    gain = sign * (ours.mean() - theirs.mean())
    word = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return f"{gain:+,.{digits}f} ({low:+,.{digits}f} to {high:+,.{digits}f}), {word}"


def table() -> str:
    """Markdown."""
    ours = json.loads((HERE / "atlasvi.json").read_text())
    theirs = json.loads((HERE / "scvi_tools.json").read_text())
    lines = [
        "| data | measure | atlasvi | scvi-tools 1.4.2 | gain of atlasvi (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for data_set in DATASETS:
        for metric, name, digits in COLUMNS:
            a, b = values(ours, data_set.name, metric), values(theirs, data_set.name, metric)
            cells = [f"{v.mean():,.{digits}f} ± {v.std(ddof=1):.{digits}f} ({len(v)})" for v in (a, b)]
            judged = compare(a, b, HIGHER_IS_BETTER[metric], digits)
            lines.append(f"| {data_set.name} | {name} | {cells[0]} | {cells[1]} | {judged} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
