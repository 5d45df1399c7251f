"""The fixtures that fill fresh memory do so; without this, they could stop working unseen."""

import sys

import numba
import numpy as np
import pytest
import torch


def test_torch_empty_is_nan():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
    assert (torch.empty(3, dtype=torch.int16) == 32767).all()
    assert torch.zeros(3).sum() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs mallopt of glibc")
def test_memory_of_compiled_code_is_not_zero():
    @numba.njit
    def fresh(n):
        return np.empty(n, np.float32)

    for n in (1_000, 100_000):
        assert (fresh(n) != 0).all()
        assert (np.empty(n * 10, np.int32) != 0).all()
