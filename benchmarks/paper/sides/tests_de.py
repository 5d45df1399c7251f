"""Wilcoxon's test and Welch's t-test of scanpy, on log(1 + counts to 10,000 a cell)."""

from __future__ import annotations

from typing import Any

import numpy as np
import scanpy as sc

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.comparing import Answer, answers, of_p_values
from benchmarks.paper.sides.writing import main


def fit(job: Job) -> dict[str, Any]:
    """Answer of the cells that are drawn, which are all that these see."""
    adata = SETS[job.data].load(n_genes=job.n_genes)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)

    def ask(test: str, one: np.ndarray, two: np.ndarray, seed: int) -> Answer:
        both = adata[np.concatenate([one, two])].copy()
        both.obs["side"] = np.repeat(["one", "two"], [len(one), len(two)])
        ties = {"tie_correct": True} if test == "wilcoxon" else {}
        sc.tl.rank_genes_groups(both, "side", groups=["one"], reference="two", method=test, **ties)
        found = sc.get.rank_genes_groups_df(both, "one").set_index("names").loc[adata.var_names]
        return of_p_values(found["pvals"], found["logfoldchanges"])

    return answers(
        job,
        adata.obs,
        {
            "Wilcoxon": lambda one, two, seed: ask("wilcoxon", one, two, seed),
            "t-test": lambda one, two, seed: ask("t-test", one, two, seed),
        },
    )


if __name__ == "__main__":
    main(fit, "scanpy", "scipy", "numpy")
