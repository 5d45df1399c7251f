"""Differential expression against references that were measured apart (the paper's Figure 5).

Each method is asked which genes differ between 100 cells of one group and 100 of another, drawn anew five
times a seed. A model has been trained on cells of all types, without labels; a test sees the cells drawn.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from benchmarks.paper.comparisons import COMPARISONS, Comparison, Reference, references
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, fit, made
from benchmarks.paper.idr import idr
from benchmarks.paper.methods import OURS, PEER
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots
from benchmarks.paper.record import Record, Row
from benchmarks.paper.tables import Compared, difference_table, differences, mean_of, n_seeds, table

DATA = (
    "scmixology_celllines", "pbmc_sorted_reference", "demo", "kang_treatment", "ziegenhain_mesc_scrbseq_umi",
)  # fmt: skip
DEFINITIONS = {
    "auroc": "of the evidence, without its sign, for the genes that the reference says differ; "
    "mean of the repeats",
    "idr_rho": "correlation in the part that method and reference rank alike (Li et al. 2011), "
    "whose share is that of genes that differ in the reference",
    "reproducible": "share of genes at an irreproducible discovery rate of 5 % or less",
    "change_rank": "Spearman's correlation of the method's change with the reference's",
    "called": "share of genes called, at |K| > 3, an expected false discovery rate of 5 %, or adjusted "
    "p < 0.05",
    "power": "share called of the genes that the reference says differ",
    "called_else": "share called of the other genes of the reference",
    "worst": "largest share called in a repeat",
}
MEASURES = ("auroc", "idr_rho", "change_rank")


class Maker(NamedTuple):
    """Who answers: the side, the environment it needs, the names of its methods, and the model it asks."""

    side: str
    environment: str
    methods: tuple[str, ...]
    model: str | None = None


MAKERS: Mapping[str, Maker] = {
    "atlasvi-de": Maker(
        "atlasvi_de", "atlasvi", ("atlasvi, vanilla", "atlasvi, change", "atlasvi, paper"), OURS
    ),
    "tests": Maker("tests_de", "classic", ("Wilcoxon", "t-test")),
    "scvi-tools-de": Maker(
        "scvi_tools_de", "scvi_tools", ("scvi-tools, vanilla", "scvi-tools, change"), PEER
    ),
    "edgeR": Maker("edger", "R", ("edgeR, cells",)),
    "pools": Maker("deseq", "classic", ("DESeq2, pools",)),
    "cells": Maker("deseq", "classic", ("DESeq2, cells",)),
}
METHODS = tuple(method for maker in MAKERS.values() for method in maker.methods)
NOT_RUN = {"MAST": "an R package of Bioconductor that Debian does not have"}


def run(options: Options) -> None:
    """Make the rows that are not there yet, the first seed of everything first."""
    record = Record(options.results / "differential.json", DEFINITIONS)
    makers = options.methods or (("atlasvi-de",) if options.quick else tuple(MAKERS))
    sets = options.data or (("little",) if options.quick else DATA)
    # The first numbers of genes first, of which there are fits for other experiments too; all genes last.
    for place, seed in product(range(1 if options.variable else 3), range(options.seeds)):
        for maker, data in product(makers, sets):
            if place >= len(SETS[data].gene_sets):
                continue
            genes = SETS[data].gene_sets[place]
            if record.has(data=data, genes=genes or "all", by=maker, seed=seed):
                continue
            SETS[data].prepare(options.work)
            rows = _rows(options, data, genes, maker, seed)
            record.add(*rows)
            for row in rows:
                shown = ("comparison", "genes", "method", "reference", "seed", "auroc", "called")
                print({k: row.get(k) for k in shown}, flush=True)


def _rows(options: Options, data: str, n_genes: int | None, name: str, seed: int) -> list[Row]:
    """Of all comparisons of a set, by the methods of one maker; none if something it needs is not here."""
    bulk = None
    if data == "scmixology_celllines":
        bulk = made(Job("bulk", data), "deseq", options.pythons.classic, options.work)
        if bulk is None:
            print(f"{data}: not run: the reference needs --classic, for DESeq2 of the bulk", flush=True)
            return []
    found = _answers(options, data, n_genes, name, seed)
    if found is None:
        print(f"{data}, {name}: not run: needs {MAKERS[name].environment}", flush=True)
        return []
    genes = SETS[data].load(n_genes=n_genes).var_names
    rows = []
    for comparison in COMPARISONS[data]:
        truths = references(data, comparison, genes, bulk)
        for method in MAKERS[name].methods:
            key = {
                "data": data, "genes": n_genes or "all", "comparison": comparison.name, "by": name,
                "method": method, "seed": seed,
            }  # fmt: skip
            answer = [
                found[f"{comparison.name}|{method}|{what}"] for what in ("evidence", "change", "called")
            ]
            shares = answer[2].mean(1)
            called = {"called": _mean(shares), "worst": float(shares.max())}
            end = {"repeats": len(shares), "versions": str(found.get("versions", ""))}
            if comparison.null:
                rows.append({**key, "reference": "none", **called, **end})
            for reference, truth in truths.items():
                rows.append({**key, "reference": reference, **called, **score(truth, *answer), **end})
    return rows


def _answers(
    options: Options, data: str, n_genes: int | None, name: str, seed: int
) -> Mapping[str, np.ndarray] | None:
    maker, job = MAKERS[name], Job(name, data, seed, n_genes)
    if maker.model is not None:
        epochs = {"max_epochs": 10} if options.quick else {}
        job = replace(job, **epochs)
        if fit(replace(job, method=maker.model), options.work, options.pythons) is None:
            return None
    if options.quick:
        answers: Mapping[str, np.ndarray] = import_module(f"benchmarks.paper.sides.{maker.side}").fit(job, 1)
        return answers
    here = maker.environment != "R" or shutil.which("Rscript")
    python = (
        options.pythons.of("atlasvi" if maker.environment == "R" else maker.environment) if here else None
    )
    return made(job, maker.side, python, options.work)


def _mean(values: object) -> float:
    return float(np.mean(values))


def score(truth: Reference, evidence: np.ndarray, change: np.ndarray, called: np.ndarray) -> Row:
    """Means over the repeats; (repeats, G) each."""
    keep = truth.known
    positive = truth.positive[keep]
    scores = {
        "n_genes": int(keep.sum()),
        "n_positive": int(positive.sum()),
        "auroc": _mean([roc_auc_score(positive, one) for one in evidence[:, keep]]),
        "power": _mean(called[:, keep][:, positive]),
        "called_else": _mean(called[:, keep][:, ~positive]),
    }
    if truth.evidence is not None:
        fits = [idr(one, truth.evidence[keep], positive.mean()) for one in evidence[:, keep]]
        scores["idr_rho"] = _mean([found.rho for found in fits])
        scores["reproducible"] = _mean([found.rate <= 0.05 for found in fits])
    if truth.change is not None:
        scores["change_rank"] = _mean([spearmanr(one, truth.change[keep])[0] for one in change[:, keep]])
    return scores


def _asked(record: Record) -> list[dict[str, Any]]:
    """Set, comparison, reference and genes, as far as there is something; all genes last."""
    names = ("data", "comparison", "reference", "genes")
    found = dict.fromkeys(tuple(row[name] for name in names) for row in record.rows)
    order = {(data, c.name): place for place, (data, c) in enumerate(_comparisons())}
    places = sorted(found, key=lambda values: (order[values[:2]], values[2], str(values[3])))
    return [dict(zip(names, values, strict=True)) for values in places]


def _comparisons() -> Iterator[tuple[str, Comparison]]:
    for data in (*DATA, "little"):
        for comparison in COMPARISONS[data]:
            yield data, comparison


def _compared(record: Record) -> list[Compared]:
    found = []
    for asked in _asked(record):
        part = record.only(**asked)
        for mode in ("vanilla", "change"):
            sides = f"{OURS}, {mode}", f"{PEER}, {mode}"
            for one in differences(part, [(asked["data"], asked["genes"])], MEASURES[:2], *sides):
                found.append(replace(one, data=f"{asked['comparison']}, {asked['reference']}, {mode}"))
    return found


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    lines, nulls = [], []
    for asked in _asked(record):
        for method in METHODS:
            key = {**asked, "method": method}
            if not record.has(**key):
                continue
            if asked["reference"] == "none":
                shares = [mean_of(record, m, **key) for m in ("called", "worst")]
                cells = [asked["comparison"], str(asked["genes"]), method]
                nulls.append([*cells, *shares, n_seeds(record, **key)])
            else:
                row = record.where(**key)[0]
                genes = f"{asked['reference']}: {row['n_positive']:,} of {row['n_genes']:,}"
                measures = (*MEASURES[:2], "reproducible", "change_rank", "power", "called_else")
                values = [mean_of(record, m, **key) for m in measures]
                lines.append([asked["comparison"], genes, method, *values, n_seeds(record, **key)])
    heads = (
        "cells", "reference: genes that differ", "method", "AUROC", "IDR's correlation", "reproducible",
        "changes, rank r", "called of them", "called of others", "seeds",
    )  # fmt: skip
    return {
        "differences": difference_table(_compared(record)),
        "methods": table(heads, lines, words=3),
        "null": table(
            ("cells", "genes", "method", "share called", "largest of a repeat", "seeds"), nulls, words=3
        ),
        "not run": table(("method", "not run"), [[name, why] for name, why in NOT_RUN.items()]),
    }


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    panels = {}
    for asked in _asked(record):
        if asked["genes"] != (SETS[asked["data"]].gene_sets[0] or "all"):
            continue
        found = {m: record.values("auroc", **asked, method=m) for m in METHODS}
        if any(found.values()):
            title = f"{asked['comparison']}: {asked['reference']}"
            panels[title] = {m: list(v.values()) for m, v in found.items() if v}
    return {
        "evidence-differential.svg": dots(
            panels,
            "AUROC for the genes that the reference says differ",
            alt="AUROC of each method by comparison and reference, a dot a seed",
            low=0.4,
            high=1.0,
        )
    }
