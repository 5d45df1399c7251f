"""atlasvi asked which genes differ: its two modes, and the paper's estimator."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import anndata
import numpy as np
import torch

import atlasvi
from benchmarks.paper.comparisons import N_REPEATS
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, model_folder
from benchmarks.paper.sides.comparing import Answer, answers
from benchmarks.paper.sides.writing import main

PACKAGES = ("atlasvi", "torch", "numpy")
MODES: dict[str, dict[str, Any]] = {
    "atlasvi, vanilla": {},
    "atlasvi, change": {"mode": "change"},
    "atlasvi, paper": {"estimator": "paper"},
}


def fit(job: Job, n_repeats: int = N_REPEATS) -> dict[str, Any]:
    """Answers of the model that `benchmarks.paper.sides.atlasvi` has trained, about the cells drawn."""
    adata = SETS[job.data].load(n_genes=job.n_genes)
    model = atlasvi.SCVI.load(model_folder(replace(job, method="atlasvi")), adata)
    asks = {name: partial(ask, model, adata, mode) for name, mode in MODES.items()}
    return answers(job, adata.obs, asks, n_repeats)


def ask(
    model: Any, adata: anndata.AnnData, mode: dict[str, Any], one: np.ndarray, two: np.ndarray, seed: int
) -> Answer:
    """Of all genes, in the order of the data."""
    found = model.differential_expression(
        idx1=one, idx2=two, all_stats=False, silent=True, seed=seed, **mode
    ).loc[adata.var_names]
    if mode.get("mode") == "change":
        return Answer(found["bayes_factor"], found["lfc_mean"], found["is_de_fdr_0.05"])
    k = found["bayes_factor"].to_numpy()
    return Answer(np.abs(k), k, np.abs(k) > 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(fit, *PACKAGES)
