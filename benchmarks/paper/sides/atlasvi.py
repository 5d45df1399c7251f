"""atlasvi's models with their defaults, streamed from a store on disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import atlasvi
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.writing import ELBO_DRAWS, MARGINAL_DRAWS, main

PACKAGES = ("atlasvi", "torch", "numpy")
MODELS: dict[str, Any] = {
    "atlasvi": atlasvi.SCVI,
    "atlasvi SCVAE": atlasvi.SCVAE,
    "atlasvi GMVAE": atlasvi.GMVAE,
    "atlasvi DCA": atlasvi.DCA,
    "atlasvi FA": atlasvi.FactorAnalysis,
    "atlasvi PPCA": atlasvi.PPCA,
}


class Trained(NamedTuple):
    """A model, all cells, the positions of those that it never saw, and the seconds that training took."""

    model: Any
    atlas: atlasvi.Atlas
    test: np.ndarray
    seconds: float


def fit(job: Job) -> dict[str, Any]:
    """Train on the training cells, stop by the validation cells, score the test cells."""
    # The one option that is of training and not of the model.
    training = {name: job.options[name] for name in ("precision",) if name in job.options}
    of_model = {name: value for name, value in job.options.items() if name not in training}
    with trained(replace(job, options=of_model), **training) as (model, atlas, test, seconds):
        found = {
            "model": model,
            "latent": model.get_latent_representation(atlas),
            "seconds": seconds,
            "epochs": len(model.records),
        }
        return {**found, **of_held_out(model, atlas[test])}


@contextmanager
def trained(job: Job, **training: Any) -> Iterator[Trained]:
    """A job's model, from a store that is there as long as this is open; ``training`` as `train` takes it."""
    data_set, kind = SETS[job.data], MODELS[job.method]
    adata = data_set.load(n_genes=job.n_genes)
    is_scvi = kind is atlasvi.SCVI
    batch_key = "batch" if "batch" in adata.obs and is_scvi else None
    train, validation, test = data_set.split(adata.n_obs, job.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.zarr"
        atlasvi.ingest(adata, path)
        with atlasvi.open(path) as atlas:
            # `train` splits these again, as many to train on as the peers have.
            fitted = atlas[np.sort(np.concatenate([train, validation]))]
            share = len(train) / (len(train) + len(validation))
            kind.setup_anndata(fitted, **({"batch_key": batch_key} if batch_key else {}), gene_mask=None)
            model = kind(fitted, n_latent=job.n_latent, seed=job.seed, **job.options)
            start = time.perf_counter()
            model.train(
                job.max_epochs, train_size=share, seed=job.seed, enable_progress_bar=False, **training
            )
            yield Trained(model, atlas, test, time.perf_counter() - start)


def of_held_out(model: Any, cells: atlasvi.Atlas) -> dict[str, Any]:
    """What the model can say of cells that it never saw."""
    if isinstance(model, atlasvi.DCA):
        return {}
    if isinstance(model, (atlasvi.FactorAnalysis, atlasvi.PPCA)):
        return {"log_likelihood": model.get_elbo(cells)}
    found = {
        "elbo": elbo(model, cells),
        "reconstruction": -np.mean(
            [model.get_reconstruction_error(cells, seed=draw)["reconstruction_loss"] for draw in range(2)]
        ),
    }
    proposal = model
    if model.module.posterior_parts:  # with prior="vamp" the prior is made of the encoder
        proposal = model.refine_posterior(cells, max_epochs=50, enable_progress_bar=False)
        found["elbo_refitted"] = elbo(proposal, cells)
    if isinstance(model, atlasvi.SCVI):
        found["marginal"] = proposal.get_marginal_ll(cells, n_mc_samples=MARGINAL_DRAWS)
    if isinstance(model, atlasvi.GMVAE):
        found["clusters"] = model.predict(cells)
    return found


def elbo(model: Any, cells: atlasvi.Atlas) -> float:
    """Nats a cell, over some draws."""
    return float(np.mean([model.get_elbo(cells, seed=draw) for draw in range(ELBO_DRAWS)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(fit, *PACKAGES)
