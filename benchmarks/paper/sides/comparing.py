"""What every method of `benchmarks.paper.differential` is asked, and how its answers are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.paper.comparisons import COMPARISONS, N_REPEATS
from benchmarks.paper.fits import Job


class Answer(NamedTuple):
    """Of one method about two groups of cells: (G,) each.

    ``evidence`` is larger where a gene is surer to differ, ``change`` is positive where group one has more of
    it, and ``called`` says which genes the method would report at the threshold that is usual for it.
    """

    evidence: np.ndarray
    change: np.ndarray
    called: np.ndarray


Ask = Callable[[np.ndarray, np.ndarray, int], Answer]


def of_p_values(p: Any, change: Any) -> Answer:
    """Called at a false discovery rate of 5 % (Benjamini and Hochberg); p that is NaN says nothing."""
    p = np.where(np.isfinite(p), p, 1.0).astype(np.float64)
    adjusted = scipy.stats.false_discovery_control(p)
    evidence = -np.log10(np.maximum(p, np.finfo(np.float64).tiny))
    return Answer(evidence, np.nan_to_num(np.asarray(change, np.float64)), adjusted < 0.05)


def answers(job: Job, obs: Any, asks: Mapping[str, Ask], n_repeats: int = N_REPEATS) -> dict[str, np.ndarray]:
    """``"comparison|method|what"``: (repeats, G) of every comparison of the data."""
    found = {}
    for comparison in COMPARISONS[job.data]:
        for name, ask in asks.items():
            made = [
                ask(*comparison.drawn(obs, job.seed, repeat), N_REPEATS * job.seed + repeat)
                for repeat in range(n_repeats)
            ]
            for what, arrays in zip(Answer._fields, zip(*made, strict=True), strict=True):
                kind = bool if what == "called" else np.float32
                found[f"{comparison.name}|{name}|{what}"] = np.stack(arrays).astype(kind)
    return found
