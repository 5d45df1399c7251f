"""log p(x) by importance sampling against the integral over a grid."""

import math

import numpy as np
import pytest
import torch

from atlasvi.errors import OptionError
from atlasvi.models.dca import DCA
from atlasvi.models.gmvae import GMVAE
from atlasvi.models.ldvae import LinearSCVI
from atlasvi.models.scanvi import SCANVI
from atlasvi.models.scvae import SCVAE
from atlasvi.models.scvi import SCVI

GRID = torch.linspace(-7, 7, 1_401, dtype=torch.float64)  # of z


@pytest.fixture
def make(adata):
    def build(kind=SCVI, setup=None, **options):
        kind.setup_anndata(adata, batch_key="batch", gene_mask=None, **(setup or {}))
        model = kind(adata, **{"n_hidden": 16, "n_latent": 1, **options})
        model.train(10, batch_size=64, enable_progress_bar=False)
        return model

    return build


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi) + variance.log())


@torch.no_grad()
def integral(model, cell, library_grid=None):
    """The sum over the grid of p(x | z, l) p(z) p(l), trapezoids being equal steps here."""
    module = model.module
    prior = module.prior()
    parts = torch.distributions.Normal(prior.components.loc[:, 0], prior.components.scale[:, 0])
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.log_weights), parts
    )
    (minibatch,) = model._minibatches(None, [cell], None)
    z = GRID.float()
    log_p_z = density.log_prob(z).double()
    width = float(GRID[1] - GRID[0])
    if library_grid is None:
        cells = minibatch.take(np.zeros(len(z), np.int64))
        library, _ = module.library(cells)
        terms = module.log_likelihood(z[:, None], library, cells) + log_p_z
    else:
        width *= float(library_grid[1] - library_grid[0])
        batch = minibatch.batch_index
        mean, variance = module.library_log_mean[batch], module.library_log_var[batch]
        log_p_l = log_normal(library_grid.double(), mean.double(), variance.double())
        cells = minibatch.take(np.zeros(len(library_grid), np.int64))
        library = library_grid.exp()
        terms = torch.cat([
            module.log_likelihood(at.expand(len(library), 1), library, cells) + log_p_l + of_z
            for at, of_z in zip(z, log_p_z, strict=True)
        ])  # fmt: skip
    return float(torch.logsumexp(terms.double(), 0)) + math.log(width)


@pytest.mark.parametrize("prior", ["normal", "mog", "vamp"])
def test_it_is_the_integral_over_z(prior, make):
    model = make(prior=prior, n_prior_components=5)
    # After few epochs q(z | x) is too narrow for 2,000 draws to find all of the integral.
    model.module.encoder.log_variance.bias.data.add_(1)
    cells = [0, 5, 9]
    found = model.get_marginal_ll(indices=cells, n_mc_samples=2_000, return_mean=False)
    np.testing.assert_allclose(found, [integral(model, cell) for cell in cells], atol=0.05)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LinearSCVI, {"use_observed_lib_size": True}), (SCVAE, {}), (GMVAE, {"n_components": 3})],
)
def test_so_it_is_of_the_other_models_with_a_prior(kind, options, make):
    model = make(kind, **options)
    model.module.encoder.log_variance.bias.data.add_(2)
    found = model.get_marginal_ll(indices=[0, 5], n_mc_samples=4_000, return_mean=False)
    np.testing.assert_allclose(found, [integral(model, cell) for cell in (0, 5)], atol=0.05)


@pytest.mark.parametrize(
    ("kind", "setup", "options"),
    [
        (SCANVI, {"labels_key": "cell_type", "unlabeled_category": "NK"}, {}),
        (DCA, {}, {}),
    ],
)
def test_a_model_without_a_density_of_its_prior_says_so(kind, setup, options, make):
    model = make(kind, setup, **options)
    with pytest.raises(OptionError, match=f"{kind.__name__} has no get_marginal_ll"):
        model.get_marginal_ll()


def test_of_a_latent_library_it_is_the_integral_over_both(make, monkeypatch):
    model = make(use_observed_lib_size=False)
    monkeypatch.setitem(globals(), "GRID", torch.linspace(-5, 5, 61, dtype=torch.float64))
    with torch.no_grad():
        (minibatch,) = model._minibatches(None, [3], None)
        # After few epochs q(l | x) lies beside the posterior, and no number of draws would find it.
        head = model.module.library_encoder
        head.loc.weight.zero_()
        head.loc.bias.fill_(float(minibatch.counts.row_sums().log()))
        head.log_variance.weight.zero_()
        head.log_variance.bias.fill_(math.log(0.3))
        ql = model.module.encode_library(minibatch)
        mean, scale = float(ql.loc), float(ql.scale)
        prior = float(model.module.library_log_var[minibatch.batch_index].sqrt())
    spread = 6 * max(scale, prior)
    expected = integral(model, 3, torch.linspace(mean - spread, mean + spread, 161))
    assert model.get_marginal_ll(indices=[3], n_mc_samples=4_000) == pytest.approx(expected, abs=0.1)


def test_it_is_above_the_elbo_rises_with_samples_and_does_not_depend_on_cutting(make):
    model = make()
    few, many = (model.get_marginal_ll(n_mc_samples=n) for n in (2, 50))
    assert model.get_elbo() < few < many
    one, other = (
        model.get_marginal_ll(n_mc_samples=3, batch_size=size, return_mean=False) for size in (7, 300)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    with pytest.raises(OptionError, match="n_mc_samples"):
        model.get_marginal_ll(n_mc_samples=0)
