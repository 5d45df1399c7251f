"""Linear methods of scikit-learn and scanpy.

For latents they see log(1 + counts to the median depth) of all cells, as is usual. For likelihoods they see
log(1 + x) of the training cells, and the density of the counts has the Jacobian: less sum log(1 + x).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scanpy as sc
from sklearn.decomposition import PCA, FactorAnalysis

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main

PACKAGES = ("scikit-learn", "scanpy", "harmonypy", "numpy")


def fit(job: Job) -> dict[str, Any]:
    """The latent of all cells, or the likelihood of the test cells."""
    return likelihood(job) if job.method.startswith("scikit-learn") else latent(job)


def likelihood(job: Job) -> dict[str, Any]:
    """Exact log densities in nats a cell; PPCA is what scikit-learn's PCA says of samples."""
    adata = SETS[job.data].load(n_genes=job.n_genes)
    train, _, test = SETS[job.data].split(adata.n_obs, job.seed)
    y = adata.X.log1p()
    model = (FactorAnalysis if job.method.endswith("FA") else PCA)(job.n_latent, random_state=job.seed)
    start = time.perf_counter()
    model.fit(y[train].toarray().astype(np.float64))
    seconds = time.perf_counter() - start
    log_p = model.score(y[test].toarray().astype(np.float64)) - y[test].sum(1).mean()
    return {"log_likelihood": log_p, "seconds": seconds}


def latent(job: Job) -> dict[str, Any]:
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
    found = model(job.n_latent, random_state=job.seed).fit_transform(x)
    if job.method == "Harmony":
        import harmonypy

        harmony = harmonypy.run_harmony(found, adata.obs, "batch", random_state=job.seed)
        found = np.asarray(harmony.Z_corr)
        found = found if len(found) == adata.n_obs else found.T
    return {"latent": found.astype(np.float32), "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main(fit, *PACKAGES)
