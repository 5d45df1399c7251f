"""scvi-tools' side of `benchmarks.de`, which starts this with the peer's Python: it trains, and is asked."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scvi
import torch

from benchmarks.common import n_cores


def _model(folder: Path) -> Any:
    adata = ad.read_h5ad(folder / "cells.h5ad")
    adata.X = adata.X.astype(np.float32)
    if (folder / "peer").is_dir():
        return scvi.model.SCVI.load(folder / "peer", adata)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    model.train(
        10, accelerator="cpu", devices=1, train_size=1.0, batch_size=512, enable_progress_bar=False,
        plan_kwargs={"lr": 4e-3, "n_epochs_kl_warmup": 3},
    )  # fmt: skip
    model.save(folder / "peer")
    return model


def main(folder: Path, *, processor: bool) -> None:
    """Answer a `Worker` until it closes: seconds on all cores, or ``processor`` time of one thread."""
    clock = time.process_time if processor else time.perf_counter
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1 if processor else n_cores())
    warnings.filterwarnings("ignore")
    for name in ("scvi", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    model = _model(folder)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = {"scvi-tools": scvi.__version__}
        if request["do"] == "weights":
            state = {name: value.numpy() for name, value in model.module.state_dict().items()}
            np.savez(request["file"], **state)
        elif request["do"] == "ask":
            scvi.settings.seed = request["seed"]
            begun = clock()
            found = model.differential_expression(silent=True, **request["arguments"])
            answer = clock() - begun
            if request["file"]:
                np.save(request["file"], found.loc[model.adata.var_names, "bayes_factor"].to_numpy())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), processor="--processor" in sys.argv)
