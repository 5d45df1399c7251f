"""GMVAE and SCVAE: the bound by brute force over components, the sampled one without bias, and clusters."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import nbinom, poisson
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Categorical, Normal, kl_divergence

from atlasvi.errors import OptionError
from atlasvi.models.gmvae import GMVAE, repeated
from atlasvi.models.scvae import SCVAE
from atlasvi.nn.layers import Covariates, by_label
from atlasvi.types import Noise, StepWeights


def build(kind, adata, **options):
    kind.setup_anndata(adata, batch_key="batch", gene_mask=None)
    return kind(adata, **{"n_hidden": 16, "n_latent": 3, **options})


def train(model, max_epochs=2, **options):
    model.train(max_epochs, **{"batch_size": 64, "enable_progress_bar": False, **options})
    return model


def minibatch_of(model, n=60):
    return next(model._minibatches(None, np.arange(n), n))


@pytest.mark.parametrize("mean", ["softmax", "exp"])
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_the_bound_is_that_of_every_component_written_out(likelihood, mean, adata):
    """Brute force: each component apart, with the densities of scipy and the divergences of torch."""
    n_components = 4
    model = train(build(GMVAE, adata, n_components=n_components, gene_likelihood=likelihood, mean=mean))
    module, minibatch = model.module, minibatch_of(model)
    with torch.no_grad():
        module.component_log_scale.normal_(0, 0.3)  # not at their start
        noise = Noise(3, 0, minibatch.rows)
        terms = module.loss(minibatch, noise, StepWeights(kl=0.3))
        q = module.class_logits(minibatch).softmax(-1)
        h = module.trunk(minibatch.counts, _covariates(minibatch), None)
        epsilon = noise.normal(n_components * 3, 0).view(-1, n_components, 3)
        x, library = adata.X.toarray()[:60], adata.X.sum(1).A1[:60]
        reconstruction, kl = np.zeros(60), np.zeros(60)
        for k in range(n_components):
            qz = module.encoder(h, Covariates(torch.full((60, 1), k), torch.empty(60, 0)), None)
            z = qz.loc + qz.scale * epsilon[:, k]
            mu = module.decode_log_rho(z, minibatch).exp().double().numpy() * library[:, None]
            if likelihood == "nb":
                hidden = module.decoder.hidden(z, _covariates(minibatch))
                theta = module.decoder.log_theta(hidden).exp().double().numpy()
                log_p = nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1)
            else:
                log_p = poisson.logpmf(x, mu).sum(1)
            prior = Normal(module.component_loc[k], module.component_log_scale[k].exp())
            kl_z = kl_divergence(Normal(qz.loc, qz.scale), prior).sum(1)
            reconstruction -= q[:, k].numpy() * log_p
            kl += (q[:, k] * kl_z).numpy()
        uniform = Categorical(torch.full((n_components,), 1 / n_components))
        kl += kl_divergence(Categorical(q), uniform).numpy()
    np.testing.assert_allclose(terms.reconstruction, reconstruction, rtol=1e-4)
    np.testing.assert_allclose(terms.kl_z, kl, rtol=1e-4, atol=1e-5)
    assert float(terms.total) == pytest.approx((reconstruction + 0.3 * kl).mean(), rel=1e-4)


def _covariates(minibatch):
    from atlasvi.models.scvi import covariates

    return covariates(minibatch)


def test_one_component_of_a_standard_normal_is_scvae(adata):
    model = train(build(GMVAE, adata, n_components=1))
    with torch.no_grad():
        model.module.component_loc.zero_()
        model.module.component_log_scale.zero_()
    minibatch = minibatch_of(model)
    with torch.no_grad():
        qz = model.module.encode(minibatch)
        terms = model.module.loss(minibatch, Noise(0, 0, minibatch.rows))
    torch.testing.assert_close(terms.kl_z, qz.kl_divergence(), rtol=1e-4, atol=1e-5)


def gradient(module, minibatch, step):
    module.zero_grad()
    terms = module.loss(minibatch, Noise(0, step, minibatch.rows), StepWeights(kl=0.0))
    terms.total.backward()
    kept = (module.assign.weight, module.decoder.scale.weight)
    return torch.cat([p.grad.flatten() for p in kept]), float(terms.reconstruction.mean())


def test_the_sampled_bound_and_its_gradient_have_no_bias(adata):
    """The mean over many draws is the exact one, within its standard error."""
    options = {"n_components": 3, "use_batch_norm": "none", "dropout_rate": 0.0}
    model = train(build(GMVAE, adata, **options))
    exact, minibatch = model.module, minibatch_of(model, 12)
    sampled = build(GMVAE, adata, **options, bound="sampled").module
    with torch.no_grad():
        exact.encoder.log_variance.weight.zero_()
        exact.encoder.log_variance.bias.fill_(-100)  # z hardly varies: what varies is the component
        exact.assign.weight.mul_(3)
    sampled.load_state_dict(exact.state_dict())
    exact.train()
    sampled.train()
    expected, value = gradient(exact, minibatch, 0)
    draws = [gradient(sampled, minibatch, step) for step in range(400)]
    gradients = torch.stack([g for g, _ in draws])
    error = gradients.std(0) / math.sqrt(len(draws)) + 1e-3 * expected.abs().max()
    assert ((gradients.mean(0) - expected).abs() / error).max() < 5
    values = np.array([v for _, v in draws])
    assert abs(values.mean() - value) < 5 * values.std() / math.sqrt(len(draws)) + 1e-3 * value
    assert expected.abs().max() > 0.01


def test_rows_within_labels(adata):
    values = torch.arange(12.0).view(2, 6)
    assert by_label(values, 3).tolist() == [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]]
    minibatch = minibatch_of(build(GMVAE, adata), 5)
    twice = repeated(minibatch, 2)
    dense = minibatch.counts.to_dense()
    assert torch.equal(twice.counts.to_dense(), torch.cat([dense, dense]))
    assert torch.equal(twice.rows, torch.cat([minibatch.rows, minibatch.rows]))


@pytest.mark.parametrize("bound", ["exact", "sampled"])
def test_it_finds_the_groups_and_says_how_sure_it_is(bound, adata):
    rng = np.random.default_rng(0)
    group = adata.obs["cell_type"].cat.codes.to_numpy()
    mu = rng.gamma(0.5, 4.0, (3, 60))[group] + 0.1
    adata.X = type(adata.X)(rng.poisson(mu).astype(np.float32))
    model = train(
        build(GMVAE, adata, n_components=3, bound=bound, dispersion="gene"), 25, plan_kwargs={"lr": 0.01}
    )
    assert model.records[0].kl_weight == 1
    clusters, soft = model.predict(), model.predict(soft=True)
    assert adjusted_rand_score(group, clusters) > 0.9
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(soft.to_numpy().argmax(1), clusters)
    np.testing.assert_array_equal(model.predict(indices=[9, 2], batch_size=1), clusters[[9, 2]])
    np.testing.assert_allclose(model.expression()[:20].compute().sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zip", "zinb"])
def test_scvae_by_exp_is_the_likelihood_of_scipy(likelihood, adata):
    model = train(build(SCVAE, adata, gene_likelihood=likelihood, mean="exp"))
    module, minibatch = model.module, minibatch_of(model)
    with torch.no_grad():
        z = torch.randn(60, 3)
        library, _ = module.library(minibatch)
        found = module.log_likelihood(z, library, minibatch)
        h = module.decoder.hidden(z, _covariates(minibatch))
        mu = (module.decoder.scale(h).exp() * library[:, None]).double().numpy()
        x = adata.X.toarray()[:60]
        p = poisson.pmf(x, mu)
        if module.likelihood.has_theta:
            theta = module.decoder.log_theta(h).exp().double().numpy()
            p = nbinom.pmf(x, theta, theta / (theta + mu))
        if module.likelihood.has_pi:
            pi = module.decoder.pi(h).sigmoid().double().numpy()
            p = (1 - pi) * p + pi * (x == 0)
    np.testing.assert_allclose(found, np.log(p).sum(1), rtol=1e-4)
    assert np.isfinite(model.expression()[:20].compute()).all()


def test_what_cannot_be_is_refused(adata):
    for options, said in (
        ({"n_components": 0}, "n_components"),
        ({"bound": "top"}, "'top'.*exact, sampled"),
        ({"n_draws": 1}, "n_draws"),
        ({"mean": "log"}, "'log'"),
    ):
        with pytest.raises(OptionError, match=said):
            build(GMVAE, adata, **options)
    SCVAE.setup_anndata(adata, gene_mask=None, size_factor_key="size_factor")
    with pytest.raises(OptionError, match="size_factor_key='size_factor'"):
        SCVAE(adata)
