"""Cost as it grows (the paper's Figure 2a): seconds and memory against cells and against genes.

    python -m benchmarks.paper cost --scvi-tools ... --classic ... [--limit 3600] [--largest 1000000]

Simulated counts. Each size and method is a process of its own, which reads the counts, trains, and gives
latents of all cells. A method that runs out of memory or of time stops there, and the row says so; larger
sizes are then not tried. Methods run in turn on one size before the next: give this a machine with nothing
else to do.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from atlasvi import Simulation, ingest
from atlasvi.plots import Line, as_file, line_chart, palette
from benchmarks.paper.options import Options
from benchmarks.paper.record import Record, Row
from benchmarks.paper.tables import number, table

METHODS = ("atlasvi", "scvi-tools", "atlasvi PCA", "scanpy PCA", "scikit-learn FA")
CELLS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
GENES = (1_000, 3_000, 10_000, 30_000)
AT_GENES, AT_CELLS = 2_000, 10_000
COUNTS_PER_GENE = 0.3
# Of the machine's memory, above which a method counts as stopped; the system needs some.
SHARE = 0.85
DEFINITIONS = {
    "seconds": "of the second epoch (variational) or of the whole fit (linear)",
    "latent_seconds": "of giving latents of all cells",
    "all_seconds": "of all, with reading and imports",
    "peak_mib": "peak resident memory of the process, imports included; 0 where it was not finished",
    "stopped": "why a method did not finish",
    "load": "the machine's mean load in the row's last minute: more than cores is a shared machine",
}


def sizes(largest: int) -> list[tuple[str, int, int]]:
    """Axis, cells, genes; none with more entries than ``largest`` cells of 2,000 genes."""
    found = [("cells", n, AT_GENES) for n in CELLS] + [("genes", AT_CELLS, n) for n in GENES]
    return [(axis, n, g) for axis, n, g in found if n * g <= largest * AT_GENES]


def run(options: Options) -> None:
    """Make the rows that are not there yet."""
    record = Record(options.results / "cost.json", DEFINITIONS)
    methods = options.methods or (METHODS[:1] if options.quick else METHODS)
    for axis, n_obs, n_vars in [("cells", 300, 100)] if options.quick else sizes(options.largest):
        keys = [{"axis": axis, "n_obs": n_obs, "n_vars": n_vars, "method": method} for method in methods]
        keys = [key for key in keys if not record.has(**key) and _python(options, key["method"])]
        smaller = {m: [r for r in record.where(axis=axis, method=m) if r["stopped"]] for m in methods}
        keys = [key for key in keys if not smaller[key["method"]]]
        if not keys:
            continue
        with tempfile.TemporaryDirectory(dir=options.work if options.work.is_dir() else None) as folder:
            needs = {"store" if key["method"].startswith("atlasvi") else "h5ad" for key in keys}
            inputs = simulate(Path(folder), n_obs, n_vars, needs, here=options.quick)
            for key in keys:
                record.add({**key, **measure(key["method"], inputs, Path(folder), options)})
                print(record.rows[-1], flush=True)


def simulate(
    folder: Path, n_obs: int, n_vars: int, needs: set[str], *, here: bool = False
) -> dict[str, Path]:
    """The same counts as a store and as h5ad; unless ``here``, by a process whose memory is given back."""
    found = {kind: folder / f"counts.{'zarr' if kind == 'store' else kind}" for kind in sorted(needs)}
    for kind, path in found.items():
        if here:
            write_counts(n_obs, n_vars, kind, path)
        else:
            code = (
                "import sys; from benchmarks.paper.cost import write_counts\n"
                "n_obs, n_vars, kind, path = sys.argv[1:]\n"
                "write_counts(int(n_obs), int(n_vars), kind, path)"
            )
            subprocess.run([sys.executable, "-c", code, str(n_obs), str(n_vars), kind, path], check=True)
    return found


def write_counts(n_obs: int, n_vars: int, kind: str, path: str | Path) -> None:
    """A simulated atlas as ``"store"``, streamed, or as ``"h5ad"``, which makes it in memory."""
    types = max(2, min(8, n_vars // 50))
    atlas = Simulation(n_obs, n_vars, counts_per_cell=COUNTS_PER_GENE * n_vars, n_types=types)
    if kind == "store":
        ingest(atlas, path)
    else:
        atlas.to_anndata().write_h5ad(path)


def measure(method: str, inputs: dict[str, Path], folder: Path, options: Options) -> Row:
    """One row: what the side printed, or why it stopped."""
    counts = inputs["store" if method.startswith("atlasvi") else "h5ad"]
    python = _python(options, method)
    assert python is not None
    most = int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    command = [
        python,
        "-W",
        "ignore",
        "-m",
        "benchmarks.paper.sides.growing",
        method,
        counts,
        folder / "z.npy",
    ]
    start = time.perf_counter()
    nothing = {"seconds": 0.0, "latent_seconds": 0.0, "all_seconds": 0.0, "peak_mib": 0.0}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=options.limit,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
        )
    except subprocess.TimeoutExpired:
        return {**nothing, "stopped": f"not done after {options.limit:,.0f} s", "load": os.getloadavg()[0]}
    if done.returncode:
        text = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        out_of_memory = "MemoryError" in done.stderr or "allocate" in done.stderr or done.returncode == -9
        if not out_of_memory:
            raise RuntimeError(
                f"{method} failed after {time.perf_counter() - start:.0f} s: {done.stderr[-2000:]}"
            )
        said = text[0].rpartition("Error: ")[2][:40]
        return {**nothing, "stopped": f"out of memory: {said}", "load": os.getloadavg()[0]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return {**{k: round(v, 3) for k, v in found.items()}, "stopped": "", "load": os.getloadavg()[0]}


def _python(options: Options, method: str) -> str | None:
    if method.startswith("atlasvi"):
        return sys.executable
    return options.pythons.scvi_tools if method == "scvi-tools" else options.pythons.classic


def tables(record: Record) -> dict[str, str]:
    """Markdown."""
    return {axis: _table(record, axis) for axis in ("cells", "genes")}


def _table(record: Record, axis: str) -> str:
    rows = record.where(axis=axis)
    if not rows:
        return "Not run yet: it wants a machine with nothing else to do."
    lines = []
    for n_obs, n_vars in dict.fromkeys((row["n_obs"], row["n_vars"]) for row in rows):
        for row in record.where(axis=axis, n_obs=n_obs, n_vars=n_vars):
            head = [f"{n_obs:,} x {n_vars:,}", row["method"]]
            if row["stopped"]:
                lines.append([*head, row["stopped"], "", "", ""])
            else:
                per_cell = 1e6 * row["seconds"] / n_obs
                cells = [number(row["seconds"]), f"{per_cell:,.0f}", number(row["latent_seconds"])]
                lines.append([*head, *cells, f"{row['peak_mib']:,.0f}"])
    return table(("cells x genes", "method", "seconds", "us a cell", "latents, seconds", "peak, MiB"), lines)


def pictures(record: Record) -> dict[str, str]:
    """SVG files: memory and time against cells."""
    found = {}
    for what, label in (("peak_mib", "peak memory, MiB"), ("seconds", "seconds an epoch, or a fit")):
        for axis, size in (("cells", "n_obs"), ("genes", "n_vars")):
            lines = _lines(record, axis, size, what)
            if lines:
                svg = line_chart(
                    lines, x_label=f"thousand {axis}", y_label=label, width=720,
                    alt=f"{label} against {axis}, by method",
                )  # fmt: skip
                found[f"evidence-cost-{axis}-{'memory' if what == 'peak_mib' else 'time'}.svg"] = as_file(svg)
    return found


def _lines(record: Record, axis: str, size: str, what: str) -> Sequence[Line]:
    found = []
    for method, colour in zip(METHODS, palette(METHODS), strict=True):
        rows = sorted(
            (row for row in record.where(axis=axis, method=method) if not row["stopped"]),
            key=lambda r: r[size],
        )
        if rows:
            found.append(
                Line(method, [row[size] / 1000 for row in rows], [row[what] for row in rows], colour)
            )
    return found
