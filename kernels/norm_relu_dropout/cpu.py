"""The numba backend: threads share out the units, so that each has the sums of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..math_cpu import vector_code
from ..parallel import compiled, in_parallel, n_threads

_FLAGS = {"reassoc", "contract", "nsz", "nnan", "ninf"}
# Rows whose sum is taken before it is added to those of the others: float32 sums of many rows lose less.
_ROWS = 64
_FEW = 1 << 17  # entries that take less time than starting a thread
_LANES = 16
_f = np.float32
_all = np.ones((1, 1), np.bool_)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kept: torch.Tensor | None, rate: float,
    eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    """``[y, mean, variance]``."""
    y, mean, variance = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    _by_units(
        _forward, x, x.numpy(), weight.numpy(), bias.numpy(), _all if kept is None else kept.numpy(),
        _f(1 / (1 - rate)), _f(eps), y.numpy(), mean.numpy(), variance.numpy(),
    )  # fmt: skip
    return [y, mean, variance]


def backward(
    upstream: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor,
    variance: torch.Tensor, rate: float, eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    """``[dx, dweight, dbias]``; ``y`` says which entries were neither dropped nor negative."""
    g_x, g_weight, g_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    _by_units(
        _backward, x, upstream.contiguous().numpy(), x.numpy(), y.numpy(), weight.numpy(), mean.numpy(),
        variance.numpy(), _f(1 / (1 - rate)), _f(eps), g_x.numpy(), g_weight.numpy(), g_bias.numpy(),
    )  # fmt: skip
    return [g_x, g_weight, g_bias]


def _by_units(loop: Any, x: torch.Tensor, *arrays: Any) -> None:
    # A thread's units are whole vectors: what a unit's sum is does not depend on how many threads there are.
    n_groups = -(-x.shape[1] // _LANES)
    parts = n_threads(n_groups) if x.numel() > _FEW else 1
    in_parallel(loop, n_groups, *arrays, parts=parts)


@compiled(fastmath=_FLAGS)
def _add(x, total):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        total[j] += x[j]


@compiled(fastmath=_FLAGS)
def _add_squares(x, mean, total):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        apart = x[j] - mean[j]
        total[j] += apart * apart


@compiled(fastmath=_FLAGS)
def _relu(x, scale, shift, y):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        y[j] = max(x[j] * scale[j] + shift[j], _f(0.0))


@compiled(fastmath=_FLAGS)
def _relu_dropout(x, scale, shift, kept, over, y):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        y[j] = max(x[j] * scale[j] + shift[j], _f(0.0)) * (over * _f(kept[j]))


@compiled()
def _forward(  # type: ignore[no-untyped-def]
    part, first, last, x, weight, bias, kept, over, eps, y, mean, variance
):
    n_obs = len(x)
    t = slice(first * _LANES, min(last * _LANES, x.shape[1]))
    m, v, of_rows = mean[t], variance[t], np.empty(t.stop - t.start, np.float32)
    m[:] = 0
    for start in range(0, n_obs, _ROWS):
        of_rows[:] = 0
        for b in range(start, min(start + _ROWS, n_obs)):
            _add(x[b, t], of_rows)
        _add(of_rows, m)
    m /= _f(n_obs)
    v[:] = 0
    for start in range(0, n_obs, _ROWS):
        of_rows[:] = 0
        for b in range(start, min(start + _ROWS, n_obs)):
            _add_squares(x[b, t], m, of_rows)
        _add(of_rows, v)
    v /= _f(n_obs)
    scale = weight[t] / np.sqrt(v + eps)
    shift = bias[t] - m * scale
    drops = len(kept) == n_obs
    for b in range(n_obs):
        if drops:
            _relu_dropout(x[b, t], scale, shift, kept[b, t], over, y[b, t])
        else:
            _relu(x[b, t], scale, shift, y[b, t])


@compiled(fastmath=_FLAGS)
def _gather(upstream, x, y, mean, over, g, of_bias, of_weight):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        passed = upstream[j] * over if y[j] > _f(0.0) else _f(0.0)
        g[j] = passed
        of_bias[j] += passed
        of_weight[j] += passed * (x[j] - mean[j])


@compiled(fastmath=_FLAGS)
def _through_norm(x, mean, scale, of_bias, of_weight, g):  # type: ignore[no-untyped-def]
    vector_code()
    for j in range(len(x)):
        g[j] = scale[j] * (g[j] - of_bias[j] - (x[j] - mean[j]) * of_weight[j])


@compiled()
def _backward(  # type: ignore[no-untyped-def]
    part, first, last, upstream, x, y, weight, mean, variance, over, eps, g_x, g_weight, g_bias
):
    n_obs = len(x)
    t = slice(first * _LANES, min(last * _LANES, x.shape[1]))
    m, of_weight, of_bias = mean[t], g_weight[t], g_bias[t]
    sums = np.empty((2, t.stop - t.start), np.float32)
    of_weight[:] = 0
    of_bias[:] = 0
    for start in range(0, n_obs, _ROWS):
        sums[:] = 0
        for b in range(start, min(start + _ROWS, n_obs)):
            _gather(upstream[b, t], x[b, t], y[b, t], m, over, g_x[b, t], sums[0], sums[1])
        _add(sums[0], of_bias)
        _add(sums[1], of_weight)
    over_deviation = _f(1.0) / np.sqrt(variance[t] + eps)
    of_weight *= over_deviation
    scale = weight[t] * over_deviation
    bias_share, weight_share = of_bias / _f(n_obs), of_weight * over_deviation / _f(n_obs)
    for b in range(n_obs):
        _through_norm(x[b, t], m, scale, bias_share, weight_share, g_x[b, t])
