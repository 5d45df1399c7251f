"""Peak memory of each stage against the number of cells: `python -m benchmarks.scale.memory`.

Every measurement is a process of its own (with ``--together``, one process goes through the stages, which
saves importing them each time). It imports what the stage needs, notes its anonymous memory, runs
the stage on a tiny atlas so that compiled code is loaded, notes its anonymous memory again (the level), and
then runs the stage while a thread samples that memory. What is reported is the peak above the level, and the
peak above import, where the price of compiled code and thread pools is in it as it is for a user.

Stages, each on what the one before it left in the folder:

=============  =========================================================================================
``simulate``   `Simulation`, or one block of it over and over (``--repeat``), through `ingest` to a store
``ingest``     that store, as a file, through `ingest` to another
``shuffle``    the same with ``shuffle=True``
``train``      scVI on the store
``latent``     the means of q(z|x) into ``obsm`` of the store
``decode``     rho of some genes of every cell to Zarr
``decode-all`` rho of all genes of every cell to Zarr
``impute``     imputed counts and technical zeros of some genes of every cell to Zarr
``de``         every cell type against the rest, fold changes, 1,000 draws of each
``evaluate``   a scorecard, of a model that was trained on other cells: all of them are held out
``load``       the control: ``anndata.read_zarr`` of the store, which no limit below its size lets pass
=============  =========================================================================================

A peak is the most that readers, workers and encoders hold at one moment, and the more moments there are
the higher it is found. So that this is not taken for the price of a cell, a stage goes through few cells
again and again until it has gone through ``--work`` of them (several epochs, several decodings); 0: once.
All stages run on ``--cores`` cores, since each further reader and writer has a chunk of its own in hand; on
one, what is held at a time is nearly the same in every run.

With ``--limit`` a stage may take no more than so many MiB above its level: the control must then fail where
the others pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STAGES = (
    "simulate",
    "ingest",
    "shuffle",
    "train",
    "latent",
    "decode",
    "decode-all",
    "impute",
    "de",
    "evaluate",
)
CONTROL = "load"
TINY = 600
# Exit status of a stage that was refused memory.
REFUSED = 42
_MIB = 1 << 20
Ready = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """How everything is run.

    Args:
        genes: number of genes.
        counts: median expected counts of a cell.
        repeat: cells that are simulated and then repeated; 0 simulates all.
        cores: cores to run on.
        workers: threads of ingest.
        ingest_budget: bytes of ingest's shards in flight.
        stream_budget: bytes of decoded buffers in training.
        batch_size: cells a minibatch.
        hidden: units of the hidden layers.
        some_genes: genes that ``decode`` writes.
        work: cells that a stage goes through at least, if need be the same several times.
        live: have malloc give freed blocks back at once: what is measured then is what is in use, to a few
            hundred kB; without, what a user sees, which differs by a tenth from run to run.
        limit: MiB above the level that a stage may take, or 0 for no limit.
        together: measure all stages of so many cells in one process, one after the other.
    """

    genes: int = 2_000
    counts: float = 600.0
    repeat: int = 0
    cores: int = 2
    workers: int = 2
    ingest_budget: int = 64 * _MIB
    stream_budget: int = 8 * _MIB
    batch_size: int = 1_024
    hidden: int = 128
    some_genes: int = 24
    work: int = 400_000
    live: int = 0
    limit: int = 0
    together: int = 0

    def times(self, n: int) -> int:
        """How often a stage goes through ``n`` cells."""
        return 1 if n == TINY else max(1, round(self.work / n))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 400_000])
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, CONTROL], default=list(STAGES))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each stage; the median is reported")
    parser.add_argument("--folder", type=Path, help="for the stores; by default temporary, and removed")
    parser.add_argument("--out", type=Path, help="JSON with every run")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(**{name: getattr(options, name) for name in asdict(Setting())})
    if options.one:
        _here(options.one.split(","), options.cells[0], options.folder, setting)
        return
    with tempfile.TemporaryDirectory(prefix="atlasvi-memory-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = measure(options.stage, options.cells, folder, setting, options.repeats)
    print(table(runs))
    if options.out is not None:
        options.out.write_text(json.dumps({"setting": asdict(setting), "runs": runs}, indent=1))


def measure(
    stages: list[str], cells: list[int], folder: Path, setting: Setting, repeats: int
) -> list[dict[str, Any]]:
    """Every stage with every number of cells, ``repeats`` times, in turn."""
    if not (folder / "model").is_dir():
        _run(["prepare"], TINY, folder, replace(setting, limit=0))
    runs = []
    for some in [stages] if setting.together else [[stage] for stage in stages]:
        for n in cells:
            for _ in range(repeats):
                runs += _run(some, n, folder, setting)
                print(json.dumps(runs[-len(some) :]), file=sys.stderr, flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Medians in MiB, the largest against the smallest number of cells, and what a cell costs."""
    lines = []
    for above in ("import", "level"):
        lines.append(f"peak above {above}")
        peaks: dict[str, dict[int, list[float]]] = {}
        for run in runs:
            if run["peak"] is not None:
                more = run["level"] - run["import"] if above == "import" else 0
                peaks.setdefault(run["stage"], {}).setdefault(run["cells"], []).append(run["peak"] + more)
        for stage, of_stage in peaks.items():
            medians = {n: statistics.median(values) for n, values in sorted(of_stage.items())}
            few, many = min(medians), max(medians)
            ratio, cost = medians[many] / medians[few], (medians[many] - medians[few]) / max(many - few, 1)
            shown = "  ".join(f"{n:>9,}: {peak / _MIB:7.1f} MiB" for n, peak in medians.items())
            lines.append(f"{stage:<11} {shown}  ratio {ratio:.3f}  {cost:6.1f} bytes a cell")
    lines += [f"{run['stage']:<11} {run['cells']:>9,}: refused" for run in runs if run["peak"] is None]
    return "\n".join(lines)


def _run(stages: list[str], n: int, folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """The stages in a process of their own. ``peak`` is ``None`` where the limit broke one."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(setting).items()]
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale.memory", f"--one={','.join(stages)}", f"--cells={n}",
         f"--folder={folder}", *options],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], check=False,
        env={**os.environ, **(environment if setting.live else {})},
    )  # fmt: skip
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode == REFUSED:
        found += [{"stage": stage, "cells": n, "peak": None} for stage in stages[len(found) :]]
    elif done.returncode:
        raise RuntimeError(f"{stages} of {n} cells ended with status {done.returncode}")
    return found


def _here(stages: list[str], n: int, folder: Path, setting: Setting) -> None:
    """The body of that process: prints a line of JSON for each stage."""
    # Before torch counts the cores.
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cores)
        os.sched_setaffinity(0, (cores + cores)[first : first + setting.cores])
    import atlasvi
    from atlasvi.memory import anonymous_bytes

    _ = atlasvi.SCVI
    imported = anonymous_bytes()
    if stages == ["prepare"]:
        _prepare(folder, setting)
        return
    for stage in stages:
        _STAGES[stage](TINY, folder, setting)()
    for stage in stages:
        found = _watched(_STAGES[stage](n, folder, setting), stage, n, folder, setting)
        print(json.dumps({"stage": stage, "cells": n, "import": imported, **found}), flush=True)


def _watched(ready: Ready, stage: str, n: int, folder: Path, setting: Setting) -> dict[str, float]:
    """Run a stage and say what it took; the process ends where it is refused memory."""
    from atlasvi.memory import Watch, give_back

    gc.collect()
    give_back()
    if setting.limit:
        hard_limit(setting.limit * _MIB)
    try:
        with Watch(interval=0.002) as watch:
            for _ in range(1 if stage == "train" else setting.times(n)):
                ready()
                # What one repeat leaves to the garbage collector is no part of the next.
                gc.collect()
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for the processor's memory.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            sys.exit(REFUSED)
        raise
    finally:
        shutil.rmtree(_scratch(folder), ignore_errors=True)
    return {
        "peak": watch.peak_bytes - watch.before_bytes,
        "level": watch.before_bytes,
        "seconds": round(watch.seconds, 2),
    }


def hard_limit(n_bytes: int) -> None:
    """Allow so many bytes of private writable memory more than there are now.

    RLIMIT_AS would count files mapped for reading and what torch reserves and never touches, gigabytes that
    differ from machine to machine. RLIMIT_DATA counts private writable pages alone: the heap, anonymous
    mappings (large arrays) and the stacks of threads, touched or not.
    """
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    most = (int(found[1]) << 10) + n_bytes
    # The hard limit stays, so that this can be asked for again.
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _prepare(folder: Path, setting: Setting) -> None:
    """A tiny store, and a model of its genes that decodes any number of cells."""
    _simulate(TINY, folder, setting)()
    _train(TINY, folder, setting)()


def _store(n: int, folder: Path) -> Path:
    return folder / f"atlas-{n}.zarr"


def _scratch(folder: Path) -> Path:
    """A store that is removed at the end; another process may run the same stage beside this one."""
    return folder / f"scratch-{os.getpid()}.zarr"


class Repeated:
    """One simulated block of cells over and over, under different names."""

    def __init__(self, n_obs: int, simulation: Any) -> None:
        import numpy as np

        self.shape = (n_obs, simulation.n_vars)
        self.name, self.var_names, self.obs_keys = "repeated", simulation.var_names, simulation.obs_keys
        self._length = simulation.n_obs
        self._counts = simulation.read_rows(0, self._length)
        self._columns = {key: simulation.obs_column(key) for key in self.obs_keys}
        self._string = np.dtypes.StringDType()

    def obs_column(self, key: str) -> Any:
        import numpy as np
        import pandas as pd

        block, n = self._columns[key], self.shape[0]
        if isinstance(block, pd.Categorical):
            return pd.Categorical.from_codes(np.resize(block.codes, n), dtype=block.dtype)
        return np.resize(block, n)

    def read_names(self, start: int, stop: int) -> Any:
        import numpy as np

        return np.array([f"cell-{i:07d}" for i in range(start, stop)], self._string)

    def read_rows(self, start: int, stop: int) -> Any:
        import numpy as np

        return self._counts.take_rows(np.arange(start, stop) % self._length)

    def close(self) -> None:
        """Nothing is open."""


def _simulate(n: int, folder: Path, setting: Setting) -> Ready:
    import atlasvi

    options = {"counts_per_cell": setting.counts, "seed": 1}
    source: Any = atlasvi.Simulation(setting.repeat or n, setting.genes, **options)
    if setting.repeat:
        source = Repeated(n, source)
    return _ingesting(source, _store(n, folder), setting, shuffle=False)


def _ingesting(source: Any, out: Path, setting: Setting, *, shuffle: bool) -> Ready:
    import warnings

    import atlasvi

    def run() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* have no counts")
            atlasvi.ingest(
                source, out, shuffle=shuffle, workers=setting.workers, memory_budget=setting.ingest_budget,
                overwrite=True,
            )  # fmt: skip

    return run


def _ingest(n: int, folder: Path, setting: Setting) -> Ready:
    return _ingesting(str(_store(n, folder)), _scratch(folder), setting, shuffle=False)


def _shuffle(n: int, folder: Path, setting: Setting) -> Ready:
    return _ingesting(str(_store(n, folder)), _scratch(folder), setting, shuffle=True)


def _train(n: int, folder: Path, setting: Setting) -> Ready:
    import warnings

    import atlasvi

    model_type = atlasvi.SCVI

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* found underfitting")
            model_type.setup_anndata(atlas, batch_key="batch", gene_mask=None)
            model = model_type(atlas, n_hidden=setting.hidden)
            model.train(
                setting.times(n), batch_size=setting.batch_size, memory_budget=setting.stream_budget,
                enable_progress_bar=False,
            )  # fmt: skip
            if n == TINY:
                model.save(folder / "model", overwrite=True)

    return run


def _latent(n: int, folder: Path, setting: Setting) -> Ready:
    import atlasvi
    from atlasvi.infer.write import write_latent

    model_type = atlasvi.SCVI

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas:
            model = model_type.load(folder / "model", atlas)
            write_latent(
                model.latent_blocks(), atlas, model.config.n_latent, None, "X_scVI", lambda done, text: None
            )

    return run


def _decode(n: int, folder: Path, setting: Setting) -> Ready:
    return _decoding(n, folder, setting.some_genes)


def _decode_all(n: int, folder: Path, setting: Setting) -> Ready:
    return _decoding(n, folder, None)


def _decoding(n: int, folder: Path, n_genes: int | None) -> Ready:
    import atlasvi
    from atlasvi.infer.write import write_expression

    model_type = atlasvi.SCVI
    out = _scratch(folder)

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas:
            model = model_type.load(folder / "model", atlas)
            genes = list(model.fields.var_names[:n_genes])
            rho = model.expression(genes=None if n_genes is None else genes)
            write_expression(
                rho, atlas.read_names, genes, out, overwrite=True, advance=lambda done, text: None
            )

    return run


def _impute(n: int, folder: Path, setting: Setting) -> Ready:
    import atlasvi
    from atlasvi.infer.write import write_expression

    model_type = atlasvi.SCVI
    out = _scratch(folder)

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas:
            model = model_type.load(folder / "model", atlas)
            genes = list(model.fields.var_names[: setting.some_genes])
            write_expression(
                model.denoised_counts(genes=genes), atlas.read_names, genes, out, overwrite=True,
                advance=lambda done, text: None,
                layers={"technical_zero": model.technical_zeros(genes=genes)},
            )  # fmt: skip

    return run


def _de(n: int, folder: Path, setting: Setting) -> Ready:
    import atlasvi

    model_type = atlasvi.SCVI

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas:
            model = model_type.load(folder / "model", atlas)
            model.differential_expression(
                groupby="cell_type", mode="change", n_samples_overall=1000, silent=True
            )

    return run


def _evaluate(n: int, folder: Path, setting: Setting) -> Ready:
    import atlasvi
    from atlasvi.scorecard import QUICK

    def run() -> None:
        with atlasvi.open(_store(n, folder)) as atlas:
            atlasvi.evaluate(
                folder / "model", atlas, label_key="cell_type", **asdict(QUICK), picture=False,
                memory_budget=setting.stream_budget,
            )  # fmt: skip

    return run


def _load(n: int, folder: Path, setting: Setting) -> Ready:
    import anndata

    def run() -> None:
        anndata.read_zarr(_store(n, folder))

    return run


_STAGES: dict[str, Callable[[int, Path, Setting], Ready]] = {
    "simulate": _simulate, "ingest": _ingest, "shuffle": _shuffle, "train": _train, "latent": _latent,
    "decode": _decode, "decode-all": _decode_all, "impute": _impute, "de": _de, "evaluate": _evaluate,
    "load": _load,
}  # fmt: skip


if __name__ == "__main__":
    main()
