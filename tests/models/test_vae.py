"""The Gaussian VAE: its likelihood is that of scipy with the Jacobian, a density of counts, and fits."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from atlasvi.errors import OptionError
from atlasvi.models.factor import PPCA
from atlasvi.models.scvi import covariates
from atlasvi.models.vae import GaussianVAE
from atlasvi.types import CSR, Noise, StepWeights


def build(adata, **options):
    GaussianVAE.setup_anndata(adata, batch_key="batch", gene_mask=None)
    return GaussianVAE(adata, **{"n_hidden": 16, "n_latent": 3, **options})


def moments(module, z, minibatch):
    """The B x G means that the module never makes, and the variances."""
    m = module.mean(module.hidden(z, covariates(minibatch), None))
    return m.double().detach().numpy(), (module.log_variance.double().exp() + 1e-3).detach().numpy()


def test_the_likelihood_is_that_of_scipy_with_the_jacobian(adata):
    model = build(adata)
    module = model.module
    with torch.no_grad():
        module.log_variance.normal_(-1, 0.7)
    (minibatch,) = model._minibatches(None, [7, 3, 250, 20, 21], None)
    z = 2 * torch.randn(5, 3)
    m, v = moments(module, z, minibatch)
    x = adata.X.toarray()[[7, 3, 250, 20, 21]].astype(float)
    expected = (norm.logpdf(np.log1p(x), m, np.sqrt(v)) - np.log1p(x)).sum(1)
    np.testing.assert_allclose(module.log_likelihood(z, minibatch).detach(), expected, rtol=1e-5)


def test_gradients_are_those_of_the_dense_density(adata):
    model = build(adata, use_batch_norm="none")
    module = model.module
    (minibatch,) = model._minibatches(None, range(11), None)
    z = torch.randn(11, 3, requires_grad=True)
    inputs = [z, *module.mean.parameters(), module.log_variance, *module.hidden.parameters()]
    upstream = torch.arange(1.0, 12)
    ours = torch.autograd.grad((module.log_likelihood(z, minibatch) * upstream).sum(), inputs)
    y = torch.from_numpy(adata.X.toarray()[:11]).log1p()
    m = module.mean(module.hidden(z, covariates(minibatch), None))
    scale = (module.log_variance.exp() + 1e-3).sqrt()
    dense = torch.distributions.Normal(m, scale).log_prob(y).sum(1)
    for a, b in zip(ours, torch.autograd.grad((dense * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_it_is_a_density_of_counts(adata):
    """Of one gene, over all x > -1, it integrates to one: without the Jacobian it would not."""
    model = build(adata[:, :1].copy(), n_hidden=4)
    module = model.module
    x = np.expm1(np.linspace(-8, 8, 20_001)).astype(np.float32)
    (minibatch,) = model._minibatches(None, [0], None)
    many = type(minibatch)(
        CSR.from_torch(torch.from_numpy(x)[:, None]), *(torch.zeros(len(x), dtype=torch.int64),) * 3,
        torch.zeros(len(x), 0, dtype=torch.int64), torch.zeros(len(x), 0),
    )  # fmt: skip
    p = module.log_likelihood(torch.zeros(len(x), 3), many).exp().detach().numpy()
    assert np.trapezoid(p, x) == pytest.approx(1, abs=1e-3)


def test_the_elbo_is_its_likelihood_less_the_divergence(adata):
    model = build(adata)
    (minibatch,) = model._minibatches(None, range(30), None)
    noise = Noise(2, 0, minibatch.rows)
    with torch.no_grad():
        terms = model.module.loss(minibatch, noise, StepWeights(kl=0.25))
        qz = model.module.encode(minibatch)
        z = qz.rsample(noise.normal(3, 0))
        reconstruction = -model.module.log_likelihood(z, minibatch)
    torch.testing.assert_close(terms.reconstruction, reconstruction)
    torch.testing.assert_close(terms.total, (reconstruction + 0.25 * qz.kl_divergence()).mean())


def test_it_comes_near_the_exact_likelihood_of_what_is_linear(adata):
    """On counts from a linear factor model it is below PPCA's log-likelihood, and not by much."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 2))
    y = 3 + z @ rng.normal(size=(2, 60)) * 0.4 + rng.normal(size=(300, 60)) * 0.3
    adata.X = type(adata.X)(np.round(np.expm1(y).clip(0)).astype(np.float32))
    model = build(adata, n_latent=2, dropout_rate=0.0)
    model.train(60, batch_size=64, plan_kwargs={"lr": 0.05}, enable_progress_bar=False)
    PPCA.setup_anndata(adata, gene_mask=None)
    exact = PPCA(adata, n_latent=2)
    exact.train(enable_progress_bar=False)
    best = exact.get_elbo()
    assert best - 15 < model.get_elbo() < best


def test_what_it_has_not_is_refused(adata):
    model = build(adata)
    model.train(1, batch_size=64, enable_progress_bar=False)
    with pytest.raises(OptionError, match="GaussianVAE has no expression"):
        model.expression()
    with pytest.raises(OptionError, match="n_latent"):
        build(adata, n_latent=0)
