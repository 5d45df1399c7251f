"""The numba backend: the zero case for every gene as vector code, then a correction at the non-zeros.

Derivation and notation (f, z, u, s, dtheta, dp) are in README.md beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from ..csr import CSR
from ..math_cpu import (
    exp32,
    exp_expm1_32,
    log1p32,
    log1p_share_32,
    log32,
    log_factorial,
    max32,
    nb_at_count,
    vector_code,
)
from ..parallel import compiled, empty, in_parallel, n_threads

_POISSON, _ZIP, _NB, _ZINB = range(4)
_KIND = {"poisson": _POISSON, "zip": _ZIP, "nb": _NB, "zinb": _ZINB}
_FLAGS = {"reassoc", "contract", "nsz", "nnan", "ninf"}
_INLINE = {"contract", "nsz"}  # no reassociation in functions that live on a rounding error
# Genes at a time: what the steps of the zero case hand each other stays in the second-level cache, and
# calling them all, half a microsecond, is little beside their work. Sums are float32 within a tile, float64
# across.
_TILE = 4096
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
    scale: float,
    with_gradient: bool,
    inplace: bool,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """Log-likelihood and ``[d logits, d library, d theta, d pi_logits]``, and of biases, where given.

    Cell b's gradient is multiplied by ``scale`` and, where given, by ``weights[b]``. With ``inplace``
    those of logits and pi_logits are written into these tensors' own memory, which is overwritten too
    if no gradient is asked for.

    Args:
        counts: (B x G).
        logits: ``(B, G)`` float32, or with ``biases`` bfloat16; so is ``pi_logits``.
        library: ``(B,)``.
        theta: as of the op.
        pi_logits: see there.
        theta_index: see there.
        likelihood: see there.
        mean: see there.
        weights: ``(B,)``.
        scale: a number.
        with_gradient: whether gradients are wanted.
        inplace: see above.
        biases: ``(G,)`` each, added to logits and pi_logits on the way, which takes ``inplace``; their
            gradients are the last two.
    """
    n_obs = counts.n_obs
    kind = _KIND[likelihood]
    none = np.empty((0, 0), np.float32)

    logits_ = logits.detach().contiguous()
    pi = None if pi_logits is None else pi_logits.detach().contiguous()
    narrow = logits_.dtype == torch.bfloat16
    assert biases is None or inplace
    assert not narrow or biases is not None
    bias, pi_bias = (none.ravel(), none.ravel()) if biases is None else map(_or_zeros(logits_), biases)
    theta_ = none if theta is None else np.atleast_2d(theta.detach().contiguous().numpy())
    own_row = theta is not None and theta.dim() == 2 and theta_index is None
    if theta_index is not None:
        theta_row = theta_index.numpy()
        if n_obs and not 0 <= theta_row.min() <= theta_row.max() < len(theta_):
            raise ValueError(f"theta_index must lie in [0, {len(theta_)}), reaches {theta_row.max()}")
    else:
        theta_row = np.arange(n_obs) if own_row else np.zeros(n_obs, np.int64)

    g_logits = g_pi = None
    if with_gradient:
        g_logits = logits_ if inplace else empty(logits_.shape)
        g_pi = None if pi is None else pi if inplace else empty(pi.shape)
    parts = n_threads(n_obs)
    # Cells that share a row of theta may be on different threads: one sum for each thread.
    g_theta = (
        np.empty((1, *theta_.shape), np.float32) if own_row else np.zeros((parts, *theta_.shape), np.float32)
    )
    g_bias = np.zeros((0 if biases is None else parts, 2, logits_.shape[1]), np.float32)
    log_p, g_library = torch.empty(n_obs), torch.empty(n_obs)
    upstream = np.full(n_obs, scale, np.float32)
    if weights is not None:
        upstream *= weights.numpy()
    indptr = counts.indptr.numpy()
    with np.errstate(divide="ignore"):  # a theta that a diverging run has brought to 0
        per_theta = none if own_row else 1 / theta_

    in_parallel(
        _rows, n_obs,
        indptr, counts.indices.to(torch.int32).numpy(), counts.data.float().numpy(),
        _longest(indptr),
        none if narrow else logits_.numpy(), library.detach().contiguous().numpy(), theta_,
        per_theta, theta_row, none if pi is None or narrow else pi.numpy(), upstream,
        kind, mean == "softmax", with_gradient, bias, pi_bias, _bits(logits_ if narrow else None),
        _bits(pi if narrow else None),
        log_p.numpy(), none if g_logits is None or narrow else g_logits.numpy(), g_library.numpy(), g_theta,
        none if g_pi is None or narrow else g_pi.numpy(), g_bias,
        parts=parts,
    )  # fmt: skip
    if not with_gradient:
        return log_p, None
    g_theta_ = None
    if theta is not None:
        g_theta_ = torch.from_numpy(g_theta.sum(0) if len(g_theta) > 1 else g_theta[0]).reshape(theta.shape)
    of_biases = [] if biases is None else list(torch.from_numpy(g_bias.sum(0)))
    return log_p, [g_logits, g_library, g_theta_, g_pi, *of_biases]


@numba.njit(nogil=True, cache=True)
def _longest(indptr):  # type: ignore[no-untyped-def]
    most = 0
    for b in range(len(indptr) - 1):
        most = max(most, indptr[b + 1] - indptr[b])
    return most


def _or_zeros(logits: torch.Tensor) -> Callable[[torch.Tensor | None], NDArray[np.float32]]:
    def given(bias: torch.Tensor | None) -> NDArray[np.float32]:
        return np.zeros(logits.shape[1], np.float32) if bias is None else bias.detach().contiguous().numpy()

    return given


def _bits(narrow: torch.Tensor | None) -> NDArray[np.uint16]:
    """The bits of bfloat16, which numpy has not."""
    return np.empty((0, 0), np.uint16) if narrow is None else narrow.view(torch.uint16).numpy()


# Functions of one pass over genes `lo` to `hi` of a row. Arrays of a tile begin at 0.


@compiled(fastmath=_FLAGS)
def _add_to(row, bias):  # type: ignore[no-untyped-def]
    vector_code()
    for g in range(len(row)):
        row[g] += bias[g]


@compiled(fastmath=_INLINE)
def _widen(bits, bias, row):  # type: ignore[no-untyped-def]
    """The upper half of a float32 is a bfloat16."""
    vector_code()
    for g in range(len(row)):
        row[g] = np.uint32(np.uint32(bits[g]) << np.uint32(16)).view(_f) + bias[g]


@compiled(fastmath=_INLINE)
def _narrow(row, bits):  # type: ignore[no-untyped-def]
    """Rounded to the nearest, ties to even."""
    vector_code()
    for g in range(len(row)):
        wide = _f(row[g]).view(np.uint32)
        odd = (wide >> np.uint32(16)) & np.uint32(1)
        bits[g] = np.uint16(np.uint32(wide + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled(fastmath=_FLAGS)
def _largest(row, lo, hi):  # type: ignore[no-untyped-def]
    vector_code()
    top = row[lo]
    for g in range(lo, hi):
        top = max32(top, row[g])
    return top


@compiled(fastmath=_FLAGS)
def _exp_shifted(row, lo, hi, shift, mu):  # type: ignore[no-untyped-def]
    vector_code()
    total = _f(0.0)
    for g in range(lo, hi):
        e = exp32(row[g] - shift)
        mu[g] = e
        total += e
    return total


@compiled(fastmath=_FLAGS)
def _pull(u, mu, pull, weight):  # type: ignore[no-untyped-def]
    """From u to the gradient of the logits."""
    vector_code()
    for g in range(len(u)):
        u[g] = weight * (u[g] - mu[g] * pull)


@compiled(fastmath=_FLAGS)
def _mean(lo, hi, mu, scale, u):  # type: ignore[no-untyped-def]
    """The mean, and u of a zero under Poisson, whose sum is also that of f."""
    vector_code()
    total = _f(0.0)
    for g in range(lo, hi):
        m = mu[g] * scale
        mu[g] = m
        u[g] = -m
        total -= m
    return total


@compiled(fastmath=_FLAGS)
def _mean_and_ratio(lo, hi, mu, scale, inv_theta, share, log1p_r):  # type: ignore[no-untyped-def]
    """The mean, and of NB: 1 / (1 + r) and log(1 + r)."""
    vector_code()
    for g in range(lo, hi):
        k = g - lo
        m = mu[g] * scale
        r = m * inv_theta[g]
        one_over = _f(1.0) / (_f(1.0) + r)
        mu[g] = m
        share[k] = one_over
        log1p_r[k] = log1p_share_32(r, one_over)


@compiled(fastmath=_INLINE, forceinline=True)
def _dtheta_zero(r, share, log1p_r):  # type: ignore[no-untyped-def]
    # r / (1 + r) - log1p(r) cancels for small r; series instead.
    series = r * r * (_f(-0.5) + r * (_f(2.0 / 3) + r * (_f(-0.75) + r * _f(0.8))))
    return series if r < _f(0.03) else r * share - log1p_r


@compiled(fastmath=_FLAGS)
def _zero_nb(lo, hi, mu, theta, inv_theta, share, log1p_r, weight, u, g_theta):  # type: ignore[no-untyped-def]
    vector_code()
    total_f, total_u = _f(0.0), _f(0.0)
    for g in range(lo, hi):
        k = g - lo
        u_g = -mu[g] * share[k]
        u[g] = u_g
        g_theta[g] += weight * _dtheta_zero(mu[g] * inv_theta[g], share[k], log1p_r[k])
        total_f -= theta[g] * log1p_r[k]
        total_u += u_g
    return total_f, total_u


@compiled(fastmath=_FLAGS)
def _exponentials(lo, hi, theta, log1p_r, pi, p, q, ez, ez_minus_1):  # type: ignore[no-untyped-def]
    """Of ZIP and ZINB: p (a copy, for its gradient may be written over it), e^-|p|, e^z and e^z - 1."""
    vector_code()
    for g in range(lo, hi):
        k = g - lo
        p[g] = pi[g]
        q[k] = exp32(-abs(pi[g]))
        ez[k], ez_minus_1[k] = exp_expm1_32(-theta[g] * log1p_r[k])


@compiled(fastmath=_INLINE, forceinline=True)
def _inflate(p, q, ez, ez_minus_1):  # type: ignore[no-untyped-def]
    """Of log(pi + (1 - pi) e^z): what to take the logarithm of, what to add to it, d/dz, d/dp, is it tiny."""
    positive = p >= _f(0.0)
    # With e^p = 1/q or q, every term is divided by the larger of 1 and e^p: nothing overflows.
    kept = q * ez if positive else ez
    num = (_f(1.0) if positive else q) + kept
    den = _f(1.0) + q
    inverse = _f(1.0) / (num * den)
    minus_1 = (q if positive else _f(1.0)) * ez_minus_1 * (num * inverse)
    # log(ratio) is precise from ratio - 1 near 1 and from ratio itself near 0.
    near_1 = minus_1 > _f(-0.5)
    argument = _f(1.0) + minus_1 if near_1 else num * (num * inverse)
    lost = minus_1 - (argument - _f(1.0)) if near_1 else _f(0.0)
    # Where pi and the zero case both vanish exp underflows; those entries are left to float64.
    tiny = (p < _f(-80.0)) & (ez < _f(1.8e-35))
    return (
        _f(1.0) if tiny else argument,
        _f(0.0) if tiny else lost,
        _f(0.0) if tiny else kept * (den * inverse),
        -q * ez_minus_1 * inverse,
        tiny,
    )


@compiled(fastmath=_FLAGS)
def _zero_zip(lo, hi, mu, p, q, ez, ez_minus_1, weight, u, g_pi, ratio, rest):  # type: ignore[no-untyped-def]
    vector_code()
    total_u, n_tiny = _f(0.0), _f(0.0)
    for g in range(lo, hi):
        k = g - lo
        ratio[k], rest[k], s, dp, tiny = _inflate(p[g], q[k], ez[k], ez_minus_1[k])
        u_g = -s * mu[g]
        u[g] = u_g
        g_pi[g] = _LEFT_OUT if tiny else weight * dp
        total_u += u_g
        n_tiny += _f(1.0) if tiny else _f(0.0)
    return total_u, n_tiny


@compiled(fastmath=_FLAGS)
def _zero_zinb(  # type: ignore[no-untyped-def]
    lo, hi, mu, inv_theta, share, log1p_r, p, q, ez, ez_minus_1, weight, u, g_theta, g_pi, ratio, rest
):
    vector_code()
    total_u, n_tiny = _f(0.0), _f(0.0)
    for g in range(lo, hi):
        k = g - lo
        ratio[k], rest[k], s, dp, tiny = _inflate(p[g], q[k], ez[k], ez_minus_1[k])
        u_g = -s * mu[g] * share[k]
        u[g] = u_g
        g_theta[g] += weight * s * _dtheta_zero(mu[g] * inv_theta[g], share[k], log1p_r[k])
        g_pi[g] = _LEFT_OUT if tiny else weight * dp
        total_u += u_g
        n_tiny += _f(1.0) if tiny else _f(0.0)
    return total_u, n_tiny


@compiled(fastmath=_FLAGS)
def _sum_of_logs(n, ratio, rest):  # type: ignore[no-untyped-def]
    vector_code()
    total = _f(0.0)
    for k in range(n):
        total += log32(ratio[k]) + rest[k]
    return total


@compiled()
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


@compiled()
def _zero_case(  # type: ignore[no-untyped-def]
    kind, lo, hi, scale, mu, theta, inv_theta, pi, p, weight, u, g_theta, g_pi, scratch
):
    """Every entry as if zero: scales mu, writes u, dp and p, adds to dtheta, returns sums of f and u."""
    if kind == _POISSON:
        total = np.float64(_mean(lo, hi, mu, scale, u))
        return total, total
    share, log1p_r, q, ez, ez_minus_1, ratio, rest, ones = scratch
    if kind == _ZIP:
        # z = -mu, which is -theta log(1 + r) of a theta of one.
        _mean(lo, hi, mu, scale, u)
        log1p_r[: hi - lo] = mu[lo:hi]
        theta = ones
    else:
        _mean_and_ratio(lo, hi, mu, scale, inv_theta, share, log1p_r)
    if kind == _NB:
        sums = _zero_nb(lo, hi, mu, theta, inv_theta, share, log1p_r, weight, u, g_theta)
        return np.float64(sums[0]), np.float64(sums[1])
    _exponentials(lo, hi, theta, log1p_r, pi, p, q, ez, ez_minus_1)
    if kind == _ZIP:
        sum_u, n_tiny = _zero_zip(lo, hi, mu, p, q, ez, ez_minus_1, weight, u, g_pi, ratio, rest)
    else:
        sum_u, n_tiny = _zero_zinb(
            lo, hi, mu, inv_theta, share, log1p_r, p, q, ez, ez_minus_1, weight,
            u, g_theta, g_pi, ratio, rest,
        )  # fmt: skip
    f, total_u = np.float64(_sum_of_logs(hi - lo, ratio, rest)), np.float64(sum_u)
    if n_tiny > 0:
        for g in range(lo, hi):
            if g_pi[g] == _LEFT_OUT:
                theta_g = np.float64(theta[g]) if kind == _ZINB else 1.0
                e = _zero_in_float64(np.float64(mu[g]), theta_g, np.float64(p[g]), kind == _ZINB)
                u[g], g_pi[g] = e[1], weight * _f(e[3])
                if kind == _ZINB:
                    g_theta[g] += weight * _f(e[2])
                f, total_u = f + e[0], total_u + e[1]
    return f, total_u


@compiled(fastmath=_FLAGS)
def _at_counts(n, x, log_scale, a, mu, u):  # type: ignore[no-untyped-def]
    """Poisson at n counts: writes u, returns the sums of f (without log x!) and u."""
    vector_code()
    total_f, total_u = 0.0, 0.0
    for k in range(n):
        x_k = np.float64(x[k])
        total_f += x_k * (np.float64(a[k]) + log_scale) - np.float64(mu[k])
        u_k = x_k - np.float64(mu[k])
        u[k] = _f(u_k)
        total_u += u_k
    return total_f, total_u


@compiled(fastmath=_FLAGS)
def _nb_at_counts(n, x, log_scale, a, mu, theta, inv_theta, u, g_theta):  # type: ignore[no-untyped-def]
    """The same for NB; turns g_theta, which holds the zero case's, into what it must be changed by."""
    vector_code()
    total_f, total_u = 0.0, 0.0
    for k in range(n):
        x_k, m, t = np.float64(x[k]), np.float64(mu[k]), np.float64(theta[k])
        rise, log_over, slope = nb_at_count(x_k, t, m)
        r = mu[k] * inv_theta[k]
        share = _f(1.0) / (_f(1.0) + r)
        log1p_r = log1p_share_32(r, share)
        total_f += rise + x_k * (log_over + np.float64(a[k]) + log_scale) - t * np.float64(log1p_r)
        g_theta[k] = _f(slope) + _dtheta_zero(r, share, log1p_r) - g_theta[k]
        u_k = (x_k - m) * np.float64(share)
        u[k] = _f(u_k)
        total_u += u_k
    return total_f, total_u


@compiled(fastmath=_FLAGS)
def _not_inflated(n, p, weight, g_pi):  # type: ignore[no-untyped-def]
    """Log(1 - pi) at n counts: writes dp, returns the sum."""
    vector_code()
    total = _f(0.0)
    for k in range(n):
        q = exp32(-abs(p[k]))
        total -= max(p[k], _f(0.0)) + log1p32(q)
        g_pi[k] = -weight * (_f(1.0) if p[k] >= _f(0.0) else q) / (_f(1.0) + q)
    return total


@compiled()
def _correct(  # type: ignore[no-untyped-def]
    kind, n, gene, x, a, log_scale, mu, theta, inv_theta, p, weight, u, g_theta, g_pi, entry, scratch
):
    """At n non-zeros: take back what the zero case added and put in what is right; change of f and u."""
    has_theta, inflated = kind >= _NB, kind == _ZIP or kind == _ZINB
    m, th, inv, u_n, dth, dp, pi, p_n = (
        entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7]
    )  # fmt: skip
    for k in range(n):
        m[k] = mu[gene[k]]
        if has_theta:
            th[k], inv[k] = theta[gene[k]], inv_theta[gene[k]]
        if inflated:
            pi[k] = p[gene[k]]
    dth[:n] = 0
    f_zero, u_zero = _zero_case(
        kind, np.uintp(0), np.uintp(n), _f(1.0), m, th, inv, pi, p_n, _f(1.0), u_n, dth, dp, scratch
    )
    if has_theta:
        f, total_u = _nb_at_counts(n, x, log_scale, a, m, th, inv, u_n, dth)
    else:
        f, total_u = _at_counts(n, x, log_scale, a, m, u_n)
    if inflated:
        f += np.float64(_not_inflated(n, p_n, weight, dp))
    for k in range(n):
        g = gene[k]
        u[g] = u_n[k]
        if has_theta:
            g_theta[g] += weight * dth[k]
        if inflated:
            g_pi[g] = dp[k]
    return f - f_zero, total_u - u_zero


@compiled()
def _rows(  # type: ignore[no-untyped-def]
    part, first, last,
    indptr, indices, data, most, logits, library, theta, inv_theta, theta_row, pi, weights,
    kind, softmax, with_gradient, bias, pi_bias, narrow_logits, narrow_pi,
    log_p, g_logits, g_library, g_theta, g_pi, g_bias,
):  # fmt: skip
    n_vars = max(logits.shape[1], narrow_logits.shape[1])
    narrow, biased = narrow_logits.shape[0] > 0, len(bias) > 0
    inflated, has_theta = kind == _ZIP or kind == _ZINB, kind >= _NB
    own_row = has_theta and inv_theta.shape[0] == 0
    slot = 0 if own_row else part
    n_tiles = (n_vars + _TILE - 1) // _TILE
    rows = np.empty((6, n_vars), np.float32)
    mu, p, spare_u, spare_pi, spare_inv, none = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    tiles, entry = np.empty((7, _TILE), np.float32), np.empty((8, _TILE), np.float32)
    ones = np.ones(n_vars if kind == _ZIP else 0, np.float32)
    scratch = (tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5], tiles[6], ones)
    shifts, sums = np.empty(n_tiles, np.float32), np.empty(n_tiles, np.float64)
    # The logits at the non-zeros are kept, since their gradient may be written over them.
    gene, x, a = np.empty(most, np.int64), np.empty(most, np.float32), np.empty(most, np.float32)
    for b in range(first, last):
        weight = weights[b]
        # As float32 in the cache; u and dp may be written over row and p_row.
        row = spare_u if narrow else logits[b]
        p_row = none if not inflated else spare_pi if narrow else pi[b]
        u = g_logits[b] if with_gradient and not narrow else spare_u
        dp = g_pi[b] if with_gradient and inflated and not narrow else spare_pi
        if narrow:
            _widen(narrow_logits[b], bias, row)
            if inflated:
                _widen(narrow_pi[b], pi_bias, p_row)
        elif biased:
            _add_to(row, bias)
            if inflated:
                _add_to(p_row, pi_bias)
        th = theta[theta_row[b]] if has_theta else none
        dth = g_theta[slot, theta_row[b]] if has_theta else none
        if own_row:
            spare_inv[:] = _f(1.0) / th
            dth[:] = 0
        inv = spare_inv if own_row or not has_theta else inv_theta[theta_row[b]]

        for i in range(n_tiles):
            lo, hi = np.uintp(i * _TILE), np.uintp(min(n_vars, (i + 1) * _TILE))
            shifts[i] = _largest(row, lo, hi) if softmax else _f(0.0)
            sums[i] = _exp_shifted(row, lo, hi, shifts[i], mu)
        shift, total = 0.0, 1.0
        if softmax and n_tiles:
            shift, total = np.float64(shifts.max()), 0.0
            for i in range(n_tiles):
                total += sums[i] * math.exp(np.float64(shifts[i]) - shift)
        log_scale = math.log(np.float64(library[b])) - shift - math.log(total)

        f, total_u, n = 0.0, 0.0, 0
        for k in range(indptr[b], indptr[b + 1]):
            if data[k] != _f(0.0):
                g = indices[k]
                gene[n], x[n], a[n] = g, data[k], row[g]
                f -= log_factorial(np.float64(data[k]))
                n += 1

        for i in range(n_tiles):
            lo, hi = np.uintp(i * _TILE), np.uintp(min(n_vars, (i + 1) * _TILE))
            scale = _f(np.float64(library[b]) / total * math.exp(np.float64(shifts[i]) - shift))
            f_tile, u_tile = _zero_case(
                kind, lo, hi, scale, mu, th, inv, p_row, p, weight, u, dth, dp, scratch
            )
            f, total_u = f + f_tile, total_u + u_tile
        for k in range(0, n, _TILE):
            t = slice(k, min(n, k + _TILE))
            f_change, u_change = _correct(
                kind, t.stop - k, gene[t], x[t], a[t], log_scale, mu, th, inv, p, weight,
                u, dth, dp, entry, scratch,
            )  # fmt: skip
            f, total_u = f + f_change, total_u + u_change

        log_p[b] = f
        g_library[b] = weight * _f(total_u / np.float64(library[b]))
        if with_gradient:
            _pull(u, mu, _f(total_u / np.float64(library[b])) if softmax else _f(0.0), weight)
            if biased:
                _add_to(g_bias[part, 0], u)
                if inflated:
                    _add_to(g_bias[part, 1], dp)
            if narrow:
                _narrow(u, narrow_logits[b])
                if inflated:
                    _narrow(dp, narrow_pi[b])
