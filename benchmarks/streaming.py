"""Minibatches from a store, atlasvi beside annbatch and others: ``python -m benchmarks.streaming``.

    benchmarks/peers/annbatch_env.sh .peers/annbatch
    benchmarks/peers/scvi_tools_env.sh .peers/scvi-tools
    benchmarks/peers/scdataset_env.sh .peers/scdataset
    python -m benchmarks.scale.conversion --folder data --peer-python .peers/annbatch/bin/python
    python -m benchmarks.streaming --folder data --peer-python .peers/annbatch/bin/python --markdown

The stores are those that the conversion left in the folder, made from the same files. Each contender has a
process of its own. They take turns of a few epochs, the first of which does not count. The first epoch of all
is shown apart. All run with a malloc that keeps what is freed: otherwise large buffers are new pages each
time, and on a virtual machine, which hands pages back to its host, these can take longer than the epoch
(annbatch then has 70,000 to 400,000 cells a second, by what ran before it). ``--system-malloc`` leaves that
as it is. The files are read before each turn, since some machines drop what is cached by and by. An epoch
during which other processes had more than 15 % of a core does not count, unless there is no other.
Before any is timed, an epoch of each must have every cell exactly once and the counts of the files, or
nothing is reported. annbatch is taken at the fastest setting of a small grid, which is shown, and with
narrow or float32 counts, whichever is faster.

=============================  =========================================================================
``atlasvi``                    `Atlas.stream` as it comes, and with the budget that annbatch's preload takes
``atlasvi, kept``              `atlasvi.stream.Epochs` with a budget that has room for all counts: after the
                               first epoch, which is shown apart, they are in memory
``annbatch``                   `annbatch.Loader`, random chunks, zarrs, of the store it made
``scDataset``                  `scDataset` with blocks in random order, of atlasvi's store, by AnnData and
                               zarrs, or of the HDF5 files: at the fastest of a small grid of its own
``in memory``                  rows of a scipy matrix in random order, after it was read: not out of core
``scvi-tools, sparse, dense``  its `AnnDataLoader` on the same matrix in memory
``read and decode``            the arrays of atlasvi's store, shard after shard, chunk after chunk into the
                               same place, a thread on each core: nothing kept, checked or shuffled
``copy``                       the same decoded bytes, copied once, a thread on each core
=============================  =========================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import Worker, machine, n_cores, table
from benchmarks.scale.answer import answer, check_and_time, evict, warm
from benchmarks.scale.conversion import AS_IS, NARROW, QUIET, stores
from benchmarks.scale.inputs import Content, inputs

BATCH_SIZES = (512, 4_096)
# That count, of a turn.
EPOCHS = 3
# Share of one core that others may have in an epoch that counts.
_CALM = 0.15
# chunk_size and preload_nchunks of annbatch: its defaults, its README's, and around them.
GRID = ((512, 32), (32, 256), (256, 64), (4_096, 4), (4_096, 8), (512, 128))
# block_size of scDataset, and cells that it fetches at a time.
BLOCKS = ((4_096, 8_192), (4_096, 32_768), (512, 32_768))
PREPARED = ("atlasvi", "annbatch")
BARE = ("read and decode", "copy")
_COPY_BLOCK = 1 << 22
KEPT = "1GB"
# No block of its own for a large array, and nothing given back.
_KEEPING = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


@dataclass
class Contender:
    """One row of the table.

    Args:
        name: as it is shown.
        side: whose process it runs in.
        who: the name that side knows it by.
        setting: passed on to it.
        epochs: from a warm page cache: seconds, seconds of all cores together, and those of other processes.
        first: seconds of the first epoch, of a process that has just begun.
        cold: seconds of an epoch after the system forgot the files.
        disk: bytes that came from the disk then.
        peak: most memory of the process.
    """

    name: str
    side: str
    who: str
    setting: dict[str, Any]
    epochs: list[tuple[float, float, float]] = field(default_factory=list)
    first: float = 0.0
    cold: float = 0.0
    disk: int = 0
    peak: int = 0

    def quiet(self) -> np.ndarray:
        """The epochs in which others had little of the machine; all, if there is none such."""
        epochs = np.array(self.epochs)
        calm = epochs[epochs[:, 2] < _CALM * epochs[:, 0]]
        return calm if len(calm) else epochs

    @property
    def seconds(self) -> float:
        """Of an epoch."""
        return float(median(self.quiet()[:, 0]))


def stream(store: str, batch_size: int, memory_budget: int | None = None) -> Iterator[Any]:
    """An epoch of ours; a new one each time, as training has it."""
    atlas = _open(store)
    _epoch[store] = epoch = _epoch.get(store, -1) + 1
    return atlas.stream(batch_size, epoch=epoch, memory_budget=memory_budget)


def kept(store: str, batch_size: int, memory_budget: str) -> Iterator[Any]:
    """An epoch of ours whose counts the epoch before has left in memory."""
    _epoch[store] = epoch = _epoch.get(store, -1) + 1
    return _epochs(store, batch_size, memory_budget).counts(epoch)


@cache
def _epochs(store: str, batch_size: int, memory_budget: str) -> Any:
    from atlasvi.stream import Epochs

    epochs = Epochs(_open(store), batch_size=batch_size, memory_budget=memory_budget)
    if not epochs.kept:
        raise SystemExit(f"the counts do not fit into half of {memory_budget}")
    return epochs


_epoch: dict[str, int] = {}


@cache
def _open(store: str) -> Any:
    import atlasvi

    return atlasvi.open(store)


def in_memory(store: str, batch_size: int) -> Iterator[Any]:
    """Rows of a scipy matrix."""
    counts = _matrix(store)
    order = np.random.default_rng(0).permutation(counts.shape[0])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield counts[rows], rows


@cache
def _matrix(store: str) -> Any:
    return _open(store).read_rows(slice(None)).to_scipy()


def read_and_decode(store: str, batch_size: int) -> Iterator[Any]:
    """The two long arrays, a shard at a time, each chunk into the same place: the least that can be done."""
    del batch_size
    arrays, n_obs = _arrays(store)
    shards = [(array, path) for array in arrays for path in (Path(store) / array.path / "c").iterdir()]
    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(_decode_shard, *zip(*shards, strict=True)))
    yield None, range(n_obs)


def _decode_shard(array: Any, path: Path) -> None:
    from numcodecs import blosc

    shard, per_shard = memoryview(path.read_bytes()), array.shards[0] // array.chunks[0]
    # Offset and length of each chunk, then a checksum.
    index = np.frombuffer(shard[-16 * per_shard - 4 : -4], "<u8").reshape(per_shard, 2)
    out = np.empty(array.chunks[0], array.dtype)
    for offset, length in index[index[:, 0] < len(shard)].tolist():
        blosc.decompress(shard[offset : offset + length - 4], out)


@cache
def _arrays(store: str) -> Any:
    import zarr

    group = zarr.open_group(store, mode="r")
    return (group["X/indices"], group["X/data"]), group["X/indptr"].shape[0] - 1


def copy(store: str, batch_size: int) -> Iterator[Any]:
    """As many bytes as those arrays have when they are decoded, from and to memory that is there already."""
    del batch_size
    source, target = _buffers(store)
    with ThreadPoolExecutor(n_cores()) as pool:
        pieces = [slice(start, start + _COPY_BLOCK) for start in range(0, len(source), _COPY_BLOCK)]
        list(pool.map(lambda piece: np.copyto(target[piece], source[piece]), pieces))
    yield None, range(_arrays(store)[1])


@cache
def _buffers(store: str) -> tuple[np.ndarray, np.ndarray]:
    n_bytes = sum(array.shape[0] * array.dtype.itemsize for array in _arrays(store)[0])
    return np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)


def serve() -> None:
    """Answer as our side."""
    import scipy.sparse as sp

    def arrays(counts: Any) -> Any:
        return (counts.indptr, counts.indices, counts.data) if sp.issparse(counts) else counts.numpy()

    epochs = {
        "atlasvi": stream,
        "atlasvi, kept": kept,
        "in memory": in_memory,
        "read and decode": read_and_decode,
        "copy": copy,
    }
    answer(check_and_time(epochs, arrays))


@dataclass
class Bench:
    """Takes the times.

    Args:
        folder: with the inputs and stores.
        n_obs: cells.
        commands: of the process of each side.
        repeats: turns.
        cold: whether to have epochs from the disk too.
        grid: settings of annbatch.
        names: of contenders; all when ``None``.
    """

    folder: Path
    n_obs: int
    commands: dict[str, list[str]]
    repeats: int
    cold: bool
    grid: tuple[tuple[int, int], ...]
    names: list[str] | None = None

    def __post_init__(self) -> None:
        self.content = inputs(self.folder, self.n_obs)[1]
        self.stores = stores(self.folder, self.n_obs)

    def measure(self, batch_size: int) -> list[Contender]:
        """All contenders at one size of minibatch."""
        contenders = self.contenders(batch_size)
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(self.commands[c.side])) for c in contenders]
            pairs = list(zip(contenders, workers, strict=True))
            for contender, worker in pairs:
                warm(Path(contender.setting["store"]))
                contender.first = self._epoch(contender, worker)["seconds"]
                if contender.who not in BARE:
                    self._check(contender, worker)
            for _ in range(self.repeats):
                for contender, worker in pairs:
                    warm(Path(contender.setting["store"]))
                    self._epoch(contender, worker)
                    for _ in range(EPOCHS):
                        found = self._epoch(contender, worker)
                        contender.epochs.append((found["seconds"], found["cpu"], found["others"]))
            for contender, worker in pairs:
                contender.peak = worker.ask("peak")
                if self.cold and contender.who not in ("in memory", "scvi-tools", "copy"):
                    self._epoch(contender, worker)
                    evict(Path(contender.setting["store"]))
                    found = self._epoch(contender, worker)
                    contender.cold, contender.disk = found["seconds"], int(found["disk"])
        return contenders

    def contenders(self, batch_size: int) -> list[Contender]:
        """Those that there are."""
        ours = {"store": str(self.stores["atlasvi"]), "batch_size": batch_size}
        found = [Contender("atlasvi", "ours", "atlasvi", ours)]
        if "annbatch" in self.commands:
            best = self.best(batch_size)
            rows = best.setting["chunk_size"] * best.setting["preload_nchunks"]
            # What its buffer holds: uint16 genes, and counts of one byte or float32.
            entry = 3 if best.setting["store"] == str(self.stores[NARROW]) else 6
            budget = round(rows * self.content.nnz / self.content.n_obs * entry)
            more = {**ours, "memory_budget": budget}
            found += [Contender(f"atlasvi, {budget / 2**20:,.0f} MiB", "ours", "atlasvi", more), best]
        if "scDataset" in self.commands:
            found.append(self.best_blocks(batch_size))
        more = {**ours, "memory_budget": KEPT}
        found.append(Contender(f"atlasvi, kept in {KEPT}", "ours", "atlasvi, kept", more))
        found.append(Contender("in memory", "ours", "in memory", ours))
        if "scvi-tools" in self.commands:
            for form in ("sparse", "dense"):
                name, setting = f"scvi-tools, {form}", {**ours, "sparse": form == "sparse"}
                found.append(Contender(name, "scvi-tools", "scvi-tools", setting))
        found += [Contender(name, "ours", name, ours) for name in BARE]
        return [c for c in found if self.names is None or c.name.split(",")[0] in self.names]

    def best(self, batch_size: int) -> Contender:
        """annbatch at its fastest: the grid with narrow counts, then float32 at the best of it."""
        with Worker(self.commands["annbatch"]) as worker:
            tried = [self._try(worker, NARROW, batch_size, *sizes) for sizes in self.grid]
            sizes = min(tried, key=lambda found: found[0])[1:3]
            tried.append(self._try(worker, AS_IS, batch_size, *sizes))
        return min(tried, key=lambda found: found[0])[3]

    def best_blocks(self, batch_size: int) -> Contender:
        """scDataset at its fastest, of our store or of the files."""
        stores = {"our store": str(self.stores["atlasvi"]), "h5ad": str(self.folder / f"inputs-{self.n_obs}")}
        trials = [
            Contender(
                f"scDataset, {where}, blocks of {block:,}, {fetch:,} at a time", "scDataset", "scDataset",
                {
                    "store": store, "batch_size": batch_size, "block_size": block,
                    "fetch_factor": fetch // batch_size,
                },
            )
            for where, store in stores.items()
            for block, fetch in BLOCKS
        ]  # fmt: skip
        with Worker(self.commands["scDataset"]) as worker:
            return min(trials, key=lambda trial: self._time(trial, worker))

    def _try(
        self, worker: Worker, who: str, batch_size: int, chunk_size: int, preload_nchunks: int
    ) -> tuple[float, int, int, Contender]:
        setting = {
            "store": str(self.stores[who]), "batch_size": batch_size, "chunk_size": chunk_size,
            "preload_nchunks": preload_nchunks,
        }  # fmt: skip
        trial = Contender(f"{who}, {preload_nchunks} x {chunk_size}", "annbatch", "annbatch", setting)
        return self._time(trial, worker), chunk_size, preload_nchunks, trial

    def _time(self, trial: Contender, worker: Worker) -> float:
        warm(Path(trial.setting["store"]))
        # Of the last two: the first opens the store.
        seconds = min([self._epoch(trial, worker)["seconds"] for _ in range(3)][1:])
        name = f"{trial.setting['batch_size']}: {trial.name}"
        print(f"  {name}: {self.n_obs / seconds:,.0f} cells/s", flush=True)
        return seconds

    def _epoch(self, contender: Contender, worker: Worker) -> dict[str, float]:
        found = worker.ask("epoch", who=contender.who, setting=contender.setting)
        if found["cells"] != self.n_obs:
            sys.exit(f"{contender.name} had {found['cells']} of {self.n_obs} cells; no speed is reported")
        return dict(found)

    def _check(self, contender: Contender, worker: Worker) -> None:
        found = worker.ask("check", who=contender.who, setting=contender.setting)
        if not found["once"] or Content(**found["content"]) != self.content:
            sys.exit(
                f"{contender.name} had {found} where the files have {self.content}; no speed is reported"
            )


def lines(contenders: list[Contender], n_obs: int) -> list[list[str]]:
    """Cells of the table at one size of minibatch."""
    theirs = [c.seconds for c in contenders if c.side == "annbatch"]
    bare = {c.who: c.seconds for c in contenders if c.who in BARE}
    out = []
    for c in contenders:
        seconds, cpu, _ = c.quiet().T
        cells = [f"{c.setting['batch_size']:,}", c.name, f"{n_obs / c.seconds / 1e3:,.0f}"]
        cells.append(f"{n_obs / max(seconds) / 1e3:,.0f} to {n_obs / min(seconds) / 1e3:,.0f}")
        cells.append(f"{len(seconds)} of {len(c.epochs)}")
        cells.append(f"{theirs[0] / c.seconds:.2f}" if theirs else "")
        cells += [f"{bare[who] / c.seconds:.0%}" if who in bare else "" for who in BARE]
        cells += [f"{median(cpu):.2f}", f"{n_obs / c.first / 1e3:,.0f}"]
        cells += [f"{n_obs / c.cold / 1e3:,.0f}", f"{c.disk / 1e6:,.0f}"] if c.cold else ["", ""]
        out.append([*cells, f"{c.peak / 2**20:,.0f}"])
    return out


HEADS = (
    "minibatch", "run", "thousand cells/s", "least to most", "quiet epochs", "x annbatch",
    "of read and decode", "of copy", "CPU s", "first epoch", "cold", "MB from disk", "peak, MiB",
)  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--folder", type=Path, help="with the stores of benchmarks.scale.conversion")
    add("--peer-python", help="Python of benchmarks/peers/annbatch_env.sh; without it, no annbatch")
    add("--scvi-python", help="Python of benchmarks/peers/scvi_tools_env.sh; without it, no scvi-tools")
    add("--scdataset-python", help="Python of benchmarks/peers/scdataset_env.sh; without it, no scDataset")
    add("--cells", type=int, default=100_000)
    add("--batch-size", type=int, nargs="+", default=BATCH_SIZES)
    add("--repeats", type=int, default=3,
        help=f"turns, of {EPOCHS} epochs that count each; the median of all is shown")  # fmt: skip
    add("--runs", nargs="+", metavar="RUN", help="only these, by the word before a comma, such as atlasvi")
    add("--peer-setting", type=int, nargs=2, metavar=("CHUNK_SIZE", "PRELOAD_NCHUNKS"),
        help="of annbatch, in place of the grid")  # fmt: skip
    add("--no-cold", action="store_true", help="leave out the epochs from the disk")
    add("--system-malloc", action="store_true", help="with the system's settings of malloc")
    add("--markdown", action="store_true", help="a table for the docs")
    add("--out", type=Path, help="JSON with every time")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.folder is None:
        parser.error("--folder is needed")
    if not options.system_malloc:
        os.environ.update(_KEEPING)
    commands = {"ours": [sys.executable, *QUIET, "benchmarks.streaming", "--serve"]}
    if options.peer_python:
        commands["annbatch"] = [options.peer_python, *QUIET, "benchmarks.peers.annbatch_side"]
    if options.scvi_python:
        commands["scvi-tools"] = [options.scvi_python, *QUIET, "benchmarks.peers.scvi_tools_loader"]
    if options.scdataset_python:
        commands["scDataset"] = [options.scdataset_python, *QUIET, "benchmarks.peers.scdataset_side"]
    grid = (tuple(options.peer_setting),) if options.peer_setting else GRID
    bench = Bench(
        options.folder, options.cells, commands, options.repeats, not options.no_cold, grid, options.runs
    )
    about = machine() | _peers(commands)
    print(table(["machine", ""], list(about.items()), markdown=options.markdown, words=2), flush=True)
    found: list[Contender] = []
    for batch_size in options.batch_size:
        found += bench.measure(batch_size)
        some = [c for c in found if c.setting["batch_size"] == batch_size]
        print("\n" + table(HEADS, lines(some, options.cells), markdown=options.markdown, words=2), flush=True)
    if options.out is not None:
        content = {"machine": about, "contenders": [asdict(c) for c in found]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


def _peers(commands: dict[str, list[str]]) -> dict[str, str]:
    packages = {
        "annbatch": ["annbatch", "anndata", "zarr", "zarrs", "scipy"],
        "scvi-tools": ["scvi-tools", "torch"],
        "scDataset": ["scDataset", "anndata", "zarr", "zarrs", "torch"],
    }
    about = {}
    for side in packages.keys() & commands.keys():
        with Worker(commands[side]) as worker:
            found = worker.ask("about", packages=packages[side])
        about[side] = ", ".join(f"{name} {version}" for name, version in found.items())
    return about


if __name__ == "__main__":
    main()
