"""Which backend runs an operation: asked for by name, or chosen by device and said once."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

logger = logging.getLogger("atlasvi_kernels")
BACKENDS = ("auto", "numba", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # nothing is imported to find out
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_said: set[tuple[str, str, str]] = set()


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
    on_gpu, narrow = devices == ["cuda"], all(t in _ON_GPU for t in dtypes)
    fits_numba = devices == ["cpu"] and dtypes == [torch.float32]
    if backend == "auto":
        if fits_numba:
            return _say(op, "numba", f"tensors are {shown}")
        if on_gpu and narrow and HAS_TRITON:
            return _say(op, "triton", f"tensors are {shown}")
        missing = " and triton is not installed" if on_gpu and not HAS_TRITON else ""
        return _say(op, "reference", f"tensors are {shown}{missing}")
    if backend == "reference":
        return backend
    if backend == "numba":
        if fits_numba:
            return backend
        takes = "float32 on the CPU"
    elif backend == "triton":
        if narrow and (on_gpu or (devices == ["cpu"] and interpreting())):
            if not HAS_TRITON:
                raise ImportError(f"{op}: backend 'triton' needs triton: pip install 'atlasvi[gpu]'")
            return backend
        takes = "float32, bfloat16 or float16 on a GPU"
    else:
        raise ValueError(f"{op}: backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    raise ValueError(
        f"{op}: backend {backend!r} takes {takes}, got {shown}; pass backend='reference' or 'auto'"
    )


def registered(function: _Function) -> _Function:
    """Register a function of tensors with torch under its own name, in ``torch.ops.atlasvi_kernels``.

    Not with `torch.library.custom_op`: its first call imports torch's compiler, seconds and 74 MB of memory.
    """
    name = f"atlasvi_kernels::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "default", function)
    return function


def differentiable(
    op: Any, run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``op`` of `torch.ops`, registered with its gradient; called by torch's other road where nothing traces.

    What `torch.library.register_autograd` makes takes 120 us a call before anything is computed, and
    `torch.autograd.Function` 13: a twentieth of a training step on 128 cells of 1,000 genes. The first is the
    one that torch.compile and fake tensors understand.

    Args:
        op: in whose place the result is called; returns one tensor or a list.
        run: what it does.
        setup_context: as for `torch.library.register_autograd`.
        backward: see there.
    """
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        # Not with a `setup_context` of its own, for which torch asks for forward's signature at each call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            made = run(*args)
            made = tuple(made) if isinstance(made, list) else made
            setup_context(ctx, args, made)
            return made

        @staticmethod
        def backward(ctx: Any, *upstreams: Any) -> Any:
            return backward(ctx, upstreams[0] if len(upstreams) == 1 else upstreams)

    plain = (torch.Tensor, torch.nn.Parameter)

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        traced = torch.compiler.is_compiling() or any(type(t) not in plain for t in tensors)
        # What autocast does to arguments is registered with the op.
        if traced or torch.is_autocast_enabled(tensors[0].device.type):
            return op(*args)
        return Eager.apply(*args)  # type: ignore[no-untyped-call]

    return call


def interpreting() -> bool:
    """Whether Triton kernels are run by its interpreter, on the CPU: for tests (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _say(op: str, chosen: str, reason: str) -> str:
    # torch.compile traces calls; a log and a set of what was said are for those that run.
    if not torch.compiler.is_compiling() and (op, chosen, reason) not in _said:
        _said.add((op, chosen, reason))
        logger.info("%s: backend %s, since %s", op, chosen, reason)
    return chosen
