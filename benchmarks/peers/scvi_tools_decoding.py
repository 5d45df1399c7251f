"""scvi-tools' side of `benchmarks.scale.decoding`: to ``go`` it answers how long rho of all cells took.

DIR/bin/python benchmarks/peers/scvi_tools_decoding.py COUNTS.npz
"""

from __future__ import annotations

import sys
import time
import warnings

import anndata
import numpy as np
import scipy.sparse as sp
import scvi
import torch


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    with np.load(sys.argv[1]) as f:
        counts = sp.csr_matrix((f["data"].astype(np.float32), f["indices"], f["indptr"]), tuple(f["shape"]))
    answers, sys.stdout = sys.stdout, sys.stderr
    adata = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    model.train(1, accelerator="cpu", batch_size=512, enable_progress_bar=False)
    for _ in sys.stdin:
        begun = time.perf_counter()
        rho = model.get_normalized_expression(return_numpy=True, batch_size=512)
        seconds = time.perf_counter() - begun
        assert abs(float(rho[:9].sum()) - 9) < 1e-3
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main()
