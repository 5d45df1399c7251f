"""atlasvi's imputed counts: of `SCVI`, or of `DCA`, which is not the published implementation."""

from __future__ import annotations

import time
from typing import Any

import anndata
import pandas as pd
import torch

import atlasvi
from benchmarks.paper.corrupted import read
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """Train with the defaults on nine cells in ten of the corrupted counts; means of ten draws."""
    torch.set_num_threads(1)
    asked = read(job)
    adata = anndata.AnnData(asked.counts)
    batch_key = None
    if asked.batch is not None:
        adata.obs["batch"], batch_key = pd.Categorical(asked.batch), "batch"
    kind = atlasvi.DCA if job.method == "atlasvi DCA" else atlasvi.SCVI
    kind.setup_anndata(adata, batch_key=batch_key, gene_mask=None)
    model = kind(adata, seed=job.seed)
    start = time.perf_counter()
    model.train(job.max_epochs, seed=job.seed, enable_progress_bar=False)
    seconds = time.perf_counter() - start
    n_samples = {} if kind is atlasvi.DCA else {"n_samples": 10}
    imputed = model.denoised_counts(seed=job.seed, **n_samples).compute()
    return {"imputed": imputed[asked.rows, asked.genes], "seconds": seconds}


if __name__ == "__main__":
    main(fit, "atlasvi", "torch", "numpy")
