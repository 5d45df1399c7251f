"""exp, log, log1p and 1 / x in float32 for Triton, and what varies slowly in lgamma and digamma.

Triton's own operations keep subnormals, at the price of a scaling, or call libdevice, which its interpreter
cannot run. Where NVIDIA has one instruction instead (error about 2^-22, says the PTX manual), that is used on
the GPU and plain arithmetic elsewhere. All the rest runs in the tests on a CPU as it does on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def reciprocal(x):  # type: ignore[no-untyped-def]
    """1 / x of a float32 below 8e37 in magnitude; a tenth of a division, which scales its operands first."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exp32(x):  # type: ignore[no-untyped-def]
    """Exp of a float32; below -87 it is 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_minus_abs(x):  # type: ignore[no-untyped-def]
    """exp(-|x|) of a float32."""
    return tl.exp2(tl.abs(x) * -1.4426950408889634)


@triton.jit
def one_minus_exp_minus(x):  # type: ignore[no-untyped-def]
    """1 - exp(-x) of a float32 x >= 0, to full precision near 0."""
    # (1 - exp(-x)) / x, fitted on [0, 1/4] to 3e-7.
    series = 9.9999977e-1 + x * (-4.9996999e-1 + x * (1.6606225e-1 + x * -3.7728974e-2))
    return tl.where(x < 0.25, x * series, 1.0 - tl.exp2(x * -1.4426950408889634))


@triton.jit
def log_absolute(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a positive float32, with an absolute error of 2e-7 near x = 1."""
    if _PTX:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log2 = tl.log2(x)
    return log2 * 0.6931471805599453


@triton.jit
def log1p_excess(y):  # type: ignore[no-untyped-def]
    """``(log(1 + y), y - log(1 + y), |y| < 1 / 4)`` of a float32 y > -1; the second where the third holds."""
    # (y - log(1 + y)) / y^2, fitted on [-1/4, 1/4] to 2e-6.
    series = -1.9973671e-1 + y * (1.7908149e-1 + y * -1.5390714e-1)
    series = 5.0000103e-1 + y * (-3.3333425e-1 + y * (2.4970429e-1 + y * series))
    excess = y * y * series
    small = tl.abs(y) < 0.25
    return tl.where(small, y - excess, log_absolute(1.0 + y)), excess, small


@triton.jit
def stirling(y):  # type: ignore[no-untyped-def]
    """``(rest, product, slope)``: what Stirling's formulas leave of lgamma and digamma of a float32 y > 0.

    ``lgamma(y) = (y - 1/2) log y - y + log(2 pi) / 2 + rest - log(product)`` and
    ``digamma(y) = log y - 1 / (2 y) - slope``. What they leave falls to zero as y grows: so differences of
    it lose nothing, as those of lgamma would. For y >= 4, product is 1.
    """
    small = y < 4.0
    v = tl.where(small, y, 1.0)
    # lgamma(v) from lgamma(v + 4): the product of (v + k) / (v + 4), and of v + k with its derivative.
    over, over_v = reciprocal(v + 4.0), reciprocal(v)
    product = v * over
    rise, change = v, tl.zeros_like(v) + 1.0
    for k in tl.static_range(1, 4):
        t = v + k
        product *= t * over
        change = change * t + rise
        rise *= t
    log_ratio = log_absolute((v + 4.0) * over_v)
    i = tl.where(small, over, reciprocal(y))
    i2 = i * i
    rest = i * (1.0 / 12 - i2 * (1.0 / 360 - i2 * (1.0 / 1260 - i2 * (1.0 / 1680))))
    slope = i2 * (1.0 / 12 - i2 * (1.0 / 120 - i2 * (1.0 / 252 - i2 * (1.0 / 240))))
    rest += tl.where(small, (v - 0.5) * log_ratio - 4.0, 0.0)
    slope += tl.where(small, change * reciprocal(rise) - log_ratio + 0.5 * (over - over_v), 0.0)
    return rest, tl.where(small, product, 1.0), slope


@triton.jit
def log_excess(t, log_ratio):  # type: ignore[no-untyped-def]
    """``-log(1 - t) - t`` of a float32 t < 1, where ``log_ratio`` is -log(1 - t) as the caller knows it.

    That is t^2 / 2 + t^3 / 3 + ...: near t = 0 the difference would cancel, near t = 1 the sum 1 - t has.
    """
    near = (t > -1.0) & (t < 0.5)
    v = tl.where(near, t, 0.0)
    v = v * reciprocal(2.0 - v)
    # -log(1 - t) = 2 artanh(v), |v| <= 1/3, as in Loader's deviance of the binomial.
    w = v * v
    series = 1.0 / 9 + w * (1.0 / 11 + w * (1.0 / 13 + w * (1.0 / 15)))
    series = 1.0 / 3 + w * (1.0 / 5 + w * (1.0 / 7 + w * series))
    return tl.where(near, v * (t + 2.0 * w * series), log_ratio - t)
