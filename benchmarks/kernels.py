"""The operations of `atlasvi_kernels` beside scvi-tools and plain torch: ``python -m benchmarks.kernels``.

    benchmarks/peers/scvi_tools_env.sh .peers/scvi-tools
    python -m benchmarks.kernels --peer-python .peers/scvi-tools/bin/python --markdown

Each contender computes the same case, forward and the gradient of all inputs, from one file of numbers; ours
and the peer's take turns, a process each, with a thread on every core. Library sizes are data, as in scVI:
the peer spends no time on their gradient. Before anything is timed, the result and every gradient of ours are
held against the peer's in float64 or, where it has none, our reference in float64; if one is off, the command
ends there and prints no speed.

What is printed: the median time; ns for each entry of the cells x genes matrix; how many times as fast as
each baseline; how much of that time the bytes that must be moved take at the measured copy bandwidth; the
most memory held beyond the inputs, in a fresh process, and of that what is no returned gradient, in float32
matrices of cells x genes; the largest relative error. Only first calls of a process have compiling in them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import scipy.sparse
import torch
import torch.nn.functional as F
from scipy.special import expit, logsumexp, ndtri, softmax

import atlasvi_kernels
from benchmarks.common import (
    COUNTS,
    Arrays,
    Case,
    Run,
    Setup,
    Worker,
    copy_bandwidth,
    dense_counts,
    in_turn,
    machine,
    serve,
    table,
    tensors,
)

LIKELIHOOD, LINEAR, CSR_LINEAR = "count_log_likelihood", "linear_count_log_likelihood", "csr_linear"
MAIN = Case(512, 20_000, 0.05)
CASES = {
    "main": MAIN,
    "mean": replace(MAIN, loss="mean"),
    "exp": replace(MAIN, mean="exp"),
    "nb": replace(MAIN, likelihood="nb"),
    "poisson": replace(MAIN, likelihood="poisson"),
    "zip": replace(MAIN, likelihood="zip"),
    "small": Case(128, 2_000, 0.12),
    "medium": Case(128, 10_000, 0.12),
    "sparse": Case(1_024, 20_000, 0.02),
    "large": Case(4_096, 20_000, 0.05),
    "csr-small": Case(128, 10_000, 0.12, op=CSR_LINEAR),
    "csr-main": Case(512, 20_000, 0.05, op=CSR_LINEAR),
    "csr-sparse": Case(1_024, 20_000, 0.02, op=CSR_LINEAR),
    **{
        f"linear-{n}-{g // 1_000}k{'-bf16' * bf16}": Case(n, g, 0.05, op=LINEAR, bf16=bf16)
        for g in (20_000, 60_000)
        for n in (512, 1_024, 4_096)
        for bf16 in (False, True)
    },
}
FIRST_CALL = "first-call"
OPTIONAL = ("large",)
PEER = {
    LIKELIHOOD: ("eager", "formula", "compile", "compile autotuned"),
    LINEAR: ("eager", "compile"),
    CSR_LINEAR: (),
}
PEER_LIKELIHOODS = ("poisson", "nb", "zinb")
OURS = ("numba", "triton")  # what must be right; plain torch in float32 or bfloat16 only says its error
# What a ratio is against: the fastest of these.
BASELINES = {
    LIKELIHOOD: {"eager": ("eager",), "compile": ("compile", "compile autotuned")},
    LINEAR: {"layers": ("layers", "layers inplace"), "eager": ("eager",), "compile": ("compile",)},
    CSR_LINEAR: {"dense": ("dense",), "sparse": ("sparse",)},
}
# Cells x genes float32 matrices that one holds at its peak, about: what would not fit is not run, and said.
MATRICES = {"eager": 22, "formula": 20, "reference": 18}
OTHERS_HOLD = 8


def inputs(case: Case) -> Arrays:
    """Gamma-Poisson counts of log-normal genes as CSR, and the parameters they were drawn from.

    Logits are hidden units times weights, as a decoder makes them. The sequencing depth is what gives the
    density asked for.
    """
    rng = np.random.default_rng(case.seed)
    n, g, h = case.n_obs, case.n_vars, case.n_hidden

    def normal(mean: float, deviation: float, *shape: int) -> np.ndarray:
        return np.float32(mean) + np.float32(deviation) * rng.standard_normal(shape, np.float32)

    hidden = np.maximum(normal(0, 1, n, h), 0)
    weight, pi_weight = normal(0, h**-0.5, g, h), normal(0, h**-0.5, g, h)
    bias, pi_bias, px_r = normal(0, 1.5, g), normal(-1.5, 0.5, g), normal(0.5, 0.7, g)
    bias -= logsumexp(bias)
    theta = np.exp(px_r)
    # The same spread of depths in any 64 cells, from which the density is set.
    depth = np.exp(0.4 * ndtri((np.arange(n)[:, None] % 64 + 0.5) / 64)).astype(np.float32)

    def share_and_kept(cells: slice) -> tuple[np.ndarray, np.ndarray]:
        dropped = expit(hidden[cells] @ pi_weight.T + pi_bias) if case.inflated else np.zeros(1, np.float32)
        return depth[cells] * softmax(hidden[cells] @ weight.T + bias, axis=1), 1 - dropped

    share, kept = share_and_kept(slice(64))
    low, high = 0.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        density = (kept * (1 - (1 + np.exp(middle) * share / theta) ** -theta)).mean()
        low, high = (middle, high) if density < case.density else (low, middle)
    blocks = []
    for start in range(0, n, 256):
        share, kept = share_and_kept(slice(start, start + 256))
        x = rng.poisson(rng.gamma(theta, np.exp(low) * share / theta)) * (rng.random(share.shape) < kept)
        blocks.append(scipy.sparse.csr_matrix(x, dtype=np.float32))
    counts = scipy.sparse.vstack(blocks, format="csr")
    found = {"indptr": counts.indptr.astype(np.int64), "indices": counts.indices, "data": counts.data}
    if case.op == CSR_LINEAR:
        return found | {"hidden": hidden, "weight": weight, "bias": bias[:h]}
    # Not the counts' own sum, at which a Poisson's gradient is zero.
    found["library"] = np.float32(np.exp(low)) * depth[:, 0]
    if case.op == LIKELIHOOD:
        found["logits"] = hidden @ weight.T + bias
        found |= {"pi_logits": hidden @ pi_weight.T + pi_bias} if case.inflated else {}
    else:
        found |= {"hidden": hidden, "weight": weight, "bias": bias}
        found |= {"pi_weight": pi_weight, "pi_bias": pi_bias} if case.inflated else {}
    return found | ({"px_r": px_r} if case.likelihood in ("nb", "zinb") else {})


def _counts(case: Case, arrays: Arrays) -> atlasvi_kernels.CSR:
    return atlasvi_kernels.CSR.from_numpy(*(arrays[name] for name in COUNTS), case.n_vars).to(case.device)


def likelihood(backend: str, *, inplace: bool = False, dtype: torch.dtype = torch.float32) -> Setup:
    """`count_log_likelihood` of given logits, or of those that linear layers make of given hidden units.

    With ``inplace`` all that a caller can say is said: that logits may be overwritten, and what upstream
    gradient will come.
    """

    def setup(case: Case, arrays: Arrays) -> Run:
        counts = _counts(case, arrays)

        def of_logits(logits, library, px_r=None, pi_logits=None):  # type: ignore[no-untyped-def]
            return atlasvi_kernels.count_log_likelihood(
                counts, logits, library, None if px_r is None else px_r.exp(), pi_logits=pi_logits,
                likelihood=case.likelihood, mean=case.mean, backend=backend, inplace=inplace,
                upstream=1 / case.n_obs if inplace and case.loss == "mean" else 1.0,
            )  # fmt: skip

        def of_hidden(  # type: ignore[no-untyped-def]
            hidden, weight, bias, library, px_r=None, pi_weight=None, pi_bias=None
        ):
            pi_logits = None if pi_weight is None else F.linear(hidden, pi_weight, pi_bias)
            return of_logits(F.linear(hidden, weight, bias), library, px_r, pi_logits)

        given = tensors(case, arrays, dtype)
        if case.op == LINEAR:
            return Run(case, given, of_hidden)
        return Run(case, given, of_logits, ("logits", "pi_logits") if inplace else ())

    return setup


def linear(backend: str) -> Setup:
    """`linear_count_log_likelihood`."""

    def setup(case: Case, arrays: Arrays) -> Run:
        counts = _counts(case, arrays)

        def forward(  # type: ignore[no-untyped-def]
            hidden, weight, bias, library, px_r=None, pi_weight=None, pi_bias=None
        ):
            return atlasvi_kernels.linear_count_log_likelihood(
                counts, hidden, weight, library, None if px_r is None else px_r.exp(), bias=bias,
                pi_weight=pi_weight, pi_bias=pi_bias, likelihood=case.likelihood, mean=case.mean,
                backend=backend,
            )  # fmt: skip

        return Run(case, tensors(case, arrays), forward)

    return setup


def first_layer(how: str, dtype: torch.dtype = torch.float32) -> Setup:
    """``(log1p(x) @ weight + bias) * hidden``: the gradient of ``hidden`` is the layer's output."""

    def setup(case: Case, arrays: Arrays) -> Run:
        counts, given = _counts(case, arrays), tensors(case, arrays, dtype)
        if how == "dense":
            x = dense_counts(case, arrays, dtype)
        elif how == "sparse":
            parts = counts.indptr, counts.indices.long(), counts.data
            x = torch.sparse_csr_tensor(*parts, counts.shape, check_invariants=False)

        def forward(hidden, weight, bias):  # type: ignore[no-untyped-def]
            if how == "dense":
                out = torch.log1p(x) @ weight + bias
            elif how == "sparse":
                out = torch.sparse.mm(torch.log1p(x), weight) + bias
            else:
                out = atlasvi_kernels.csr_linear(counts, weight, bias, backend=how)
            return (out * hidden).sum(-1)

        return Run(case, given, forward)

    return setup


SETUPS = {
    LIKELIHOOD: {
        "numba": likelihood("numba"),
        "numba inplace": likelihood("numba", inplace=True),
        "triton": likelihood("triton"),
        "triton inplace": likelihood("triton", inplace=True),
        "reference": likelihood("reference"),
        "oracle": likelihood("reference", dtype=torch.float64),
    },
    LINEAR: {
        "numba": linear("numba"),
        "triton": linear("triton"),
        "layers": likelihood("auto"),
        "layers inplace": likelihood("auto", inplace=True),
        "oracle": likelihood("reference", dtype=torch.float64),
    },
    CSR_LINEAR: {
        "numba": first_layer("numba"),
        "triton": first_layer("triton"),
        "reference": first_layer("reference"),
        "dense": first_layer("dense"),
        "sparse": first_layer("sparse"),
        "oracle": first_layer("dense", torch.float64),
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one contender came to; ``why`` it has no times, if it has none."""

    case: Case
    who: str
    why: str = ""
    error: float = float("nan")
    seconds: Sequence[float] = ()
    peak: int | None = None
    returned: int = 0

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds) if self.seconds else float("nan")


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Args:
        commands: of our process, ``"ours"``, and the peer's, ``"peer"``, if there is one.
        folder: for the arrays that the processes share.
        runs: the only contenders that are run, or ``None`` for all.
        repeats: of each contender.
        limit: seconds after which a case gets no more repeats, but at least three.
        memory: whether to measure it, in two processes more for each contender.
    """

    commands: dict[str, list[str]] = field(default_factory=dict)
    folder: Path = Path()
    runs: list[str] | None = None
    repeats: int = 15
    limit: float = 90
    memory: bool = True

    def contenders(self, case: Case) -> list[str]:
        """Whoever can run the case."""
        absent = "numba" if case.device == "cuda" else "triton"
        found = [who for who in SETUPS[case.op] if not who.startswith((absent, "oracle"))]
        has_peer = "peer" in self.commands and case.likelihood in PEER_LIKELIHOODS
        found += PEER[case.op] if has_peer else ()
        return [who for who in found if self.runs is None or who in self.runs]

    def measure(self, case: Case) -> list[Row]:
        """Errors, times and memory of each contender."""
        names = self.contenders(case)
        why_not = {who: why for who in names if (why := _why_not(case, who))}
        names = [who for who in names if who not in why_not]
        np.savez(self._file(case), **inputs(case))
        with ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(command)) for side, command in self.commands.items()}
            for worker in workers.values():
                self._load(worker, case)
            error = self._errors(case, workers, names)
            calls = {who: partial(workers[_side(who)].ask, "seconds", who=who) for who in names}
            seconds = in_turn(calls, self.repeats, self.limit)
        held = {who: self._held(case, who) if self.memory else (None, 0) for who in names}
        rows = [Row(case, who, "", error[who], seconds[who], *held[who]) for who in names]
        return rows + [Row(case, who, why) for who, why in why_not.items()]

    def first_call(self, case: Case, who: str) -> tuple[list[float], list[float]]:
        """Seconds of the first and of the third call of a process, import and input not counted."""
        np.savez(self._file(case), **inputs(case))
        first, later = [], []
        for _ in range(4):
            with Worker(self.commands[_side(who)]) as worker:
                self._load(worker, case)
                seconds = [worker.ask("seconds", who=who) for _ in range(3)]
            first.append(seconds[0])
            later.append(seconds[2])
        return first[1:], later[1:]  # the first process filled the caches of compiled code

    def _file(self, case: Case) -> str:
        return str(self.folder / f"{case.n_obs}.npz")

    def _load(self, worker: Worker, case: Case) -> None:
        worker.ask("load", case=asdict(case), file=self._file(case))

    def _errors(self, case: Case, workers: dict[str, Worker], names: list[str]) -> dict[str, float]:
        """The largest relative error of each. Ours must be within tolerance, or the program ends here."""
        file = self.folder / "results.npz"

        def ask(side: str, do: str, **request: str) -> Arrays:
            workers[side].ask(do, file=str(file), **request)
            with np.load(file) as found:
                return dict(found)

        oracle = ask("peer" if set(names) & set(PEER[case.op]) else "ours", "oracle")
        worst = {}
        for who in names:
            off = errors(case, ask(_side(who), "results", who=who), oracle)
            if complaint := wrong(case, who, off):
                sys.exit(f"{complaint}; no speed is reported")
            worst[who] = max(off.values())
        return worst

    def _held(self, case: Case, who: str) -> tuple[int, int]:
        """Peak memory beyond the inputs and, of that, gradients returned; in a process of its own."""
        tiny = replace(case, n_obs=8, n_vars=256)
        np.savez(self._file(tiny), **inputs(tiny))
        with Worker(self.commands[_side(who)], frugal=True) as worker:
            # Code is loaded before, but what is kept from call to call must not hide; compiling takes memory.
            self._load(worker, case if who.startswith("compile") else tiny)
            worker.ask("seconds", who=who)
            self._load(worker, case)
            peak, returned = worker.ask("peak", who=who)
        return peak, returned


def errors(case: Case, found: Arrays, oracle: Arrays) -> dict[str, float]:
    """Of each output, the relative error: of log p in the worst cell, of a gradient in norm."""
    if set(found) != set(oracle):
        raise ValueError(f"outputs are {sorted(found)}, the oracle's are {sorted(oracle)}")

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x.astype(np.float64)))

    off = {name: norm(found[name] - a) / norm(a) for name, a in oracle.items()}
    if case.op != CSR_LINEAR:
        off["log_p"] = float((np.abs(found["log_p"] - oracle["log_p"]) / np.abs(oracle["log_p"])).max())
    return off


def wrong(case: Case, who: str, off: dict[str, float]) -> str:
    """What is wrong with a run of ours, or nothing."""
    for name, error in off.items() if who.startswith(OURS) else ():
        most = 1e-2 if case.bf16 else 1e-5 if name == "log_p" else 1e-4
        if not error <= most:
            return f"{case.op}, {case.name}, {who}: {name} is off by {error:.1e}, more than {most:.0e}"
    return ""


def _side(who: str) -> str:
    return "peer" if who in PEER[LIKELIHOOD] else "ours"


def _why_not(case: Case, who: str) -> str:
    """Why a contender is not run, if so: one that does not fit in memory would take the machine down."""
    free = torch.cuda.mem_get_info()[0] if case.device == "cuda" else psutil.virtual_memory().available
    need = 4 * case.n_entries * MATRICES.get(who, OTHERS_HOLD)
    if case.op == CSR_LINEAR or need < free:
        return ""
    return f"not run: needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def lines(rows: list[Row], bandwidth: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of one operation."""
    op = rows[0].case.op
    baselines = BASELINES[op]
    heads = [f"`{op}`", "run", "ms", "ns an entry", *(f"× {name}" for name in baselines)]
    heads += ["of roof"] * (op == LIKELIHOOD) + ["peak, MiB", "scratch, B x G", "error"]
    out = []
    for row in rows:
        case = row.case
        cells = [case.name, row.who]
        if row.why:
            out.append([*cells, row.why, *[""] * (len(heads) - 3)])
            continue
        cells += [f"{row.median * 1e3:,.1f}", f"{row.median / case.n_entries * 1e9:.2f}"]
        for names in baselines.values():
            others = [r.median for r in rows if r.case == case and r.who in names and r.seconds]
            cells.append(f"{min(others) / row.median:.2f}" if others else "-")
        if op == LIKELIHOOD:
            cells.append(f"{case.least_bytes / bandwidth[case.device] / row.median:.0%}")
        if row.peak is None:
            cells += ["-", "-"]
        else:
            cells += [f"{row.peak / 2**20:,.0f}", f"{(row.peak - row.returned) / (4 * case.n_entries):.3f}"]
        out.append([*cells, f"{row.error:.0e}"])
    return heads, out


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = [*CASES, FIRST_CALL]
    usual = [name for name in every if name not in OPTIONAL]
    add = parser.add_argument
    add("--peer-python", help="Python of benchmarks/peers/scvi_tools_env.sh; without it, no peer")
    add("--cases", nargs="+", choices=every, default=usual, metavar="CASE",
        help=f"of {', '.join(every)}; by default all but {', '.join(OPTIONAL)}")  # fmt: skip
    add("--runs", nargs="+", metavar="RUN", help="of each case only these, such as numba eager")
    add("--device", nargs="+", choices=["cpu", "cuda"], help="by default what there is")
    add("--repeats", type=int, default=Bench.repeats, help="of each run; the median is shown")
    add(
        "--limit",
        type=float,
        default=Bench.limit,
        help="seconds after which a case has no more than 3 repeats",
    )
    add("--no-memory", action="store_true", help="leave out peak memory (known on Linux only)")
    add("--out", type=Path, help="JSON with every time")
    add("--markdown", action="store_true", help="tables for the docs")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(SETUPS, ("torch",))
        return
    has_gpu = torch.cuda.is_available()
    devices = options.device or ["cpu", *["cuda"] * has_gpu]
    memory = sys.platform == "linux" and not options.no_memory
    quiet = ["-W", "ignore", "-m"]
    commands = {"ours": [sys.executable, *quiet, "benchmarks.kernels", "--serve"]}
    if options.peer_python:
        commands["peer"] = [options.peer_python, *quiet, "benchmarks.peers.scvi_tools_likelihood"]
    with tempfile.TemporaryDirectory(prefix="atlasvi-kernels-") as folder:
        bench = Bench(commands, Path(folder), options.runs, options.repeats, options.limit, memory)
        report(bench, options.cases, devices, markdown=options.markdown, out=options.out)
    if not has_gpu:
        print("No GPU here: run this command on one for its table.")


def report(bench: Bench, names: list[str], devices: list[str], *, markdown: bool, out: Path | None) -> None:
    """Measure; print the machine and a table for each operation."""
    bandwidth = {device: copy_bandwidth(device) for device in devices}
    about = machine() | {f"copy, {device}": f"{rate / 1e9:.1f} GB/s" for device, rate in bandwidth.items()}
    if "peer" in bench.commands:
        with Worker(bench.commands["peer"]) as worker:
            about["peer"] = ", ".join(f"{name} {version}" for name, version in worker.ask("about").items())
    rows: list[Row] = []
    calls = []
    for device in devices:
        for name in names:
            print(f"{device}: {name}", file=sys.stderr, flush=True)
            if name != FIRST_CALL:
                found = bench.measure(replace(CASES[name], device=device))
                # As they come: all cases together take half an hour.
                shown = table(*lines(found, bandwidth), markdown=markdown, words=2)
                print(shown, file=sys.stderr, flush=True)
                rows += found
                continue
            case = replace(MAIN, device=device)
            timed = [who for who in bench.contenders(case) if who in ("numba", "triton", "eager", "compile")]
            calls += [(case.name, who, *bench.first_call(case, who)) for who in timed]
    print(table(["machine", ""], list(about.items()), markdown=markdown, words=2))
    for op in SETUPS:
        of_op = [row for row in rows if row.case.op == op]
        if of_op:
            print("\n" + table(*lines(of_op, bandwidth), markdown=markdown, words=2))
    if calls:
        shown = [(*c, f"{median(first):.2f}", f"{median(third):.3f}") for *c, first, third in calls]
        print(
            "\n"
            + table(["new process", "run", "first call, s", "third, s"], shown, markdown=markdown, words=2)
        )
    if out is not None:
        found = {"machine": about, "rows": [asdict(row) for row in rows], "first calls": calls}
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
