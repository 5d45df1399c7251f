"""Priors: densities and gradients of torch.distributions, the KL in closed form, and all that uses them."""

import sys

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from atlasvi.cli import main
from atlasvi.errors import ModelError, OptionError
from atlasvi.models import load
from atlasvi.models.convert import to_scvi_tools
from atlasvi.models.gmvae import GMVAE
from atlasvi.models.scanvi import SCANVI
from atlasvi.models.scvi import SCVI
from atlasvi.types import Mixture, Noise, Posterior

SETUP = {"batch_key": "batch", "gene_mask": None}
SMALL = {"n_hidden": 16, "n_latent": 3}


def mixture(k, n, dtype=torch.double):
    logits, loc, log_scale = torch.randn(k), 2 * torch.randn(k, n), 0.5 * torch.randn(k, n)
    leaves = [t.to(dtype).requires_grad_() for t in (logits, loc, log_scale)]
    logits, loc, log_scale = leaves
    return Mixture(logits.log_softmax(-1), Posterior(loc, log_scale.exp())), leaves


def of_torch(found):
    components = Independent(Normal(found.components.loc, found.components.scale), 1)
    return MixtureSameFamily(Categorical(logits=found.log_weights), components)


def build(kind, adata, setup=SETUP, **options):
    kind.setup_anndata(adata, **setup)
    return kind(adata, **SMALL, **options)


def train(model, max_epochs=2):
    model.train(max_epochs, batch_size=64, enable_progress_bar=False)
    return model


@pytest.mark.parametrize("k", [1, 2, 7])
def test_density_and_gradients_are_those_of_torch(k):
    found, leaves = mixture(k, 4)
    z = (3 * torch.randn(9, 4, dtype=torch.double)).requires_grad_()
    gradients = []
    for density in (found.log_prob(z), of_torch(found).log_prob(z)):
        weight = torch.arange(1.0, 10, dtype=torch.double)
        gradients.append(
            [density, *torch.autograd.grad((density * weight).sum(), [z, *leaves], retain_graph=True)]
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_kl_is_the_closed_form_in_expectation():
    """Two components that are both the standard normal: the density of one, by the route of many."""
    qz = Posterior(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.tensor([[0.3, 1.5], [1.0, 0.1]]))
    two = Mixture(torch.tensor([0.3, 0.7]).log(), Posterior(torch.zeros(2, 2), torch.ones(2, 2)))
    draws = torch.stack([two.kl_divergence(qz, qz.rsample(torch.randn(2, 2))) for _ in range(4000)])
    error = draws.std(0) / np.sqrt(len(draws))
    assert ((draws.mean(0) - qz.kl_divergence()).abs() < 5 * error).all()
    assert (error < 0.05).all()
    one, _ = mixture(1, 2, torch.float)
    expected = kl_divergence(Normal(qz.loc, qz.scale), Normal(one.components.loc, one.components.scale))
    torch.testing.assert_close(one.kl_divergence(qz, qz.loc), expected.sum(1))


def test_what_is_drawn_has_the_density():
    found, _ = mixture(3, 1)
    noise = Noise(0, 0, torch.arange(20_000))
    chosen = found.chosen(noise.uniform(1, 4).double())
    z = chosen.rsample(noise.normal(1, 0).double()).detach().numpy().ravel()
    parts = [scipy.stats.norm(m, s) for m, s in _moments(found)]
    weights = found.log_weights.exp().detach().numpy()

    def cdf(x):
        return sum(w * part.cdf(x) for w, part in zip(weights, parts, strict=True))

    assert scipy.stats.kstest(z, cdf).pvalue > 1e-3


def _moments(found):
    loc, scale = found.components.loc.detach(), found.components.scale.detach()
    return zip(loc[:, 0].tolist(), scale[:, 0].tolist(), strict=True)


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_vamp_begins_at_the_posteriors_of_cells(encode_covariates, adata):
    options = {"prior": "vamp", "n_prior_components": 12, "encode_covariates": encode_covariates}
    module = build(SCVI, adata, **options).module
    log_counts = np.log1p(adata.X.toarray())
    pseudo = module.z_prior.inputs.detach().numpy()
    cells = [int(np.flatnonzero((np.abs(log_counts - u) < 1e-6).all(1))[0]) for u in pseudo]
    assert len(set(cells)) == 12
    model = SCVI(adata, **SMALL, **options)
    with torch.no_grad():
        norm = module.encoder.mlp.batch_norms[0]
        norm.running_mean.normal_()
        before = norm.running_mean.clone()
        (minibatch,) = model._minibatches(None, cells, None)
        found = module.prior()
        assert torch.equal(norm.running_mean, before)
        module.train()
        torch.testing.assert_close(module.prior().components.loc, found.components.loc)
        qz = module.encode(minibatch)  # without noise nothing drops out; the norms take these cells' moments
    torch.testing.assert_close(found.components.loc, qz.loc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.components.scale, qz.scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.log_weights.exp(), torch.full((12,), 1 / 12))


@pytest.mark.parametrize("prior", ["mog", "vamp"])
def test_the_loss_has_its_kl_and_trains_it(prior, adata):
    model = build(SCVI, adata, prior=prior, n_prior_components=6)
    before = {name: value.clone() for name, value in model.module.z_prior.named_parameters()}
    train(model)
    for name, value in model.module.z_prior.named_parameters():
        assert not torch.equal(before[name], value), name
    module = model.module
    (minibatch,) = model._minibatches(None, np.arange(40), None)
    noise = Noise(5, 0, minibatch.rows)
    with torch.no_grad():
        qz = module.encode(minibatch)
        z = qz.rsample(noise.normal(3, 0))
        expected = Normal(qz.loc, qz.scale).log_prob(z).sum(1) - of_torch(module.prior()).log_prob(z)
        terms = module.loss(minibatch, noise)
    torch.testing.assert_close(terms.kl_z, expected, rtol=1e-4, atol=1e-4)
    assert model.get_elbo(indices=range(40), seed=5) == pytest.approx(
        -float((terms.reconstruction + terms.kl_z).mean()), rel=1e-5
    )


def drawn(model, n=4000):
    source = model.sample_prior(n, seed=3)._source._source
    return source.read(0, n, torch.device("cpu")).draw(3, 0).numpy()


@pytest.mark.parametrize("kind", [SCVI, GMVAE])
def test_new_cells_are_of_the_mixture(kind, adata):
    options = {"n_components": 4} if kind is GMVAE else {"prior": "mog", "n_prior_components": 4}
    model = train(build(kind, adata, **options), 1)
    with torch.no_grad():
        theirs = of_torch(model.module.prior()).sample((4000,)).numpy()
    ours = drawn(model)
    assert scipy.stats.ks_2samp(ours[:, 0], theirs[:, 0]).pvalue > 1e-3
    assert scipy.stats.kstest(ours[:, 0], "norm").pvalue < 1e-6
    np.testing.assert_array_equal(ours[:100], drawn(model, 100))


def test_new_cells_of_scanvi_are_of_a_label_and_of_what_it_does_not_say(adata):
    model = train(build(SCANVI, adata, {**SETUP, "labels_key": "cell_type", "unlabeled_category": "NK"}), 1)
    with torch.no_grad():
        u_decoder = model.module.u_decoder
        u_decoder.loc.weight.mul_(20)
        codes = torch.randint(0, 2, (4000, 1))
        labels = type("Labels", (), {"codes": codes, "continuous": torch.empty(4000, 0)})
        pz = u_decoder(torch.randn(4000, 3), labels, None)
        theirs = (pz.loc + pz.scale * torch.randn(4000, 3)).numpy()
    ours = drawn(model)
    for k in range(3):
        assert scipy.stats.ks_2samp(ours[:, k], theirs[:, k]).pvalue > 1e-3
    assert scipy.stats.kstest(ours[:, 0], "norm").pvalue < 1e-6


def test_what_was_learnt_of_the_prior_stays_behind_where_it_has_no_use(adata, tmp_path):
    scvi = train(build(SCVI, adata, prior="mog", adversary=1.0), 1)
    model = SCANVI.from_scvi_model(scvi, "NK", "cell_type")
    np.testing.assert_array_equal(
        train(model, 1).module.state_dict().keys() & {"z_prior.loc", "critic.out.bias"}, set()
    )
    with pytest.raises(ModelError, match="prior='normal'"):
        to_scvi_tools(scvi, tmp_path / "theirs")


def test_the_command_takes_it_and_refuses_it_where_there_is_none(small_store, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["atlasvi", "train", str(small_store), "-o", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    words = ["--prior", "mog", "--option", "n_prior_components=3", "--max-epochs", "1", "--n-hidden", "8"]
    assert run(tmp_path / "m", *words) == 0
    model = load(tmp_path / "m", small_store)
    assert (model.config.prior, len(model.module.prior().log_weights)) == ("mog", 3)
    assert run(tmp_path / "n", "--prior", "mog", "--model", "gmvae") == 1
    assert "GMVAE has no argument 'prior'; it has n_components" in capsys.readouterr().err


def test_what_cannot_be_is_refused(adata):
    for options, said in (
        ({"prior": "flow"}, "'flow'.*normal, mog, vamp"),
        ({"n_prior_components": 0}, "at least 1"),
        ({"prior": "vamp", "n_prior_components": 1}, "at least 2"),
    ):
        with pytest.raises(OptionError, match=said):
            build(SCVI, adata, **options)
