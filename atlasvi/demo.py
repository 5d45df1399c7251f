"""`atlasvi demo`: the whole way, from counts to a report, on a simulated atlas whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from atlasvi.errors import StoreError
from atlasvi.infer.write import write_expression, write_latent
from atlasvi.metrics import decode_check, pca_latent, score_latent, subsample
from atlasvi.models.folder import CHECKPOINT, LOG
from atlasvi.models.scvi import SCVI
from atlasvi.progress import bar, stage_bars
from atlasvi.report import Decoding, ElboCurve, Report, Stopwatch, embed, package_versions, write_report
from atlasvi.simulate import Simulation
from atlasvi.store.atlas import Atlas
from atlasvi.store.atlas import open as open_atlas
from atlasvi.store.ingest import ingest
from atlasvi.train.history import CsvLog

MARKERS_EACH = 3
BATCH_SIZE = 256


def run(out: Path, *, n_obs: int = 50_000, n_vars: int = 2_000, max_epochs: int = 15, seed: int = 0) -> Path:
    """`make` the report and write it to ``out / "report.html"``; returns its path."""
    report = make(out, n_obs=n_obs, n_vars=n_vars, max_epochs=max_epochs, seed=seed)
    return write_report(Path(out) / "report.html", report)


def make(out: Path, *, n_obs: int, n_vars: int, max_epochs: int, seed: int) -> Report:
    """Simulate, ingest, train, write latents, decode, score, report; all of it streamed.

    Args:
        out: folder for ``atlas.zarr``, ``model``, ``markers.zarr`` and ``report.html``; replaced if it
            is one that a demo made.
        n_obs: cells.
        n_vars: genes.
        max_epochs: passes over the cells.
        seed: of everything.

    Returns:
        What a report shows.

    Raises:
        StoreError: ``out`` holds something else.
    """
    out = Path(out)
    ours = {"atlas.zarr", "model", "markers.zarr", "report.html"}
    strangers = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []
    if strangers or (out.exists() and not out.is_dir()):
        raise StoreError(
            f"{str(out)!r} holds {(strangers or ['a file'])[0]!r}; name a new folder for the demo"
        )
    out.mkdir(parents=True, exist_ok=True)

    watch = Stopwatch()
    truth = Simulation(n_obs, n_vars, seed=seed)
    with (
        watch.step("simulate and ingest", f"{n_obs:,} cells x {n_vars:,} genes, to Zarr"),
        stage_bars("cells") as step,
    ):
        ingest(truth, out / "atlas.zarr", shuffle=True, seed=seed, overwrite=True, progress=step)
    atlas = open_atlas(out / "atlas.zarr")

    SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
    model = SCVI(atlas, seed=seed)
    with watch.step("train", f"scVI, ZINB, {max_epochs} epochs, minibatches of {BATCH_SIZE}"):
        model.train(
            max_epochs,
            batch_size=BATCH_SIZE,
            seed=seed,
            checkpoint=out / "model" / CHECKPOINT,
            on_epoch=CsvLog(out / "model" / LOG),
        )
        model.save(out / "model", overwrite=True)
    with watch.step("latents", "into obsm['X_scVI'] of the store"), bar("latent", n_obs, "cells") as advance:
        write_latent(model.latent_blocks(), atlas, model.config.n_latent, None, "X_scVI", advance)
    markers = truth.markers(MARKERS_EACH)
    genes = [str(truth.var_names[g]) for g in markers]
    with (
        watch.step("decode", f"{len(genes)} marker genes of every cell"),
        bar("decode", n_obs, "cells") as advance,
    ):
        rho = model.expression(genes=genes)
        write_expression(rho, atlas.read_names, genes, out / "markers.zarr", overwrite=True, advance=advance)

    batch, types = pd.Categorical(atlas.obs_column("batch")), pd.Categorical(atlas.obs_column("cell_type"))
    cells = ~(np.asarray(atlas.obs_column("is_doublet")) | np.asarray(atlas.obs_column("is_empty")))
    with watch.step("score", "k-means, batch mixing, PCA for comparison, t-SNE"):
        latent = model.get_latent_representation()
        pca = pca_latent(lambda: _counts(atlas), seed=seed).latent
        scores = tuple(
            score_latent(name, values, types, batch, seed=seed, keep=cells)
            for name, values in (("scVI", latent), ("PCA", pca))
        )
        view = embed(latent[cells], batch[cells], types[cells].remove_unused_categories(), seed=seed)
        shown = np.flatnonzero(cells)[subsample(int(cells.sum()), 4_000, seed=seed)]
        # The atlas is shuffled: a cell's name holds its number in the simulation.
        number = np.array([int(name.rsplit("-", 1)[1]) for name in atlas.obs_names[shown]])
        check = decode_check(
            rho[shown].compute(),
            truth.true_rho_of(number, genes=markers),
            types[shown].remove_unused_categories(),
        )

    records = model.records
    return Report(
        title="An atlas, from counts to expression",
        summary=_summary(scores, check, watch),
        n_obs=n_obs,
        n_vars=n_vars,
        n_batches=truth.n_batches,
        steps=watch.steps,
        elbo=ElboCurve(
            tuple(r.epoch + 1 for r in records),
            tuple(r.elbo_train for r in records),
            tuple(float("nan") if r.elbo_validation is None else r.elbo_validation for r in records),
        ),
        embedding=view,
        scores=scores,
        scored="Doublets and empty droplets are trained on and not scored; the types are the simulation's.",
        decoding=Decoding(check, tuple(genes), tuple(range(len(genes)))),
        seed=seed,
        versions=package_versions("atlasvi", "torch", "zarr", "dask", "numba"),
        command=f"atlasvi demo -o {out.name}",
        snippet=_SNIPPET.format(folder=out.name, genes=genes[:2]),
    )


_SNIPPET = """\
import atlasvi

atlas = atlasvi.open("{folder}/atlas.zarr")
model = atlasvi.SCVI.load("{folder}/model", atlas)
latent = model.get_latent_representation()    # cells x 10
rho = model.expression(genes={genes})         # lazy: nothing is computed yet
rho[:1000].compute()
"""


def _summary(scores: Any, check: Any, watch: Stopwatch) -> str:
    ours, pca = scores
    return (
        f"scVI, streamed from disk, finds the types with an adjusted Rand index of {ours.clustering.ari:.2f} "
        f"(PCA: {pca.clustering.ari:.2f}) and decodes marker genes with a correlation of "
        f"{check.pearson_log:.2f} to the truth."
    )


def _counts(atlas: Atlas) -> Iterator[Any]:
    for counts, _ in atlas.iter_blocks():
        yield counts
