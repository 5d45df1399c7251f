"""Which backend runs an operation: asked for by name, or chosen by device and said once."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache, lru_cache

import torch

logger = logging.getLogger("atlasvi_kernels")
BACKENDS = ("auto", "numba", "triton", "reference")
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(op: str, backend: str, *tensors: torch.Tensor) -> str:
    """The backend to run ``op`` with on these tensors: ``"reference"``, ``"numba"`` or ``"triton"``.

    ``"auto"`` takes numba for float32 on the CPU, Triton on an NVIDIA or AMD GPU where it is installed and
    the reference elsewhere, and logs its choice and the reason once. A backend asked for by name runs or
    raises: it never gives way to another.

    Raises:
        ValueError: an unknown backend, or one that cannot take these tensors.
        ImportError: Triton was asked for and is not installed.
    """
    devices = sorted({t.device.type for t in tensors})
    dtypes = sorted({t.dtype for t in tensors if t.is_floating_point()}, key=str)
    shown = f"{', '.join(map(str, dtypes))} on {', '.join(devices)}"
    fits_numba = devices == ["cpu"] and dtypes == [torch.float32]
    fits_triton = (devices == ["cuda"] or (devices == ["cpu"] and interpreting())) and all(
        t in _ON_GPU for t in dtypes
    )
    if backend == "auto":
        if fits_numba:
            return _say(op, "numba", f"tensors are {shown}")
        if fits_triton and devices == ["cuda"]:
            if has_triton():
                return _say(op, "triton", f"tensors are {shown}")
            return _say(op, "reference", f"tensors are {shown} and triton is not installed")
        return _say(op, "reference", f"tensors are {shown}")
    if backend == "reference":
        return backend
    if backend == "numba":
        if fits_numba:
            return backend
        takes = "float32 on the CPU"
    elif backend == "triton":
        if fits_triton:
            if not has_triton():
                raise ImportError(f"{op}: backend 'triton' needs triton: pip install 'atlasvi[gpu]'")
            return backend
        takes = "float32, bfloat16 or float16 on a GPU"
    else:
        raise ValueError(f"{op}: backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    raise ValueError(
        f"{op}: backend {backend!r} takes {takes}, got {shown}; pass backend='reference' or 'auto'"
    )


def interpreting() -> bool:
    """Whether Triton kernels are run by its interpreter, on the CPU: for tests (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton can be imported; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


@cache
def _say(op: str, chosen: str, reason: str) -> str:
    # Cached: each choice is logged once.
    logger.info("%s: backend %s, since %s", op, chosen, reason)
    return chosen
