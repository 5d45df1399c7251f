"""Counter-based random numbers: a draw is a pure function of (seed, step, stream, row, column).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Since no state is
carried, a cell gets the same noise however the cells are cut into minibatches, in any order, on any
number of readers, and after any resumption.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@numba.njit(nogil=True, cache=True)
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32((p1 >> _SHIFT) ^ np.uint64(c1) ^ np.uint64(k0)),
            np.uint32(p1 & _LOW),
            np.uint32((p0 >> _SHIFT) ^ np.uint64(c3) ^ np.uint64(k1)),
            np.uint32(p0 & _LOW),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@numba.njit(nogil=True, cache=True)
def _fill(seed, steps, stream, rows, out):  # type: ignore[no-untyped-def]
    k0 = np.uint32(np.uint64(seed) & _LOW)
    k1 = np.uint32(np.uint64(seed) >> _SHIFT)
    n = out.shape[1]
    for b in range(len(rows)):
        c3 = np.uint32(np.uint64(steps[b]) & _LOW)
        row = np.uint64(rows[b])
        c1 = np.uint32(row & _LOW)
        c2 = np.uint32(row >> _SHIFT)
        for block in range((n + 3) // 4):
            c0 = np.uint32((np.uint64(stream) << np.uint64(24)) | np.uint64(block))
            words = _philox(c0, c1, c2, c3, k0, k1)
            for j in range(min(4, n - 4 * block)):
                # The 24 high bits, centred in their cell: never 0 and never 1.
                out[b, 4 * block + j] = (np.float64(words[j] >> np.uint32(8)) + 0.5) * 2.0**-24


def _draw(seed: int, step: int | torch.Tensor, stream: int, rows: torch.Tensor, n: int) -> torch.Tensor:
    each = step.cpu().numpy() if isinstance(step, torch.Tensor) else np.array([step])
    low, high = (int(each.min()), int(each.max())) if len(each) else (0, 0)
    if not 0 <= seed < 1 << 63 or not 0 <= low <= high < 1 << 32 or not 0 <= stream < 1 << 8 or n >= 1 << 26:
        raise ValueError(
            f"seed {seed}, step {low if low < 0 else high}, stream {stream}, n {n}: need 0 <= seed < 2^63, "
            "0 <= step < 2^32, 0 <= stream < 2^8 and n < 2^26"
        )
    out = np.empty((len(rows), n), np.float64)
    steps = np.ascontiguousarray(np.broadcast_to(each.astype(np.int64), (len(rows),)))
    _fill(seed, steps, stream, rows.cpu().numpy(), out)
    return torch.from_numpy(out)


def counter_uniform(
    seed: int, step: int | torch.Tensor, stream: int, rows: torch.Tensor, n: int
) -> torch.Tensor:
    """``n`` uniform draws from (0, 1) for each row; drawn on the CPU, returned on the device of ``rows``.

    Args:
        seed: of the run, in ``[0, 2^63)``.
        step: training step or posterior sample, in ``[0, 2^32)``; or ``(B,)`` int64, one for each row.
        stream: tells apart the uses within a step, in ``[0, 256)``.
        rows: ``(B,)`` int64, identities of the rows.
        n: draws for each row.

    Returns:
        ``(B, n)`` float32.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> a = counter_uniform(0, 1, 0, torch.tensor([5, 9]), 3)
        >>> b = counter_uniform(0, 1, 0, torch.tensor([9]), 3)
        >>> bool((a[1] == b[0]).all())
        True
    """
    return _draw(seed, step, stream, rows, n).float().to(rows.device)


def counter_normal(
    seed: int, step: int | torch.Tensor, stream: int, rows: torch.Tensor, n: int
) -> torch.Tensor:
    """``n`` standard normal draws for each row (Box and Muller 1958); arguments as `counter_uniform`.

    Example:
        >>> counter_normal(0, 0, 0, torch.tensor([3]), 2).shape
        torch.Size([1, 2])
    """
    u = _draw(seed, step, stream, rows, 2 * ((n + 1) // 2))
    half = u.shape[1] // 2
    radius = torch.sqrt(-2 * torch.log(u[:, :half]))
    angle = 2 * math.pi * u[:, half:]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :n].float().to(rows.device)
