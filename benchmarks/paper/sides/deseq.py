"""DESeq2 as pydeseq2 has it: on cells, as the paper did, on pools of them, and on the bulk counts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from pydeseq2.dds import DeseqDataSet
from pydeseq2.ds import DeseqStats

from benchmarks.paper.comparisons import COMPARISONS
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.comparing import Answer, answers, of_p_values
from benchmarks.paper.sides.writing import main

N_POOLS = 5


def tested(one: np.ndarray, two: np.ndarray, *, sparse: bool) -> pd.DataFrame:
    """DESeq2's table of one side against the other, samples x genes, in the genes' order."""
    counts = np.concatenate([one, two]).astype(int)
    seen = counts.sum(0) > 0
    samples = [f"s{i}" for i in range(len(counts))]
    side = pd.DataFrame({"side": np.repeat(["one", "two"], [len(one), len(two)])}, index=samples)
    dds = DeseqDataSet(
        counts=pd.DataFrame(counts[:, seen], index=samples),
        metadata=side,
        design="~side",
        size_factors_fit_type="poscounts" if sparse else "ratio",
        n_cpus=1,
        quiet=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dds.deseq2()
        stats = DeseqStats(dds, contrast=["side", "one", "two"], n_cpus=1, quiet=True)
        stats.summary()
    table: pd.DataFrame = stats.results_df.set_axis(np.flatnonzero(seen)).reindex(range(len(seen)))
    return table


def fit(job: Job) -> dict[str, Any]:
    """``job.method`` says of what: ``"bulk"``, ``"pools"`` or ``"cells"``."""
    if job.method == "bulk":
        return bulk()
    adata = SETS[job.data].load(n_genes=job.n_genes)

    def ask(one: np.ndarray, two: np.ndarray, seed: int) -> Answer:
        sides = []
        for cells in (one, two):
            counts = adata.X[cells].toarray()
            if job.method == "pools":
                order = np.random.default_rng(seed).permutation(len(cells))
                counts = np.stack([counts[pool].sum(0) for pool in np.array_split(order, N_POOLS)])
            sides.append(counts)
        found = tested(*sides, sparse=job.method == "cells")
        return of_p_values(found["pvalue"], found["log2FoldChange"])

    # On cells it takes minutes: once a seed.
    repeats = {"n_repeats": 1} if job.method == "cells" else {}
    return answers(job, adata.obs, {f"DESeq2, {job.method}": ask}, **repeats)


def bulk() -> dict[str, Any]:
    """Of the bulk counts of the cell lines, two replicates each, for each pair of lines compared."""
    path = SETS["scmixology_celllines"].path().parent / "bulk_holik_celllines.csv.gz"
    table = pd.read_csv(path).dropna(subset=["ensembl"]).drop_duplicates("ensembl").set_index("ensembl")
    found: dict[str, Any] = {"genes": table.index.to_numpy().astype(str)}
    for comparison in COMPARISONS["scmixology_celllines"]:
        one, two = (
            table[[column for column in table if column.startswith(f"{values[0]}_")]].to_numpy().T
            for values in (comparison.one, comparison.two)
        )
        said = tested(one, two, sparse=False)
        for what, column in (("p", "pvalue"), ("adjusted", "padj"), ("change", "log2FoldChange")):
            found[f"{comparison.name}|{what}"] = said[column].to_numpy()
    return found


if __name__ == "__main__":
    main(fit, "pydeseq2", "numpy")
