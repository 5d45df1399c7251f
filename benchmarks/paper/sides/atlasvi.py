"""atlasvi with its defaults, streamed from a store on disk."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import atlasvi
from benchmarks.paper.data import SETS, split
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """Train on the training cells, stop by the validation cells, score the test cells."""
    torch.set_num_threads(1)
    adata = SETS[job.data].load(n_genes=job.n_genes)
    batch_key = "batch" if "batch" in adata.obs else None
    train, validation, test = split(adata.n_obs, job.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.zarr"
        atlasvi.ingest(adata, path)
        with atlasvi.open(path) as atlas:
            # `train` splits these again, 8 to 1: as many cells are trained on as by the peers.
            fitted = atlas[np.sort(np.concatenate([train, validation]))]
            atlasvi.SCVI.setup_anndata(fitted, batch_key=batch_key, gene_mask=None)
            model = atlasvi.SCVI(fitted, n_latent=job.n_latent, seed=job.seed, **job.options)
            start = time.perf_counter()
            model.train(train_size=8 / 9, seed=job.seed, enable_progress_bar=False)
            seconds = time.perf_counter() - start
            held_out = atlas[test]
            return {
                "latent": model.get_latent_representation(atlas),
                "elbo": sum(model.get_elbo(held_out, seed=draw) for draw in range(10)) / 10,
                "marginal": model.get_marginal_ll(held_out, n_mc_samples=200),
                "seconds": seconds,
            }


if __name__ == "__main__":
    main(fit, "atlasvi", "torch", "numpy")
