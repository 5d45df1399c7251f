"""What scvi-tools' differential expression says of a small model, from several seeds.

Run with the peer's Python (`scvi_tools_env.sh` makes it), from the root of the repository::

    DIR/bin/python -m benchmarks.peers.scvi_tools_de_fixtures tests/oracle/fixtures

The model is the case ``MODEL`` of `scvi_tools_fixtures`, with the same weights, on the same cells.
`scvi_tools_de.npz` holds, for each setting, ``(seeds, genes, columns)`` float64, genes in their order, and
`layout`, JSON as bytes: the arguments and the columns of each setting.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.scvi_tools_fixtures import N_HIDDEN, N_LATENT, _anndata, _randomise, cases, cells

MODEL = "covariates/encoded"
SEEDS = range(16)
BETWEEN = {"groupby": "label", "group1": "label0", "group2": "label1"}
SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": BETWEEN,
    "vanilla, corrected": {**BETWEEN, "batch_correction": True},
    "vanilla, few cells": {"idx1": [1, 12], "idx2": [18]},
    "vanilla, rest": {"groupby": "donor"},
    "vanilla, two batches": {
        **BETWEEN, "batch_correction": True, "batchid1": ["batch0"], "batchid2": ["batch2"],
    },
    "change": {**BETWEEN, "mode": "change", "cred_interval_lvls": [0.9]},
    "change, corrected": {**BETWEEN, "mode": "change", "batch_correction": True, "test_mode": "two"},
    "change, rest": {"groupby": "donor", "mode": "change", "delta": 0.4, "pseudocounts": 1e-3},
}  # fmt: skip


def _model() -> Any:
    from scvi.model import SCVI

    data = {key: value.astype(np.float32) for key, value in cells().items()}
    case = cases()[MODEL]
    adata = _anndata(data)
    SCVI.setup_anndata(adata, **case["setup"])
    model = SCVI(adata, n_hidden=N_HIDDEN, n_latent=N_LATENT, dropout_rate=0.0, **case["init"])
    _randomise(model.module, np.random.default_rng([7, list(cases()).index(MODEL)]))
    model.module.eval()
    model.is_trained_ = True
    return model


def main(out: Path) -> None:
    """Write ``scvi_tools_de.npz`` into ``out``."""
    import scvi
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model = _model()
    numbers: dict[str, np.ndarray] = {}
    layout: dict[str, Any] = {}
    for name, arguments in SETTINGS.items():
        runs = []
        for seed in SEEDS:
            scvi.settings.seed = seed
            found = model.differential_expression(silent=True, **arguments)
            by = "comparison" if "comparison" in found else None
            parts = [part for _, part in found.groupby(by, sort=True)] if by else [found]
            frame = [part.loc[model.adata.var_names].select_dtypes(["number", "bool"]) for part in parts]
            runs.append(np.concatenate([part.to_numpy(np.float64) for part in frame]))
            layout[name] = {
                "arguments": arguments,
                "columns": list(frame[0].columns),
                "all": list(found.columns),
            }
        numbers[name] = np.stack(runs)
        print(name, numbers[name].shape, flush=True)
    layout["scvi-tools"] = scvi.__version__
    packed = np.frombuffer(json.dumps(layout).encode(), dtype=np.uint8)
    np.savez_compressed(out / "scvi_tools_de.npz", layout=packed, **numbers)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.peers.scvi_tools_de_fixtures OUT_DIR")
    main(Path(sys.argv[1]))
