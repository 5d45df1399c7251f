"""scvi-tools on the data sets of `splits`, scored by `score`.

Run with the peer's Python (`benchmarks/peers/scvi_tools_env.sh` makes it), from the root of the repository::

    DIR/bin/python -m benchmarks.quality.peer_scvi_tools benchmarks/quality/scvi_tools.json
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scvi
import torch

from benchmarks.quality.score import averaged, latent_scores, run_all
from benchmarks.quality.splits import RECIPE, DataSet, split


def load(data_set: DataSet) -> ad.AnnData:
    """The cells that are used, with float32 counts as scvi-tools wants them."""
    adata = ad.read_h5ad(data_set.path())
    adata = adata[data_set.kept(adata.obs)].copy()
    adata.X = adata.X.astype(np.float32)
    return adata


def run(data_set: DataSet, seed: int) -> dict[str, Any]:
    """Train on the train cells; score the test cells and the latent of all."""
    adata = load(data_set)
    train, _, test = split(adata.n_obs)
    scvi.settings.seed = seed
    fitted = adata[train].copy()
    scvi.model.SCVI.setup_anndata(fitted, batch_key=data_set.batch_key)
    model = scvi.model.SCVI(
        fitted,
        n_hidden=RECIPE.n_hidden,
        n_latent=RECIPE.n_latent,
        n_layers=RECIPE.n_layers,
        dropout_rate=RECIPE.dropout_rate,
        dispersion=RECIPE.dispersion,
        gene_likelihood=RECIPE.gene_likelihood,
    )
    start = time.perf_counter()
    model.train(
        max_epochs=data_set.max_epochs,
        accelerator="cpu",
        devices=1,
        train_size=1.0,
        batch_size=RECIPE.batch_size,
        enable_progress_bar=False,
        plan_kwargs={
            "lr": RECIPE.lr,
            "weight_decay": RECIPE.weight_decay,
            "eps": RECIPE.eps,
            "n_epochs_kl_warmup": RECIPE.n_epochs_kl_warmup(data_set),
        },
    )
    seconds = time.perf_counter() - start
    held_out = adata[test].copy()

    def elbo(draw: int) -> float:
        torch.manual_seed(draw)
        return float(model.get_elbo(held_out))

    def reconstruction(draw: int) -> float:
        torch.manual_seed(draw)
        return float(model.get_reconstruction_error(held_out)["reconstruction_loss"])

    return {
        "elbo": averaged(elbo, seed),
        "reconstruction_error": averaged(reconstruction, seed),
        **latent_scores(
            model.get_latent_representation(adata), np.asarray(adata.obs[data_set.label_key]), seed
        ),
        "train_seconds": round(seconds, 2),
        "n_train": len(train),
        "n_test": len(test),
        "n_obs": adata.n_obs,
        "n_vars": adata.n_vars,
    }


def main(out: Path) -> None:
    """Run what is not in ``out`` yet."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("scvi").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    versions = {
        "scvi-tools": scvi.__version__,
        "torch": torch.__version__.split("+")[0],
        "anndata": ad.__version__,
    }
    run_all(out, "scvi-tools", versions, run)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.quality.peer_scvi_tools OUT.json")
    main(Path(sys.argv[1]))
