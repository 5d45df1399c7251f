"""Are cells that the model reconstructs badly doublets? `python -m benchmarks.quality.doublets`.

On `hashing_celllines_doublets`, where hashtags tell doublets by construction, and on doublets made of its
cells by adding the counts of two. Each score's AUROC, over all cells, and at matched depth: the mean over
fifths of the cells by their total, which no score of depth alone can pass.

`--scrublet FILE.npy` adds scores made elsewhere, one for each cell of the file in its order (scanpy has
``sc.pp.scrublet``, which puts them into ``obs["doublet_score"]``).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

from benchmarks.common import table
from benchmarks.paper.data import DataSet

SEEDS = range(3)


def at_matched_depth(truth: np.ndarray, score: np.ndarray, total: np.ndarray) -> float:
    """Mean AUROC over fifths of the cells by depth."""
    fifths = np.array_split(np.argsort(total, kind="stable"), 5)
    return float(np.mean([roc_auc_score(truth[cells], score[cells]) for cells in fifths]))


def main() -> None:
    """Run the command."""
    import anndata

    import atlasvi

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scrublet", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    adata = anndata.read_h5ad(DataSet("hashing_celllines_doublets", "cell_type").path())
    known = (adata.obs["doublet"] != "Negative").to_numpy()
    truth = (adata.obs["doublet"] == "Doublet").to_numpy()
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def note(which: str, name: str, truth: Any, score: Any, total: Any) -> None:
        found = roc_auc_score(truth, score), at_matched_depth(truth, score, total)
        rows.setdefault((which, name), []).append(found)

    for seed in SEEDS:
        atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
        model = atlasvi.SCVI(adata, seed=seed)
        model.train(
            30, batch_size=128, train_size=1.0, seed=seed, enable_progress_bar=False,
            plan_kwargs={"lr": 2e-3, "n_epochs_kl_warmup": 10},
        )  # fmt: skip
        scores = model.cell_quality(seed=seed)
        both = _with_simulated(adata, seed)
        made = np.arange(both.n_obs) >= adata.n_obs
        simulated = model.cell_quality(both, seed=seed)
        for column in ("total_counts", "n_genes", "reconstruction_error", "depth_score"):
            note(
                "hashtags",
                column,
                truth[known],
                scores[column].to_numpy()[known],
                scores["total_counts"].to_numpy()[known],
            )
            note(
                "simulated", column, made, simulated[column].to_numpy(), simulated["total_counts"].to_numpy()
            )
        if options.scrublet is not None:
            theirs = np.load(options.scrublet)
            note(
                "hashtags", "scrublet", truth[known], theirs[known], scores["total_counts"].to_numpy()[known]
            )
    heads = ["doublets by", "score", "AUROC", "at matched depth"]
    lines = [[*key, *(f"{value:.3f}" for value in np.mean(found, 0))] for key, found in sorted(rows.items())]
    print(table(heads, lines, markdown=True))


def _with_simulated(adata: Any, seed: int) -> Any:
    """The cells, and a tenth as many sums of two of them."""
    import anndata

    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, adata.n_obs, (2, adata.n_obs // 10))
    counts = sp.csr_matrix(adata.X)
    return anndata.AnnData(
        sp.vstack([counts, counts[one] + counts[two]], format="csr").astype(np.float32), var=adata.var
    )


if __name__ == "__main__":
    main()
