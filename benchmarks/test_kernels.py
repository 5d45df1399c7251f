"""The cases of `benchmarks.kernels` on few cells and genes: ``pytest benchmarks --benchmark-only``.

Quick, and without a peer, to see if a change made an operation slower. Numbers are checked, times are not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.common import Case, in_blocks
from benchmarks.kernels import CASES, MAIN, SETUPS, Bench, errors, inputs, wrong


def small(case: Case, device: str = "cpu") -> Case:
    return replace(case, n_obs=64, n_vars=1_000, density=0.1, n_hidden=32, device=device)


DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SMALL = dict.fromkeys(small(case, device) for device in DEVICES for case in CASES.values())
RUNS = [
    pytest.param(case, who, id=f"{case.op}-{case.name}-{who}")
    for case in SMALL
    for who in Bench().contenders(case)
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("case", "who"), RUNS)
def test_forward_and_gradients(benchmark, case, who):
    arrays = inputs(case)
    run = SETUPS[case.op][who](case, arrays)
    benchmark.group = f"{case.op}: {case.name}"
    benchmark.pedantic(run.run, setup=lambda: ((run.leaves(),), {}), rounds=10, warmup_rounds=2)
    oracle = in_blocks(SETUPS[case.op]["oracle"], case, arrays)
    assert not wrong(case, who, errors(case, run.results(), oracle))


def test_an_error_in_any_output_is_seen():
    case = small(MAIN)
    right = SETUPS[case.op]["oracle"](case, inputs(case)).results()
    assert not wrong(case, "numba", errors(case, right, right))
    for name in right:
        off = right | {name: right[name] * 1.001}
        assert f"numba: {name} is off" in wrong(case, "numba", errors(case, off, right))
