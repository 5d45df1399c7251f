"""How near the stream comes to a full shuffle: ``python -m benchmarks.scale.shuffling --folder data``.

A simulated atlas is laid down in three orders: as ``ingest(shuffle=True)`` leaves it, batch after batch (as
an ingest of several files does), and sorted by cell type and then batch, which is the worst. A real set comes
as it was published, one sorted type after the other.

==========  ============================================================================================
``mixing``  types and batches in the minibatches of each stream, against those of a full shuffle
``elbo``    held-out ELBO of scVI trained on each stream, less that on a full shuffle with the same seed
``real``    the same with the real set
``speed``   cells a second of the stream, from a warm page cache, counts not kept in memory
==========  ============================================================================================

The streams are those of the default budget and of budgets whose half, which is what `default_sizes` gives to
blocks, holds a share of the counts; and for contrast some that no budget gives. *Full shuffle* is one block
of all cells; *cell by cell* is the same order read a cell at a time, as a map-style loader reads; *one lane*
goes through blocks of 512 in random order and mixes within each alone. *64 lanes* of 64 cells show a model
what an atlas that is much larger than the budget would.

Of a minibatch of B cells with n_k of type k the entropy is that of n_k / B. Its mean is given as a share of
the mean over random samples of B cells, which is exact (hypergeometric). ``worth`` says it more strictly: the
number of cells of which a random sample would scatter around the composition of the atlas as much.

Results go to ``--out`` as they come, and what is there is not measured again; the tables are made from it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from scipy.stats import hypergeom

import atlasvi
from atlasvi.plots import Line, line_chart, palette, standalone
from atlasvi.stream import Epochs
from atlasvi.stream.plan import EpochPlan, as_budget, default_sizes, plan_epoch
from benchmarks.common import machine, table
from benchmarks.paper.data import SETS
from benchmarks.scale.answer import seconds_of_all

PARTS = ("mixing", "elbo", "real", "speed")
ORDERS = ("shuffled", "by batch", "sorted")
# Cells seen in a row: a minibatch, a larger one, and 64 of the first.
LENGTHS = (128, 512, 8_192)
REAL = SETS["pbmc_sorted_reference"]
_MIXING_EPOCHS = 3
_ELBO_DRAWS = 5
# Of a large atlas only the plan is made, with cells of 1,500 non-zeros in three bytes each.
_LARGE, _LARGE_ROW = 1_000_000, 4_500.0
_SPEED_SECONDS, _SPEED_TURNS = 0.5, 3
_DRAWN = 120

Tally = np.ndarray


@dataclass(frozen=True, slots=True)
class Setting:
    """How a stream is set up.

    Args:
        name: as it is shown.
        share: of the counts that the blocks may hold; the default budget when ``None``.
        sizes: ``(block_rows, n_lanes)`` in place of those of the budget; 0 rows stand for all cells.
    """

    name: str
    share: float | None = None
    sizes: tuple[int, int] | None = None

    @contextmanager
    def budget(self, n_rows: int, bytes_per_row: float) -> Iterator[int | None]:
        """The budget to ask for; within, streams have the sizes of this setting."""
        if self.sizes is not None:
            rows, lanes = self.sizes
            with patch("atlasvi.stream.epochs.default_sizes", return_value=(rows or n_rows, lanes)):
                yield None
        else:
            yield None if self.share is None else max(1, int(2 * self.share * n_rows * bytes_per_row))


FULL = Setting("full shuffle", sizes=(0, 1))
EACH = Setting("cell by cell", sizes=(1, 1))
ONE_LANE = Setting("one lane", sizes=(512, 1))
MANY_LANES = Setting("64 lanes", sizes=(64, 64))
DEFAULT = Setting("default")
BUDGETS = tuple(Setting(f"{share:.0%} held", share) for share in (1.0, 0.2, 0.05, 0.01))
# Nothing smaller is ever asked for than two lanes of the smallest block.
LEAST = Setting("least budget", 0.0)


class Results:
    """What was measured, by a key of words; kept in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def of(self, *key: str) -> dict[tuple[str, ...], Any]:
        """Everything whose key begins so, by the rest of the key."""
        pairs = ((tuple(text.split("/")), value) for text, value in self.found.items())
        return {words[len(key) :]: value for words, value in pairs if words[: len(key)] == key}

    def measure(self, *key: str, by: Callable[[], Any]) -> None:
        """Unless it is there."""
        text = "/".join(key)
        if text not in self.found:
            self.found[text] = by()
            print(f"{text}: {json.dumps(self.found[text])}", flush=True)
            if self._path is not None:
                lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.found.items())
                self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# --- the orders -------------------------------------------------------------------------------------------


def make_stores(folder: Path, n_obs: int, n_vars: int) -> dict[str, Path]:
    """The same simulated cells in each order, and the real ones."""
    stores = {order: folder / f"{order.replace(' ', '-')}-{n_obs}-{n_vars}.zarr" for order in ORDERS}
    stores[REAL.name] = folder / f"{REAL.name}.zarr"
    simulation = None
    for order, path in stores.items():
        if path.exists():
            continue
        if order == REAL.name:
            atlasvi.ingest(REAL.path(), path)
            continue
        simulation = simulation or simulate(n_obs, n_vars)
        of = classes(simulation)
        by_type = np.lexsort((of["batch"], of["cell_type"]))
        rows = by_type if order == "sorted" else np.argsort(of["batch"], kind="stable")
        atlasvi.ingest(simulation.to_anndata(rows), path, shuffle=order == "shuffled")
    return stores


def simulate(n_obs: int, n_vars: int) -> atlasvi.Simulation:
    """Ten types and near-empty droplets in four batches."""
    return atlasvi.Simulation(n_obs, n_vars, n_types=10, n_batches=4, counts_per_cell=0.6 * n_vars, seed=1)


# --- mixing -----------------------------------------------------------------------------------------------


def tally(plan: EpochPlan, codes: np.ndarray) -> Tally:
    """``(minibatches, classes)``, cells of each class in each whole minibatch."""
    n_classes = int(codes.max()) + 1
    whole = plan.n_rows // plan.batch_size
    return np.stack([np.bincount(codes[plan.positions(i)], minlength=n_classes) for i in range(whole)])


def in_a_row(minibatches: Tally, n: int) -> Tally:
    """The same for each ``n`` minibatches in a row."""
    whole = len(minibatches) // n
    rows: Tally = minibatches[: whole * n].reshape(whole, n, -1).sum(1)
    return rows


def entropy(cells: Tally) -> np.ndarray:
    """Of the classes in each row, in bits."""
    p = cells / cells.sum(-1, keepdims=True)
    bits: np.ndarray = -np.sum(p * np.log2(p, where=p > 0, out=np.zeros_like(p)), -1)
    return bits


def full_entropy(atlas: np.ndarray, n: int) -> float:
    """The mean entropy of ``n`` cells drawn without replacement from ``(classes,)`` cells."""
    k = np.arange(1, n + 1)
    each = -(k / n) * np.log2(k / n)
    return float(sum(hypergeom.pmf(k, atlas.sum(), cells, n) @ each for cells in atlas))


def worth(cells: Tally, atlas: np.ndarray) -> float:
    """How many cells drawn without replacement scatter as much around the composition of the atlas.

    n of N cells scatter by (1 / n) (N - n) / (N - 1) sum_k p_k (1 - p_k).
    """
    total, p = atlas.sum(), atlas / atlas.sum()
    scatter = np.mean(np.sum((cells / cells.sum(1, keepdims=True) - p) ** 2, 1))
    return float(total / (1 + scatter * (total - 1) / np.sum(p * (1 - p))))


def mixing(
    plan: Callable[[int], EpochPlan], columns: dict[str, np.ndarray], n_epochs: int = _MIXING_EPOCHS
) -> dict[str, Any]:
    """Both measures of each column, of the epochs from 0 together."""
    plans = [plan(epoch) for epoch in range(n_epochs)]
    first = plans[0]
    held = min(1.0, first.block_rows * first.n_lanes / first.n_rows)
    found: dict[str, Any] = {"block": first.block_rows, "lanes": first.n_lanes, "held": round(held, 4)}
    for key, codes in columns.items():
        atlas = np.bincount(codes)
        of_epochs = [tally(plan, codes) for plan in plans]
        for length in LENGTHS:
            if length > first.n_rows:
                continue
            cells = np.concatenate([in_a_row(t, length // first.batch_size) for t in of_epochs])
            share = float(entropy(cells).mean()) / full_entropy(atlas, length)
            found[f"{key} {length}"] = {"share": round(share, 4), "worth": round(worth(cells, atlas), 1)}
    return found


def measure_mixing(results: Results, stores: dict[str, Path], settings: tuple[Setting, ...]) -> None:
    """Every order and setting, then the default budget on a large atlas."""
    for order, path in stores.items():
        with atlasvi.open(path) as atlas:
            columns = classes(atlas)
            for setting in settings:
                plan = epochs_of(atlas, setting).plan
                results.measure("mixing", order, setting.name, by=partial(mixing, plan, columns))
    for name, budget in ((DEFAULT.name, None), ("1 GiB", 1 << 30)):
        results.measure("mixing", f"{_LARGE:,} sorted", name, by=partial(large, budget))


def large(budget: int | None) -> dict[str, Any]:
    """A sorted atlas larger than the budget, of which only the plan is made."""
    simulation = simulate(_LARGE, 1_000)
    columns = classes(simulation)
    order = np.lexsort((columns["batch"], columns["cell_type"]))
    columns = {key: codes[order] for key, codes in columns.items()}
    rows, lanes = default_sizes(_LARGE_ROW, as_budget(budget), _LARGE)

    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(_LARGE, batch_size=LENGTHS[0], block_rows=rows, n_lanes=lanes, seed=0, epoch=epoch)

    return mixing(plan, columns, 1)


def classes(cells: atlasvi.Atlas | atlasvi.Simulation) -> dict[str, np.ndarray]:
    """Codes of the columns that tell cells apart; a real set may have no batch."""
    keys = [key for key in ("cell_type", "batch") if key in cells.obs_keys]
    return {key: np.asarray(pd.Categorical(cells.obs_column(key)).codes, np.int64) for key in keys}


def epochs_of(atlas: atlasvi.Atlas, setting: Setting, batch_size: int = LENGTHS[0]) -> Epochs:
    """The stream as it would train, but that counts are read anew in each epoch."""
    with setting.budget(atlas.n_obs, atlas.bytes_per_row) as budget:
        return Epochs(atlas, batch_size=batch_size, memory_budget=budget, keep=False)


# --- speed ------------------------------------------------------------------------------------------------


def measure_speed(
    results: Results, path: Path, settings: tuple[Setting, ...], batch_sizes: tuple[int, ...]
) -> None:
    """All in turn, several times: cells a second, and the share of a core that others had meanwhile."""
    with atlasvi.open(path) as atlas:
        streams = {(s.name, size): epochs_of(atlas, s, size) for s in settings for size in batch_sizes}
        runs: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in streams}
        for turn in range(_SPEED_TURNS + 1):
            for key, epochs in streams.items():
                found = cells_a_second(epochs)
                if turn:
                    runs[key].append(found)
    for (name, size), found in runs.items():
        results.measure("speed", path.stem, name, str(size), by=partial(_speed, found))


def _speed(turns: list[tuple[float, float]]) -> dict[str, float]:
    speeds, others = zip(*turns, strict=True)
    of_turns = {"cells/s": median(speeds), "least": min(speeds), "most": max(speeds)}
    return {**{name: round(value) for name, value in of_turns.items()}, "others": round(max(others), 2)}


def cells_a_second(epochs: Epochs) -> tuple[float, float]:
    """Of whole epochs, or of the first part of one that takes long."""
    begun, cpu, of_all, n = time.perf_counter(), time.process_time(), seconds_of_all(), 0
    seconds = 0.0
    for epoch in count():
        for _, rows in epochs.counts(epoch):
            n += len(rows)
            seconds = time.perf_counter() - begun
            if seconds > 2 * _SPEED_SECONDS:
                break
        if seconds > _SPEED_SECONDS:
            break
    others = seconds_of_all() - of_all - (time.process_time() - cpu)
    return n / seconds, max(0.0, others) / seconds


# --- the model --------------------------------------------------------------------------------------------


def held_out_elbo(path: Path, setting: Setting, seed: int, n_epochs: int) -> float:
    """Nats a cell on a tenth of the cells, the same ones whatever their order."""
    with atlasvi.open(path) as atlas:
        # The split counts in names, which each order has in another sequence.
        by_name = np.argsort(np.asarray(atlas.obs_names))
        kept_apart = np.random.default_rng(0).permutation(atlas.n_obs)[: atlas.n_obs // 10]
        test = np.sort(by_name[kept_apart])
        train = np.setdiff1d(np.arange(atlas.n_obs), test)
        fitted = atlas[train]
        batch_key = "batch" if "batch" in atlas.obs_keys else None
        atlasvi.SCVI.setup_anndata(fitted, batch_key=batch_key, gene_mask=None)
        model = atlasvi.SCVI(fitted, seed=seed)
        with setting.budget(len(train), fitted.bytes_per_row) as budget:
            model.train(
                n_epochs, accelerator="cpu", train_size=1.0, memory_budget=budget, seed=seed,
                schedule="scvi-tools", enable_progress_bar=False,
                plan_kwargs={"n_epochs_kl_warmup": n_epochs // 2},
            )  # fmt: skip
        elbo = mean(float(model.get_elbo(atlas[test], seed=draw)) for draw in range(_ELBO_DRAWS))
    return round(elbo, 3)


def measure_elbo(
    results: Results, runs: list[tuple[str, Path, Setting]], n_seeds: int, n_epochs: int
) -> None:
    """Seed after seed, so that what is there can be compared at any time."""
    for seed in range(n_seeds):
        for order, path, setting in runs:
            results.measure(
                "elbo", order, setting.name, str(seed),
                by=partial(held_out_elbo, path, setting, seed, n_epochs),
            )  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------


def mixing_table(results: Results, markdown: bool) -> str:
    """Shares of the entropy of a full shuffle, and what a minibatch is worth."""
    heads = ["order of the store", "stream", "blocks", "held"]
    heads += [f"types in {n:,}" for n in LENGTHS] + [f"batches in {LENGTHS[0]}"]
    heads += [f"{n:,} are worth" for n in LENGTHS]
    rows = []
    for (order, name), found in results.of("mixing").items():
        types = [found.get(f"cell_type {n}") for n in LENGTHS]
        batch = found.get(f"batch {LENGTHS[0]}")
        row = [order, name, f"{found['lanes']} x {found['block']:,}", f"{found['held']:.0%}"]
        row += ["" if t is None else f"{t['share']:.1%}" for t in [*types, batch]]
        row += ["" if t is None else f"{t['worth']:,.0f}" for t in types]
        rows.append(row)
    return table(heads, rows, markdown=markdown, words=3)


def elbo_table(results: Results, markdown: bool) -> str:
    """Means over seeds, and the difference from a full shuffle with the same seed."""
    runs: dict[tuple[str, str], dict[str, float]] = {}
    for (order, name, seed), value in results.of("elbo").items():
        runs.setdefault((order, name), {})[seed] = value
    rows = []
    for (order, name), values in runs.items():
        full = runs.get(("sorted" if order in ORDERS else order, FULL.name), {})
        gains = [value - full[seed] for seed, value in values.items() if seed in full]
        spread = f" ± {stdev(gains):.2f}" if len(gains) > 1 else ""
        row = [order, name, str(len(values)), f"{mean(values.values()):,.1f}"]
        rows.append([*row, f"{mean(gains):+.2f}{spread}" if any(gains) else ""])
    heads = ["order of the store", "stream", "seeds", "held-out ELBO", "less that of the full shuffle"]
    return table(heads, rows, markdown=markdown, words=2)


def speed_table(results: Results, markdown: bool) -> str:
    """Cells a second."""
    rows = []
    for (store, name, size), found in results.of("speed").items():
        row = [store, name, f"{int(size):,}", f"{found['cells/s']:,}"]
        rows.append([*row, f"{found['least']:,} to {found['most']:,}", f"{found['others']:.2f}"])
    heads = ["store", "stream", "minibatch", "cells/s", "least to most", "cores of others, most"]
    return table(heads, rows, markdown=markdown, words=2)


def draw(path: Path, store: Path, settings: tuple[Setting, ...]) -> None:
    """Entropy of the types in the first minibatches of an epoch, one after the other."""
    lines = []
    with atlasvi.open(store) as atlas:
        codes = classes(atlas)["cell_type"]
        for setting, colour in zip(settings, palette([s.name for s in settings]), strict=True):
            bits = entropy(tally(epochs_of(atlas, setting).plan(0), codes))[:_DRAWN]
            lines.append(Line(setting.name, range(len(bits)), bits.tolist(), colour))
    alt = "Entropy of the cell types in each minibatch of an epoch over a store sorted by cell type"
    labels = {"x_label": "minibatch of 128 cells", "y_label": "entropy of its cell types, bits"}
    chart = line_chart(lines, **labels, alt=alt, width=760, height=360)
    path.write_text(standalone(chart, 760, 360, alt) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.shuffling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for the stores; those that are there are used")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="``real``: the ELBO of the real set")
    add("--cells", type=int, default=32_000)
    add("--genes", type=int, default=1_000)
    add("--seeds", type=int, default=3, help="runs of each model")
    add("--epochs", type=int, default=10, help="of each model; four times as many of the real set")
    add("--out", type=Path, help="JSON with every result")
    add("--picture", type=Path, help="SVG of the entropy along an epoch of the sorted store")
    add("--markdown", action="store_true", help="tables for the docs")
    add("--quick", action="store_true", help="5,000 cells, 2 epochs, 1 seed: whether it runs")
    options = parser.parse_args()
    if options.quick:
        options.cells, options.genes, options.seeds, options.epochs = 5_000, 300, 1, 2
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(found underfitting|have no counts).*")
    options.folder.mkdir(parents=True, exist_ok=True)
    stores = make_stores(options.folder, options.cells, options.genes)
    results = Results(options.out)
    if "mixing" in options.part:
        measure_mixing(results, stores, (DEFAULT, *BUDGETS, MANY_LANES, LEAST, ONE_LANE))
    if "elbo" in options.part:
        on_sorted = (FULL, DEFAULT, MANY_LANES, BUDGETS[2], LEAST, ONE_LANE)
        runs = [("sorted", stores["sorted"], setting) for setting in on_sorted]
        runs += [("shuffled", stores["shuffled"], setting) for setting in (FULL, LEAST)]
        measure_elbo(results, runs, options.seeds, options.epochs)
    if "real" in options.part:
        runs = [
            (REAL.name, stores[REAL.name], setting)
            for setting in (FULL, DEFAULT, BUDGETS[0], LEAST, ONE_LANE)
        ]
        measure_elbo(results, runs, options.seeds, 4 * options.epochs)
    if "speed" in options.part:
        settings = (FULL, DEFAULT, *BUDGETS, LEAST, ONE_LANE, EACH)
        measure_speed(results, stores["sorted"], settings, LENGTHS[:2])
    if options.picture is not None:
        draw(options.picture, stores["sorted"], (FULL, BUDGETS[2], LEAST, ONE_LANE))
    print(table(["machine", ""], list(machine().items()), markdown=options.markdown, words=2))
    for part in (mixing_table, elbo_table, speed_table):
        print("\n" + part(results, options.markdown))


if __name__ == "__main__":
    main()
