"""Memory of an epoch against the number of cells; budgets as ceilings: `python -m benchmarks.scale.epochs`.

A store of 100,000 cells is made whose entries fill their shards exactly. Larger stores are that one many
times: their shards are links to its shards, so that ten million cells take the disk of 100,000 and a few
bytes a cell. Streaming does not know.

Every measurement is a process of its own: it imports, opens a tiny store and goes through it so that compiled
code is loaded, opens the store, and then goes through epochs while a thread samples its anonymous memory.
What is reported is the peak above the level just before the store was opened; what opening itself took stands
beside it. With a budget, the process may take no more than the budget above its level once the store is open
(``RLIMIT_DATA``, a hard limit of the system), and ends if it asks for more.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.scale.memory import REFUSED, hard_limit

BASE = 100_000
GENES = 2_000
# Of the narrowest types: what ingest writes for counts below 256 and fewer than 65,536 genes.
_SHARD = 32 << 16
_SHARDS = 20
_PIECE = 1 << 20
_MIB = 1 << 20


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.epochs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--budget", nargs="+", default=["64MB"], help="of the runs that are only measured")
    parser.add_argument("--ceiling", nargs="*", default=["500MB", "1GB", "4GB"], help="held by a hard limit")
    parser.add_argument("--ceiling-cells", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the stores; by default temporary, and removed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(Path(options.one), options)))
        return
    with tempfile.TemporaryDirectory(prefix="atlasvi-epochs-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _measure(folder, options)


def _measure(folder: Path, options: argparse.Namespace) -> None:
    rows, first = [], {}
    for budget in options.budget:
        for n in options.cells:
            runs = [_run(_store(folder, n), budget, options, limit=False) for _ in range(options.repeats)]
            peak = median(run["peak"] for run in runs)
            base = first.setdefault(budget, (n, peak))
            a_cell = f"{(peak - base[1]) / (n - base[0]):.1f}" if n > base[0] else ""
            opened, rate = (median(run[key] for run in runs) for key in ("open", "rate"))
            rows.append([
                f"{n:,}", budget, f"{opened / _MIB:.1f}", f"{peak / _MIB:.1f}",
                f"{peak / base[1] - 1:+.1%}", a_cell, f"{rate / 1e3:,.0f}",
            ])  # fmt: skip
            print(*rows[-1], sep=" | ", flush=True)
    print(
        table(
            ("cells", "budget", "opened, MiB", "peak, MiB", "more by", "bytes a cell", "k cells/s"),
            rows,
            markdown=True,
        )
    )
    rows = []
    for budget in options.ceiling:
        run = _run(_store(folder, options.ceiling_cells), budget, options, limit=True)
        rows.append([f"{options.ceiling_cells:,}", budget, *(
            (f"{run['above'] / _MIB:.1f}", "yes" if run["kept"] else "no", f"{run['rate'] / 1e3:,.0f}")
            if run else ("refused", "", "")
        )])  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    if rows:
        print(
            table(
                ("cells", "budget and limit", "peak, MiB", "kept in memory", "k cells/s"), rows, markdown=True
            )
        )


def _run(store: Path, budget: str, options: argparse.Namespace, *, limit: bool) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.scale.epochs", "--one", str(store), "--budget", budget,
        "--batch-size", str(options.batch_size), "--workers", str(options.workers),
        *(["--limit"] if limit else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == REFUSED:
        return {}
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The body of that process."""
    import atlasvi
    from atlasvi.memory import Watch, anonymous_bytes, give_back
    from atlasvi.stream import Epochs

    def epoch(path: Path, epochs: int) -> Any:
        with atlasvi.open(path) as atlas:
            opened = anonymous_bytes()
            if path == store and atlas.n_obs != int(store.stem):
                raise SystemExit(f"{store} has {atlas.n_obs} cells")
            if options.limit and path == store:
                hard_limit(atlasvi.stream.as_budget(options.budget[0]))
            stream = Epochs(
                atlas, batch_size=options.batch_size, num_workers=options.workers,
                memory_budget=options.budget[0], keep=options.limit,
            )  # fmt: skip
            started = time.perf_counter()
            n = sum(len(rows) for k in range(epochs) for _, rows in stream.counts(k))
            return opened, n / (time.perf_counter() - started), stream.is_kept

    epoch(store.parent / "tiny.zarr", 1)
    gc.collect()
    give_back()
    # Few cells are gone through as often as it takes to find the peak.
    epochs = 2 if options.limit else max(1, 1_000_000 // int(store.stem))
    try:
        with Watch(interval=0.002) as watch:
            opened, rate, kept = epoch(store, epochs)
    except MemoryError:
        sys.exit(REFUSED)
    return {
        "open": opened - watch.before_bytes, "peak": watch.peak_bytes - watch.before_bytes,
        "above": watch.peak_bytes - opened, "rate": rate, "kept": kept,
    }  # fmt: skip


def _store(folder: Path, n: int) -> Path:
    """The store of ``n`` cells, made if it is not there."""
    base, path = folder / f"{BASE}.zarr", folder / f"{n}.zarr"
    if not base.is_dir():
        _make_base(base)
        _make_tiny(folder / "tiny.zarr")
    if n % BASE:
        raise SystemExit(f"--cells {n} must be a multiple of {BASE}")
    if not path.is_dir():
        making = folder / f"{n}.making"
        shutil.rmtree(making, ignore_errors=True)
        _repeat(base, making, n // BASE)
        making.rename(path)
    return path


def _matrix(n: int, nnz: int) -> Any:
    """``n`` cells with ``nnz`` entries in all, which repeat every thousand cells."""
    import scipy.sparse as sp

    random = np.random.default_rng(0)
    each = np.full(n, nnz // n)
    each[: nnz - each.sum()] += 1
    indptr = np.concatenate([[0], np.cumsum(each)])
    kinds = np.sort(
        random.permuted(np.tile(np.arange(GENES, dtype=np.int32), (1_000, 1)), axis=1)[:, : each.max()]
    )
    # Of the longer kind all; of the shorter all but the last.
    indices = np.concatenate([kinds[i % 1_000, :k] for i, k in enumerate(each)])
    data = (1 + random.poisson(0.7, nnz)).astype(np.float32)
    return sp.csr_matrix((data, indices, indptr), shape=(n, GENES))


def _make_base(path: Path) -> None:
    import anndata

    import atlasvi

    atlasvi.ingest(anndata.AnnData(_matrix(BASE, _SHARDS * _SHARD)), path)
    if len(list((path / "X" / "data" / "c").iterdir())) != _SHARDS:
        raise SystemExit(f"{path}: the entries no longer fill {_SHARDS} shards; see atlasvi.store.layout")


def _make_tiny(path: Path) -> None:
    import anndata

    import atlasvi

    atlasvi.ingest(anndata.AnnData(_matrix(2_000, 800_000)), path)


def _repeat(base: Path, path: Path, times: int) -> None:
    """A store of ``base`` so many times."""
    import zarr

    shutil.copytree(
        base, path, ignore=lambda folder, names: ["c"] if Path(folder).parent == base / "X" else []
    )
    shutil.rmtree(path / "obs")
    (path / "obs").mkdir()
    _edit(
        base / "obs" / "zarr.json",
        path / "obs" / "zarr.json",
        lambda j: j["attributes"].update({"column-order": []}),
    )
    _edit(
        path / "X" / "zarr.json",
        path / "X" / "zarr.json",
        lambda j: j["attributes"].update(shape=[BASE * times, GENES]),
    )
    for key in ("indices", "data"):
        of, to = base / "X" / key, path / "X" / key
        (to / "c").mkdir()
        n_shards = len(list((of / "c").iterdir()))
        for k in range(n_shards * times):
            os.link(of / "c" / str(k % n_shards), to / "c" / str(k))
        _edit(of / "zarr.json", to / "zarr.json", lambda j: j.update(shape=[j["shape"][0] * times]))
    indptr = zarr.open_array(base / "X" / "indptr", mode="r")[:]
    long = np.concatenate([[0], *((indptr[1:] + k * indptr[-1]) for k in range(times))])
    _write(base / "X" / "indptr", path / "X" / "indptr", long)
    names = np.array([f"cell-{i}" for i in range(BASE * times)], dtype=np.dtypes.StringDType())
    _write(base / "obs" / "_index", path / "obs" / "_index", names)
    # What the store says of its arrays in one place is still that of the base.
    _edit(path / "zarr.json", path / "zarr.json", lambda j: j.pop("consolidated_metadata", None))
    zarr.consolidate_metadata(path)


def _write(of: Path, to: Path, values: Any) -> None:
    import zarr

    to.mkdir(exist_ok=True)
    _edit(of / "zarr.json", to / "zarr.json", lambda j: j.update(shape=[len(values)]))
    array = zarr.open_array(to, mode="r+")
    for start in range(0, len(values), _PIECE):
        array[start : start + _PIECE] = values[start : start + _PIECE]


def _edit(of: Path, to: Path, change: Any) -> None:
    metadata = json.loads(of.read_text())
    change(metadata)
    to.write_text(json.dumps(metadata))


if __name__ == "__main__":
    main()
