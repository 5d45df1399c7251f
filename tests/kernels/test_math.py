import mpmath
import numba
import numpy as np
import pytest

from atlasvi_kernels import math_cpu

mpmath.mp.dps = 30


@numba.njit
def _apply(function, x, out):
    for i in range(len(x)):
        out[i] = function(x[i])


def _on(function, x):
    x = x.astype(np.float32)
    out = np.full_like(x, np.nan)
    _apply(function, x, out)
    return x, out


@numba.njit
def expm1_32(x):
    return math_cpu.exp_expm1_32(x)[1]


@pytest.mark.parametrize(
    ("function", "oracle", "x"),
    [
        (math_cpu.exp32, mpmath.exp, np.linspace(-86, 86, 997)),
        (math_cpu.log32, mpmath.log, np.geomspace(1e-37, 1e38, 997)),
        (math_cpu.log1p32, mpmath.log1p, np.geomspace(1e-12, 1e37, 997)),
        (expm1_32, mpmath.expm1, -np.geomspace(1e-9, 80, 997)),
    ],
)
def test_float32_functions_are_within_a_few_ulp(function, oracle, x):
    x, got = _on(function, x)
    expected = np.array([float(oracle(mpmath.mpf(float(v)))) for v in x])
    # 5e-7 relative is about four ulp; where a logarithm crosses 0 the absolute error is what counts.
    np.testing.assert_allclose(got, expected, rtol=5e-7, atol=1e-9)


def test_exp_stays_finite_beyond_its_range():
    _, got = _on(math_cpu.exp32, np.array([-1000.0, -88.0, 88.0, 1000.0]))
    assert np.isfinite(got).all() and got[0] < 2e-38 and got[-1] > 1e38


@pytest.mark.parametrize("x", [1e-300, 1e-4, 0.3, 0.999999, 1.0, 1.0000001, 2.5, 1e3, 1e12, 1e300])
def test_float64_logarithm(x):
    assert math_cpu.log64(x) == pytest.approx(float(mpmath.log(mpmath.mpf(x))), rel=3e-11, abs=0)


@pytest.mark.parametrize("x", [0.0, 1.0, 2.5, 1023.0, 1024.0, 1e6])
def test_log_factorial(x):
    assert math_cpu.log_factorial(x) == pytest.approx(float(mpmath.loggamma(mpmath.mpf(x) + 1)), rel=1e-13)


@pytest.mark.parametrize("mu", [1e-30, 0.02, 3.0, 1e6])
@pytest.mark.parametrize("theta", [1e-4, 0.5, 20.0, 1e6, 1e12])
@pytest.mark.parametrize("x", [0.5, 1.0, 2.0, 12.0, 500.0, 1e6])
def test_nb_at_count(x, theta, mu):
    rise, log_over, slope = math_cpu.nb_at_count(x, theta, mu)
    t, m = mpmath.mpf(theta), mpmath.mpf(mu)
    terms = [mpmath.loggamma(t + x) - mpmath.loggamma(t), x * mpmath.log(t + m)]
    # What cancels between the terms is known to float64 times their size, no better.
    assert rise + x * log_over == pytest.approx(float(terms[0] - terms[1]), rel=1e-9, abs=1e-8)
    slopes = [mpmath.digamma(t + x) - mpmath.digamma(t), x / (t + m)]
    assert slope == pytest.approx(float(slopes[0] - slopes[1]), rel=1e-7, abs=1e-8)
