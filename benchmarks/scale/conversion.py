"""From ``.h5ad`` to a shuffled store, atlasvi beside annbatch: ``python -m benchmarks.scale.conversion``.

    benchmarks/peers/annbatch_env.sh .peers/annbatch
    python -m benchmarks.scale.conversion --folder data --peer-python .peers/annbatch/bin/python --markdown

The same simulated files (`benchmarks.scale.inputs`; in the page cache) for both, a fresh process for each
conversion, in turn, timed from after import until all files are synced to the disk. Both shuffle all cells
among one another and compress with Blosc lz4 at one level, after byte shuffle; atlasvi's counts after bit
shuffle. annbatch takes the counts as they are (float32), and once more narrowed on reading to the type that
atlasvi chooses; its genes are uint16, as atlasvi's. atlasvi once with its default budget, 128 MiB, and once
with 1 GB; what it wrote is compared with what is in the files. The stores are left in the folder, for
`benchmarks.streaming`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Worker, machine, table
from benchmarks.scale.answer import answer, peak, size_of
from benchmarks.scale.inputs import Content, inputs

# That of `atlasvi.store.layout.codecs`.
LEVEL = 1
OURS, OURS_1GB = "atlasvi", "atlasvi, 1 GB"
NARROW, AS_IS = "annbatch, narrow counts", "annbatch, float32"
QUIET = ("-W", "ignore", "-m")


@dataclass
class Outcome:
    """Of one way to convert."""

    who: str
    store: Path
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def stores(folder: Path, n_obs: int) -> dict[str, Path]:
    """Where each one's store is."""
    names = {OURS: "atlasvi", OURS_1GB: "atlasvi-1GB", NARROW: "annbatch-narrow", AS_IS: "annbatch-float32"}
    return {who: folder / f"{name}-{n_obs}.zarr" for who, name in names.items()}


def commands(peer_python: str) -> dict[str, list[str]]:
    """Of the process of each side."""
    return {
        OURS: [sys.executable, *QUIET, "benchmarks.scale.conversion", "--serve"],
        "annbatch": [peer_python, *QUIET, "benchmarks.peers.annbatch_side"],
    }


def convert(files: list[str], out: str, **budget: str) -> dict[str, Any]:
    """Ours; `ingest` syncs what it writes."""
    import atlasvi

    shutil.rmtree(out, ignore_errors=True)  # as on the other side, not part of the time
    begun = time.perf_counter()
    atlasvi.ingest(files, out, shuffle=True, **budget)
    return {"seconds": time.perf_counter() - begun, "peak": peak()}


def check(store: Path, content: Content) -> None:
    """See that our store holds the cells of the files."""
    import atlasvi

    with atlasvi.open(store) as atlas:
        edges = [*range(0, atlas.n_obs, 5_000), atlas.n_obs]
        blocks = (atlas.read_rows(slice(*edge)) for edge in pairwise(edges))
        found = sum((Content.of(*block.numpy()) for block in blocks), Content())
    if found != content:
        raise SystemExit(f"{store} holds {found}, the files {content}")


def measure(
    folder: Path, n_obs: int, peer_python: str, repeats: int, names: Sequence[str] | None = None
) -> tuple[list[Outcome], list[Path], Content]:
    """Every conversion, in turn; what each took and made, the inputs and what is in them."""
    files, content = inputs(folder, n_obs)
    for file in files:
        file.read_bytes()  # into the page cache
    narrow = "uint8" if content.largest < 1 << 8 else "uint16" if content.largest < 1 << 16 else "uint32"
    outcomes = [Outcome(who, store) for who, store in stores(folder, n_obs).items()]
    outcomes = [outcome for outcome in outcomes if names is None or outcome.who in names]
    command = commands(peer_python)
    for _ in range(repeats):
        for outcome in outcomes:
            side = outcome.who.split(",")[0]
            request: dict[str, Any] = {"files": [str(file) for file in files], "out": str(outcome.store)}
            if outcome.who == OURS_1GB:
                request["memory_budget"] = "1GB"
            if side != OURS:
                request |= {"level": LEVEL, "dtype": narrow if outcome.who == NARROW else None}
            with Worker(command[side]) as worker:
                found = worker.ask("convert", **request)
            if side == OURS:
                check(outcome.store, content)
            outcome.seconds.append(found["seconds"])
            outcome.peaks.append(found["peak"])
            print(f"{outcome.who}: {found['seconds']:.1f} s, {found['peak'] >> 20:,} MiB", flush=True)
    return outcomes, files, content


def rows(outcomes: list[Outcome], files: list[Path], content: Content) -> list[list[str]]:
    """Cells of the table."""
    h5ad = sum(file.stat().st_size for file in files)
    ours = median(outcomes[0].seconds)
    found = [[f"the {len(files)} .h5ad files (gzip 4)", "", "", "", "", *_sizes(h5ad, h5ad, content)]]
    for outcome in outcomes:
        seconds = median(outcome.seconds)
        found.append([
            outcome.who, f"{seconds:.1f}", f"{content.n_obs / seconds:,.0f}", f"{seconds / ours:.2f}",
            f"{median(outcome.peaks) / 2**20:,.0f}", *_sizes(size_of(outcome.store), h5ad, content),
        ])  # fmt: skip
    return found


def _sizes(n_bytes: int, h5ad: int, content: Content) -> list[str]:
    return [f"{n_bytes / 1e6:,.0f}", f"{n_bytes / content.nnz:.2f}", f"{n_bytes / h5ad:.2f}"]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.conversion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--folder", type=Path, help="for the inputs and the stores, which are left there")
    add("--peer-python", help="Python of benchmarks/peers/annbatch_env.sh")
    add("--cells", type=int, default=100_000)
    add("--repeats", type=int, default=3, help="of each conversion; the median is shown")
    add("--runs", nargs="+", choices=[OURS, OURS_1GB, NARROW, AS_IS], help="only these; atlasvi is first")
    add("--markdown", action="store_true", help="a table for the docs")
    add("--out", type=Path, help="JSON with every time")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        import atlasvi.store.ingest  # noqa: F401  (not to be timed, as the peer's import is not)

        answer({"convert": convert})
        return
    if options.folder is None or options.peer_python is None:
        parser.error("--folder and --peer-python are needed")
    outcomes, files, content = measure(
        options.folder, options.cells, options.peer_python, options.repeats, options.runs
    )
    print(table(["machine", ""], list(machine().items()), markdown=options.markdown, words=2))
    isal = "with" if importlib.util.find_spec("isal") else "without"
    print(f"\n{content.n_obs:,} cells x 10,000 genes, {content.nnz / content.n_obs:,.0f} non-zeros a cell; "
          f"Blosc lz4 at level {LEVEL}; atlasvi {isal} isal\n")  # fmt: skip
    heads = ["conversion", "s", "cells/s", "time x atlasvi", "peak, MiB", "MB", "bytes a non-zero", "x h5ad"]
    print(table(heads, rows(outcomes, files, content), markdown=options.markdown))
    if options.out is not None:
        times = {o.who: {"seconds": o.seconds, "peaks": o.peaks} for o in outcomes}
        options.out.write_text(json.dumps({"machine": machine(), "conversions": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
