"""The methods of the tables: what each is fitted by, and with which options; and those that are not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.paper.data import SETS, DataSet
from benchmarks.paper.fits import Job, fit
from benchmarks.paper.options import Options
from benchmarks.paper.record import Record

OURS = "atlasvi"
SHORT = "atlasvi, bfloat16"
MIXTURE = "atlasvi, prior mog"
PEER = "scvi-tools"
# With the rate that is atlasvi's default; its own is 0.001.
PEER_FASTER = "scvi-tools, rate 0.01"


@dataclass(frozen=True)
class Method:
    """What a column says of itself, and how it is fitted.

    Args:
        side: the method of a `Job`.
        options: of the model, and ``"precision"`` of its training.
        by_labels: the option that is given the number of labels, or ``None``.
    """

    side: str
    options: Mapping[str, Any] = field(default_factory=dict)
    by_labels: str | None = None


METHODS = {
    "atlasvi": Method("atlasvi"),
    SHORT: Method("atlasvi", {"precision": "bf16"}),
    "atlasvi, NB": Method("atlasvi", {"gene_likelihood": "nb"}),
    MIXTURE: Method("atlasvi", {"prior": "mog"}),
    "atlasvi, prior vamp": Method("atlasvi", {"prior": "vamp"}),
    "atlasvi, MMD 10": Method("atlasvi", {"mmd": 10.0}),
    "atlasvi SCVAE": Method("atlasvi SCVAE"),
    "atlasvi GMVAE": Method("atlasvi GMVAE", {"bound": "sampled"}, by_labels="n_components"),
    "atlasvi DCA": Method("atlasvi DCA"),
    "atlasvi FA": Method("atlasvi FA"),
    "atlasvi PPCA": Method("atlasvi PPCA"),
    PEER: Method("scvi-tools"),
    PEER_FASTER: Method("scvi-tools", {"lr": 0.01}),
    "scikit-learn FA": Method("scikit-learn FA"),
    "scikit-learn PPCA": Method("scikit-learn PPCA"),
    "PCA": Method("PCA"),
    "FA": Method("FA"),
    "Harmony": Method("Harmony"),
    "ComBat + PCA": Method("ComBat"),
}
# Methods of the paper without a row of their own, and why.
NOT_RUN = {
    "ZIFA": "not on PyPI, and its EM makes cells x genes dense at each step: hours at 720 genes",
    "ZINB-WaVE": "an R package of Bioconductor that Debian does not have",
    "BISCUIT": "R scripts, not a package; the paper could not run it on more than a few thousand cells",
    "SIMLR": "an R package of Bioconductor that Debian does not have; makes cells x cells dense",
    "DCA, published": "needs TensorFlow 1, which no Python of today has; ours stands under its own name",
}


# Fields of a `Job` that an experiment may vary; a row says them all, so that none is taken for another.
DEFAULTS = {"n_latent": 10, "max_epochs": None}


def asked(
    options: Options, data: Sequence[str], methods: tuple[str, ...]
) -> Iterator[tuple[DataSet, int | None, tuple[str, ...]]]:
    """Each set, made ready, its numbers of genes, and the methods: the first on little data if quick."""
    for name in options.data or (("little",) if options.quick else data):
        SETS[name].prepare(options.work)
        for genes in SETS[name].gene_sets:
            yield SETS[name], genes, options.methods or (methods[:1] if options.quick else methods)


def rows(
    record: Record, options: Options, data: str, genes: int | None, methods: Sequence[str], **more: Any
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Key and arrays of each fit that has no row in the record yet, seed after seed.

    ``more`` are fields of the `Job` that are not as in `DEFAULTS`. Fits that are not there yet and whose
    peer has no interpreter here are left out.
    """
    if options.quick:
        more = {"max_epochs": 5, **more}
    for seed in range(options.seeds):
        for name in methods:
            key = {"data": data, "genes": genes or "all", "method": name, "seed": seed, **DEFAULTS, **more}
            if record.has(**key):
                continue
            method = METHODS[name]
            given = dict(method.options)
            if method.by_labels is not None and SETS[data].label_key is not None:
                given[method.by_labels] = SETS[data].n_labels(options.work)
            job = Job(method.side, data, seed, genes, options=given, **more)
            arrays = fit(job, options.work, options.pythons)
            if arrays is not None:
                yield key, arrays


def scalars(arrays: Mapping[str, np.ndarray], *names: str) -> dict[str, float]:
    """Those of the scalars that a fit has."""
    return {name: float(arrays[name]) for name in names if name in arrays}
