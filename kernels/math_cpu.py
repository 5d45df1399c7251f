"""exp, log, log1p in float32 as polynomials that LLVM turns into vector code, and lgamma in float64.

numba without Intel's SVML calls libm once per element (about 10 ns); these take about 0.3 ns each on
eight or sixteen lanes. The polynomials for exp and log are those of Cephes (Moshier), 2 ulp or better
over the ranges used; tests/kernels/test_math.py holds them against mpmath.
"""

from __future__ import annotations

import math

import numba
import numpy as np

# No reassociation here: log1p below lives on a rounding error that it would cancel away.
_FLAGS = {"contract", "nsz", "nnan", "ninf"}
_f = np.float32


@numba.njit(fastmath=_FLAGS, error_model="numpy", nogil=True, cache=True, forceinline=True)
def exp32(x):  # type: ignore[no-untyped-def]
    """Exp of a float32; below -87 it stays at exp(-87) = 1.6e-38, above 88 at exp(88) = 1.7e38."""
    return exp_expm1_32(x)[0]


@numba.njit(fastmath=_FLAGS, error_model="numpy", nogil=True, cache=True, forceinline=True)
def exp_expm1_32(x):  # type: ignore[no-untyped-def]
    """``(exp(x), exp(x) - 1)`` of a float32, the second to full precision near 0."""
    x = x if x > _f(-87.0) else _f(-87.0)
    x = x if x < _f(88.0) else _f(88.0)
    n = np.floor(x * _f(1.44269504) + _f(0.5))
    r = x - n * _f(0.693359375)
    r = r + n * _f(2.12194440e-4)
    p = _f(1.9875691500e-4)
    p = p * r + _f(1.3981999507e-3)
    p = p * r + _f(8.3334519073e-3)
    p = p * r + _f(4.1665795894e-2)
    p = p * r + _f(1.6666665459e-1)
    p = p * r + _f(5.0000001201e-1)
    p = p * r * r + r
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    e = (p + _f(1.0)) * power
    return e, p if n == _f(0.0) else e - _f(1.0)


@numba.njit(fastmath=_FLAGS, error_model="numpy", nogil=True, cache=True, forceinline=True)
def log32(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a normal positive float32."""
    bits = np.float32(x).view(np.int32)
    # Split as 2^e * m with m in [sqrt(1/2), sqrt(2)).
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    m = np.int32(bits - (e << np.int32(23))).view(np.float32) - _f(1.0)
    z = m * m
    p = _f(7.0376836292e-2)
    p = p * m + _f(-1.1514610310e-1)
    p = p * m + _f(1.1676998740e-1)
    p = p * m + _f(-1.2420140846e-1)
    p = p * m + _f(1.4249322787e-1)
    p = p * m + _f(-1.6668057665e-1)
    p = p * m + _f(2.0000714765e-1)
    p = p * m + _f(-2.4999993993e-1)
    p = p * m + _f(3.3333331174e-1)
    k = np.float32(e)
    y = p * m * z + k * _f(-2.12194440e-4) - _f(0.5) * z
    return m + y + k * _f(0.693359375)


@numba.njit(fastmath=_FLAGS, error_model="numpy", nogil=True, cache=True, forceinline=True)
def log1p32(x):  # type: ignore[no-untyped-def]
    """log(1 + x) of a float32 x >= 0, to full precision near 0."""
    u = _f(1.0) + x
    # (x - (u - 1)) is what rounding 1 + x lost; beyond 2^24 nothing of it is left to correct.
    lost = x - (u - _f(1.0))
    return log32(u) + lost / u


@numba.njit(error_model="numpy", nogil=True, cache=True)
def lgamma_digamma(x):  # type: ignore[no-untyped-def]
    """``(lgamma(x), digamma(x))`` of a float64 x > 0: recurrence up to 8, then Stirling's series."""
    product, shift = 1.0, 0.0
    while x < 8.0:
        product *= x
        shift += 1.0 / x
        x += 1.0
    inv = 1.0 / x
    inv2 = inv * inv
    log_x = math.log(x)
    series = inv * (
        1.0 / 12
        - inv2
        * (
            1.0 / 360
            - inv2 * (1.0 / 1260 - inv2 * (1.0 / 1680 - inv2 * (1.0 / 1188 - inv2 * 691.0 / 360360)))
        )
    )
    lgamma = (x - 0.5) * log_x - x + 0.9189385332046727 + series - math.log(product)
    digamma = (
        log_x
        - 0.5 * inv
        - inv2
        * (
            1.0 / 12
            - inv2
            * (
                1.0 / 120
                - inv2 * (1.0 / 252 - inv2 * (1.0 / 240 - inv2 * (1.0 / 132 - inv2 * 691.0 / 32760)))
            )
        )
        - shift
    )
    return lgamma, digamma


@numba.njit(error_model="numpy", nogil=True, cache=True)
def rising_factorial(theta, x):  # type: ignore[no-untyped-def]
    """``(lgamma(theta + x) - lgamma(theta), digamma(theta + x) - digamma(theta))`` for a count x > 0."""
    high = lgamma_digamma(theta + x)
    low = lgamma_digamma(theta)
    return high[0] - low[0], high[1] - low[1]
