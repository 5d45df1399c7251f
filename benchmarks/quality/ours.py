"""atlasvi on the data sets of `splits`, scored by `score`: ingested, streamed from disk, all genes.

Run from the root of the repository::

    python -m benchmarks.quality.ours benchmarks/quality/atlasvi.json
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import atlasvi
from benchmarks.quality.score import averaged, latent_scores, run_all
from benchmarks.quality.splits import RECIPE, DataSet, split


def run(data_set: DataSet, seed: int) -> dict[str, Any]:
    """Train on the train cells; score the test cells and the latent of all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.zarr"
        atlasvi.ingest(data_set.path(), path)
        with atlasvi.open(path) as whole:
            return _run(whole[data_set.kept(whole.obs)], data_set, seed)


def _run(atlas: atlasvi.Atlas, data_set: DataSet, seed: int) -> dict[str, Any]:
    train, _, test = split(atlas.n_obs)
    fitted = atlas[train]
    atlasvi.SCVI.setup_anndata(fitted, batch_key=data_set.batch_key, gene_mask=None)
    model = atlasvi.SCVI(
        fitted,
        n_hidden=RECIPE.n_hidden,
        n_latent=RECIPE.n_latent,
        n_layers=RECIPE.n_layers,
        dropout_rate=RECIPE.dropout_rate,
        dispersion=RECIPE.dispersion,
        gene_likelihood=RECIPE.gene_likelihood,
        seed=seed,
    )
    start = time.perf_counter()
    model.train(
        max_epochs=data_set.max_epochs,
        accelerator="cpu",
        train_size=1.0,
        schedule="scvi-tools",
        batch_size=RECIPE.batch_size,
        enable_progress_bar=False,
        seed=seed,
        plan_kwargs={
            "lr": RECIPE.lr,
            "weight_decay": RECIPE.weight_decay,
            "eps": RECIPE.eps,
            "n_epochs_kl_warmup": RECIPE.n_epochs_kl_warmup(data_set),
        },
    )
    seconds = time.perf_counter() - start
    held_out = atlas[test]
    return {
        "elbo": averaged(lambda draw: model.get_elbo(held_out, seed=draw), seed),
        "reconstruction_error": averaged(
            lambda draw: model.get_reconstruction_error(held_out, seed=draw)["reconstruction_loss"], seed
        ),
        **latent_scores(
            model.get_latent_representation(atlas), np.asarray(atlas.obs[data_set.label_key]), seed
        ),
        "train_seconds": round(seconds, 2),
        "n_train": len(train),
        "n_test": len(test),
        "n_obs": atlas.n_obs,
        "n_vars": atlas.n_vars,
    }


def main(out: Path) -> None:
    """Run what is not in ``out`` yet."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    versions = {"atlasvi": atlasvi.__version__, "torch": torch.__version__.split("+")[0]}
    run_all(out, "atlasvi", versions, run)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.quality.ours OUT.json")
    main(Path(sys.argv[1]))
