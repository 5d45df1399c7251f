"""The data of the experiments: which cells, labels, batches and genes, and how they are split.

Needs numpy, scipy and anndata only, so that the environment of every method imports the same file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp

FOLDER = "ATLASVI_TEST_DATA"


@dataclass(frozen=True)
class DataSet:
    """Real counts with labels that were published with them.

    Args:
        name: the file without ``.h5ad``.
        label_key: column of obs with the types, or ``None``.
        batch_key: column of obs with the batches, or ``None``.
        keep: column of obs and the value that cells must have there, or ``None`` for all cells.
        coarser: from a type to a coarser one; types not named stay as they are.
    """

    name: str
    label_key: str | None
    batch_key: str | None = None
    keep: tuple[str, str] | None = None
    coarser: Mapping[str, str] = field(default_factory=dict)

    def path(self) -> Path:
        """Where the file is: in ``ATLASVI_TEST_DATA``, by default ``shared/data`` beside the repository."""
        default = Path(__file__).resolve().parents[3] / "shared" / "data"
        return Path(os.environ.get(FOLDER, default)) / f"{self.name}.h5ad"

    def load(self, *, n_genes: int | None = None) -> anndata.AnnData:
        """Counts as float32 CSR, and obs with ``label`` and ``batch`` as text; genes in the file's order.

        ``n_genes`` keeps the genes of largest variance of log(1 + count).
        """
        adata = anndata.read_h5ad(self.path())
        if self.keep is not None:
            key, value = self.keep
            adata = adata[(adata.obs[key].astype(str) == value).to_numpy()]
        adata = adata.copy()
        adata.X = sp.csr_matrix(adata.X, dtype=np.float32)
        for name, key in (("label", self.label_key), ("batch", self.batch_key)):
            if key is not None:
                adata.obs[name] = adata.obs[key].astype(str).astype("category")
        if n_genes is not None and n_genes < adata.n_vars:
            adata = adata[:, most_variable(adata.X, n_genes)].copy()
        return adata

    def coarse(self, labels: Any) -> np.ndarray:
        """Labels at the coarser cut."""
        return np.array([self.coarser.get(label, label) for label in np.asarray(labels).astype(str)])


SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "pbmc_sorted_reference",
            "cell_type",
        ),
        DataSet("worm_neuron", "cell_type"),
        DataSet("cbmc_citeseq", "cell_type"),
        DataSet("scmixology_celllines", "cell_type", "batch", ("demuxlet_cls", "SNG")),
        DataSet("kang_pbmc_ifnb", "cell_type", "batch"),
        DataSet("pbmc_3chemistries", None, "batch"),
        DataSet("ziegenhain_mesc_umi", None, "batch"),
        DataSet("monocle3_worm_embryo", "cell_type", "batch"),
    )
}


def most_variable(counts: sp.csr_matrix, n_genes: int) -> np.ndarray:
    """Positions, sorted, of the genes of largest variance of log(1 + count)."""
    logs = counts.copy()
    logs.data = np.log1p(logs.data)
    mean = np.asarray(logs.mean(0)).ravel()
    variance = np.asarray(logs.multiply(logs).mean(0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:n_genes])


def split(n_obs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted positions of the training (80 %), validation (10 %) and test (10 %) cells; each cell once."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(n_obs)
    n_held = n_obs // 10
    test, validation, train = np.split(order, [n_held, 2 * n_held])
    return np.sort(train), np.sort(validation), np.sort(test)
