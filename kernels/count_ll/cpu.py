"""The numba backend: the zero case for every gene as vector code, then a correction at each non-zero.

Derivation and notation (f, u, dtheta, dp) are in README.md beside this file.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch

from ..csr import CSR
from ..math_cpu import exp32, exp_expm1_32, lgamma_digamma, log1p32, log32, rising_factorial
from ..parallel import in_parallel, n_threads

_POISSON, _ZIP, _NB, _ZINB = range(4)
_KIND = {"poisson": _POISSON, "zip": _ZIP, "nb": _NB, "zinb": _ZINB}
_FLAGS = {"reassoc", "contract", "nsz", "nnan", "ninf"}
_INLINE = {"contract", "nsz"}  # no reassociation in functions that live on a rounding error
_TILE = 1024  # sums are float32 within a tile and float64 across tiles
_TABLE = 1024
_LOG_FACTORIAL = np.array([math.lgamma(x + 1.0) for x in range(_TABLE)])
_f = np.float32
_LEFT_OUT = _f(2e30)  # marks an entry; no gradient of pi is this large


def run(
    counts: CSR,
    logits: torch.Tensor,
    library: torch.Tensor,
    theta: torch.Tensor | None,
    pi_logits: torch.Tensor | None,
    theta_index: torch.Tensor | None,
    likelihood: str,
    mean: str,
    *,
    weights: torch.Tensor | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """``(log_p, [d logits, d library, d theta, d pi_logits])`` cell b's gradient times ``weights[b]``."""
    n_obs = counts.n_obs
    kind = _KIND[likelihood]
    empty2 = np.empty((0, 0), np.float32)

    logits_ = logits.detach().contiguous().numpy()
    pi = empty2 if pi_logits is None else pi_logits.detach().contiguous().numpy()
    theta_ = empty2 if theta is None else np.atleast_2d(theta.detach().contiguous().numpy())
    own_row = theta is not None and theta.dim() == 2 and theta_index is None
    if theta_index is not None:
        theta_row = theta_index.numpy()
    else:
        theta_row = np.arange(n_obs) if own_row else np.zeros(n_obs, np.int64)

    parts = n_threads(n_obs)
    g_logits = torch.empty_like(logits) if with_gradient else None
    g_pi = torch.empty_like(pi_logits) if with_gradient and pi_logits is not None else None
    g_library = torch.empty_like(library)
    # Cells that share a row of theta may be on different threads: one sum for each thread.
    g_theta = np.zeros((1 if own_row else parts, *theta_.shape), np.float32)
    log_p = torch.empty_like(library)

    in_parallel(
        _rows, n_obs,
        counts.indptr.numpy(), counts.indices.to(torch.int32).numpy(), counts.data.float().numpy(),
        logits_, library.detach().contiguous().numpy(), theta_, theta_row, pi,
        np.ones(n_obs, np.float32) if weights is None else weights.numpy(),
        kind, mean == "softmax", own_row,
        log_p.numpy(), empty2 if g_logits is None else g_logits.numpy(), g_library.numpy(), g_theta,
        empty2 if g_pi is None else g_pi.numpy(),
        parts=parts,
    )  # fmt: skip
    if not with_gradient:
        return log_p, None
    g_theta_ = None
    if theta is not None:
        g_theta_ = torch.from_numpy(g_theta.sum(0)).reshape(theta.shape)
    return log_p, [g_logits, g_library, g_theta_, g_pi]


def _njit(**options: Any) -> Any:
    return numba.njit(error_model="numpy", nogil=True, cache=True, **options)


@_njit(fastmath=_FLAGS)
def _exp_shifted(row, shift, scratch):  # type: ignore[no-untyped-def]
    for g in range(len(row)):
        scratch[g] = exp32(row[g] - shift)


@_njit(fastmath=_FLAGS)
def _sum(values):  # type: ignore[no-untyped-def]
    # Sums are taken in loops of their own, which write nothing. A loop that also writes asks at run time
    # whether its arrays are too near each other to be vectorised, and adds in another order if they are:
    # the same numbers would then give another sum wherever malloc happened to put them.
    total = 0.0
    for start in range(0, len(values), _TILE):
        part = _f(0.0)
        for g in range(start, min(start + _TILE, len(values))):
            part += values[g]
        total += np.float64(part)
    return total


@_njit()
def _row_max(row, lanes):  # type: ignore[no-untyped-def]
    # A running maximum is a chain that LLVM will not vectorise; 32 of them side by side it will.
    lanes[:] = row[0]
    n = len(row) // 32 * 32
    for start in range(0, n, 32):
        for k in range(32):
            value = row[start + k]
            lanes[k] = value if value > lanes[k] else lanes[k]
    top = row[0]
    for k in range(32):
        top = max(top, lanes[k])
    for g in range(n, len(row)):
        top = max(top, row[g])
    return top


@_njit(fastmath=_FLAGS)
def _pull(u, mu, pull, weight):  # type: ignore[no-untyped-def]
    """From u to the gradient of the logits."""
    for g in range(len(u)):
        u[g] = weight * (u[g] - mu[g] * pull)


# The functions below take the zero case of every gene of a tile. They leave u = d f / d log mu and dp
# where the gradients go, and what the correction at a non-zero must take back in scratch: f and dtheta
# as they were counted, and log1p(mu / theta), which it needs again.


@_njit(fastmath=_FLAGS)
def _zero_poisson(mu, scale, u, f_zero):  # type: ignore[no-untyped-def]
    for g in range(len(mu)):
        m = mu[g] * scale
        mu[g] = m
        u[g] = -m
        f_zero[g] = -m


@_njit(fastmath=_FLAGS)
def _zero_nb(mu, scale, theta, weight, u, g_theta, f_zero, d_zero, log1p_ratio):  # type: ignore[no-untyped-def]
    for g in range(len(mu)):
        m = mu[g] * scale
        r = m / theta[g]
        log1p_r = log1p32(r)
        share = _f(1.0) / (_f(1.0) + r)
        z = -theta[g] * log1p_r
        d = _dtheta_zero(r, share, log1p_r)
        u[g] = -m * share
        mu[g] = m
        g_theta[g] += weight * d
        f_zero[g], d_zero[g], log1p_ratio[g] = z, d, log1p_r


@_njit(fastmath=_INLINE, forceinline=True)
def _dtheta_zero(r, share, log1p_r):  # type: ignore[no-untyped-def]
    # r / (1 + r) - log1p(r) cancels for small r; series instead.
    series = r * r * (_f(-0.5) + r * (_f(2.0 / 3) + r * (_f(-0.75) + r * _f(0.8))))
    return series if r < _f(0.03) else r * share - log1p_r


@_njit(fastmath=_FLAGS)
def _zero_zip(mu, scale, pi, weight, u, g_pi, f_zero):  # type: ignore[no-untyped-def]
    n_tiny = _f(0.0)
    for g in range(len(mu)):
        m = mu[g] * scale
        log_ratio, s, dp, tiny = _inflate(-m, pi[g])
        n_tiny += tiny
        mu[g] = m
        u[g] = -s * m
        g_pi[g] = _LEFT_OUT if tiny > _f(0.0) else weight * dp
        f_zero[g] = log_ratio
    return n_tiny


@_njit(fastmath=_FLAGS)
def _zero_zinb(  # type: ignore[no-untyped-def]
    mu, scale, theta, pi, weight, u, g_theta, g_pi, f_zero, d_zero, log1p_ratio
):
    n_tiny = _f(0.0)
    for g in range(len(mu)):
        m = mu[g] * scale
        r = m / theta[g]
        log1p_r = log1p32(r)
        share = _f(1.0) / (_f(1.0) + r)
        log_ratio, s, dp, tiny = _inflate(-theta[g] * log1p_r, pi[g])
        d = s * _dtheta_zero(r, share, log1p_r)
        n_tiny += tiny
        mu[g] = m
        u[g] = -s * m * share
        g_theta[g] += weight * d
        g_pi[g] = _LEFT_OUT if tiny > _f(0.0) else weight * dp
        f_zero[g], d_zero[g], log1p_ratio[g] = log_ratio, d, log1p_r
    return n_tiny


@_njit(fastmath=_INLINE, forceinline=True)
def _inflate(z, p):  # type: ignore[no-untyped-def]
    """log(pi + (1 - pi) e^z), its derivatives by z and by p, and 1 where float32 cannot hold it."""
    ez, ez_minus_1 = exp_expm1_32(z)
    positive = p >= _f(0.0)
    # With e^p = 1/q or q, every term is divided by the larger of 1 and e^p: nothing overflows.
    q = exp32(-abs(p))
    kept = q * ez if positive else ez
    num = (_f(1.0) if positive else q) + kept
    over_den = _f(1.0) / (_f(1.0) + q)
    over_num = _f(1.0) / num
    minus_1 = (q if positive else _f(1.0)) * ez_minus_1 * over_den
    # log(ratio) is precise from ratio - 1 near 1 and from ratio itself near 0.
    near_1 = minus_1 > _f(-0.5)
    argument = _f(1.0) + minus_1 if near_1 else num * over_den
    lost = minus_1 - (argument - _f(1.0)) if near_1 else _f(0.0)
    log_ratio = log32(argument) + lost
    # Where pi and the zero case both vanish exp underflows; those entries are left to float64.
    tiny = (p < _f(-80.0)) & (z < _f(-80.0))
    return (
        _f(0.0) if tiny else log_ratio,
        _f(0.0) if tiny else kept * over_num,
        -q * ez_minus_1 * over_num * over_den,
        _f(1.0) if tiny else _f(0.0),
    )


@_njit()
def _zero_in_float64(mu, theta, p, has_theta):  # type: ignore[no-untyped-def]
    """``(f, u, dtheta, dp)`` of a zero under ZINB or ZIP, where float32 underflows."""
    log1p_r, share, z, d = 0.0, 1.0, -mu, 0.0
    if has_theta:
        r = mu / theta
        log1p_r, share = math.log1p(r), 1.0 / (1.0 + r)
        z = -theta * log1p_r
        d = r * share - log1p_r if r > 1e-4 else r * r * (-0.5 + r * 2.0 / 3)
    softplus_p = max(p, 0.0) + math.log1p(math.exp(-abs(p)))
    top = max(p, z)
    log_sum = top + math.log(math.exp(p - top) + math.exp(z - top))
    s = math.exp(z - log_sum)
    return log_sum - softplus_p, -s * mu * share, s * d, math.exp(p - log_sum) - math.exp(p - softplus_p)


@_njit()
def _nb_at_count(x, log_mu, mu, theta, log1p_r):  # type: ignore[no-untyped-def]
    """``(f, dtheta)`` of a count x > 0 under NB, without the terms in log x! and in z.

    ``f = sum over k < x of log((theta + k) / (theta + mu)) + x log mu``.
    """
    over = 1.0 / (theta + mu)
    if x <= 12.0 and x == math.floor(x) and theta < 1e20:
        # Counts are small, nearly all of them: a product and one logarithm, which for large theta
        # does not cancel as a difference of lgammas does. (slope / rise) is its derivative's logarithm.
        product, rise, slope, t = 1.0, 1.0, 0.0, theta
        for _ in range(int(x)):
            product *= t * over
            slope = slope * t + rise
            rise *= t
            t += 1.0
        if product > 0.0:
            return math.log(product) + x * log_mu, slope / rise - x * over
    rise, slope = rising_factorial(theta, x)
    return rise + x * (log_mu - math.log(theta) - log1p_r), slope - x * over


@_njit()
def _rows(  # type: ignore[no-untyped-def]
    part, first, last,
    indptr, indices, data, logits, library, theta, theta_row, pi, weights,
    kind, softmax, own_row,
    log_p, g_logits, g_library, g_theta, g_pi,
):  # fmt: skip
    n_vars = logits.shape[1]
    with_gradient = g_logits.shape[1] == n_vars and n_vars > 0
    inflated = kind == _ZIP or kind == _ZINB
    has_theta = kind == _NB or kind == _ZINB
    slot = 0 if own_row else part
    lanes = np.empty(32, np.float32)
    scratch = np.empty((6, n_vars), np.float32)
    mu, f_zero, d_zero, log1p_ratio, spare, none = (
        scratch[0], scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    )  # fmt: skip
    for b in range(first, last):
        weight = weights[b]
        u = g_logits[b] if with_gradient else spare
        dp = g_pi[b] if with_gradient and inflated else none
        p_row = pi[b] if inflated else none
        th = theta[theta_row[b]] if has_theta else none
        dth = g_theta[slot, theta_row[b]] if has_theta else none

        shift = _row_max(logits[b], lanes) if softmax else _f(0.0)
        _exp_shifted(logits[b], shift, mu)
        total = _sum(mu) if softmax else 1.0
        scale = _f(library[b] / total)
        log_scale = math.log(np.float64(library[b])) - np.float64(shift) - math.log(total)

        for start in range(0, n_vars, _TILE):
            t = slice(start, min(start + _TILE, n_vars))
            if kind == _POISSON:
                _zero_poisson(mu[t], scale, u[t], f_zero[t])
            elif kind == _NB:
                _zero_nb(mu[t], scale, th[t], weight, u[t], dth[t], f_zero[t], d_zero[t], log1p_ratio[t])
            else:
                if kind == _ZIP:
                    n_tiny = _zero_zip(mu[t], scale, p_row[t], weight, u[t], dp[t], f_zero[t])
                else:
                    n_tiny = _zero_zinb(
                        mu[t], scale, th[t], p_row[t], weight, u[t], dth[t], dp[t],
                        f_zero[t], d_zero[t], log1p_ratio[t],
                    )  # fmt: skip
                if n_tiny > 0:
                    for g in range(t.start, t.stop):
                        if dp[g] == _LEFT_OUT:
                            theta_g = np.float64(th[g]) if has_theta else 1.0
                            e = _zero_in_float64(np.float64(mu[g]), theta_g, np.float64(p_row[g]), has_theta)
                            f_zero[g], u[g], dp[g] = e[0], e[1], weight * _f(e[3])
                            if has_theta:
                                d_zero[g] = e[2]
                                dth[g] += weight * d_zero[g]
        f, total_u = _sum(f_zero), _sum(u)

        for k in range(indptr[b], indptr[b + 1]):
            x = np.float64(data[k])
            if x == 0.0:
                continue
            g = indices[k]
            m = np.float64(mu[g])
            log_mu = np.float64(logits[b, g]) + log_scale
            tabled = x < _TABLE and x == math.floor(x)
            log_factorial = _LOG_FACTORIAL[int(x)] if tabled else lgamma_digamma(x + 1.0)[0]
            f -= np.float64(f_zero[g]) + log_factorial
            total_u -= np.float64(u[g])
            if has_theta:
                theta_g = np.float64(th[g])
                log1p_r = np.float64(log1p_ratio[g])
                part, slope = _nb_at_count(x, log_mu, m, theta_g, log1p_r)
                f += part - theta_g * log1p_r
                r = _f(m / theta_g)
                share = _f(1.0) / (_f(1.0) + r)
                u[g] = (x - m) * share
                dth[g] += weight * (_f(slope) + _dtheta_zero(r, share, log1p_ratio[g]) - d_zero[g])
            else:
                f += x * log_mu - m
                u[g] = x - m
            total_u += np.float64(u[g])
            if inflated:
                p = p_row[g]
                q = exp32(-abs(p))
                f -= np.float64(max(p, _f(0.0)) + log1p32(q))
                dp[g] = -weight * (_f(1.0) if p >= _f(0.0) else q) / (_f(1.0) + q)

        log_p[b] = f
        g_library[b] = weight * _f(total_u / np.float64(library[b]))
        if with_gradient:
            _pull(u, mu, _f(total_u / np.float64(library[b])) if softmax else _f(0.0), weight)
