"""Counts as `benchmarks.paper.imputation` leaves them for the sides, and what it asks of them.

Needs numpy and scipy and anndata only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from benchmarks.paper.data import SIMULATED
from benchmarks.paper.fits import Job


@dataclass(frozen=True)
class Asked:
    """Corrupted counts, and the entries whose imputed counts are asked for.

    Args:
        counts: (n_obs, n_vars) float32 CSR.
        batch: (n_obs,) names, or ``None``.
        rows: (n,) cells of the entries.
        genes: (n,) genes of the entries.
    """

    counts: sp.csr_matrix
    batch: np.ndarray | None
    rows: np.ndarray
    genes: np.ndarray


def path_of(job: Job) -> Path:
    """One file a set, number of genes, corruption and seed, for all methods."""
    name = f"{job.data}-{job.n_genes}-{job.options['corruption']}-{job.seed}.counts.npz"
    return Path(os.environ[SIMULATED]) / name.replace(" ", "_")


def read(job: Job) -> Asked:
    """What `write` left."""
    with np.load(path_of(job)) as f:
        x = sp.csr_matrix((f["data"], f["indices"], f["indptr"]), shape=tuple(f["shape"]))
        return Asked(x, f["batch"] if "batch" in f else None, f["rows"], f["genes"])


def write(job: Job, asked: Asked) -> None:
    """Leave it for the sides; the file is whole or is not there."""
    x, path = asked.counts, path_of(job)
    batch = {} if asked.batch is None else {"batch": asked.batch.astype(str)}
    part = path.with_name(path.name + ".part.npz")
    np.savez(
        part,
        data=x.data.astype(np.float32), indices=x.indices, indptr=x.indptr, shape=x.shape,
        rows=asked.rows, genes=asked.genes, **batch,
    )  # fmt: skip
    os.replace(part, path)
