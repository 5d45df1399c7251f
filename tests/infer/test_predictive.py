"""Posterior predictive checks: against numpy, closed forms of the moments, and counts that do not fit."""

import numpy as np
import pytest
import scipy.stats

from atlasvi import plots
from atlasvi.errors import ObsError, OptionError
from atlasvi.infer import sample
from atlasvi.models.scvi import SCVI
from tests.conftest import make_adata

pytestmark = pytest.mark.filterwarnings("ignore:.*have no counts")


def trained(adata, likelihood="zinb", epochs=2):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3, gene_likelihood=likelihood)
    model.train(epochs, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.02})
    return model


@pytest.fixture(scope="module")
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def model(adata):
    return trained(adata)


def of(found, statistic, group=None):
    chosen = found["statistic"] == statistic
    return found[chosen if group is None else chosen & (found["group"] == group)]


def test_what_was_observed_is_what_numpy_says(model, adata):
    found = model.posterior_predictive_check(n_samples=1)
    x = adata.X.toarray().astype(float)
    np.testing.assert_allclose(of(found, "mean")["observed"], x.mean(0))
    np.testing.assert_allclose(of(found, "variance")["observed"], x.var(0, ddof=1))
    np.testing.assert_allclose(of(found, "zero_share")["observed"], (x == 0).mean(0), atol=1e-12)
    assert list(of(found, "mean").index) == list(model.fields.var_names)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "zip", "poisson"])
def test_replicates_have_the_moments_of_what_they_are_drawn_from(adata, likelihood):
    model = trained(adata, likelihood)
    n_samples, n = 60, adata.n_obs
    found = model.posterior_predictive_check(n_samples=n_samples, seed=2)
    p = {k: v.astype(float) for k, v in model.get_likelihood_parameters(n_samples=n_samples, seed=2).items()}
    mu, pi = p["mean"], p.get("dropout", 0.0)
    over = 1 / p["dispersions"] if "dispersions" in p else 0.0
    mean, variance = (1 - pi) * mu, (1 - pi) * mu * (1 + mu * (pi + over))
    # Of each replicate, given its z: a variance is that within cells and that of their means.
    expected = {
        "mean": mean.mean(1),
        "variance": variance.mean(1) + mean.var(1, ddof=1),
        "zero_share": (pi + (1 - pi) * zero(mu, p.get("dispersions"))).mean(1),
    }
    spread = {"mean": variance.sum(1) / n**2}
    at_zero = pi + (1 - pi) * zero(mu, p.get("dispersions"))
    spread["zero_share"] = (at_zero * (1 - at_zero)).sum(1) / n**2
    for statistic, value in expected.items():
        rows = of(found, statistic)
        if statistic == "variance":
            np.testing.assert_allclose(rows["replicated"].sum(), value.mean(0).sum(), rtol=0.05)
            continue
        z = (rows["replicated"] - value.mean(0)) / np.sqrt(spread[statistic].sum(0)) * n_samples
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
        assert np.abs(z).max() < 5
    assert (found["low"] <= found["replicated"] + 1e-12).all()
    assert (found["replicated"] <= found["high"] + 1e-12).all()


def zero(mu, theta):
    """P(0) of the count without dropout, by scipy."""
    if theta is None:
        return scipy.stats.poisson.pmf(0, mu)
    return scipy.stats.nbinom.pmf(0, theta, theta / (theta + mu))


def test_groups_are_checked_by_themselves(model, adata):
    found = model.posterior_predictive_check(groupby="batch", n_samples=4)
    batches = adata.obs["batch"].to_numpy()
    x = adata.X.toarray().astype(float)
    assert list(found["group"].unique()) == list(model.fields.batch_categories)
    for level in model.fields.batch_categories:
        cells = np.flatnonzero(batches == level)
        np.testing.assert_allclose(of(found, "variance", level)["observed"], x[cells].var(0, ddof=1))
        alone = model.posterior_predictive_check(indices=cells, n_samples=4)
        for statistic in ("mean", "variance", "zero_share"):
            one, other = of(found, statistic, level), of(alone, statistic)
            np.testing.assert_allclose(one["replicated"], other["replicated"], rtol=0.02, atol=0.02)


def test_nothing_depends_on_the_cutting_or_on_other_genes(model, monkeypatch):
    whole = model.posterior_predictive_check(n_samples=3, seed=1)
    genes = list(model.fields.var_names[5:8])
    monkeypatch.setattr(sample, "_PIECE_BYTES", 1)
    some = model.posterior_predictive_check(gene_list=genes[::-1], n_samples=3, seed=1)
    assert list(of(some, "mean").index) == genes[::-1]
    for statistic in ("mean", "variance", "zero_share"):
        # A mean rounded otherwise in its last bit may move a count that sat on the edge.
        one, other = of(whole, statistic).loc[genes], of(some, statistic).loc[genes]
        np.testing.assert_allclose(one["observed"], other["observed"])
        np.testing.assert_allclose(one["replicated"], other["replicated"], rtol=5e-3)


def test_a_likelihood_that_is_too_narrow_is_seen(adata):
    """Of counts with other than Poisson variance and zeros, a Poisson model has too little of both."""
    counts = adata.copy()
    rng = np.random.default_rng(0)
    counts.X = counts.X.copy()
    counts.X.data = rng.negative_binomial(0.5, 0.5 / (0.5 + 6.0), counts.X.nnz).astype(np.float32)
    counts.X.eliminate_zeros()
    narrow, wide = (
        trained(counts, likelihood, 60).posterior_predictive_check() for likelihood in ("poisson", "zinb")
    )
    assert (of(narrow, "variance")["p"] == 0).mean() > 0.9
    assert (of(narrow, "zero_share")["p"] == 0).mean() > 0.9
    assert (of(wide, "variance")["p"] == 0).mean() < 0.5
    assert (of(wide, "zero_share")["p"] == 0).mean() < 0.1


def test_what_cannot_be_is_refused(model):
    with pytest.raises(OptionError, match="n_samples must be a whole number of at least 1"):
        model.posterior_predictive_check(n_samples=0)
    with pytest.raises(ObsError, match="lane"):
        model.posterior_predictive_check(groupby="lane")


def test_the_chart_shows_each_statistic(model):
    found = model.posterior_predictive_check(groupby="batch", n_samples=2)
    chart = plots.predictive_check(found, group=model.fields.batch_categories[0])
    for word in ("mean", "variance", "share of zeros"):
        assert word in chart
    with pytest.raises(OptionError, match="name one with group="):
        plots.predictive_check(found)
    with pytest.raises(OptionError, match="no group 'x'"):
        plots.predictive_check(found, group="x")
