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
SIMULATED = "ATLASVI_PAPER_WORK"


@dataclass(frozen=True)
class DataSet:
    """Counts, real ones with labels that were published with them or simulated ones whose truth is known.

    Args:
        name: the file without ``.h5ad``.
        label_key: column of obs with the types, or ``None``.
        batch_key: column of obs with the batches, or ``None``.
        keep: column of obs and the value that cells must have there, or ``None`` for all cells.
        coarser: from a type to a coarser one; types not named stay as they are.
        simulation: arguments of `atlasvi.Simulation`, or ``None`` for real counts.
        n_train: of a simulation, cells to train on, and an eighth as many for validation. Before them come
            10,000 to test, the same for all sizes and seeds, so that sizes can be compared. 80 % when
            ``None``.
        gene_sets: how many of the most variable genes the experiments use, and ``None`` for all; the first is
            the one that all methods are run with.
        file: the file without ``.h5ad``, where it is not named as the set.
    """

    name: str
    label_key: str | None
    batch_key: str | None = None
    keep: tuple[str, str] | None = None
    coarser: Mapping[str, str] = field(default_factory=dict)
    simulation: Mapping[str, Any] | None = None
    n_train: int | None = None
    gene_sets: tuple[int | None, ...] = (None,)
    file: str | None = None

    def path(self) -> Path:
        """Where the file is: in ``ATLASVI_TEST_DATA``, by default ``shared/data`` beside the repository.

        Simulated counts are in the folder of fits, by default ``.paper``.
        """
        if self.simulation is not None:
            shape = f"{self.simulation['n_obs']}x{self.simulation['n_vars']}"
            return Path(os.environ.get(SIMULATED, ".paper")) / f"simulated-{shape}.h5ad"
        default = Path(__file__).resolve().parents[3] / "shared" / "data"
        return Path(os.environ.get(FOLDER, default)) / f"{self.file or self.name}.h5ad"

    def prepare(self, work: Path) -> None:
        """Simulate, if these counts are to be and are not in ``work`` yet; needs atlasvi."""
        work.mkdir(parents=True, exist_ok=True)
        os.environ[SIMULATED] = str(work.resolve())
        if self.simulation is None or self.path().is_file():
            return
        from atlasvi import Simulation

        part = self.path().with_suffix(".part")
        Simulation(**self.simulation).to_anndata().write_h5ad(part, compression="lzf")
        os.replace(part, self.path())

    def split(self, n_obs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted positions of the training, validation and test cells; each cell once."""
        if self.n_train is None:
            return split(n_obs, seed)
        others = np.random.Generator(np.random.Philox(key=seed)).permutation(np.arange(N_HELD_OUT, n_obs))
        validation, train = np.split(others, [self.n_train // 8])
        return np.sort(train), np.sort(validation), np.arange(N_HELD_OUT)

    def load(self, *, n_genes: int | None = None) -> anndata.AnnData:
        """Counts as float32 CSR, and obs with ``label`` and ``batch`` as text; genes in the file's order.

        A ``batch`` of the file that is not one to remove is called ``group``.

        ``n_genes`` keeps the genes of largest variance of log(1 + count).
        """
        adata = anndata.read_h5ad(self.path())
        if self.keep is not None:
            key, value = self.keep
            adata = adata[(adata.obs[key].astype(str) == value).to_numpy()]
        if self.n_train is not None:
            adata = adata[: self.n_train + self.n_train // 8 + N_HELD_OUT]
        adata = adata.copy()
        adata.X = sp.csr_matrix(adata.X, dtype=np.float32)
        if self.batch_key is None:
            adata.obs = adata.obs.rename(columns={"batch": "group"})
        for name, key in (("label", self.label_key), ("batch", self.batch_key)):
            if key is not None:
                adata.obs[name] = adata.obs[key].astype(str).astype("category")
        if n_genes is not None and n_genes < adata.n_vars:
            adata = adata[:, most_variable(adata.X, n_genes)].copy()
        return adata

    def n_labels(self, work: Path) -> int:
        """How many types there are."""
        self.prepare(work)
        return self.load().obs["label"].nunique()

    def coarse(self, labels: Any) -> np.ndarray:
        """Labels at the coarser cut."""
        return np.array([self.coarser.get(label, label) for label in np.asarray(labels).astype(str)])


N_HELD_OUT = 10_000
# The paper's Table 1 has 720 genes.
GENES = (720, 2_000, None)
# One atlas for all numbers of training cells; droplets are cells, and as deep as 720 variable genes are.
MANY_CELLS = {
    "n_obs": 122_500,
    "n_vars": 720,
    "counts_per_cell": 1_000.0,
    "doublet_rate": 0.0,
    "empty_rate": 0.0,
    "seed": 0,
}
# The demo's atlas, with fewer cells.
DEMO = {"n_obs": 5_000, "n_vars": 2_000, "doublet_rate": 0.0, "empty_rate": 0.0, "seed": 0}
# The demo's atlas as `atlasvi demo` makes it.
WHOLE_DEMO = {"n_obs": 50_000, "n_vars": 2_000, "seed": 0}
# What the tests run.
LITTLE = {**DEMO, "n_obs": 600, "n_vars": 100, "n_types": 4, "counts_per_cell": 200.0}
_T = dict.fromkeys(("memoryt", "regulatoryt", "thelper", "cytotoxict", "naivet", "naivecytotoxic"), "T")
_CBMC = {"CD4 T": "T", "CD8 T": "T", "CD14+ Mono": "myeloid", "CD16+ Mono": "myeloid", "DC": "myeloid"}
_KANG = {
    **dict.fromkeys(("CD4 Naive T", "CD4 Memory T", "CD8 T", "activated T"), "T"),
    **dict.fromkeys(("B", "activated B"), "B"),
    **dict.fromkeys(("CD14 Mono", "CD16 Mono", "DC"), "myeloid"),
}
# Simulated types are named by their lineage and a number.
_LINEAGES = {f"{lineage}{k}": lineage for lineage in "ABCD" for k in range(1, 4)}
SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet("pbmc_sorted_reference", "cell_type", coarser=_T, gene_sets=GENES),
        DataSet("worm_neuron", "cell_type", gene_sets=GENES),
        DataSet("cbmc_citeseq", "cell_type", coarser=_CBMC, gene_sets=(720, None)),
        DataSet("scmixology_celllines", "cell_type", "batch", ("demuxlet_cls", "SNG"), gene_sets=GENES),
        DataSet("kang_pbmc_ifnb", "cell_type", "batch", coarser=_KANG, gene_sets=GENES),
        DataSet("pbmc_3chemistries", None, "batch", gene_sets=GENES),
        DataSet("ziegenhain_mesc_umi", None, "batch"),
        DataSet("monocle3_worm_embryo", "cell_type", "batch", gene_sets=GENES),
        # The batches are ages, a treatment, and replicates that do not differ: not to be removed.
        DataSet("worm_embryo_ages", "cell_type", file="monocle3_worm_embryo", gene_sets=GENES),
        DataSet("kang_treatment", "cell_type", file="kang_pbmc_ifnb", gene_sets=GENES),
        DataSet("ziegenhain_mesc_scrbseq_umi", "cell_type"),
        DataSet("scmixology_RNAmix", "cell_type", "batch", gene_sets=GENES),
        DataSet("zeisel_ERCC", "cell_type"),
        DataSet("hashing_celllines_doublets", "cell_type"),
        DataSet("demo", "cell_type", "batch", coarser=_LINEAGES, simulation=DEMO),
        DataSet("whole_demo", "cell_type", "batch", coarser=_LINEAGES, simulation=WHOLE_DEMO),
        DataSet("little", "cell_type", "batch", coarser=_LINEAGES, simulation=LITTLE),
        *(
            DataSet(f"simulated_{n}k", "cell_type", "batch", simulation=MANY_CELLS, n_train=1_000 * n)
            for n in (4, 10, 15, 50, 100)
        ),
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
