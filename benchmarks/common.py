"""What benchmarks of operations share: the case, what is run, processes that take turns, the machine, tables.

Each side runs in a process of its own, under the Python of its own environment, and answers the same requests
(`serve`). The one that measures asks them in turn (`Worker`, `in_turn`). Nothing here needs atlasvi.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from ctypes import CDLL
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
COUNTS = ("indptr", "indices", "data")
# In scVI the library size is data: its gradient is checked, and asked of nobody while time is taken.
OBSERVED = "library"
# Inputs, and gradients, that have no row for each cell.
SHARED = ("px_r", "weight", "bias", "pi_weight", "pi_bias")
_SIMD = "avx2 fma avx512f avx512_bf16 amx_bf16 amx_int8 asimd sve bf16".split()
_BLOCK = 256
# Seconds in which the OpenMP threads of the side that ran last cease to spin.
_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on one size of minibatch.

    Args:
        n_obs: cells, B.
        n_vars: genes, G.
        density: share of the counts that are not zero.
        op: name of the operation in `atlasvi_kernels`.
        likelihood: ``"poisson"``, ``"zip"``, ``"nb"`` or ``"zinb"``.
        mean: ``"softmax"`` or ``"exp"``.
        loss: ``"sum"`` or ``"mean"`` over cells, which is what the gradients are of.
        n_hidden: H, of the operations with weights.
        bf16: whether forward runs under autocast to bfloat16.
        device: ``"cpu"`` or ``"cuda"``.
        seed: of the random numbers.
    """

    n_obs: int
    n_vars: int
    density: float
    op: str = "count_log_likelihood"
    likelihood: str = "zinb"
    mean: str = "softmax"
    loss: str = "sum"
    n_hidden: int = 128
    bf16: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def name(self) -> str:
        """In words."""
        words = ["" if self.op == "csr_linear" else self.likelihood, f"{self.n_obs:,} x {self.n_vars:,}"]
        words += [f"{self.density:.0%}", *(w for w in (self.mean, self.loss) if w not in ("softmax", "sum"))]
        return " ".join([*words, "bf16" * self.bf16, "GPU" * (self.device == "cuda")]).strip()

    @property
    def inflated(self) -> bool:
        """Whether there are dropout logits."""
        return self.likelihood in ("zip", "zinb")

    @property
    def n_entries(self) -> int:
        """B x G."""
        return self.n_obs * self.n_vars

    @property
    def least_bytes(self) -> int:
        """Of the likelihood: (dropout) logits read once and their gradients written once, in float32."""
        return self.n_entries * (16 if self.inflated else 8)


@dataclass(frozen=True, slots=True)
class Run:
    """What is timed: ``forward`` of the tensors, and the gradient of each of them.

    Args:
        case: says which loss is taken of what ``forward`` returns.
        tensors: inputs by name.
        forward: takes them by name, returns a value for each cell.
        consumed: inputs whose memory ``forward`` may overwrite: it is given copies, made before.
    """

    case: Case
    tensors: dict[str, torch.Tensor]
    forward: Callable[..., torch.Tensor]
    consumed: tuple[str, ...] = ()

    def leaves(self) -> dict[str, torch.Tensor]:
        """The inputs, ready for gradients."""
        return {
            name: (t.clone() if name in self.consumed else t.detach()).requires_grad_(name != OBSERVED)
            for name, t in self.tensors.items()
        }

    def run(self, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward, and backward into ``grad`` of the leaves."""
        autocast = torch.autocast(self.case.device, torch.bfloat16) if self.case.bf16 else nullcontext()
        with autocast:
            out = self.forward(**leaves)
        getattr(out, self.case.loss)().backward()
        return out.detach()

    def seconds(self) -> float:
        """The time of one."""
        leaves = self.leaves()
        if self.case.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            self.run(leaves)
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        begun = time.perf_counter()
        self.run(leaves)
        return time.perf_counter() - begun

    def results(self) -> Arrays:
        """``log_p`` and the gradient of each input, that of the library too."""
        leaves = {name: t.requires_grad_() for name, t in self.leaves().items()}
        out = self.run(leaves)
        found = {name: t.grad.cpu().numpy() for name, t in leaves.items() if t.grad is not None}
        return {"log_p": out.cpu().numpy(), **found}

    def peak(self) -> tuple[int, int]:
        """Most bytes held beyond the inputs at any moment of one run, and those of the gradients returned."""
        leaves = self.leaves()
        memory = _GPUMemory() if self.case.device == "cuda" else _Memory()
        self.run(leaves)
        most = memory.above()
        given = [t for t in leaves.values() if t.grad is not None and t.grad.data_ptr() != t.data_ptr()]
        return most, sum(t.nbytes for t in given)


class _Memory:
    """The system's own record of the most memory this process held, taken back to what it holds now."""

    def __init__(self) -> None:
        gc.collect()
        CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.now("VmRSS")

    def now(self, field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    def above(self) -> int:
        return self.now("VmHWM") - self.before


class _GPUMemory:
    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def above(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


Setup = Callable[[Case, Arrays], Run]


def tensors(case: Case, arrays: Arrays, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The inputs that have gradients, where the case runs."""
    named = {name: torch.from_numpy(a) for name, a in arrays.items() if name not in COUNTS}
    return {name: t.to(case.device, dtype) for name, t in named.items()}


def dense_counts(case: Case, arrays: Arrays, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(B, G), as those who know no sparse counts want them."""
    indptr = arrays["indptr"]
    x = np.zeros((len(indptr) - 1, case.n_vars), np.float32)
    x[np.repeat(np.arange(len(x)), np.diff(indptr)), arrays["indices"]] = arrays["data"]
    return torch.from_numpy(x).to(case.device, dtype)


def in_blocks(setup: Setup, case: Case, arrays: Arrays) -> Arrays:
    """`Run.results`, of a few cells at a time: for a setup that takes much memory."""
    parts = []
    for start in range(0, case.n_obs, _BLOCK):
        stop = min(start + _BLOCK, case.n_obs)
        entries = slice(*arrays["indptr"][[start, stop]])
        block = {name: a[start:stop] for name, a in arrays.items() if name not in SHARED}
        block |= {name: arrays[name] for name in SHARED if name in arrays}
        block |= {name: arrays[name][entries] for name in ("indices", "data")}
        block["indptr"] = arrays["indptr"][start : stop + 1] - entries.start
        found = setup(case, block).results()
        scale = (stop - start) / case.n_obs if case.loss == "mean" else 1.0
        parts.append({name: a if name == "log_p" else a * scale for name, a in found.items()})
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: np.sum(c, 0) if name in SHARED else np.concatenate(c) for name, c in columns.items()}


def serve(setups: Mapping[str, Mapping[str, Setup]], packages: Sequence[str]) -> None:
    """Answer a `Worker` until it closes. ``setups`` are by operation and contender, ``oracle`` among them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(n_cores())
    case, arrays, runs = Case(0, 0, 0.0), Arrays(), dict[str, Run]()
    for line in sys.stdin:
        request = json.loads(line)
        who, answer = request.get("who"), None
        if request["do"] == "about":
            answer = {name: metadata.version(name) for name in packages}
        elif request["do"] == "load":
            case, runs = Case(**request["case"]), {}
            with np.load(request["file"]) as file:
                arrays = dict(file)
        elif request["do"] == "oracle":
            np.savez(request["file"], **in_blocks(setups[case.op]["oracle"], case, arrays))
        else:
            if who not in runs:
                runs[who] = setups[case.op][who](case, arrays)
            if request["do"] == "results":
                np.savez(request["file"], **runs[who].results())
            else:
                answer = {"seconds": runs[who].seconds, "peak": runs[who].peak}[request["do"]]()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """The other end of `serve`: a process with one side's environment, data and compiled code.

    Args:
        command: of the process, run from the root of the repository.
        frugal: have malloc give freed blocks back at once, so that memory held is memory in use.
    """

    def __init__(self, command: Sequence[str], *, frugal: bool = False) -> None:
        settings = {f"MALLOC_{name}_THRESHOLD_": "131072" for name in ("MMAP", "TRIM")} if frugal else {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1], env={**os.environ, **settings},
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> Any:
        """Its answer; an error there is printed there, and raises here."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            raise RuntimeError(f"{self._process.args!r} ended with status {status} at {do} {request}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def in_turn(runs: Mapping[str, Callable[[], float]], repeats: int, limit: float) -> dict[str, list[float]]:
    """Seconds of each, A B C A B C ..., after two rounds that do not count.

    After ``limit`` seconds there are no more rounds than three.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for done in range(-2, repeats):
        if done >= 3 and time.perf_counter() - begun > limit:
            break
        for name, run in runs.items():
            time.sleep(_PAUSE)
            seconds = run()
            times[name] += [seconds] * (done >= 0)
    return times


def n_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the fastest copy of a large array."""
    n = 1 << (29 if device == "cuda" else 26)
    source, target = torch.ones(n, device=device), torch.zeros(n, device=device)
    seconds = []
    for i in range(20):
        begun = time.perf_counter()
        if device == "cpu" and i % 2:
            np.copyto(target.numpy(), source.numpy())  # with stores past the cache, on some machines faster
        else:
            target.copy_(source)
        float(target[-1])  # waits for the GPU
        seconds.append(time.perf_counter() - begun)
    return (source.nbytes + target.nbytes) / min(seconds)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo")
    about = cpu.read_text() if cpu.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", about)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", about)
    simd = [name for name in _SIMD if flags is not None and name in flags[1].split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {name: metadata.version(name) for name in ("torch", "numba", "numpy")}
    if find_spec("triton") is not None:
        versions["triton"] = metadata.version("triton")
    return {
        "CPU": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": f"{n_cores()}, a thread on each",
        "SIMD": " ".join(simd) or "none known",
        "memory": f"{memory / 2**30:.0f} GiB",
        "GPU": gpu,
        "Python": platform.python_version(),
        **versions,
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool, words: int = 1) -> str:
    """Columns in line: the first ``words`` are text, the others numbers."""
    lines = [list(heads), *map(list, rows)]
    if markdown:
        lines.insert(1, ["---"] * words + ["---:"] * (len(heads) - words))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < words else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in lines
    )
