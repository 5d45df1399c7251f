"""Linear methods of scikit-learn and scanpy on log(1 + counts to the median depth)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scanpy as sc
from sklearn.decomposition import PCA, FactorAnalysis

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """The latent of all cells."""
    adata = SETS[job.data].load(n_genes=job.n_genes)
    start = time.perf_counter()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    if job.method == "ComBat":
        adata.X = adata.X.toarray()
        sc.pp.combat(adata, key="batch")
    x = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, dtype=np.float64)
    model = FactorAnalysis if job.method == "FA" else PCA
    latent = model(job.n_latent, random_state=job.seed).fit_transform(x)
    if job.method == "Harmony":
        import harmonypy

        harmony = harmonypy.run_harmony(latent, adata.obs, "batch", random_state=job.seed)
        latent = np.asarray(harmony.Z_corr)
        latent = latent if len(latent) == adata.n_obs else latent.T
    return {"latent": latent.astype(np.float32), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main(fit, "scikit-learn", "scanpy", "numpy")
