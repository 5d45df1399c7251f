"""The irreproducible discovery rate (Li, Brown, Huang and Bickel 2011, Annals of Applied Statistics 5, 1752).

Of two rankings of the same things, a share ``p`` is ranked alike by both, and the rest by chance::

    z_1, z_2 ~ p N((mu, mu), sigma^2 ((1, rho), (rho, 1))) + (1 - p) N((0, 0), ((1, 0), (0, 1)))
    z_i = G^-1(rank_i / (n + 1)),   G(x) = p Phi((x - mu) / sigma) + (1 - p) Phi(x)

fitted by EM, in turn with z, which depends on the parameters through G. The local rate of a thing is the
posterior of the second part, and the IDR at a thing is the mean local rate of those as good or better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata


@dataclass(frozen=True)
class Idr:
    """What was fitted.

    Args:
        mu: mean of the part that is ranked alike.
        sigma: its standard deviation.
        rho: its correlation.
        p: its share: given, not fitted.
        local: (n,) posterior that a thing is ranked by chance.
    """

    mu: float
    sigma: float
    rho: float
    p: float
    local: np.ndarray

    @property
    def rate(self) -> np.ndarray:
        """(n,) irreproducible discovery rate at each thing."""
        order = np.argsort(self.local, kind="stable")
        rate = np.empty_like(self.local)
        rate[order] = np.cumsum(self.local[order]) / np.arange(1, len(order) + 1)
        return rate


def idr(one: np.ndarray, two: np.ndarray, p: float, *, tolerance: float = 1e-5, most: int = 500) -> Idr:
    """Fit the model to two scores, (n,) each, larger where surer; ties get their mean rank.

    Raises:
        ValueError: ``p`` is no share between 0 and 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1, is {p}")
    n = len(one)
    u = np.stack([rankdata(one), rankdata(two)]) / (n + 1)
    mu, sigma, rho, before = 1.0, 1.0, 0.5, -np.inf
    for _ in range(most):
        z = _quantile(u, mu, sigma, p)
        alike = np.log(p) + _log_density(z, mu, sigma, rho)
        chance = np.log1p(-p) + _log_density(z, 0.0, 1.0, 0.0)
        both = np.logaddexp(alike, chance)
        local = np.exp(chance - both)
        weight = 1 - local
        # The likelihood of the copula: the density of z over that of its margins.
        margins = np.logaddexp(np.log(p) + _log_normal(z, mu, sigma), np.log1p(-p) + _log_normal(z, 0.0, 1.0))
        now = float((both - margins.sum(0)).sum())
        if abs(now - before) < tolerance * (abs(now) + 1):
            break
        before = now
        mu = max(float((weight * z).sum() / (2 * weight.sum())), 0.0)
        spread = float((weight * (z - mu) ** 2).sum() / (2 * weight.sum()))
        sigma = np.sqrt(spread)
        rho = float(
            np.clip((weight * (z[0] - mu) * (z[1] - mu)).sum() / (spread * weight.sum()), -0.999, 0.999)
        )
    return Idr(mu, sigma, rho, p, local)


def _log_normal(z: np.ndarray, mu: float, sigma: float) -> np.ndarray:
    return -0.5 * ((z - mu) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)


def _log_density(z: np.ndarray, mu: float, sigma: float, rho: float) -> np.ndarray:
    """(n,) log density of the bivariate normal with equal means and variances."""
    x, y = (z - mu) / sigma
    form = (x**2 - 2 * rho * x * y + y**2) / (1 - rho**2)
    return -0.5 * form - 2 * np.log(sigma) - 0.5 * np.log1p(-(rho**2)) - np.log(2 * np.pi)


def _quantile(u: np.ndarray, mu: float, sigma: float, p: float) -> np.ndarray:
    """G^-1(u) by interpolation between 4,000 points."""
    grid = np.linspace(min(-6.0, mu - 6 * sigma), max(6.0, mu + 6 * sigma), 4000)
    return np.interp(u, p * ndtr((grid - mu) / sigma) + (1 - p) * ndtr(grid), grid)
