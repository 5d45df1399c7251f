"""Matrix products on the CPU by the faster of torch's two libraries, and of types it multiplies fast.

torch gives float32 products to MKL, which on processors that are not Intel's takes half the width of their
vector units: 160 GFLOP/s where oneDNN, in the same torch, has 350 (two cores with AVX-512). The switch to
oneDNN is torch's permission to compute float32 products in bfloat16. oneDNN makes use of that where there
are matrix units (AMX) and computes in full float32 elsewhere, so whether the switch is free is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import llvmlite.binding
import torch

logger = logging.getLogger("atlasvi_kernels")
# Of LLVM's names of what a processor can do: x86's vector and matrix units, and ARM's.
_BFLOAT16_UNITS = ("avx512bf16", "amx-bf16", "bf16")
_SWITCH = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def _permitted() -> Iterator[None]:
    before = _SWITCH.fp32_precision
    _SWITCH.fp32_precision = "bf16"
    try:
        yield
    finally:
        _SWITCH.fp32_precision = before


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Whether oneDNN, permitted to round float32 factors to bfloat16, does not."""
    if not torch.backends.mkldnn.is_available():
        return False
    # 1 + 2^-12 is a float32 and no bfloat16; 64 of them sum to 64 + 2^-6. Small products stay with MKL.
    factor = torch.full((64, 64), 1 + 2.0**-12)
    with _permitted():
        found = torch.mm(factor, torch.ones(64, 64))
    return bool((found == 64 + 2.0**-6).all())


@contextmanager
def fast_products() -> Iterator[None]:
    """Float32 products inside are by oneDNN, where those are products of float32."""
    if not onednn_is_exact():
        yield
        return
    with _permitted():
        yield


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor does; where it does not, torch takes five times as long as for float32."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on every system
        features = {}
    found = any(features.get(name, False) for name in _BFLOAT16_UNITS)
    if not found:
        logger.info("bfloat16: factors are rounded to it and multiplied as float32, since the CPU does not")
    return found


def as_factor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` rounded to ``dtype``; of the type in which that is multiplied fast, which may be its own."""
    rounded = tensor.to(dtype)
    slow = dtype == torch.bfloat16 and tensor.device.type == "cpu" and not multiplies_bfloat16()
    return rounded.to(tensor.dtype) if slow else rounded
