"""An epoch of a model, atlasvi beside scvi-tools: ``python -m benchmarks.training``.

    benchmarks/peers/scvi_tools_env.sh .peers/scvi-tools
    python -m benchmarks.training --folder data --peer-python .peers/scvi-tools/bin/python --markdown

Simulated counts are written once as h5ad for scvi-tools, which has them in memory, and as a store for
atlasvi, which streams them. Both train the same model (128 hidden, 10 latent, one layer; ``--model`` chooses
it, and of SCANVI every other cell has one of ten labels) with Adam. Each side is a process of its own; they
take turns of one epoch, the first of which does not count. Times are of the whole epoch: loading, the step,
the optimiser. Medians are shown, in microseconds a cell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

HEADS = ("case", "atlasvi, us a cell", "bf16", "scvi-tools", "ratio", "ratio, bf16", "MiB", "scvi-tools, MiB")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the counts")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with scvi-tools")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--density", type=float, nargs="+", default=[0.12])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--likelihood", nargs="+", default=["zinb"])
    parser.add_argument("--model", nargs="+", choices=["SCVI", "SCANVI", "LinearSCVI"], default=["SCVI"])
    parser.add_argument("--turns", type=int, default=4, help="the first does not count")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--side", choices=["atlasvi", "scvi-tools"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _serve(options.side)
        return
    from benchmarks.common import machine, table

    print(machine(), flush=True)
    rows = []
    for n_vars in options.genes:
        for density in options.density:
            store, h5ad = _inputs(options.folder, options.cells, n_vars, density)
            for model, likelihood, size in product(options.model, options.likelihood, options.batch_size):
                case = {"cells": options.cells, "batch_size": size, "likelihood": likelihood, "model": model}
                name = f"{model} {likelihood} {options.cells:,} x {n_vars:,}, {density:.0%}, {size}"
                rows.append([name, *_in_turn(options, case, str(store), str(h5ad))])
                print(*rows[-1], sep=" | ", flush=True)
    print(table(HEADS, rows, markdown=options.markdown))


def _inputs(folder: Path, n_obs: int, n_vars: int, density: float) -> tuple[Path, Path]:
    """The same counts as a store and as h5ad: a gamma-Poisson of ten types, with the density asked for.

    Their ``label`` is the type of every other cell, and ``"Unknown"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"labelled-{n_obs}-{n_vars}-{round(100 * density)}"
    store, h5ad = stem.with_suffix(".zarr"), stem.with_suffix(".h5ad")
    if not (store.exists() and h5ad.exists()):
        import anndata
        import numpy as np
        import scipy.sparse as sp

        from atlasvi.store.ingest import ingest

        rng = np.random.default_rng(0)
        shares = rng.gamma(0.3, size=(10, n_vars))
        shares /= shares.sum(1, keepdims=True)

        types = rng.integers(10, size=n_obs + 1_000)

        def blocks(depth: float) -> Any:
            for start in range(0, n_obs, 1_000):
                means = shares[types[start : start + 1_000]] * depth
                yield sp.csr_matrix(rng.poisson(means * rng.gamma(2.0, 0.5, means.shape)).astype(np.float32))

        low, high = 1.0, 1e6
        for _ in range(40):  # the depth at which so many of the counts are not zero
            depth = (low * high) ** 0.5
            sample = next(blocks(depth))
            low, high = (depth, high) if sample.nnz < density * 1_000 * n_vars else (low, depth)
        adata = anndata.AnnData(sp.vstack(list(blocks(depth)), format="csr")[:n_obs])
        named = np.where(np.arange(n_obs) % 2, types[:n_obs].astype(str), "Unknown")
        adata.obs["label"] = named
        adata.write_h5ad(h5ad)
        ingest(adata, store, overwrite=True)
    return store, h5ad


def _in_turn(options: argparse.Namespace, case: dict[str, Any], store: str, h5ad: str) -> list[str]:
    sides = {
        "float32": (sys.executable, "atlasvi", {**case, "data": store, "precision": "float32"}),
        "bf16": (sys.executable, "atlasvi", {**case, "data": store, "precision": "bf16"}),
        "peer": (options.peer_python, "scvi-tools", {**case, "data": h5ad}),
    }
    workers = {}
    for name, (python, side, setting) in sides.items():
        command = [python, "-W", "ignore", "-m", "benchmarks.training", "--folder", "-", "--peer-python", "-"]
        workers[name] = subprocess.Popen(
            [*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _ask(workers[name], setting)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(options.turns):
        for name, worker in workers.items():
            found = _ask(worker, {})
            seconds[name].append(found["seconds"])
            peaks[name] = found["peak"]
    for worker in workers.values():
        worker.communicate("")
    us = {name: 1e6 * median(values[1:]) / case["cells"] for name, values in seconds.items()}
    return [
        f"{us['float32']:.0f}", f"{us['bf16']:.0f}", f"{us['peer']:.0f}",
        f"{us['peer'] / us['float32']:.1f}", f"{us['peer'] / us['bf16']:.1f}",
        f"{peaks['float32']:.0f}", f"{peaks['peer']:.0f}",
    ]  # fmt: skip


def _ask(worker: subprocess.Popen[str], request: dict[str, Any]) -> Any:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a side ended before it answered")


def _serve(side: str) -> None:
    """One side: the first request says what to train on; each further one is answered by an epoch."""
    setting = json.loads(sys.stdin.readline())
    epoch = _ours(setting) if side == "atlasvi" else _theirs(setting)
    print("{}", flush=True)
    for _ in sys.stdin:
        seconds = epoch()
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def _labels(setting: dict[str, Any]) -> dict[str, str]:
    return {"labels_key": "label", "unlabeled_category": "Unknown"} if setting["model"] == "SCANVI" else {}


def _ours(setting: dict[str, Any]) -> Any:
    """The trainer's own step, on minibatches streamed from the store."""
    import atlasvi  # isort: skip - before torch, as it sets how long torch's threads spin
    import numpy as np
    import torch

    from atlasvi.stream import Epochs
    from atlasvi.train.fit import Run

    atlas = atlasvi.open(setting["data"])
    kind = getattr(atlasvi, setting["model"])
    kind.setup_anndata(atlas, gene_mask=None, **_labels(setting))
    model = kind(atlas, gene_likelihood=setting["likelihood"])
    plan = model._plan(None, setting["precision"])
    run = Run(model.module, plan, 0, torch.device("cpu"), None)
    epochs = partial(Epochs, atlas, model._codes, batch_size=setting["batch_size"])
    minibatches = model._training_epochs(epochs, np.arange(atlas.n_obs))
    model.module.train()

    def epoch() -> float:
        started = time.perf_counter()
        for minibatch in minibatches(run.progress.epoch):
            run.step(minibatch)
        run.progress.close_epoch(plan, plan.lr)
        return time.perf_counter() - started

    return epoch


def _theirs(setting: dict[str, Any]) -> Any:
    """A call of train for one epoch, all cells, no validation; its set-up is not in the time."""
    import logging

    import anndata
    import lightning.pytorch as pl
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = anndata.read_h5ad(setting["data"])
    kind = getattr(scvi.model, setting["model"])
    kind.setup_anndata(adata, **_labels(setting))
    model = kind(adata, gene_likelihood=setting["likelihood"])

    class Clock(pl.Callback):
        """Takes the time of an epoch alone."""

        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    clock = Clock()

    def epoch() -> float:
        model.train(
            max_epochs=1, train_size=1.0, batch_size=setting["batch_size"], accelerator="cpu",
            enable_progress_bar=False, callbacks=[clock],
        )  # fmt: skip
        return clock.seconds

    return epoch


if __name__ == "__main__":
    main()
