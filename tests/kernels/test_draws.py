"""Draws of each entry: quantiles against scipy, moments and shapes against their distributions, and keys."""

import numpy as np
import pytest
import scipy.stats
import torch

from atlasvi_kernels import binomial_quantile, counter_counts, counter_gamma, counter_pairs
from atlasvi_kernels.draws import _quantile

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("mu", "theta"),
    [(0.01, 0.3), (1.0, 1.0), (3.0, 0.01), (30.0, 5.0), (2000.0, 100.0), (5e4, 0.5), (1e5, 1e4), (0.5, 1e6)],
)
def test_a_count_is_the_quantile_of_a_negative_binomial(mu, theta):
    u = np.concatenate([RNG.uniform(size=60), [1e-12, 1e-6, 0.5, 1 - 1e-6]])
    expected = scipy.stats.nbinom.ppf(u, theta, theta / (theta + mu))
    found = [_quantile(x, mu, theta) for x in u]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mu", [0.001, 0.7, 40.0, 800.0, 3e4])
def test_a_count_is_the_quantile_of_a_poisson(mu):
    u = np.concatenate([RNG.uniform(size=60), [1e-12, 1e-6, 0.5, 1 - 1e-6]])
    np.testing.assert_array_equal([_quantile(x, mu, np.inf) for x in u], scipy.stats.poisson.ppf(u, mu))


def test_uniforms_at_their_ends_come_to_an_end():
    for mu, theta in ((1.0, 0.01), (1e3, 0.01), (5.0, np.inf), (1e6, 80.0)):
        assert _quantile(2.0**-53, mu, theta) >= 0
        assert _quantile(1 - 2.0**-53, mu, theta) > mu
    assert _quantile(0.999, 0.0, 1.0) == 0


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])
def test_counts_have_the_probabilities_of_their_distribution(likelihood):
    n, mu, theta, logit = 40_000, 2.5, 0.8, -0.4
    counts = counter_counts(
        3, 1, torch.arange(n), torch.tensor([5]), torch.full((n, 1), mu),
        torch.tensor([theta]) if likelihood.endswith("nb") else None,
        torch.full((n, 1), logit) if likelihood.startswith("zi") else None,
    )[:, 0]  # fmt: skip
    nb = likelihood.endswith("nb")
    ks = np.arange(12)
    p = scipy.stats.nbinom.pmf(ks, theta, theta / (theta + mu)) if nb else scipy.stats.poisson.pmf(ks, mu)
    if likelihood.startswith("zi"):
        pi = 1 / (1 + np.exp(-logit))
        p = (1 - pi) * p + pi * (ks == 0)
    share = np.bincount(counts, minlength=12)[:12] / n
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-6).all()


@pytest.mark.parametrize("shape", [0.05, 0.7, 1.0, 3.0, 500.0])
def test_gamma_variates_have_their_distribution(shape):
    n = 20_000
    found = counter_gamma(
        1, 0, torch.arange(n), torch.tensor([0]), torch.full((n, 1), 2.0), torch.tensor([shape])
    )
    expected = scipy.stats.gamma(shape, scale=2.0 / shape)
    # float32 ends at 1e-38: below it, where small shapes often are, values are zero.
    assert scipy.stats.kstest(np.maximum(found[:, 0], 1e-37), expected.cdf).pvalue > 1e-3 or shape < 0.1
    assert found.mean() == pytest.approx(2.0, rel=5 / np.sqrt(n * shape))


@pytest.mark.parametrize("kind", ["counts", "gamma"])
def test_an_entry_depends_on_its_own_key_alone(kind):
    rows, columns = torch.tensor([0, 7, 2**40, 31]), torch.tensor([4, 0, 2**24 - 1])
    mu, theta = torch.rand(4, 3) * 9, torch.rand(4, 3) + 0.1

    def draw(seed, step, at, of):
        args = (seed, step, rows[at], columns[of], mu[at][:, of], theta[at][:, of])
        return counter_counts(*args) if kind == "counts" else counter_gamma(*args)

    whole = draw(5, 2, range(4), range(3))
    for at, of in (([1], [2]), ([3, 0], [1, 0]), ([2, 2], [0])):
        np.testing.assert_array_equal(draw(5, 2, at, of), whole[np.ix_(at, of)])
    mu, theta = torch.full((4, 3), 50.0), torch.full((4, 3), 2.0)
    base = draw(5, 2, range(4), range(3))
    assert len(np.unique(base)) > 9
    for seed, step in ((6, 2), (5, 3), (5 + (1 << 32), 2)):
        assert (draw(seed, step, range(4), range(3)) != base).sum() > 9


def test_pairs_are_uniform_and_belong_to_their_entries():
    rows, columns = RNG.integers(0, 2**47, 30_000), RNG.integers(0, 2**24, 30_000)
    found = counter_pairs(9, 4, rows, columns)
    for k in (0, 1):
        assert scipy.stats.kstest(found[:, k], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(found.T)[0, 1]) < 0.03
    np.testing.assert_array_equal(counter_pairs(9, 4, rows[5:7], columns[5:7]), found[5:7])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.9])
def test_binomial_quantiles(p):
    u, n = RNG.uniform(size=500), RNG.integers(0, 60, 500)
    np.testing.assert_array_equal(binomial_quantile(u, n, p), np.maximum(scipy.stats.binom.ppf(u, n, p), 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": -1}, "seed"), ({"step": 1 << 32}, "step"), ({"rows": torch.tensor([-1, 2])}, "rows"),
     ({"columns": torch.tensor([0, 1 << 24])}, "columns"), ({"mu": torch.ones(2, 3)}, "mu")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, words):
    fine = {"seed": 0, "step": 0, "rows": torch.arange(2), "columns": torch.arange(2), "mu": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=words):
        counter_counts(**fine | change)
