"""edgeR on cells: needs ``Rscript`` with Bioconductor's edgeR (Debian: ``r-bioc-edger``)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.comparing import Answer, answers, of_p_values
from benchmarks.paper.sides.writing import main

SCRIPT = Path(__file__).with_name("edger.R")


def fit(job: Job) -> dict[str, Any]:
    """Answer of the cells that are drawn."""
    adata = SETS[job.data].load(n_genes=job.n_genes)
    edger = ""

    def ask(one: np.ndarray, two: np.ndarray, seed: int) -> Answer:
        nonlocal edger
        counts = adata.X[np.concatenate([one, two])].toarray().T.astype(int)
        seen = np.flatnonzero(counts.sum(1))
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("counts.csv", "side.csv", "out.csv")]
            np.savetxt(files[0], counts[seen], fmt="%d", delimiter=",")
            np.savetxt(files[1], np.repeat([1, 2], [len(one), len(two)]), fmt="%d")
            edger = subprocess.run(
                ["Rscript", SCRIPT, *files], check=True, capture_output=True, text=True
            ).stdout
            found = pd.read_csv(files[2]).set_axis(seen).reindex(range(len(counts)))
        return of_p_values(found["PValue"], found["logFC"])

    made = answers(job, adata.obs, {"edgeR, cells": ask})
    return {**made, "edgeR": edger}


if __name__ == "__main__":
    main(fit, "numpy")
