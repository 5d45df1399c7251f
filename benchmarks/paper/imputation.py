"""Imputation error on real counts (the paper's Figure 3), and correlations that imputation makes.

Counts are corrupted (`atlasvi.imputation`), each method sees what is left, and says what was there at the
entries that were changed. In counts that were permuted among the cells of each type nothing correlates within
a type; what a method makes of them it has made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import scipy.sparse as sp

from atlasvi.imputation import binomial, imputation_errors, uniform_zero
from benchmarks.paper.corrupted import Asked, path_of, write
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, made
from benchmarks.paper.methods import NOT_RUN
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots
from benchmarks.paper.record import Record, Row
from benchmarks.paper.tables import Compared, difference_table, differences, mean_of, n_seeds, table

# Name, and how many genes: all, or those of largest variance.
NAMES = ("pbmc_sorted_reference", "scmixology_celllines", "cbmc_citeseq", "worm_neuron")
DATA: tuple[tuple[str, int | None], ...] = (
    *((name, 700) for name in NAMES),
    *((name, None) for name in NAMES),
)
CORRUPTIONS = {
    "zeroed 9%": lambda x, seed: uniform_zero(x, p_zero=0.9, seed=seed),
    "zeroed 1%": lambda x, seed: uniform_zero(x, p_zero=0.1, seed=seed),
    "binomial": lambda x, seed: binomial(x, seed=seed),
}
PERMUTED = "permuted"
PERMUTED_DATA = (("pbmc_sorted_reference", None), ("scmixology_celllines", 700))
# From a method to its side and the side's environment.
SIDES = {
    "atlasvi": ("atlasvi_impute", "atlasvi"),
    "PCA": ("classic_impute", "classic"),
    "MAGIC": ("classic_impute", "classic"),
    "atlasvi DCA": ("atlasvi_impute", "atlasvi"),
    "scvi-tools": ("scvi_tools_impute", "scvi_tools"),
}
TRIVIAL = ("constant 1", "gene's mean")
AS_THEY_ARE = "counts as they are"
DEFINITIONS = {
    "median_l1, mean_l1": "of abs(imputed - original) over the entries that changed, in counts",
    "spearman": "of imputed and original over these entries",
    "..._2": "over originals of 2 or more",
    "mean_r": "permuted within types: mean abs(r) between the 200 most expressed genes, in the cells of the "
    "largest type, on log(1 + imputed counts at the median depth)",
    "share_r": "share of these pairs with abs(r) above 0.5",
}


def run(options: Options) -> None:
    """Make the rows that are not there yet, the first seed of everything first."""
    record = Record(options.results / "imputation.json", DEFINITIONS)
    sets = [
        (name, n_genes)
        for name, n_genes in DATA
        if (name in options.data or not options.data) and (n_genes or not options.variable)
    ]
    permuted = PERMUTED_DATA
    if options.quick:
        sets, permuted = [("little", None)], (("little", None),)
    methods = options.methods or (*TRIVIAL, AS_THEY_ARE, *(("atlasvi",) if options.quick else SIDES))
    for seed, method, (data, n_genes) in product(range(options.seeds), methods, sets):
        for what in (*CORRUPTIONS, PERMUTED) if (data, n_genes) in permuted else (*CORRUPTIONS,):
            genes = n_genes or "all"
            key = {"data": data, "genes": genes, "corruption": what, "method": method, "seed": seed}
            # Counts as they are say nothing of what was lost, and other trivial answers do not vary.
            nothing = TRIVIAL if what == PERMUTED else (AS_THEY_ARE,)
            if record.has(**key) or method in nothing:
                continue
            epochs = 10 if options.quick else None
            job = Job(method, data, seed, n_genes, max_epochs=epochs, options={"corruption": what})
            row = _row(job, options)
            if row is not None:
                record.add({**key, **row})
                print(key, row.get("mean_l1", row.get("mean_r")), flush=True)


def _row(job: Job, options: Options) -> Row | None:
    truth = _prepared(job, options)
    counts, rows, genes = truth["counts"], truth["rows"], truth["genes"]
    depth = np.asarray(counts.sum(1)).ravel()
    versions = ""
    if job.method == "constant 1":
        imputed = np.ones(len(rows))
    elif job.method == AS_THEY_ARE:
        imputed = np.asarray(counts[rows, genes], np.float64).ravel()
    elif job.method == "gene's mean":
        shares = np.asarray(counts.sum(0)).ravel() / counts.sum()
        imputed = depth[rows] * shares[genes]
    else:
        side, environment = SIDES[job.method]
        if options.quick:
            found = import_module(f"benchmarks.paper.sides.{side}").fit(job)
        else:
            found = made(job, side, options.pythons.of(environment), options.work)
        if found is None:
            print(f"{job.name}: not run: needs {environment}", flush=True)
            return None
        imputed, versions = found["imputed"], str(found.get("versions", ""))
    if job.options["corruption"] == PERMUTED:
        # Dividing by the depth here and multiplying by the median is what makes cells comparable.
        level = imputed / np.maximum(depth[rows], 1) * np.median(depth)
        return {**correlations(level.reshape(truth["shape"])), "versions": versions}
    scores: Row = {"n": int(truth["changed"].sum())}
    for least, end in ((1, ""), (2, "_2")):
        keep = truth["changed"]
        errors = imputation_errors(imputed[keep], truth["before"][keep], at_least=least)
        for name in ("median_l1", "mean_l1", "spearman"):
            value = getattr(errors, name)
            scores[name + end] = float(value) if np.isfinite(value) else None
    return {**scores, "versions": versions}


def _prepared(job: Job, options: Options) -> Mapping[str, Any]:
    """Corrupt the counts, as always for this set and seed, and leave them for the sides."""
    SETS[job.data].prepare(options.work)
    adata = SETS[job.data].load(n_genes=job.n_genes)
    what = str(job.options["corruption"])
    if what == PERMUTED:
        types = np.asarray(adata.obs["label"].astype(str))
        counts = permuted_within(adata.X, types, job.seed)
        levels, sizes = np.unique(types, return_counts=True)
        cells = np.flatnonzero(types == levels[sizes.argmax()])
        most = np.argsort(-np.asarray(counts[cells].mean(0)).ravel(), kind="stable")[:200]
        rows, genes = (grid.ravel() for grid in np.meshgrid(cells, most, indexing="ij"))
        found = {"counts": counts, "rows": rows, "genes": genes, "shape": (len(cells), len(most))}
    else:
        lost = CORRUPTIONS[what](adata.X, job.seed)
        found = {
            "counts": lost.counts, "rows": lost.rows, "genes": lost.genes, "before": lost.before,
            "changed": lost.changed,
        }  # fmt: skip
    if not path_of(job).is_file():
        batch = np.asarray(adata.obs["batch"].astype(str)) if "batch" in adata.obs else None
        write(job, Asked(found["counts"], batch, found["rows"], found["genes"]))
    return found


def permuted_within(counts: sp.csr_matrix, types: np.ndarray, seed: int) -> sp.csr_matrix:
    """Each gene's counts among the cells of each type in an order of their own."""
    rng = np.random.default_rng(seed)
    x = counts.toarray()
    for level in np.unique(types):
        at = np.flatnonzero(types == level)
        x[at] = rng.permuted(x[at], axis=0)
    return sp.csr_matrix(x)


def correlations(level: np.ndarray) -> Row:
    """Between genes of (cells, genes) of expression at one depth."""
    logs = np.log1p(level)
    logs = logs[:, logs.std(0) > 0]
    r = np.abs(np.corrcoef(logs, rowvar=False)[np.triu_indices(logs.shape[1], 1)])
    return {"mean_r": float(r.mean()), "share_r": float((r > 0.5).mean())}


MEASURES = ("median_l1", "mean_l1", "spearman", "median_l1_2", "mean_l1_2", "spearman_2")


def _sets(record: Record) -> list[tuple[str, int | str, str]]:
    """Data, genes and corruption, as far as there is something."""
    return list(dict.fromkeys((row["data"], row["genes"], row["corruption"]) for row in record.rows))


def _compared(record: Record) -> list[Compared]:
    found = []
    for data, genes, what in _sets(record):
        if what != PERMUTED:
            for one in differences(record.only(corruption=what), [(data, genes)], MEASURES):
                found.append(replace(one, data=f"{data}, {what}"))
    return found


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    errors, made_up = [], []
    for data, genes, what in _sets(record):
        for method in (*TRIVIAL, AS_THEY_ARE, *SIDES):
            key = {"data": data, "genes": genes, "corruption": what, "method": method}
            if not record.has(**key):
                continue
            where = [data, str(genes)]
            if what == PERMUTED:
                values = [mean_of(record, m, **key) for m in ("mean_r", "share_r")]
                made_up.append([*where, method, *values, n_seeds(record, **key)])
            else:
                values = [mean_of(record, m, **key) for m in MEASURES]
                errors.append([*where, what, method, *values, n_seeds(record, **key)])
    heads = (
        "data", "genes", "corruption", "method", "median L1", "mean L1", "rank r", "median L1, 2 or more",
        "mean", "rank r", "seeds",
    )  # fmt: skip
    return {
        "differences": difference_table(_compared(record)),
        "errors": table(heads, errors, words=4),
        "permuted": table(
            ("data", "genes", "method", "mean of abs(r)", "pairs with abs(r) > 0.5", "seeds"),
            made_up,
            words=3,
        ),
        "not run": table(
            ("method", "not run"), [[name, NOT_RUN[name]] for name in ("DCA, published", "ZIFA")]
        ),
    }


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    panels = {}
    for data, genes, what in _sets(record):
        if what != PERMUTED:
            key = {"data": data, "genes": genes, "corruption": what}
            found = {m: record.values("mean_l1_2", **key, method=m) for m in (*TRIVIAL, *SIDES)}
            panels[f"{data}, {genes} genes, {what}"] = {m: list(v.values()) for m, v in found.items() if v}
    highest = max((float(np.mean(v)) for panel in panels.values() for v in panel.values()), default=1.0)
    return {
        "evidence-imputation.svg": dots(
            panels,
            "mean L1 of imputed counts, originals of 2 or more",
            alt="Mean imputation error of each method by data set and corruption, a dot a seed",
            low=0.0,
            high=min(np.ceil(highest), 10.0),
        )
    }
