"""Differential expression beside scvi-tools: `python -m benchmarks.de --peer DIR/bin/python --folder F`.

The cells are simulated with known truth, scvi-tools trains on them (`benchmarks.peers.scvi_tools_de`), and
its weights are copied, so that both are asked the same question of the same model. First it is seen that they
say the same: differences of Bayes factors between the two, beside those between scvi-tools' own seeds. Then
how well each finds what is true, what ours finds between halves of one type (written to
`benchmarks/de_calibration.json`) and of as few cells of two, and what each question takes,
the two in turn: seconds on all cores, or with `--processor` those that one thread was computing, which others
on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.common import Worker, in_turn, machine, n_cores, table

SIMULATION: dict[str, Any] = {
    "n_obs": 10_000, "n_vars": 10_000, "n_types": 8, "n_batches": 3, "doublet_rate": 0.0, "empty_rate": 0.0,
    "counts_per_cell": 2_000, "seed": 0,
}  # fmt: skip
PAIR = {"groupby": "cell_type", "group1": "C1", "group2": "A3"}
PAPER = {"all_stats": False, "n_cells": 100, "n_draws": 200, "estimator": "paper"}
CALIBRATION = Path(__file__).with_name("de_calibration.json")
# Name, what ours is asked, what scvi-tools is asked: in the paper's setting as many draws of as many cells.
QUESTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vanilla, defaults": ({}, {}),
    "vanilla, without raw means": ({"all_stats": False}, {"all_stats": False}),
    "vanilla, without raw means, in bfloat16": (
        {"all_stats": False, "precision": "bfloat16"}, {"all_stats": False},
    ),
    "vanilla, under all batches": ({"batch_correction": True}, {"batch_correction": True}),
    "change": ({"mode": "change"}, {"mode": "change"}),
    "change, in bfloat16": ({"mode": "change", "precision": "bfloat16"}, {"mode": "change"}),
    "paper, own batch": (
        {**PAPER, "batch_correction": False}, {"all_stats": False, "n_samples_overall": 20_000, "cells": 100},
    ),
    "paper, all batches": (
        {**PAPER, "batch_correction": True},
        {"all_stats": False, "n_samples_overall": 60_000, "cells": 100, "batch_correction": True},
    ),
}  # fmt: skip

# What is called: K beyond 3, or an expected share of false calls.
CALLERS: dict[str, dict[str, Any]] = {
    "pooled": {}, "paper": {"estimator": "paper"}, "change": {"mode": "change"},
}  # fmt: skip
PARTS = ("agreement", "truth", "calibration", "times")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="scvi-tools' Python")
    parser.add_argument("--folder", type=Path, required=True, help="for cells and models; kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a question")
    parser.add_argument("--processor", action="store_true", help="processor time of one thread")
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.processor else n_cores())
    clock = time.process_time if options.processor else time.perf_counter
    print(machine(), flush=True)
    folder = options.folder.resolve()
    simulation, path = _cells(folder)
    command = [str(options.peer), "-m", "benchmarks.peers.scvi_tools_de", str(folder)]
    with Worker(command + ["--processor"] * options.processor) as peer:
        peer.ask("weights", file=str(folder / "weights.npz"))
        model = _model(path, folder / "weights.npz")
        groups = _groups(model)
        if "agreement" in options.part:
            print(_agreement(model, peer, folder, options.seeds), flush=True)
        if "truth" in options.part:
            print(_truth(model, peer, folder, simulation, groups, options.seeds), flush=True)
        if "calibration" in options.part:
            result = _calibration(model, simulation, groups, n_splits=20, n_cells=100)
            CALIBRATION.write_text(json.dumps(result, indent=1) + "\n")
            print(_calibrated(result), flush=True)
        if "times" in options.part:
            print(_times(model, peer, groups, clock, options), flush=True)


def _cells(folder: Path) -> tuple[Any, Path]:
    import atlasvi

    folder.mkdir(parents=True, exist_ok=True)
    simulation = atlasvi.Simulation(**SIMULATION)
    if not (folder / "cells.h5ad").exists():
        simulation.to_anndata().write_h5ad(folder / "cells.h5ad")
    path = folder / "cells.zarr"
    if not path.exists():
        atlasvi.ingest(folder / "cells.h5ad", path)
    return simulation, path


def _model(path: Path, weights: Path) -> Any:
    """Ours with scvi-tools' weights, as it makes a model by default."""
    import atlasvi

    atlas = atlasvi.open(path)
    atlasvi.SCVI.setup_anndata(atlas, batch_key="batch", gene_mask=None)
    model = atlasvi.SCVI(atlas)
    with np.load(weights) as file:
        theirs = {name: torch.from_numpy(file[name]) for name in file.files}
    state = {"log_theta": theirs["px_r"][None]}
    for ours, name, n_in in (
        ("encoder.mlp", "z_encoder.encoder", atlas.n_vars), ("decoder.mlp", "decoder.px_decoder", 10),
    ):  # fmt: skip
        weight = theirs[f"{name}.fc_layers.Layer 0.0.weight"]
        state[f"{ours}.linears.0.weight"] = weight[:, :n_in].T
        state[f"{ours}.linears.0.bias"] = theirs[f"{name}.fc_layers.Layer 0.0.bias"]
        if weight.shape[1] > n_in:
            state[f"{ours}.linears.0.covariate_weight"] = weight[:, n_in:].T
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            state[f"{ours}.batch_norms.0.{part}"] = theirs[f"{name}.fc_layers.Layer 0.1.{part}"]
    for ours, name in (
        ("encoder.loc", "z_encoder.mean_encoder"), ("encoder.log_variance", "z_encoder.var_encoder"),
        ("decoder.scale", "decoder.px_scale_decoder.0"), ("decoder.pi", "decoder.px_dropout_decoder"),
    ):  # fmt: skip
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = theirs[f"{name}.{part}"]
    model.module.load_state_dict(state)
    model.records = [None]  # scvi-tools has trained it
    return model


def _groups(model: Any) -> tuple[np.ndarray, np.ndarray]:
    types = np.asarray(model.atlas.obs_column("cell_type"))
    return np.flatnonzero(types == PAIR["group1"]), np.flatnonzero(types == PAIR["group2"])


def _ours(model: Any, seed: int, **arguments: Any) -> np.ndarray:
    found = model.differential_expression(silent=True, seed=seed, **PAIR, **arguments)
    factors: np.ndarray = found.loc[list(model.fields.var_names), "bayes_factor"].to_numpy()
    return factors


def _theirs(peer: Worker, folder: Path, seed: int, **arguments: Any) -> np.ndarray:
    file = folder / "factors.npy"
    peer.ask("ask", seed=seed, file=str(file), arguments={**PAIR, **arguments})
    return np.asarray(np.load(file))


def _rms(a: list[tuple[np.ndarray, np.ndarray]], genes: np.ndarray) -> float:
    return float(np.sqrt(np.mean([np.square((x - y)[genes]).mean() for x, y in a])))


def _agreement(model: Any, peer: Worker, folder: Path, seeds: int) -> str:
    ours = [_ours(model, seed, all_stats=False) for seed in range(seeds)]
    theirs = [_theirs(peer, folder, seed, all_stats=False) for seed in range(seeds)]
    small = np.abs(np.mean(theirs, 0)) < 3
    rows = []
    for name, genes in (("all genes", np.ones(len(small), bool)), ("genes of |K| < 3", small)):
        between = [(a, b) for a in ours for b in theirs]
        sides = (list(combinations(theirs, 2)), between, list(combinations(ours, 2)))
        rows.append([name, f"{genes.sum():,}", *(f"{_rms(side, genes):.4f}" for side in sides)])
    heads = ["root mean square difference of K", "genes", "scvi-tools' seeds", "ours to theirs", "our seeds"]
    return table(heads, rows, markdown=True)


def _truth(model: Any, peer: Worker, folder: Path, simulation: Any, groups: Any, seeds: int) -> str:
    """How well genes that truly differ are told from the rest, and how many are called; means over seeds."""
    one, two = (np.log2(simulation.true_rho_of(cells).mean(0)) for cells in groups)
    change = np.abs(one - two)
    rows = []
    for name, arguments in (("vanilla", {}), ("change", {"mode": "change"}), ("paper", PAPER)):
        arguments = {"all_stats": False, **arguments}
        runs = {"atlasvi": [_ours(model, seed, **arguments) for seed in range(seeds)]}
        if name != "paper":
            runs["scvi-tools"] = [_theirs(peer, folder, seed, **arguments) for seed in range(seeds)]
        for side, factors in runs.items():
            evidence = factors if name == "change" else [np.abs(one) for one in factors]
            areas = [[roc_auc_score(change > least, one) for one in evidence] for least in (0.5, 1.0)]
            shown = [f"{np.mean(area):.4f} ± {np.std(area):.4f}" for area in areas]
            sets = () if name == "change" else (change > 1, change < 0.25)
            called = [f"{np.mean([(one[genes] > 3).mean() for one in evidence]):.1%}" for genes in sets]
            rows.append([name, side, *shown, *(called or ["", ""])])
    heads = ["", "", "AUROC of > 0.5", "AUROC of > 1", "of > 1 at |K| > 3", "of < 0.25 at |K| > 3"]
    said = f"true log2 change > 0.5: {(change > 0.5).sum():,} genes, > 1: {(change > 1).sum():,}"
    return f"{said}\n{table(heads, rows, markdown=True)}"


def _calibration(
    model: Any, simulation: Any, groups: tuple[np.ndarray, np.ndarray], n_splits: int, n_cells: int
) -> dict[str, Any]:
    """What is called of ``n_cells`` against as many: of one type, where nothing is true, and of two types."""
    one, two = (np.log2(simulation.true_rho_of(cells).mean(0)) for cells in groups)
    change = np.abs(one - two)
    result: dict[str, Any] = {
        "machine": machine(), "simulation": SIMULATION, "type": PAIR["group1"], "other": PAIR["group2"],
        "splits": n_splits, "cells": n_cells, "genes": {name: int(of.sum()) for name, of in _truths(change)},
    }  # fmt: skip
    for name, arguments in CALLERS.items():
        halves = model.calibration(
            groupby="cell_type", group=PAIR["group1"], n_splits=n_splits, n_cells=n_cells, **arguments
        )
        called = []
        for split in range(n_splits):
            rng = np.random.default_rng(split)
            sets = [np.sort(rng.choice(cells, n_cells, replace=False)) for cells in groups]
            found = model.differential_expression(
                idx1=sets[0], idx2=sets[1], all_stats=False, silent=True, seed=split, **arguments
            ).loc[list(model.fields.var_names)]
            called.append(found[next(c for c in found if c.startswith("is_de_"))].to_numpy(bool))
        result[name] = {
            "share_called": float(halves["share_called"].mean()),
            "splits_with_calls": int((halves["n_called"] > 0).sum()),
            "largest": float(halves["largest"].max()),
            "of_two_types": {name: float(np.mean(called, 0)[of].mean()) for name, of in _truths(change)},
        }
        print(name, result[name], flush=True)
    return result


def _truths(change: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [("> 1", change > 1), ("0.5 to 1", (change > 0.5) & (change <= 1)), ("< 0.25", change < 0.25)]


def _calibrated(result: dict[str, Any]) -> str:
    rows = []
    for name in CALLERS:
        found = result[name]
        shares = [f"{100 * share:.1f} %" for share in found["of_two_types"].values()]
        halves = f"{100 * found['share_called']:.3f} %", f"{found['largest']:.2f}"
        rows.append([name, *halves, *shares])
    heads = ["", "called within a type", "largest", *(f"called, change {name}" for name in result["genes"])]
    return table(heads, rows, markdown=True)


def _times(
    model: Any, peer: Worker, groups: Any, clock: Callable[[], float], options: argparse.Namespace
) -> str:
    rows = []
    for name in options.only:
        ours, theirs = (dict(arguments) for arguments in QUESTIONS[name])
        n_cells = theirs.pop("cells", None)
        pair: dict[str, Any] = PAIR
        if n_cells is not None:
            rng = np.random.default_rng(0)
            sets = [np.sort(rng.choice(cells, n_cells, replace=False)).tolist() for cells in groups]
            pair = dict(zip(("idx1", "idx2"), sets, strict=True))

        def run(arguments: dict[str, Any]) -> float:
            begun = clock()
            model.differential_expression(silent=True, **arguments)
            return clock() - begun

        runs = {
            "atlasvi": partial(run, {**pair, **ours}),
            "scvi-tools": partial(peer.ask, "ask", seed=0, file="", arguments={**pair, **theirs}),
        }
        seconds = in_turn(runs, options.repeats, options.limit)
        own, other = (statistics.median(seconds[side]) for side in runs)
        rows.append([name, f"{own:.2f}", f"{other:.2f}", f"{other / own:.1f}"])
        print(*rows[-1], sep=" | ", flush=True)
    return table(["two groups, seconds", "atlasvi", "scvi-tools", "ratio"], rows, markdown=True)


if __name__ == "__main__":
    main()
