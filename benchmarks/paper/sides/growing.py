"""Seconds and peak memory of one method on simulated counts: ``... sides.growing METHOD COUNTS LATENT.npy``.

A variational model goes through the cells twice and the second epoch is timed; a linear one is fitted. Then
all cells get a latent. Everything that a person would do is in the peak: reading the counts, too. atlasvi
reads the store, the others an AnnData in memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MINIBATCH = 128
N_LATENT = 10


def atlasvi(counts: str) -> tuple[list[float], Callable[[], Any]]:
    """Seconds of each epoch, and what gives latents."""
    import atlasvi

    atlas = atlasvi.open(counts)
    atlasvi.SCVI.setup_anndata(atlas, gene_mask=None)
    model = atlasvi.SCVI(atlas, n_latent=N_LATENT)
    clock = Clock()
    model.train(
        2, train_size=1.0, batch_size=MINIBATCH, enable_progress_bar=False, on_epoch=lambda _: clock.tick()
    )
    return clock.seconds, model.get_latent_representation


def scvi_tools(counts: str) -> tuple[list[float], Callable[[], Any]]:
    """Likewise."""
    import anndata
    import lightning.pytorch as pl
    import scvi

    adata = anndata.read_h5ad(counts)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_latent=N_LATENT, gene_likelihood="zinb")
    clock = Clock()

    class AtEnd(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            clock.tick()

    model.train(
        2,
        train_size=1.0,
        batch_size=MINIBATCH,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[AtEnd()],
    )
    return clock.seconds, model.get_latent_representation


def atlasvi_pca(counts: str) -> tuple[list[float], Callable[[], Any]]:
    """The whole fit."""
    import atlasvi

    atlas = atlasvi.open(counts)
    atlasvi.PCA.setup_anndata(atlas, gene_mask=None)
    clock, model = Clock(), atlasvi.PCA(atlas, n_latent=N_LATENT)
    model.train(train_size=1.0, enable_progress_bar=False)
    return [clock.tick()], model.get_latent_representation


def scanpy_pca(counts: str) -> tuple[list[float], Callable[[], Any]]:
    """Likewise, of sparse counts, by scanpy."""
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(counts)
    clock = Clock()
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=N_LATENT)
    return [clock.tick()], lambda: adata.obsm["X_pca"]


def factor_analysis(counts: str) -> tuple[list[float], Callable[[], Any]]:
    """Likewise, by scikit-learn, which wants them dense."""
    import anndata
    from sklearn.decomposition import FactorAnalysis

    x = anndata.read_h5ad(counts).X.log1p()
    clock, model = Clock(), FactorAnalysis(N_LATENT, random_state=0)
    latent = model.fit_transform(x.toarray())
    return [clock.tick()], lambda: latent


class Clock:
    """Seconds since the last tick."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> float:
        """Note them."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return self.seconds[-1]


METHODS = {
    "atlasvi": atlasvi,
    "scvi-tools": scvi_tools,
    "atlasvi PCA": atlasvi_pca,
    "scanpy PCA": scanpy_pca,
    "scikit-learn FA": factor_analysis,
}


def main() -> None:
    """Print what it took, as JSON, on the last line."""
    _, method, counts, latent = sys.argv
    start = time.perf_counter()
    seconds, encode = METHODS[method](counts)
    clock = Clock()
    found = encode()
    took = clock.tick()
    np.save(latent, found)
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    print(
        json.dumps(
            {
                "seconds": seconds[-1],
                "latent_seconds": took,
                "all_seconds": time.perf_counter() - start,
                "peak_mib": int(status["VmHWM"].split()[0]) / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
