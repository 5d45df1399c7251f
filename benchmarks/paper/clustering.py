"""Clusters and latent space: agreement of k-means on the latent with published types (the paper's Figure 3).

ARI and NMI (geometric mean of the entropies) with as many clusters as labels and 200 starts, and the
silhouette of the labels, at the published types and at a coarser cut where there is one. Variational models
are trained on 80 % of the cells and encode all; linear ones see all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atlasvi.metrics import clustering_scores, silhouette
from benchmarks.paper.data import SETS, DataSet
from benchmarks.paper.methods import DEFAULTS, MIXTURE, NOT_RUN, OURS, PEER, asked, rows, scalars
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots, forest
from benchmarks.paper.record import Record
from benchmarks.paper.tables import (
    beside_peer,
    differences,
    mean_of,
    method_lines,
    n_seeds,
    panels,
    sets_of,
    table,
)

DATA = ("pbmc_sorted_reference", "worm_neuron", "cbmc_citeseq", "scmixology_celllines", "demo")
METHODS = (
    "atlasvi", MIXTURE, "atlasvi, prior vamp", "atlasvi GMVAE", "atlasvi DCA", "scvi-tools",
    "PCA", "FA",
)  # fmt: skip
# Stability is looked at on one set: what is varied, one at a time, beside the defaults.
STABILITY = "pbmc_sorted_reference"
VARIED: tuple[tuple[str, int], ...] = (
    *(("n_latent", n) for n in (2, 5, 20, 30)),
    *(("max_epochs", n) for n in (10, 30, 100)),
)
MEASURES = ("ari", "nmi", "silhouette", "ari_coarse", "nmi_coarse")
N_INIT = 200
DEFINITIONS = {
    "ari, nmi": f"k-means of the latent means of all cells, as many clusters as labels, {N_INIT} starts",
    "silhouette": "of the labels in the latent, of at most 5,000 cells",
    "ari_coarse, nmi_coarse, silhouette_coarse": "the same with coarser types",
    "ari_own": "of GMVAE's own clusters, of the test cells",
}


def run(options: Options) -> None:
    """Make the rows that are not there yet."""
    record = Record(options.results / "clustering.json", DEFINITIONS)
    for data_set, genes, methods in asked(options, DATA, METHODS):
        _run(record, options, data_set, genes, methods, {})
        if data_set.name == STABILITY and genes == data_set.gene_sets[0]:
            some = tuple(method for method in methods if method in (OURS, PEER))
            for what, value in VARIED:
                _run(record, options, data_set, genes, some, {what: value})


def _run(
    record: Record,
    options: Options,
    data_set: DataSet,
    genes: int | None,
    methods: tuple[str, ...],
    varied: dict[str, Any],
) -> None:
    obs = None
    for key, arrays in rows(record, options, data_set.name, genes, methods, **varied):
        obs = data_set.load().obs if obs is None else obs
        _, _, test = data_set.split(len(obs), key["seed"])
        known = scalars(arrays, "seconds", "epochs")
        found = scores(data_set, arrays, obs, test, 10 if options.quick else N_INIT)
        record.add({**key, **found, **known, "versions": str(arrays["versions"])})
        print(record.rows[-1], flush=True)


def scores(
    data_set: DataSet, arrays: dict[str, np.ndarray], obs: Any, test: np.ndarray, n_init: int
) -> dict[str, float]:
    """Of a latent, with a fixed seed: what varies is the fit."""
    latent, labels = arrays["latent"], np.asarray(obs["label"].astype(str))
    coarse = data_set.coarse(labels)
    found = {}
    for suffix, types in (("", labels), ("_coarse", coarse)):
        if suffix and not 1 < len(set(types)) < len(set(labels)):
            continue
        found |= {f"{name}{suffix}": value for name, value in agreement(latent, types, n_init).items()}
    if "clusters" in arrays:
        from sklearn.metrics import adjusted_rand_score

        found["ari_own"] = float(adjusted_rand_score(labels[test], arrays["clusters"]))
    return found


def agreement(latent: np.ndarray, labels: np.ndarray, n_init: int) -> dict[str, float]:
    """Of k-means on a latent with labels, and the silhouette of these."""
    found = clustering_scores(latent, labels, seed=0, n_init=n_init)
    return {"ari": found.ari, "nmi": found.nmi, "silhouette": silhouette(latent, labels, seed=0)[0]}


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    usual = record.only(**DEFAULTS)
    heads = ("data", "genes", "method", "ARI", "NMI", "silhouette", "ARI, coarse", "NMI, coarse", "seeds")
    return {
        "differences": beside_peer(usual, sets_of(usual), MEASURES),
        "mixture": beside_peer(usual, sets_of(usual), MEASURES, MIXTURE),
        "methods": table(heads, method_lines(usual, METHODS, MEASURES), words=3),
        "stability": _stability(record),
        "not run": table(
            ("method", "not run"), [[name, NOT_RUN[name]] for name in ("SIMLR", "ZIFA", "DCA, published")]
        ),
    }


def _stability(record: Record) -> str:
    lines = []
    genes = SETS[STABILITY].gene_sets[0]
    names = {"n_latent": "{} dimensions", "max_epochs": "{} epochs at most"}
    for varied in ({}, *({what: value} for what, value in VARIED)):
        for method in (OURS, PEER):
            of = {"data": STABILITY, "genes": genes, "method": method, **DEFAULTS, **varied}
            if record.has(**of):
                name = next((names[what].format(value) for what, value in varied.items()), "nothing")
                cells = [mean_of(record, m, **of) for m in ("ari", "nmi", "silhouette")]
                lines.append([name, method, *cells, n_seeds(record, **of)])
    return table(("varied", "method", "ARI", "NMI", "silhouette", "seeds"), lines)


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    usual = record.only(**DEFAULTS)
    return {
        "evidence-clustering.svg": dots(
            panels(usual, METHODS, "ari"),
            "adjusted Rand index of k-means on the latent, with the labels",
            alt="Adjusted Rand index of each method by data set, a dot a seed",
            low=0.0,
            high=1.0,
        ),
        "evidence-clustering-differences.svg": forest(
            differences(usual, sets_of(usual), MEASURES),
            alt=f"Agreement with labels, {OURS} less {PEER}, in margins",
        ),
    }
