"""Counter-based random numbers: a draw is a pure function of (seed, step, stream, row, column).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Since no state is
carried, a cell gets the same noise however the cells are cut into minibatches, in any order, on any
number of readers, and after any resumption.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from .math_cpu import vector_code
from .parallel import compiled

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@compiled(forceinline=True)
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    # 32 bits in words of 64: of those, vectors have a product.
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(k0), np.uint64(k1)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


@compiled()
def _words(seed, step, stream, row, first, second, third, fourth):  # type: ignore[no-untyped-def]
    """The four words of each block of a row."""
    vector_code()
    start, row = np.uint64(stream) << np.uint64(24), np.uint64(row)
    c1, c2, c3 = row & _LOW, row >> _SHIFT, np.uint64(step) & _LOW
    k0, k1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _SHIFT
    for i in range(len(first)):
        first[i], second[i], third[i], fourth[i] = _philox(start | np.uint64(i), c1, c2, c3, k0, k1)


@compiled()
def _fill(seed, steps, stream, rows, out):  # type: ignore[no-untyped-def]
    n = out.shape[1]
    words = np.empty((4, (n + 3) // 4), np.uint32)
    for b in range(len(rows)):
        _words(seed, steps[b], stream, rows[b], words[0], words[1], words[2], words[3])
        for k in range(n):
            # The 24 high bits, centred in their cell: never 0 and never 1.
            out[b, k] = (np.float64(words[k & 3, k >> 2] >> np.uint32(8)) + 0.5) * 2.0**-24


@compiled()
def _reach(words, least, out):  # type: ignore[no-untyped-def]
    vector_code()
    for i in range(words.shape[1]):
        for j in range(4):
            out[4 * i + j] = np.int32(words[j, i] >> np.uint32(8)) >= least


@compiled()
def _fill_reached(seed, step, stream, rows, least, out):  # type: ignore[no-untyped-def]
    n = out.shape[1]
    n_blocks = (n + 3) // 4
    words, line = np.empty((4, n_blocks), np.uint32), np.empty(4 * n_blocks, np.bool_)
    for b in range(len(rows)):
        _words(seed, step, stream, rows[b], words[0], words[1], words[2], words[3])
        _reach(words, least, line)
        out[b] = line[:n]


def _check(seed: int, first: int, last: int, stream: int, n: int) -> None:
    in_range = 0 <= seed < 1 << 63 and 0 <= first <= last < 1 << 32 and 0 <= stream < 1 << 8 and n < 1 << 26
    if not in_range:
        raise ValueError(
            f"seed {seed}, step {first if first < 0 else last}, stream {stream}, n {n}: need "
            "0 <= seed < 2^63, 0 <= step < 2^32, 0 <= stream < 2^8 and n < 2^26"
        )


def _draw(
    seed: int, step: int | torch.Tensor, stream: int, rows: torch.Tensor, n: int, dtype: torch.dtype
) -> torch.Tensor:
    each = step.cpu().numpy() if isinstance(step, torch.Tensor) else np.array([step])
    _check(seed, *((int(each.min()), int(each.max())) if len(each) else (0, 0)), stream, n)
    out = torch.empty(len(rows), n, dtype=dtype)
    steps = np.ascontiguousarray(np.broadcast_to(each.astype(np.int64), (len(rows),)))
    _fill(seed, steps, stream, rows.cpu().numpy(), out.numpy())
    return out


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
    return _draw(seed, step, stream, rows, n, torch.float32).to(rows.device)


@lru_cache(maxsize=64)
def _least(rate: float) -> np.int32:
    """The least 24 bits whose uniform number, a float32, is ``rate`` or more; 2^24 if there are none."""
    k = np.arange(max(0, int(rate * 2**24) - 3), min(1 << 24, int(rate * 2**24) + 3))
    reached = k[((k + 0.5) * 2.0**-24).astype(np.float32) >= np.float32(rate)]
    return np.int32(reached[0] if len(reached) else 1 << 24)


def counter_reached(
    seed: int, step: int, stream: int, rows: torch.Tensor, n: int, rate: float
) -> torch.Tensor:
    """Where `counter_uniform` is ``rate`` or more, without making its numbers: what dropout keeps.

    Args:
        seed: as there, and so are step, stream, rows and n.
        step: see there.
        stream: see there.
        rows: see there.
        n: see there.
        rate: in [0, 1).

    Returns:
        ``(B, n)`` bool.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> rows = torch.tensor([5, 9])
        >>> kept = counter_reached(0, 1, 0, rows, 3, 0.1)
        >>> bool((kept == (counter_uniform(0, 1, 0, rows, 3) >= 0.1)).all())
        True
    """
    _check(seed, step, step, stream, n)
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), is {rate}")
    out = torch.empty(len(rows), n, dtype=torch.bool)
    _fill_reached(seed, step, stream, rows.cpu().numpy(), _least(rate), out.numpy())
    return out.to(rows.device)


def counter_normal(
    seed: int, step: int | torch.Tensor, stream: int, rows: torch.Tensor, n: int
) -> torch.Tensor:
    """``n`` standard normal draws for each row (Box and Muller 1958); arguments as `counter_uniform`.

    Example:
        >>> counter_normal(0, 0, 0, torch.tensor([3]), 2).shape
        torch.Size([1, 2])
    """
    u = _draw(seed, step, stream, rows, 2 * ((n + 1) // 2), torch.float64)
    half = u.shape[1] // 2
    radius = u[:, :half].log_().mul_(-2).sqrt_()
    angle = u[:, half:].mul_(2 * math.pi)
    normal = torch.cat([radius * torch.cos(angle), angle.sin_().mul_(radius)], dim=1)
    return normal[:, :n].float().to(rows.device)
