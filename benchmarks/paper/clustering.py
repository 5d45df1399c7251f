"""Clusters and latent space: agreement of k-means on the latent with published types (the paper's Figure 3).

ARI and NMI (geometric mean of the entropies) with as many clusters as labels and 200 starts, and the
silhouette of the labels, at the published types and at a coarser cut where there is one.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from atlasvi.metrics import clustering_scores, silhouette
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job, fit
from benchmarks.paper.options import Options
from benchmarks.paper.record import Record

DATA = ("pbmc_sorted_reference", "worm_neuron", "cbmc_citeseq", "scmixology_celllines")
METHODS = ("atlasvi", "scvi-tools", "PCA", "FA")
DEFINITIONS = {
    "ari, nmi": "k-means of the latent means of all cells, as many clusters as labels, 200 starts",
    "silhouette": "of the labels in the latent",
}


def run(options: Options) -> None:
    """Make the rows that are not there yet."""
    record = Record(options.results / "clustering.json", DEFINITIONS)
    for name in options.data or DATA:
        adata = SETS[name].load()
        for seed in range(options.seeds):
            for method in options.methods or METHODS:
                if record.has(data=name, method=method, seed=seed):
                    continue
                found = fit(Job(method, name, seed), options.work, options.pythons)
                if found is None:
                    continue
                latent, labels = found["latent"], np.asarray(adata.obs["label"].astype(str))
                scores = clustering_scores(latent, labels, seed=seed)
                width, _ = silhouette(latent, labels, seed=seed)
                row = {"data": name, "method": method, "seed": seed, **asdict(scores), "silhouette": width}
                record.add({**row, "versions": str(found["versions"])})
                print(row, flush=True)
