"""What scanpy says of a small matrix of counts, written down so that tests need no scanpy.

Run with a Python that has scanpy and scikit-misc (the fixture is of scanpy 1.11.5, scikit-misc 0.5.3), from
the root of the repository::

    DIR/bin/python -m benchmarks.peers.scanpy_fixtures tests/oracle/fixtures/scanpy.npz

`counts` (cells x genes), `batch` and `genes` are the data. `qc/...` is from `pp.calculate_qc_metrics`; and
`<case>/<column>` from `pp.highly_variable_genes`, for each of `CASES`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

N_OBS, N_VARS = 300, 200
CASES: dict[str, dict[str, Any]] = {
    "whole": {"n_top_genes": 40},
    "batches": {"n_top_genes": 40, "batch_key": "batch"},
    "paper": {"n_top_genes": 40, "batch_key": "batch", "flavor": "seurat_v3_paper"},
    "wide": {"n_top_genes": 90, "batch_key": "batch", "span": 0.7},
}


def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, batches and names: three unequal batches, overdispersed genes, and genes that are odd."""
    rng = np.random.default_rng(11)
    batch = rng.choice(["lane2", "lane10", "lane1"], N_OBS, p=[0.5, 0.3, 0.2])
    mean = rng.lognormal(-0.5, 1.6, N_VARS) * rng.lognormal(0, 0.5, N_OBS)[:, None]
    group = rng.integers(0, 3, N_OBS)
    marker = rng.lognormal(0, 0.9, (3, N_VARS)) ** (rng.random(N_VARS) < 0.25)
    mean = mean * marker[group]
    counts = rng.negative_binomial(1.5, 1.5 / (1.5 + mean))
    counts[:, 0] = 0  # never seen
    counts[:, 1] = 3  # the same everywhere
    counts[:, 2] = 0
    counts[7, 2] = 900  # one cell, far above where counts are clipped
    counts[batch == "lane1", 3] = 0  # not in one batch
    genes = np.array([f"MT-{g}" if 10 <= g < 15 else f"gene{g}" for g in range(N_VARS)])
    return counts.astype(np.uint16), batch, genes


def main(path: str) -> None:
    import anndata
    import pandas as pd
    import scanpy as sc
    import scipy.sparse as sp

    counts, batch, genes = cells()
    adata = anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"batch": pd.Categorical(batch)}, index=[f"c{i}" for i in range(N_OBS)]),
        var=pd.DataFrame({"mt": np.char.startswith(genes, "MT-")}, index=genes),
    )
    found = {"counts": counts, "batch": batch, "genes": genes}
    of_cells, _ = sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False)
    for key in ("total_counts", "n_genes_by_counts", "pct_counts_mt"):
        found[f"qc/{key}"] = of_cells[key].to_numpy()
    for case, arguments in CASES.items():
        frame = sc.pp.highly_variable_genes(adata, **{"flavor": "seurat_v3"} | arguments, inplace=False)
        for column in frame.columns.drop("gene_name"):
            found[f"{case}/{column}"] = frame[column].to_numpy()
    np.savez_compressed(path, **found)
    print(f"scanpy {sc.__version__} -> {path}")


if __name__ == "__main__":
    main(sys.argv[1])
