"""Batch removal (the paper's Figure 4), always beside what of the labels is kept.

Entropy of batch mixing as in the paper: the mean over 100 random cells of the entropy of the batches among
their 50 nearest neighbours, 50 times over, as a share of its ceiling, the entropy of the batches in all
cells. Batches that differ in their types cannot reach it and should not. In ziegenhain_mesc_umi all cells are
of one type, so that full mixing is the truth; in scmixology_celllines labels are genotypes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from atlasvi.metrics import entropy_of_batch_mixing, silhouette
from benchmarks.paper.clustering import agreement
from benchmarks.paper.data import DataSet
from benchmarks.paper.methods import DEFAULTS, MIXTURE, OURS, PEER, SHORT, asked, rows, scalars
from benchmarks.paper.options import Options
from benchmarks.paper.pictures import dots, forest
from benchmarks.paper.record import Record, Row
from benchmarks.paper.tables import (
    beside_peer,
    differences,
    method_lines,
    panels,
    sets_of,
    table,
)

DATA = ("scmixology_celllines", "kang_pbmc_ifnb", "pbmc_3chemistries", "ziegenhain_mesc_umi")
METHODS = ("atlasvi", SHORT, MIXTURE, "atlasvi, MMD 10", "scvi-tools", "Harmony", "ComBat + PCA", "PCA")
MEASURES = ("mixing", "batch_silhouette_size", "ilisi", "kbet", "ari", "nmi", "silhouette")
N_NEIGHBORS, N_INIT = 50, 200
DEFINITIONS = {
    "entropy, ceiling, mixing": "entropy of batch mixing in nats, its ceiling, and their ratio; "
    f"{N_NEIGHBORS} neighbours, or a tenth of the cells where that is less",
    "batch_silhouette, batch_silhouette_size": "of the batches in the latent, ideally 0, and its size",
    "ilisi, kbet": "scib-metrics, exact neighbours, 90 or a third of the cells: 1 is full mixing",
    "ari, nmi": f"k-means of the latent of all cells, as many clusters as labels, {N_INIT} starts",
    "silhouette": "of the labels in the latent",
}


def run(options: Options) -> None:
    """Make the rows that are not there yet."""
    record = Record(options.results / "batches.json", DEFINITIONS)
    for data_set, genes, methods in asked(options, DATA, METHODS):
        _run(record, options, data_set, genes, methods)


def _run(
    record: Record, options: Options, data_set: DataSet, genes: int | None, methods: tuple[str, ...]
) -> None:
    obs, made, latents = None, [], []
    for key, arrays in rows(record, options, data_set.name, genes, methods):
        obs = data_set.load().obs if obs is None else obs
        found = scores(arrays["latent"], obs, 10 if options.quick else N_INIT)
        made.append({**key, **found, **scalars(arrays, "seconds"), "versions": str(arrays["versions"])})
        latents.append(arrays["latent"])
        print(made[-1], flush=True)
    if made:
        both = scib(latents, obs["batch"], options.pythons.classic)
        record.add(*({**row, **more} for row, more in zip(made, both, strict=True)))


def scores(latent: np.ndarray, obs: Any, n_init: int) -> Row:
    """Of mixing and of labels, with a fixed seed: what varies is the fit."""
    batch = np.asarray(obs["batch"].astype(str))
    mixed = entropy_of_batch_mixing(latent, batch, seed=0, n_neighbors=min(N_NEIGHBORS, len(batch) // 10))
    width = silhouette(latent, batch, seed=0)[0]
    found = {
        "entropy": mixed.entropy,
        "ceiling": mixed.ceiling,
        "mixing": mixed.entropy / mixed.ceiling,
        "batch_silhouette": width,
        "batch_silhouette_size": abs(width),
    }
    if "label" in obs:
        found |= agreement(latent, np.asarray(obs["label"].astype(str)), n_init)
    return found


def scib(latents: list[np.ndarray], batch: Any, python: str | None) -> list[Row]:
    """iLISI and kBET by the peer, in one process for all latents; nothing without its interpreter."""
    if python is None:
        return [{} for _ in latents]
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "latents.npz", Path(folder) / "out.json"
        codes = np.unique(np.asarray(batch.astype(str)), return_inverse=True)[1]
        np.savez(given, batch=codes, **{f"latent{i}": latent for i, latent in enumerate(latents)})
        side = "benchmarks.paper.sides.scib"
        subprocess.run([python, "-W", "ignore", "-m", side, given, out], check=True)
        found = json.loads(out.read_text())
    return [found[f"latent{i}"] for i in range(len(latents))]


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    usual = record.only(**DEFAULTS)
    sets = sets_of(usual)
    shown = ("mixing", "batch_silhouette", "ilisi", "kbet", "ari", "nmi", "silhouette")
    heads = (
        "data", "genes", "method", "mixing", "silhouette of batches", "iLISI", "kBET", "ARI", "NMI",
        "silhouette of labels", "seeds",
    )  # fmt: skip
    penalised = "atlasvi, MMD 10"
    return {
        "differences": beside_peer(usual, sets, MEASURES),
        "bfloat16": beside_peer(usual, sets, MEASURES, SHORT),
        "mixture": beside_peer(usual, sets, MEASURES, MIXTURE),
        "MMD": beside_peer(usual, sets, MEASURES, penalised),
        "methods": table(heads, method_lines(usual, METHODS, shown), words=3),
    }


def pictures(record: Record) -> dict[str, str]:
    """SVG files."""
    usual = record.only(**DEFAULTS)
    return {
        "evidence-batches.svg": dots(
            panels(usual, METHODS, "mixing"),
            "entropy of batch mixing, as a share of its ceiling",
            alt="Entropy of batch mixing of each method by data set, a dot a seed",
            low=0.0,
            high=1.0,
        ),
        "evidence-batches-differences.svg": forest(
            differences(usual, sets_of(usual), MEASURES),
            alt=f"Batch mixing and agreement with labels, {OURS} less {PEER}, in margins",
        ),
    }
