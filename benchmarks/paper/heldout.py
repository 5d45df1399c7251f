"""Held-out log-likelihood (the paper's Table 1): what each method gives to cells that it never saw.

Nats a cell, higher is better. Variational models by their ELBO, by the ELBO after the encoder alone was
fitted anew to the held-out cells, as in the paper, and by importance sampling of log p(x). Gaussian models
are fitted to log(1 + x), are exact, and have the Jacobian of that transform, less sum log(1 + x), so that
all stand in one table. Real sets at their size, with 720, 2,000 and all genes; simulated cells where the
number of training cells is varied, since no real set here has 100,000.
"""

from __future__ import annotations

import numpy as np

from benchmarks.paper.data import SETS
from benchmarks.paper.methods import DEFAULTS, MIXTURE, NOT_RUN, OURS, PEER, PEER_FASTER, SHORT, rows, scalars
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots, forest
from benchmarks.paper.record import Record
from benchmarks.paper.tables import (
    beside_peer,
    difference_table,
    differences,
    genes_shown,
    mean_of,
    n_seeds,
    table,
)

SIMULATED = tuple(f"simulated_{n}k" for n in (4, 10, 15, 50, 100))
REAL = (
    "pbmc_sorted_reference", "worm_neuron", "scmixology_celllines", "kang_pbmc_ifnb", "cbmc_citeseq",
    "pbmc_3chemistries", "monocle3_worm_embryo",
)  # fmt: skip
VARIATIONAL = (
    "atlasvi", SHORT, "atlasvi, NB", MIXTURE, "atlasvi, prior vamp", "atlasvi SCVAE",
    "atlasvi GMVAE", "scvi-tools", PEER_FASTER,
)  # fmt: skip
EXACT = ("atlasvi FA", "scikit-learn FA", "atlasvi PPCA", "scikit-learn PPCA")
METHODS = (*VARIATIONAL, *EXACT)
# With more genes a factor analysis gives those that no training cell has a variance of next to nothing, and a
# held-out cell that has one an absurd density: it is run with the paper's 720 genes alone.
METHODS_MORE_GENES = ("atlasvi", "atlasvi, NB", MIXTURE, "atlasvi, prior vamp", "scvi-tools")
MEASURES = ("elbo", "elbo_refitted", "marginal")
DEFINITIONS = {
    "elbo": "nats a cell of the test cells, ten draws of z",
    "elbo_refitted": "the same, after the encoder alone was fitted anew to the test cells",
    "marginal": "log p(x) by importance sampling, 100 draws from the refitted encoder (with a VampPrior, "
    "which is made of the encoder, from the trained one)",
    "log_likelihood": "exact log p(x)",
    "reconstruction": "E log p(x|z)",
    "zeros": "share of the test cells' entries that are zero",
    "seconds": "of training, one thread of a shared machine: compares nothing",
}
# Lopez et al. 2018, Table 1: other data (mouse brain cells of 10x, 720 genes), so for reference only.
PAPER = {
    "scVI": (-1150.96, -1146.59, -1144.88, -1136.57, -1133.94),
    "FA": (-1175.36, None, None, None, -1169.86),
    "ZINB-WaVE": (-1166.0, None, None, None, -1163.0),
    "ZIFA": (-1250.0, None, None, None, None),
}


def run(options: Options) -> None:
    """Make the rows that are not there yet."""
    record = Record(options.results / "heldout.json", DEFINITIONS)
    for name in options.data or (("little",) if options.quick else (*REAL, *SIMULATED)):
        data_set = SETS[name]
        data_set.prepare(options.work)
        for genes in data_set.gene_sets:
            usual = METHODS if genes == data_set.gene_sets[0] else METHODS_MORE_GENES
            some = ("atlasvi", "atlasvi PPCA") if options.quick else usual
            _run(record, options, name, genes, options.methods or some)


def _run(record: Record, options: Options, name: str, genes: int | None, methods: tuple[str, ...]) -> None:
    data_set, counts = SETS[name], None
    for key, arrays in rows(record, options, name, genes, methods):
        counts = data_set.load(n_genes=genes).X if counts is None else counts
        train, _, test = data_set.split(counts.shape[0], key["seed"])
        zeros = 1 - counts[test].nnz / (len(test) * counts.shape[1])
        known = scalars(arrays, *MEASURES, "log_likelihood", "reconstruction", "seconds", "epochs")
        about = {"zeros": zeros, "n_train": len(train), "n_test": len(test), "n_genes": counts.shape[1]}
        record.add({**key, **known, **about, "versions": str(arrays["versions"])})
        print(record.rows[-1], flush=True)


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    record = record.only(**DEFAULTS)
    real = dict.fromkeys((row["data"], row["genes"]) for row in record.rows if row["data"] not in SIMULATED)
    compared = [(name, genes) for name, genes in real] + [(name, "all") for name in SIMULATED]
    return {
        "differences": beside_peer(record, compared, MEASURES),
        "same rate": difference_table(
            differences(record, compared, MEASURES, theirs=PEER_FASTER), theirs=PEER_FASTER
        ),
        "bfloat16": beside_peer(record, compared, MEASURES, SHORT),
        "mixture": beside_peer(record, compared, MEASURES, MIXTURE),
        "simulated": _by_cells(record),
        "real": _by_set(record, list(real)),
        "not run": table(("method", "not run"), [[name, NOT_RUN[name]] for name in ("ZIFA", "ZINB-WaVE")]),
    }


def _by_cells(record: Record) -> str:
    """The paper's Table 1, with cells as simulated here; its own figures below."""
    lines = []
    for method in METHODS:
        for measure, words in (
            ("elbo_refitted", "ELBO, encoder refitted"),
            ("marginal", "importance sampling"),
            ("log_likelihood", "exact"),
        ):
            means = [mean_of(record, measure, data=name, method=method) for name in SIMULATED]
            if any(means):
                lines.append([method, words, *(mean or "not run yet" for mean in means)])
    for method, values in PAPER.items():
        cells = ["" if value is None else f"{value:,.2f}" for value in values]
        lines.append([f"the paper's {method}", "on its own data", *cells])
    return table(("method", "by", "4,000", "10,000", "15,000", "50,000", "100,000"), lines)


def _by_set(record: Record, sets: list[tuple[str, int | str]]) -> str:
    lines = []
    for data, genes in sets:
        of = {"data": data, "genes": genes}
        zeros = np.mean([row["zeros"] for row in record.where(**of)])
        for method in METHODS:
            key = {**of, "method": method}
            if record.has(**key):
                values = [mean_of(record, m, **key) or "" for m in (*MEASURES, "log_likelihood")]
                head = [data, genes_shown(genes), f"{zeros:.0%}", method]
                lines.append([*head, *values, n_seeds(record, **key)])
    heads = ("data", "genes", "zeros", "method", "ELBO", "refitted", "importance sampling", "exact", "seeds")
    return table(heads, lines)


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    record = record.only(**DEFAULTS)
    sets = list(dict.fromkeys((row["data"], row["genes"]) for row in record.rows))
    panels = {}
    for data, genes in sets:
        panel = {}
        for method in METHODS:
            exact = record.values("log_likelihood", data=data, genes=genes, method=method)
            found = record.values("elbo_refitted", data=data, genes=genes, method=method) or exact
            ours = record.values("elbo_refitted", data=data, genes=genes, method=OURS)
            shared = sorted(set(found) & set(ours))
            if shared and method != OURS:
                panel[method] = [100 * (found[s] - ours[s]) / abs(ours[s]) for s in shared]
        if panel and genes == (SETS[data].gene_sets[0] or "all"):
            panels[data] = panel
    found = differences(record, sets, MEASURES)
    return {
        "evidence-heldout.svg": dots(
            panels,
            "per cent of the held-out log-likelihood, less atlasvi's",
            alt="Held-out log-likelihood of each method less that of atlasvi, by data set",
            low=-6.0,
            high=2.0,
            zero=True,
        ),
        "evidence-heldout-differences.svg": forest(
            found, alt=f"Held-out log-likelihood, {OURS} less {PEER}, in margins"
        ),
    }
