"""Imputation error on real counts, and correlations that imputation makes: for docs/imputation.md.

    python -m benchmarks.paper.imputation [--data FOLDER] [--peer DIR/bin/python] [--epochs 100]

Counts are corrupted (`atlasvi.imputation`), each method sees what is left, and says what was there at the
entries that were changed. Methods: the model (means of 10 draws), scvi-tools with as many epochs, PCA of ten
dimensions on log(1 + counts to the median depth) and back, the gene's mean at the cell's depth, and 1.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD

import atlasvi
from atlasvi.imputation import Corruption, binomial, imputation_errors, uniform_zero
from benchmarks.common import table

SETS = ("pbmc_sorted_reference", "kang_pbmc_ifnb", "scmixology_celllines")
CORRUPTIONS = {
    "zeroed, 9 %": lambda x: uniform_zero(x, p_zero=0.9),
    "zeroed, 1 %": lambda x: uniform_zero(x, p_zero=0.1),
    "binomial": binomial,
}
N_GENES = 2000


def counts_of(path: Path) -> tuple[sp.csr_matrix, NDArray[Any]]:
    """Counts of the genes with the most, and the cells' types."""
    adata = anndata.read_h5ad(path)
    totals = np.asarray(adata.X.sum(0)).ravel()
    keep = np.sort(np.argsort(-totals, kind="stable")[:N_GENES])
    return sp.csr_matrix(adata.X[:, keep]), adata.obs["cell_type"].astype(str).to_numpy()


def by_model(counts: sp.csr_matrix, epochs: int) -> NDArray[np.float32]:
    """Means of imputed counts, cells x genes: these sets are small."""
    adata = anndata.AnnData(counts.astype(np.float32))
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata)
    plan = {"n_epochs_kl_warmup": epochs}
    model.train(epochs, train_size=1.0, plan_kwargs=plan, schedule="scvi-tools", enable_progress_bar=False)
    found: NDArray[np.float32] = model.denoised_counts(n_samples=10).compute()
    return found


def by_pca(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Ten principal components of log(1 + counts at the median depth), and back."""
    depth = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    scale = np.median(depth) / depth
    x = np.log1p(counts.toarray() * scale[:, None])
    mean = x.mean(0)
    svd = TruncatedSVD(10, random_state=0)
    back = svd.inverse_transform(svd.fit_transform(x - mean)) + mean
    return np.maximum(np.expm1(back), 0) / scale[:, None]


def by_peer(python: str, found: Corruption, epochs: int) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.npz", Path(folder) / "out.npy"
        x = found.counts
        np.savez(source, data=x.data, indices=x.indices, indptr=x.indptr, shape=x.shape,
                 rows=found.rows, genes=found.genes)  # fmt: skip
        script = Path(__file__).parents[1] / "peers" / "scvi_tools_imputation.py"
        subprocess.run([python, script, source, out, str(epochs)], check=True, capture_output=True)
        answer: NDArray[np.float32] = np.load(out)
        return answer


def rows_of(name: str, counts: sp.csr_matrix, epochs: int, peer: str | None) -> list[list[str]]:
    lines = []
    for corruption, corrupt in CORRUPTIONS.items():
        found = corrupt(counts)
        at = found.rows, found.genes
        depth, genes = np.asarray(found.counts.sum(1)).ravel(), np.asarray(found.counts.sum(0)).ravel()
        methods = {
            "constant 1": np.ones(len(found.rows)),
            "gene's mean": depth[at[0]] * genes[at[1]] / genes.sum(),
            "PCA": by_pca(found.counts)[at],
            "atlasvi": by_model(found.counts, epochs)[at],
        }
        if peer is not None:
            methods["scvi-tools"] = by_peer(peer, found, epochs)
        keep = found.changed
        for method, imputed in methods.items():
            line = [name, corruption, method]
            for least in (1, 2):
                e = imputation_errors(imputed[keep], found.before[keep], at_least=least)
                line += [f"{e.median_l1:.2f}", f"{e.mean_l1:.2f}", f"{e.spearman:.2f}"]
            lines.append(line)
            print(" | ".join(line), flush=True)
    return lines


def correlations(counts: sp.csr_matrix, types: NDArray[Any], epochs: int) -> dict[str, float]:
    """Genes are permuted within each type, which leaves no correlation there; what imputation makes of it."""
    rng = np.random.default_rng(0)
    x = counts.toarray()
    levels, sizes = np.unique(types, return_counts=True)
    for level in levels:
        at = np.flatnonzero(types == level)
        x[at] = rng.permuted(x[at], axis=0)
    imputed = by_model(sp.csr_matrix(x), epochs)
    at = np.flatnonzero(types == levels[sizes.argmax()])
    genes = np.argsort(-x[at].mean(0))[:200]
    found = {}
    for name, values in (("counts", np.log1p(x)), ("imputed", np.log(imputed))):
        part = values[np.ix_(at, genes)].astype(float)
        # To one depth, as is done before correlations are looked at.
        part = part - np.log(np.maximum(x[at].sum(1, keepdims=True), 1)) if name == "imputed" else part
        r = np.corrcoef(part, rowvar=False)[np.triu_indices(len(genes), 1)]
        found[f"{name}: mean |r|"] = float(np.nanmean(np.abs(r)))
        found[f"{name}: share of |r| > 0.5"] = float(np.nanmean(np.abs(r) > 0.5))
    found["cells"] = len(at)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peer", help="Python of an environment with scvi-tools")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--sets", nargs="+", default=SETS)
    given = parser.parse_args()
    lines = []
    for name in given.sets:
        counts, types = counts_of(given.data / f"{name}.h5ad")
        lines += rows_of(name, counts, given.epochs, given.peer)
        for what, value in correlations(counts, types, given.epochs).items():
            print(f"{name}, permuted within types, {what}: {value:.3f}", flush=True)
    heads = [
        "data",
        "corruption",
        "method",
        "median L1",
        "mean L1",
        "rank r",
        "median L1, >= 2",
        "mean",
        "rank r",
    ]
    print(table(heads, lines, markdown=True, words=3))


if __name__ == "__main__":
    main()
