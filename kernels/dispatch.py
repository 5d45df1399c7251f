"""Which backend runs an operation: asked for by name, or chosen by device and said once."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("atlasvi_kernels")
_said: set[str] = set()


def choose_backend(op: str, backend: str, *tensors: torch.Tensor) -> str:
    """The backend to run ``op`` with on these tensors: ``"reference"`` or ``"numba"``.

    ``"auto"`` takes numba for float32 on the CPU and the reference elsewhere, and logs its choice and
    the reason once. A backend asked for by name runs or raises: it never gives way to another.

    Raises:
        ValueError: an unknown backend, or one that cannot take these tensors.
    """
    devices = {t.device.type for t in tensors}
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    fits_numba = devices == {"cpu"} and dtypes == {torch.float32}
    if backend == "auto":
        chosen = "numba" if fits_numba else "reference"
        key = f"{op} {chosen}"
        if key not in _said:
            _said.add(key)
            logger.info(
                "%s: backend %s, since tensors are %s on %s",
                op, chosen, ", ".join(sorted(map(str, dtypes))), ", ".join(sorted(devices)),
            )  # fmt: skip
        return chosen
    if backend == "numba" and not fits_numba:
        raise ValueError(
            f"{op}: backend 'numba' takes float32 on the CPU, got {sorted(map(str, dtypes))} on "
            f"{sorted(devices)}; pass backend='reference' or 'auto'"
        )
    if backend not in ("numba", "reference"):
        raise ValueError(f"{op}: backend {backend!r} is not one of 'auto', 'numba', 'reference'")
    return backend
