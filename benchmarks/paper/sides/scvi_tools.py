"""scvi-tools: its defaults, a KL warm-up that ends, and the weights of its best ELBO.

Left alone it trains small sets for 400 epochs, warms the KL up over all of them and keeps the last weights.
Where there are many cells it overfits by then, and where there are few it still gains: here its validation
ELBO says when it ends.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scvi
import torch
from scvi.train import SaveCheckpoint

from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import ELBO_DRAWS, MARGINAL_DRAWS, main

PACKAGES = ("scvi-tools", "torch", "numpy")
WARMUP_EPOCHS = 20
PATIENCE = 15
MAX_EPOCHS = 2_000
# Refitting the encoder to the held-out cells: minibatches at most, looks without gain, minibatches a look,
# cells and draws of a look.
REFIT_STEPS, REFIT_PATIENCE, STEPS_A_LOOK, MOST_LOOKED_AT, LOOK_DRAWS = 400, 5, 25, 1_024, 3
REFIT_RATE = 1e-3


def fit(job: Job) -> dict[str, Any]:
    """Train on the training cells, stop by the validation cells, score the test cells."""
    data_set = SETS[job.data]
    adata = data_set.load(n_genes=job.n_genes)
    parts = data_set.split(adata.n_obs, job.seed)
    batch_key = "batch" if "batch" in adata.obs else None
    model, seconds = train(
        adata, batch_key, parts, job.seed, job.max_epochs, n_latent=job.n_latent, **job.options
    )
    test = parts[2]
    found = {
        "model": model,
        "latent": model.get_latent_representation(),
        "elbo": elbo(model, test),
        "reconstruction": -float(model.get_reconstruction_error(indices=test)["reconstruction_loss"]),
        "seconds": seconds,
        "epochs": len(model.history["elbo_validation"]),
    }
    encoder = model.module.z_encoder
    trained = copy.deepcopy(encoder.state_dict())
    refit(model, test)
    # Of each cell: its own mean is one of minibatches, the last of which, smaller, would count as much.
    marginal = model.get_marginal_ll(
        indices=test, n_mc_samples=MARGINAL_DRAWS, n_mc_samples_per_pass=10, return_mean=False
    )
    found |= {"elbo_refitted": elbo(model, test), "marginal": float(np.mean(np.asarray(marginal)))}
    encoder.load_state_dict(trained)
    return found


def train(
    adata: Any,
    batch_key: str | None,
    parts: Sequence[np.ndarray],
    seed: int,
    max_epochs: int | None = None,
    *,
    lr: float | None = None,
    **options: Any,
) -> tuple[Any, float]:
    """A model of the cells of ``parts`` (training, validation, others), and the seconds it took.

    ``lr`` is the learning rate, scvi-tools' own when ``None``.
    """
    torch.set_num_threads(1)
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key)
    model = scvi.model.SCVI(adata, **{"gene_likelihood": "zinb", **options})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        keep = SaveCheckpoint(
            dirpath=folder, monitor="elbo_validation", load_best_on_end=True, check_nan_gradients=False
        )
        model.train(
            max_epochs=max_epochs or MAX_EPOCHS,
            accelerator="cpu",
            enable_progress_bar=False,
            check_val_every_n_epoch=1,
            early_stopping=True,
            early_stopping_patience=PATIENCE,
            early_stopping_warmup_epochs=WARMUP_EPOCHS,
            enable_checkpointing=True,
            callbacks=[keep],
            plan_kwargs={"n_epochs_kl_warmup": WARMUP_EPOCHS} | ({} if lr is None else {"lr": lr}),
            datasplitter_kwargs={"external_indexing": list(parts)},
        )
    return model, time.perf_counter() - start


def elbo(model: Any, cells: np.ndarray, draws: int = ELBO_DRAWS) -> float:
    """Nats a cell, over some draws."""
    return float(np.mean([float(model.get_elbo(indices=cells)) for _ in range(draws)]))


def refit(model: Any, cells: np.ndarray) -> None:
    """Train the encoder alone on some cells, nothing dropped out, and keep the weights of the best look.

    scvi-tools has no such method; this is done with its module, by its loss, rate and minibatches.
    """
    module = model.module
    module.eval()
    module.requires_grad_(False)
    parameters = list(module.z_encoder.requires_grad_(True).parameters())
    optimiser = torch.optim.Adam(parameters, lr=REFIT_RATE, eps=0.01)
    looked_at = cells[:: -(-len(cells) // MOST_LOOKED_AT)]
    best, weights = elbo(model, looked_at, LOOK_DRAWS), copy.deepcopy(module.z_encoder.state_dict())
    step = without = 0
    while step < REFIT_STEPS and without < REFIT_PATIENCE:
        for tensors in model._make_data_loader(
            adata=model.adata, indices=cells, batch_size=128, shuffle=True
        ):
            optimiser.zero_grad()
            _, _, losses = module(tensors, loss_kwargs={"kl_weight": 1.0})
            losses.loss.backward()
            optimiser.step()
            step += 1
            if step % STEPS_A_LOOK == 0:
                found = elbo(model, looked_at, LOOK_DRAWS)
                without = 0 if found > best else without + 1
                if found > best:
                    best, weights = found, copy.deepcopy(module.z_encoder.state_dict())
    module.z_encoder.load_state_dict(weights)


if __name__ == "__main__":
    main(fit, *PACKAGES)
