"""scvi-tools' side of `benchmarks.paper.imputation`: imputed counts of some entries.

    DIR/bin/python benchmarks/peers/scvi_tools_imputation.py IN.npz OUT.npy EPOCHS

IN has a CSR of corrupted counts (``data``, ``indices``, ``indptr``, ``shape``) and entries (``rows``,
``genes``).
"""

from __future__ import annotations

import sys
import warnings

import anndata
import numpy as np
import scipy.sparse as sp
import scvi


def main() -> None:
    warnings.simplefilter("ignore")
    source, out, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with np.load(source) as f:
        counts = sp.csr_matrix((f["data"].astype(np.float32), f["indices"], f["indptr"]), tuple(f["shape"]))
        rows, genes = f["rows"], f["genes"]
    scvi.settings.seed = 0
    adata = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    plan = {"n_epochs_kl_warmup": epochs}
    model.train(epochs, accelerator="cpu", train_size=1.0, plan_kwargs=plan, enable_progress_bar=False)
    imputed = model.get_normalized_expression(library_size="latent", n_samples=10, return_numpy=True)
    np.save(out, imputed[rows, genes])


if __name__ == "__main__":
    main()
