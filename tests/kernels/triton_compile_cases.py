"""The Triton kernels compiled ahead of time, as they are launched; run by test_triton.py.

No GPU is needed: a driver that only names the target stands in for it, and launching stops at the compiler.
"""

import re
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from atlasvi_kernels import CSR
from atlasvi_kernels.count_ll import gpu
from atlasvi_kernels.csr_linear import gpu as linear_gpu

B, G, H = 300, 64, 128  # every fact that Triton compiles for is as with thousands of genes


@dataclass
class Compiler:
    """Stands in for the driver of a GPU."""

    arch: int

    def get_current_device(self):
        return self.arch  # kernels are kept by device: those of two targets are kept apart

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def launched(request, monkeypatch):
    """``(kernel, target)`` of each launch."""
    seen = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__, kernel.metadata.target.arch))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Compiler(request.param))
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    return request.param, seen


def check(launched, capfd, *names):
    """These kernels were launched, and ptxas said of each that was new that nothing is spilled."""
    arch, seen = launched
    assert set(seen) == {(name, arch) for name in names}
    log = capfd.readouterr().out
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'", log)
    assert len(spills) == len(entries) > 0
    for (name, target), numbers in zip(entries, spills, strict=True):
        assert target == str(arch)
        assert numbers == ("0", "0", "0"), f"{name} for sm_{target}: stack, spill stores and loads {numbers}"


def counts(data=torch.uint8):
    full = CSR.from_torch(torch.ones(B, G))
    return CSR(full.indptr, full.indices.to(torch.uint16), full.data.to(data), G)


def run(likelihood, mean="softmax", *, dispersion="gene", dtype=torch.float32, data=torch.uint8, **options):
    theta = index = None
    if "nb" in likelihood:
        theta = torch.ones({"gene": (G,), "table": (3, G), "cell": (B, G)}[dispersion])
        index = torch.zeros(B, dtype=torch.int64) if dispersion == "table" else None
    pi_logits = torch.zeros(B, G, dtype=dtype) if "zi" in likelihood else None
    given = {"weights": None, "scale": 0.5, "with_gradient": True, "inplace": True, **options}
    gpu.run(
        counts(data), torch.zeros(B, G, dtype=dtype), torch.ones(B), theta, pi_logits, index,
        likelihood, mean, **given,
    )  # fmt: skip


CASES = {
    "zinb": ("zinb", {}),
    "nb": ("nb", {}),
    "zip": ("zip", {}),
    "poisson": ("poisson", {}),
    "zinb-exp": ("zinb", {"mean": "exp", "dispersion": "table"}),
    "nb-exp-cell": ("nb", {"mean": "exp", "dispersion": "cell"}),
    "zinb-bfloat16-weights": (
        "zinb",
        {"dtype": torch.bfloat16, "weights": torch.ones(B), "data": torch.int64},
    ),
    "zinb-value": ("zinb", {"with_gradient": False, "data": torch.float32}),
}


@pytest.mark.parametrize("case", CASES)
def test_count_ll_compiles_without_spills(case, launched, capfd):
    likelihood, options = CASES[case]
    run(likelihood, **options)
    shared = options.get("dispersion") != "cell" and options.get("with_gradient", True)
    check(launched, capfd, "_rows", *(["_add_sums"] if "nb" in likelihood and shared else []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_csr_linear_compiles_without_spills(dtype, launched, capfd):
    x = counts()
    linear_gpu.forward(x.indptr, x.indices, x.data.float(), torch.ones(G, H, dtype=dtype))
    linear_gpu.backward(x.indptr, x.indices, x.data.float(), torch.ones(B, H, dtype=dtype), G)
    check(launched, capfd, "_add_rows")


def test_a_spill_would_be_seen(launched, capfd, monkeypatch):
    monkeypatch.setitem(gpu._OPTIONS, "maxnreg", 32)
    run("nb", with_gradient=False)
    with pytest.raises(AssertionError, match="spill stores and loads"):
        check(launched, capfd, "_rows")
