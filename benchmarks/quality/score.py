"""How a run is scored and written down; the same code for every library.

A results file is JSON: what made it (``library``, ``versions``, ``recipe``, ``definitions``) and ``runs``,
one a data set and seed, appended as they end, so that a benchmark which was stopped goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from benchmarks.quality.splits import DATASETS, ELBO_DRAWS, RECIPE, SPLIT_SEED, DataSet

DEFINITIONS = {
    "elbo": f"nats a cell, full KL weight: mean over test cells, {ELBO_DRAWS} draws of z, higher is better",
    "reconstruction_error": "nats a cell, -log p(x|z), same cells, as many draws; lower is better",
    "ari, nmi": "k-means (k = number of labels, n_init=20) of the latent means of all cells against labels",
    "train_seconds": "wall clock of train() on one thread, on a machine that did other things as well",
    "split": f"80/10/10 by split(n_obs, {SPLIT_SEED}); training sees the train cells only",
}
METRICS = ("elbo", "reconstruction_error", "ari", "nmi", "train_seconds")


def latent_scores(latent: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """ARI and NMI of a k-means clustering of the latent with as many clusters as there are labels."""
    n_labels = len(np.unique(labels))
    found = KMeans(n_labels, n_init=20, random_state=seed).fit_predict(np.asarray(latent, dtype=np.float64))
    return {
        "ari": float(adjusted_rand_score(labels, found)),
        "nmi": float(normalized_mutual_info_score(labels, found)),
    }


def averaged(draw: Callable[[int], float], seed: int) -> float:
    """Mean of a Monte Carlo estimate over `ELBO_DRAWS` draws, whose seeds follow from that of the run."""
    return float(np.mean([draw(1000 * (seed + 1) + i) for i in range(ELBO_DRAWS)]))


def run_all(out: Path, library: str, versions: dict[str, str], run: Callable[[DataSet, int], Any]) -> None:
    """Call ``run(data_set, seed)`` for each pair not in ``out`` yet; write each result at once."""
    head = {
        "library": library,
        "versions": versions,
        "recipe": RECIPE.as_dict(),
        "definitions": DEFINITIONS,
    }
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {**head, "runs": []}
    changed = [key for key, value in head.items() if results[key] != value]
    if changed:
        raise ValueError(f"{out} was made with other {', '.join(changed)}; move it away and run again")
    done = {(result["dataset"], result["seed"]) for result in results["runs"]}
    for data_set in DATASETS:
        for seed in range(data_set.n_seeds):
            if (data_set.name, seed) in done:
                continue
            result = {"dataset": data_set.name, "seed": seed, **run(data_set, seed)}
            results["runs"].append(result)
            _write(out, results)
            print(json.dumps(result), flush=True)
    print(table([results]), flush=True)


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    head = {key: value for key, value in results.items() if key != "runs"}
    runs = ",\n  ".join(json.dumps(result) for result in results["runs"])
    part.write_text(json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n  ' + runs + "\n ]\n}\n")
    os.replace(part, out)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds, a row a data set and library."""
    rows = ["| data set | library | seeds | " + " | ".join(METRICS) + " |", "|" + "---|" * (3 + len(METRICS))]
    for data_set in DATASETS:
        for result in results:
            runs = [run for run in result["runs"] if run["dataset"] == data_set.name]
            if not runs:
                continue
            cells = []
            for metric in METRICS:
                values = np.array([run[metric] for run in runs])
                digits = 3 if metric in ("ari", "nmi") else 1
                cells.append(
                    f"{values.mean():.{digits}f} ± {values.std(ddof=min(1, len(values) - 1)):.{digits}f}"
                )
            rows.append(f"| {data_set.name} | {result['library']} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)
