"""Imputed counts of MAGIC, on square roots of counts to the median depth, and of PCA, on their logarithm."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD

from benchmarks.paper.corrupted import read
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """To the median depth, through the method and back."""
    asked = read(job)
    depth = np.maximum(np.asarray(asked.counts.sum(1)).ravel(), 1)
    scale = (np.median(depth) / depth).astype(np.float32)
    x = asked.counts.toarray() * scale[:, None]
    start = time.perf_counter()
    if job.method == "MAGIC":
        import magic

        root = magic.MAGIC(random_state=job.seed, n_jobs=1, verbose=0).fit_transform(np.sqrt(x))
        back = np.maximum(root, 0) ** 2
    else:
        x = np.log1p(x)
        mean = x.mean(0)
        svd = TruncatedSVD(10, random_state=job.seed)
        back = np.maximum(np.expm1(svd.inverse_transform(svd.fit_transform(x - mean)) + mean), 0)
    seconds = time.perf_counter() - start
    imputed = back[asked.rows, asked.genes] / scale[asked.rows]
    return {"imputed": imputed.astype(np.float32), "seconds": seconds}


if __name__ == "__main__":
    main(fit, "magic-impute", "scikit-learn", "numpy")
