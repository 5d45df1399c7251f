"""scvi-tools asked which genes differ: its two modes."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import anndata
import numpy as np
import scvi
import torch

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, model_folder
from benchmarks.paper.sides.comparing import Answer, answers
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """Answers of the model that `benchmarks.paper.sides.scvi_tools` has trained, about the cells drawn."""
    torch.set_num_threads(1)
    scvi.settings.verbosity = logging.ERROR
    adata = SETS[job.data].load(n_genes=job.n_genes)
    folder = model_folder(replace(job, method="scvi-tools"))
    model = scvi.model.SCVI.load(str(folder), adata, accelerator="cpu")
    asks = {f"scvi-tools, {mode}": partial(ask, model, adata, mode) for mode in ("vanilla", "change")}
    return answers(job, adata.obs, asks)


def ask(model: Any, adata: anndata.AnnData, mode: str, one: np.ndarray, two: np.ndarray, seed: int) -> Answer:
    """Of all genes, in the order of the data."""
    scvi.settings.seed = seed
    found = model.differential_expression(idx1=one, idx2=two, mode=mode, all_stats=False, silent=True).loc[
        adata.var_names
    ]
    if mode == "change":
        return Answer(found["bayes_factor"], found["lfc_mean"], found["is_de_fdr_0.05"])
    k = found["bayes_factor"].to_numpy()
    return Answer(np.abs(k), k, np.abs(k) > 3)


if __name__ == "__main__":
    main(fit, "scvi-tools", "torch", "numpy")
