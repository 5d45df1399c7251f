"""Scrublet's doublet scores (Wolock et al. 2019), with its defaults."""

from __future__ import annotations

from typing import Any

import scrublet

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """A score a cell."""
    counts = SETS[job.data].load(n_genes=job.n_genes).X
    score, _ = scrublet.Scrublet(counts, random_state=job.seed).scrub_doublets(verbose=False)
    return {"score": score}


if __name__ == "__main__":
    main(fit, "scrublet", "numpy")
