"""Counts and gamma variates of each entry of a matrix, counter-based: functions of (seed, step, row, column).

A count is the quantile of a uniform number at its distribution: one uniform number an entry, and a step of
a recursion for each count, so that a cell costs its genes and its total. No entry depends on which others are
drawn with it. Generator and layout of the counters are those of `atlasvi_kernels.noise`, with the column in
the place of the block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .noise import _LOW, _SHIFT, _philox
from .parallel import compiled, in_parallel, n_threads

_COUNTS, _GAMMA, _ENTRIES = 64, 65, 66
# Attempts of a rejection are counted in bits that rows and columns leave free.
_ATTEMPT = np.uint32(16)
_NO_ROWS_BEYOND = 1 << 48


@compiled()
def _words(seed, step, stream, row, column, attempt):  # type: ignore[no-untyped-def]
    r = np.uint64(row)
    return _philox(
        np.uint32((np.uint64(stream) << np.uint64(24)) | np.uint64(column)),
        np.uint32(r & _LOW),
        np.uint32((r >> _SHIFT) | (np.uint64(attempt) << np.uint64(_ATTEMPT))),
        np.uint32(np.uint64(step) & _LOW),
        np.uint32(np.uint64(seed) & _LOW),
        np.uint32(np.uint64(seed) >> _SHIFT),
    )


@compiled()
def _uniform53(high, low):  # type: ignore[no-untyped-def]
    """In (0, 1), from two words: neither end can come."""
    bits = ((np.uint64(high) << _SHIFT) | np.uint64(low)) >> np.uint64(12)
    return (np.float64(bits) + 0.5) * 2.0**-52


@compiled()
def _quantile(u, mu, theta):  # type: ignore[no-untyped-def]
    """Smallest k with P(X <= k) >= u, of a Poisson (``theta = inf``) or a negative binomial."""
    if mu <= 0.0:
        return 0
    if math.isinf(theta):
        log_p, over, start = -mu, mu, 1.0
        slope = 0.0
    else:
        log_p = -theta * math.log1p(mu / theta)
        over = mu / (theta + mu)
        start, slope = theta, 1.0
    k, p = 0, 1.0
    # p(k + 1) / p(k) = over (start + slope k) / (k + 1). Where p(0) is no float64, go up until p(k) is one:
    # what lies below weighs nothing.
    while log_p < -700.0:
        p *= over * (start + slope * k) / (k + 1.0)
        k += 1
        if p > 1e200 or log_p + math.log(p) > -700.0:
            log_p += math.log(p)
            p = 1.0
    p = math.exp(log_p)
    below = p
    while u > below and (p > 1e-18 or k < mu):
        p *= over * (start + slope * k) / (k + 1.0)
        k += 1
        below += p
    return k


@compiled()
def _fill_counts(part, start, stop, seed, step, rows, columns, mu, theta, pi_logits, out):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        for j in range(len(columns)):
            a, b, c, _ = _words(seed, step, _COUNTS, rows[i], columns[j], 0)
            if len(pi_logits):
                kept = 1.0 / (1.0 + math.exp(np.float64(pi_logits[i, j])))
                if (np.float64(c) + 0.5) * 2.0**-32 >= kept:
                    out[i, j] = 0
                    continue
            out[i, j] = _quantile(_uniform53(a, b), np.float64(mu[i, j]), np.float64(theta[i, j]))


@compiled()
def _standard_gamma(seed, step, row, column, shape):  # type: ignore[no-untyped-def]
    """Marsaglia and Tsang 2000; a shape below 1 is drawn at one more and brought down by a power of u."""
    boosted = shape + 1.0 if shape < 1.0 else shape
    d = boosted - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    value = d
    for attempt in range(1, 1000):
        w0, w1, w2, _ = _words(seed, step, _GAMMA, row, column, attempt)
        radius = math.sqrt(-2.0 * math.log((np.float64(w0) + 0.5) * 2.0**-32))
        x = radius * math.cos(2.0 * math.pi * (np.float64(w1) + 0.5) * 2.0**-32)
        v = 1.0 + c * x
        if v <= 0.0:
            continue
        v = v * v * v
        if math.log((np.float64(w2) + 0.5) * 2.0**-32) < 0.5 * x * x + d - d * v + d * math.log(v):
            value = d * v
            break
    if shape < 1.0:
        w0, w1, _, _ = _words(seed, step, _GAMMA, row, column, 0)
        value *= math.exp(math.log(_uniform53(w0, w1)) / shape)
    return value


@compiled()
def _fill_gamma(part, start, stop, seed, step, rows, columns, mean, shape, out):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        for j in range(len(columns)):
            a = np.float64(shape[i, j])
            out[i, j] = _standard_gamma(seed, step, rows[i], columns[j], a) / a * np.float64(mean[i, j])


@compiled()
def _fill_uniform(part, start, stop, seed, step, rows, columns, out):  # type: ignore[no-untyped-def]
    for k in range(start, stop):
        a, b, c, d = _words(seed, step, _ENTRIES, rows[k], columns[k], 0)
        out[k, 0], out[k, 1] = _uniform53(a, b), _uniform53(c, d)


@compiled()
def _fill_binomial(part, start, stop, u, n, p, out):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        trials = np.int64(n[i])
        k, chance = 0, (1.0 - p) ** trials
        below = chance
        while u[i] > below and k < trials:
            chance *= (trials - k) / (k + 1.0) * p / (1.0 - p)
            k += 1
            below += chance
        out[i] = k


def counter_counts(
    seed: int,
    step: int,
    rows: torch.Tensor,
    columns: torch.Tensor,
    mu: torch.Tensor,
    theta: torch.Tensor | None = None,
    pi_logits: torch.Tensor | None = None,
) -> NDArray[np.int32]:
    """A count for each row and column: Poisson, negative binomial, or either with dropout.

    Args:
        seed: of the run, in ``[0, 2^63)``.
        step: number of the sample, in ``[0, 2^32)``.
        rows: ``(B,)`` int64, identities of the rows, in ``[0, 2^48)``.
        columns: ``(k,)`` int64, identities of the columns, in ``[0, 2^24)``.
        mu: ``(B, k)`` float, mean before dropout.
        theta: ``(k,)`` or ``(B, k)`` float, inverse dispersion > 0; Poisson where it is ``None``.
        pi_logits: ``(B, k)`` float, logit of the probability of dropout.

    Returns:
        ``(B, k)`` int32.

    Raises:
        ValueError: a number outside its range, shapes that do not fit.

    Example:
        >>> rows, mu = torch.tensor([7, 8]), torch.full((2, 3), 4.0)
        >>> a = counter_counts(0, 0, rows, torch.arange(3), mu)
        >>> b = counter_counts(0, 0, rows[1:], torch.tensor([2]), mu[1:, 2:])
        >>> bool(a[1, 2] == b[0, 0])
        True
    """
    _check(seed, step, rows, columns)
    shape = (len(rows), len(columns))
    if tuple(mu.shape) != shape or (pi_logits is not None and tuple(pi_logits.shape) != shape):
        raise ValueError(f"mu {tuple(mu.shape)} and pi_logits must be {shape}, rows x columns")
    out = np.empty(shape, np.int32)
    arguments = (
        _numpy(rows), _numpy(columns), _numpy(mu),
        _rows_of(theta, shape), np.empty((0, 0), np.float32) if pi_logits is None else _numpy(pi_logits),
    )  # fmt: skip
    in_parallel(_fill_counts, len(rows), seed, step, *arguments, out, parts=n_threads(len(rows) // 8))
    return out


def counter_gamma(
    seed: int, step: int, rows: torch.Tensor, columns: torch.Tensor, mean: torch.Tensor, shape: torch.Tensor
) -> NDArray[np.float32]:
    """A gamma variate for each row and column; arguments as `counter_counts`.

    Args:
        seed: of the run.
        step: number of the sample.
        rows: ``(B,)`` int64.
        columns: ``(k,)`` int64.
        mean: ``(B, k)`` float.
        shape: ``(k,)`` or ``(B, k)`` float > 0; the variance is ``mean^2 / shape``.

    Example:
        >>> counter_gamma(0, 0, torch.tensor([1]), torch.arange(2), torch.ones(1, 2), torch.ones(2)).shape
        (1, 2)
    """
    _check(seed, step, rows, columns)
    wanted = (len(rows), len(columns))
    if tuple(mean.shape) != wanted:
        raise ValueError(f"mean {tuple(mean.shape)} must be {wanted}, rows x columns")
    out = np.empty(wanted, np.float32)
    arguments = (_numpy(rows), _numpy(columns), _numpy(mean), _rows_of(shape, wanted))
    in_parallel(_fill_gamma, len(rows), seed, step, *arguments, out, parts=n_threads(len(rows) // 8))
    return out


def counter_pairs(
    seed: int, step: int, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``(n, 2)`` uniform draws from (0, 1), two for each of ``n`` entries named by row and column.

    Example:
        >>> counter_pairs(0, 0, np.array([4]), np.array([2])).shape
        (1, 2)
    """
    _check(seed, step, torch.from_numpy(rows), torch.from_numpy(columns))
    out = np.empty((len(rows), 2))
    in_parallel(_fill_uniform, len(rows), seed, step, rows, columns, out, parts=n_threads(len(rows) // 4096))
    return out


def binomial_quantile(u: NDArray[np.float64], n: NDArray[Any], p: float) -> NDArray[np.int64]:
    """Smallest k with P(X <= k) >= u, X binomial of ``n`` trials of probability ``p`` in [0, 1).

    Example:
        >>> binomial_quantile(np.array([0.5]), np.array([10]), 0.2).tolist()
        [2]
    """
    out = np.empty(len(u), np.int64)
    in_parallel(_fill_binomial, len(u), u, n, p, out, parts=n_threads(len(u) // 4096))
    return out


def _check(seed: int, step: int, rows: torch.Tensor, columns: torch.Tensor) -> None:
    if not 0 <= seed < 1 << 63 or not 0 <= step < 1 << 32:
        raise ValueError(f"seed {seed}, step {step}: need 0 <= seed < 2^63 and 0 <= step < 2^32")
    for name, values, end in (("rows", rows, _NO_ROWS_BEYOND), ("columns", columns, 1 << 24)):
        if len(values) and not (0 <= int(values.min()) and int(values.max()) < end):
            raise ValueError(f"{name} must lie in [0, {end})")


def _numpy(values: torch.Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().cpu().contiguous().numpy()
    return found


def _rows_of(values: torch.Tensor | None, shape: tuple[int, int]) -> NDArray[Any]:
    """As rows x columns, without a copy for each row."""
    if values is None:
        return np.broadcast_to(np.float32(np.inf), shape)
    return np.broadcast_to(values.detach().cpu().numpy(), shape)


__all__ = ["binomial_quantile", "counter_counts", "counter_gamma", "counter_pairs"]
