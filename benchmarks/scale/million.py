"""A million cells by ten thousand genes on the machine at hand: `python -m benchmarks.scale.million`.

The cells are simulated with known truth and streamed into a store. scVI is trained with its defaults until
no look at the validation cells in about 1,000 steps gains 0.05 % of their ELBO: on all cells but 10,000, and
on a tenth of them, and both are judged by those 10,000. What it learnt is written and decoded: latents, rho
of some genes of every cell to Zarr, and rho of all genes of every cell, averaged for each cell type on the
way, since as numbers it would take 40 GB. Each stage is a process of its own, which is given nothing but
files. A line is printed as each ends: time, cells a second, and the most anonymous memory that the process
had, imports included. Looks at the cells kept for validation are written to a table as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table

HEADS = ("stage", "seconds", "cells a second", "peak memory, MiB", "what")
_MIB = 1 << 20


@dataclass(frozen=True)
class Done:
    """What a stage took, how many cells went through it, each as often as it did, and what it did."""

    seconds: float
    cells: int
    what: str


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.million",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the store, the model and what is decoded"
    )
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--counts", type=float, default=1_900.0, help="median expected counts of a cell")
    parser.add_argument("--epochs", type=int, help="at most; the default of `train` unless given")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--budget", default="256MB", help="of the stream")
    parser.add_argument("--gain", type=float, default=2.1, help="nats that count as one: 0.05 %% of the ELBO")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--stage", nargs="+", choices=list(_STAGES), default=list(_STAGES))
    parser.add_argument("--one", choices=list(_STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(_STAGES[options.one], options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    rows = []
    for stage in options.stage:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale.million", *sys.argv[1:], "--one", stage],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            [
                stage,
                f"{found['seconds']:,.0f}",
                f"{found['cells'] / found['seconds']:,.0f}",
                f"{found['peak'] / _MIB:,.0f}",
                found["what"],
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
    print(table(HEADS, rows, markdown=True))


def _one(stage: Callable[[argparse.Namespace], Done], options: argparse.Namespace) -> dict[str, Any]:
    """The body of a stage's process."""
    from atlasvi.memory import Watch

    with Watch() as watch:
        done = stage(options)
    return {**asdict(done), "peak": watch.peak_bytes}


def _timed(stage: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], Done]:
    """A stage that goes through all cells once, its imports and files included."""

    def run(options: argparse.Namespace) -> Done:
        started = time.perf_counter()
        what = stage(options)
        return Done(time.perf_counter() - started, options.cells, what)

    return run


def _build(options: argparse.Namespace) -> str:
    import atlasvi
    from atlasvi.simulate import Simulation

    simulation = Simulation(
        options.cells, options.genes, n_types=12, n_batches=4, counts_per_cell=options.counts, seed=0
    )
    store = options.folder / "atlas.zarr"
    atlasvi.ingest(simulation, store, shuffle=True, seed=0, overwrite=True)
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    return f"simulated and ingested, shuffled: {size / 1e9:.2f} GB on disk"


def _train_few(options: argparse.Namespace) -> Done:
    return _trained(options, options.cells // 10, "model-of-few")


def _train(options: argparse.Namespace) -> Done:
    return _trained(options, options.cells - _n_test(options), "model")


def _trained(options: argparse.Namespace, n_cells: int, name: str) -> Done:
    """The model of the first cells; the seconds are those of `train`."""
    import numpy as np

    import atlasvi

    with atlasvi.open(options.folder / "atlas.zarr") as atlas:
        some, others = atlas[:n_cells], atlas[options.cells - _n_test(options) :]
        atlasvi.SCVI.setup_anndata(some, batch_key="batch")
        model = atlasvi.SCVI(some, seed=0)
        started = time.perf_counter()
        with (options.folder / f"{name}.looks.csv").open("w", buffering=1) as looks:
            looks.write("step,seconds,elbo_validation\n")
            model.train(
                options.epochs,
                batch_size=options.batch_size,
                memory_budget=options.budget,
                precision=options.precision,
                seed=0,
                early_stopping_min_delta=options.gain,
                on_check=lambda look: looks.write(f"{look.step},{look.seconds:.1f},{look.elbo_validation}\n"),
            )
        seconds = time.perf_counter() - started
        model.save(options.folder / name, overwrite=True)
        elbo = -np.mean([model.get_elbo(others, seed=draw) for draw in range(3)])
    steps = model.checks[-1].step
    what = (
        f"scVI, ZINB, on {n_cells:,} cells: {steps:,} steps; -ELBO of {_n_test(options):,} others {elbo:,.2f}"
    )
    return Done(seconds, steps * options.batch_size, what)


def _n_test(options: argparse.Namespace) -> int:
    return min(10_000, options.cells // 10)


def _latent(options: argparse.Namespace) -> str:
    import numpy as np

    import atlasvi
    from atlasvi.infer.write import write_latent

    with atlasvi.open(options.folder / "atlas.zarr") as atlas:
        model = atlasvi.SCVI.load(options.folder / "model", atlas)
        write_latent(model.latent_blocks(), atlas, model.config.n_latent, None, "X_scVI", lambda *_: None)
    import zarr

    latent = zarr.open_group(options.folder / "atlas.zarr", mode="r")["obsm/X_scVI"]
    assert latent.shape[0] == options.cells
    assert np.isfinite(latent[:1000]).all()
    return "means of q(z|x) into obsm['X_scVI']"


def _decode(options: argparse.Namespace) -> str:
    import atlasvi
    from atlasvi.infer.write import write_expression

    with atlasvi.open(options.folder / "atlas.zarr") as atlas:
        model = atlasvi.SCVI.load(options.folder / "model", atlas)
        genes = [str(name) for name in atlas.var_names[:: max(1, atlas.n_vars // 200)]]
        rho = model.expression(genes=genes)
        out = options.folder / "some.zarr"
        write_expression(rho, atlas.read_names, genes, out, overwrite=True, advance=lambda *_: None)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"rho of {len(genes)} genes of every cell to Zarr: {size / 1e9:.2f} GB"


def _decode_all(options: argparse.Namespace) -> str:
    import dask
    import numpy as np
    import pandas as pd

    import atlasvi

    with atlasvi.open(options.folder / "atlas.zarr") as atlas:
        model = atlasvi.SCVI.load(options.folder / "model", atlas)
        kinds = pd.Categorical(atlas.obs_column("cell_type"))
        rho = model.expression()
        n_kinds = len(kinds.categories)

        @dask.delayed
        def sums(block: Any, codes: Any) -> Any:
            return np.eye(n_kinds, dtype=np.float32)[codes].T @ block

        ends = np.cumsum(rho.chunks[0])
        rows = rho.rechunk({1: -1}).to_delayed()[:, 0]
        total = np.zeros((n_kinds, atlas.n_vars))
        # A few tasks at a time: what Dask knows of all of them would be more than what is added up.
        for first in range(0, len(rows), 64):
            some = range(first, min(first + 64, len(rows)))
            parts = [sums(rows[i], kinds.codes[ends[i] - rho.chunks[0][i] : ends[i]]) for i in some]
            total += sum(dask.compute(*parts))
    means = total / total.sum(1, keepdims=True)
    np.save(options.folder / "means.npy", means)
    return f"rho of all {atlas.n_vars:,} genes of every cell, averaged for each of {n_kinds} types"


_STAGES: dict[str, Callable[[argparse.Namespace], Done]] = {
    "build": _timed(_build), "train few": _train_few, "train": _train, "latents": _timed(_latent),
    "decode": _timed(_decode), "decode all": _timed(_decode_all),
}  # fmt: skip


if __name__ == "__main__":
    main()
