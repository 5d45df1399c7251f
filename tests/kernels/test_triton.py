"""The Triton kernels: run by Triton's interpreter on the CPU, run on a GPU, and compiled ahead of time.

Triton chooses when it is imported between interpreting and compiling, so each has a process of its own, in
which pytest runs the file that holds the tests.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_in_its_own_process(file, **environment):
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton's compiler itself does what Python 3.13 deprecates, and warnings are errors here.
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore:AnnAssign:DeprecationWarning"]
    result = subprocess.run(
        [sys.executable, *command, str(Path(__file__).with_name(file))],
        env=keep | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_triton_is_not_imported_before_it_is_chosen():
    code = "import atlasvi_kernels, sys; assert not [m for m in sys.modules if m.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_agree_with_the_reference_under_the_interpreter():
    run_in_its_own_process("triton_cases.py", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_agree_with_the_reference_on_a_gpu():
    run_in_its_own_process("triton_cases.py")


def test_kernels_compile_without_register_spills(tmp_path):
    ptxas = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.is_file():
        pytest.skip("this build of triton has no ptxas")
    # With a cache of its own, every kernel goes through ptxas.
    run_in_its_own_process("triton_compile_cases.py", TRITON_CACHE_DIR=str(tmp_path))
