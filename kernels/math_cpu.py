"""exp, log, log1p as polynomials that LLVM turns into vector code, lgamma and digamma in float64.

numba without Intel's SVML calls libm once per element (about 10 ns); these take 0.1 to 0.2 ns each on sixteen
lanes. The coefficients were fitted to the smallest relative error over the reduced range (2e-8 for exp and
log in float32, 2e-11 for log in float64); tests/kernels/test_math.py holds them against mpmath.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# No reassociation here: log1p below lives on a rounding error that it would cancel away.
_FLAGS = {"contract", "nsz", "nnan", "ninf"}
_f, _i, _d = np.float32, np.int32, np.float64
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, found in the low bits


def _inline(function: Any) -> Any:
    return numba.njit(fastmath=_FLAGS, error_model="numpy", nogil=True, cache=True, forceinline=True)(
        function
    )


def _intrinsic(function: Any) -> Any:
    # Its caller does not pass the context that its definition takes, which a type checker cannot know.
    return intrinsic(function)


@_intrinsic
def vector_code(_context):  # type: ignore[no-untyped-def]
    """Written at the head of a function of array loops: no two of its arrays overlap; use the widest vectors.

    Without the first, a loop asks at run time whether its arrays are too near each other to be vectorised,
    and adds in another order if they are: the same numbers would then give another sum wherever malloc
    happened to put them. Without the second, LLVM uses half of AVX-512 on Intel.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        function = builder.function
        # llvmlite knows no attributes with values; they are written out as they stand.
        set.add(function.attributes, '"prefer-vector-width"="512"')
        for argument in function.args:
            # Of an array, .0 and .1 are the owner of its memory, .4 the data.
            if isinstance(argument.type, ir.PointerType) and argument.name.endswith(".4"):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.none(), codegen


@_intrinsic
def max32(_context, x, y):  # type: ignore[no-untyped-def]
    """The larger of two float32, in the one form whose running maximum LLVM vectorises."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind] * 2))
        return builder.call(function, args, fastmath=("nnan", "nsz", "ninf"))

    return types.float32(types.float32, types.float32), codegen


@_inline
def exp32(x):  # type: ignore[no-untyped-def]
    """Exp of a float32; below -87 it stays at exp(-87) = 1.6e-38, above 88 at exp(88) = 1.7e38."""
    return exp_expm1_32(x)[0]


@_inline
def exp_expm1_32(x):  # type: ignore[no-untyped-def]
    """``(exp(x), exp(x) - 1)`` of a float32, the second to full precision near 0."""
    x = max(x, _f(-87.0))
    x = min(x, _f(88.0))
    shifted = x * _f(1.44269504) + _MAGIC
    n = shifted - _MAGIC
    # ln 2 in two parts, of which the first times n is exact.
    r = x - n * _f(0.693359375)
    r = r + n * _f(2.12194440e-4)
    p = _f(1.3946448052e-3)
    p = p * r + _f(8.3665840952e-3)
    p = p * r + _f(4.1666282052e-2)
    p = p * r + _f(1.6666542991e-1)
    p = p * r + _f(5.0000000619e-1)
    p = p * r * r + r
    # Times 2^n: n is added to the exponent's bits.
    exponent = _i(_f(shifted).view(_i) << _i(23))
    e = _i(_f(p + _f(1.0)).view(_i) + exponent).view(_f)
    return e, p if n == _f(0.0) else e - _f(1.0)


@_inline
def log32(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a normal positive float32."""
    bits = _f(x).view(_i)
    # Split as 2^e * (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)).
    e = _i(_i(bits - _i(0x3F3504F3)) >> _i(23))
    m = _i(bits - _i(e << _i(23))).view(_f) - _f(1.0)
    p = _f(8.9177827453e-2)
    p = p * m + _f(-1.4350188108e-1)
    p = p * m + _f(1.4876982184e-1)
    p = p * m + _f(-1.6565636159e-1)
    p = p * m + _f(1.9965396496e-1)
    p = p * m + _f(-2.5001746906e-1)
    p = p * m + _f(3.3333858100e-1)
    z = m * m
    k = _f(e)
    y = p * m * z + k * _f(-2.12194440e-4) - _f(0.5) * z
    return m + y + k * _f(0.693359375)


@_inline
def log1p32(x):  # type: ignore[no-untyped-def]
    """log(1 + x) of a float32 x >= 0, to full precision near 0."""
    return log1p_share_32(x, _f(1.0) / (_f(1.0) + x))


@_inline
def log1p_share_32(x, share):  # type: ignore[no-untyped-def]
    """The same where ``share = 1 / (1 + x)`` is known, which saves a division."""
    u = _f(1.0) + x
    # (x - (u - 1)) is what rounding 1 + x lost; beyond 2^24 nothing of it is left to correct.
    lost = x - (u - _f(1.0))
    return log32(u) + lost * share


@_inline
def log64(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a normal positive float64, to 2e-11 of its value."""
    bits = _d(x).view(np.int64)
    e = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    m = np.int64(bits - (e << np.int64(52))).view(_d) - 1.0
    p = -0.050057398560748955
    p = p * m + 0.090369180824734383
    p = p * m - 0.091099775017652266
    p = p * m + 0.090310072162755434
    p = p * m - 0.099228381671777824
    p = p * m + 0.11109481863170483
    p = p * m - 0.12503219754385584
    p = p * m + 0.14285860677823669
    p = p * m - 0.16666611733567152
    p = p * m + 0.19999997848702774
    p = p * m - 0.25000000267154865
    p = p * m + 0.33333333337491099
    z = m * m
    return m + (p * m * z - 0.5 * z) + _d(e) * 0.6931471805599453


@_inline
def _stirling(inv):  # type: ignore[no-untyped-def]
    """``(lgamma, digamma)`` of 1 / inv >= 4 without their terms in log: series, 2e-9 at worst."""
    inv2 = inv * inv
    lgamma = inv * (1.0 / 12 - inv2 * (1.0 / 360 - inv2 * (1.0 / 1260 - inv2 * (1.0 / 1680 - inv2 / 1188))))
    digamma = -0.5 * inv - inv2 * (
        1.0 / 12 - inv2 * (1.0 / 120 - inv2 * (1.0 / 252 - inv2 * (1.0 / 240 - inv2 / 132)))
    )
    return lgamma, digamma


@_inline
def nb_at_count(x, theta, mu):  # type: ignore[no-untyped-def]
    """What a count x > 0 adds to a negative binomial beyond its zero case, in float64 without a branch.

    ``sum over k < x of log((theta + k) / (theta + mu)) = rise + x * log_over``, where sums over k are
    differences of lgamma and digamma, shifted up by four and expanded (Stirling). Differences of nearby
    logarithms are logarithms of ratios, so that nothing cancels for large theta.

    Returns:
        ``rise``, ``log_over`` and the sum's derivative by theta.
    """
    y = theta + x
    low, high = theta + 4.0, y + 4.0
    p_low = theta * (theta + 1.0) * ((theta + 2.0) * (theta + 3.0))
    p_high = y * (y + 1.0) * ((y + 2.0) * (y + 3.0))
    # Derivatives of these products, (2 t + 3) (2 t (t + 3) + 2).
    slope_low = (2.0 * theta + 3.0) * (2.0 * theta * (theta + 3.0) + 2.0)
    slope_high = (2.0 * y + 3.0) * (2.0 * y * (y + 3.0) + 2.0)
    both = theta + mu
    inverse = 1.0 / (low * high * both)
    over, inv_low, inv_high = inverse * low * high, inverse * high * both, inverse * low * both
    inv_products = 1.0 / (p_low * p_high)
    ratio = x * inv_low
    rounded = 1.0 + ratio
    log_ratio = log64(rounded) + (ratio - (rounded - 1.0)) * (low * inv_high)
    lgamma_low, digamma_low = _stirling(inv_low)
    lgamma_high, digamma_high = _stirling(inv_high)
    rise = (low - 0.5) * log_ratio - x + (lgamma_high - lgamma_low) - log64(p_high * p_high * inv_products)
    slope = log_ratio + (digamma_high - digamma_low)
    slope -= (slope_high * p_low - slope_low * p_high) * inv_products
    return rise, log64(high * over), slope - x * over


@numba.njit(error_model="numpy", nogil=True, cache=True)
def log_factorial(x):  # type: ignore[no-untyped-def]
    """``lgamma(x + 1)`` of a float64 x >= 0: a table for the counts there mostly are."""
    if x < _TABLE and x == math.floor(x):
        return _LOG_FACTORIAL[int(x)]
    return math.lgamma(x + 1.0)


_TABLE = 1024
_LOG_FACTORIAL = np.array([math.lgamma(x + 1.0) for x in range(_TABLE)])
