"""scvi-tools' imputed counts, trained as in `benchmarks.paper.sides.scvi_tools`."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pandas as pd

from benchmarks.paper.corrupted import read
from benchmarks.paper.data import split
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.scvi_tools import train
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """Train on nine cells in ten of the corrupted counts, stop by the tenth; means of ten draws."""
    asked = read(job)
    adata = anndata.AnnData(asked.counts)
    batch_key = None
    if asked.batch is not None:
        adata.obs["batch"], batch_key = pd.Categorical(asked.batch), "batch"
    training, validation, test = split(adata.n_obs, job.seed)
    parts = np.sort(np.concatenate([training, test])), validation
    model, seconds = train(adata, batch_key, parts, job.seed)
    imputed = model.get_normalized_expression(library_size="latent", n_samples=10, return_numpy=True)
    return {"imputed": imputed[asked.rows, asked.genes], "seconds": seconds}


if __name__ == "__main__":
    main(fit, "scvi-tools", "torch", "numpy")
