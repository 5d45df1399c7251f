"""What removes batches, and what it costs in labels: ``python -m benchmarks.quality.batch_options --table``.

SCVI on scmixology_celllines (five plates, two protocols, five lines by genotype; the 2,000 genes that vary
most) and on an atlas that `atlasvi.Simulation` makes: without the batch, with it as a condition, and with
an adversary or an MMD penalty besides, each with the encoder seeing the batch or not. Scored on the latent
of all cells: the entropy of the batches among 50 neighbours (its ceiling is that of random mixing) always
beside what labels keep, k-means against labels (ARI) and their silhouette. Plates differ in their lines
(two have three of the five), so that entropy at its ceiling would mean that lines are mixed.

Each run is appended to ``batch_options.json`` beside this file as it ends; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch

import atlasvi
from atlasvi.metrics import score_latent
from benchmarks.quality.label_transfer import most_variable, read

RESULTS = Path(__file__).parent / "batch_options.json"
EPOCHS = 100
# Name -> whether the model knows of batches, and its arguments.
OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {
    "no batch": (False, {}),
    "conditioning": (True, {}),
    "conditioning, encoder too": (True, {"encode_covariates": True}),
    "adversary 1": (True, {"adversary": 1.0}),
    "adversary 10": (True, {"adversary": 10.0}),
    "MMD 10": (True, {"mmd": 10.0}),
    "MMD 100": (True, {"mmd": 100.0}),
}
SCORES = ("entropy", "ari", "silhouette")


def data_sets() -> Iterator[tuple[str, anndata.AnnData]]:
    """Name, and cells with ``batch`` and ``label``."""
    cells = read("scmixology_celllines")
    cells = cells[cells.obs["demuxlet_cls"] == "SNG"].copy()
    cells = cells[:, most_variable(cells)].copy()
    cells.obs["label"] = cells.obs["cell_type"].astype(str)
    yield "scmixology_celllines", cells
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.zarr"
        # The demo's atlas, smaller.
        atlasvi.ingest(atlasvi.Simulation(3_000, 1_000, seed=0), path)
        cells = anndata.read_zarr(path)
    cells = cells[~cells.obs["is_doublet"].astype(bool) & ~cells.obs["is_empty"].astype(bool)].copy()
    cells.obs["label"] = cells.obs["cell_type"].astype(str)
    yield "simulated", cells


def run(cells: anndata.AnnData, uses_batch: bool, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Train, and score the latent."""
    atlasvi.SCVI.setup_anndata(cells, batch_key="batch" if uses_batch else None, gene_mask=None)
    model = atlasvi.SCVI(cells, seed=seed, **options)
    model.train(EPOCHS, enable_progress_bar=False, seed=seed)
    found = score_latent(
        "", model.get_latent_representation(), cells.obs["label"], cells.obs["batch"], seed=seed
    )
    return {
        "entropy": found.mixing.entropy,
        "ceiling": found.mixing.ceiling,
        "ari": found.clustering.ari,
        "silhouette": found.silhouette,
        "elbo": model.get_elbo(indices=model.validation_indices),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="one data set")
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if options.table:
        print(table(runs))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, cells in data_sets():
        for option, (uses_batch, arguments) in OPTIONS.items():
            for seed in range(options.seeds):
                key = {"data": name, "option": option, "seed": seed}
                if options.only not in (None, name) or any(key.items() <= known.items() for known in runs):
                    continue
                scores = run(cells, uses_batch, arguments, seed)
                runs.append({**key, **{k: round(float(v), 4) for k, v in scores.items()}})
                print(json.dumps(runs[-1]), flush=True)
                RESULTS.write_text("[\n " + ",\n ".join(map(json.dumps, runs)) + "\n]\n")


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds."""
    lines = [
        "| data | option | entropy of batches | ARI | silhouette of labels | ELBO, held out |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(found["data"] for found in runs):
        for option in OPTIONS:
            of = [found for found in runs if found["data"] == name and found["option"] == option]
            if of:
                mean = {key: np.mean([found[key] for found in of]) for key in (*SCORES, "ceiling", "elbo")}
                mixed = f"{mean['entropy']:.2f} of {mean['ceiling']:.2f}"
                kept = f"{mean['ari']:.3f} | {mean['silhouette']:.3f} | {mean['elbo']:,.1f}"
                lines.append(f"| {name} | {option} | {mixed} | {kept} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
