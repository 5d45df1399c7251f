"""What an epoch of GMVAE costs by its components, beside SCVI: ``python -m benchmarks.gmvae --folder data``.

The counts are those of `benchmarks.training`, streamed from a store. SCVI (ZINB) and GMVAE (NB, a dispersion
for each cell and gene: two heads as well) take turns of one epoch, the first of which does not count. What a
component costs is the slope of the exact bound's time by their number. Medians, in microseconds a cell.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import atlasvi
from benchmarks.common import machine, table
from benchmarks.training import _inputs

EXACT = (1, 2, 5, 10)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the counts")
    parser.add_argument("--cells", type=int, default=4_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=4, help="the first does not count")
    options = parser.parse_args()
    print(machine(), flush=True)
    store, _ = _inputs(options.folder, options.cells, options.genes, 0.12)
    atlas = atlasvi.open(store)
    runs = {"SCVI": epoch_of(atlas, atlasvi.SCVI, options.batch_size)}
    for k in EXACT:
        name = f"GMVAE, exact, {k}"
        runs[name] = epoch_of(atlas, atlasvi.GMVAE, options.batch_size, n_components=k)
    runs["GMVAE, sampled, 20"] = epoch_of(
        atlas, atlasvi.GMVAE, options.batch_size, n_components=20, bound="sampled"
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns):
        for name, epoch in runs.items():
            seconds[name].append(epoch(turn))
    us = {name: 1e6 * median(values[1:]) / options.cells for name, values in seconds.items()}
    rows = [[name, f"{value:.0f}", f"{value / us['SCVI']:.1f}"] for name, value in us.items()]
    print(table(("model, components", "us a cell", "of SCVI"), rows, markdown=True))
    slope = np.polyfit(EXACT, [us[f"GMVAE, exact, {k}"] for k in EXACT], 1)[0]
    print(f"a component more: {slope:.0f} us a cell")


def epoch_of(atlas: Any, kind: Any, batch_size: int, **options: Any) -> Any:
    """The trainer's own steps over all cells; gives the seconds they took."""
    import torch

    from atlasvi.stream import Epochs
    from atlasvi.train.fit import Run

    kind.setup_anndata(atlas, gene_mask=None)
    model = kind(atlas, **options)
    plan = model._plan(None, "float32")
    run = Run(model.module, plan, 0, torch.device("cpu"), None)
    minibatches = Epochs(atlas, model._codes, batch_size=batch_size)
    model.module.train()

    def epoch(number: int) -> float:
        started = time.perf_counter()
        for minibatch in minibatches(number):
            run.step(minibatch)
        run.progress.close_epoch(plan, plan.lr)
        return time.perf_counter() - started

    return epoch


if __name__ == "__main__":
    main()
