"""Posterior-only refinement: a tighter bound on the same log p(x), by the same decoder to the bit."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import atlasvi
from atlasvi.errors import NotTrainedError, OptionError
from atlasvi.models.dca import DCA
from atlasvi.models.gmvae import GMVAE, repeated
from atlasvi.models.ldvae import LinearSCVI
from atlasvi.models.scanvi import SCANVI
from atlasvi.models.scvi import SCVI
from atlasvi.models.vae import GaussianVAE

QUIET = {"batch_size": 64, "enable_progress_bar": False}
KINDS = {
    "defaults": (SCVI, {}),
    "latent library, covariates": (SCVI, {"use_observed_lib_size": False, "encode_covariates": True}),
    "a theta each batch, critic, mmd": (SCVI, {"dispersion": "gene-batch", "adversary": 2.0, "mmd": 1.0}),
    "prior of several normals": (SCVI, {"prior": "mog", "n_prior_components": 4}),
    "normal likelihood": (GaussianVAE, {}),
    "linear decoder": (LinearSCVI, {}),
    "labels": (SCANVI, {}),
    "mixture": (GMVAE, {"n_components": 3}),
    "mixture, sampled": (GMVAE, {"n_components": 3, "bound": "sampled"}),
}
GENERATIVE = (
    "z_prior",
    "hidden",
    "mean",
    "log_variance",
    "decoder",
    "log_theta",
    "library_log",
    "critic",
    "classifier",
    "u_decoder",
    "component",
    "label",
)


def make(adata, kind=SCVI, **options):
    setup = {"batch_key": "batch", "gene_mask": None}
    if kind is SCANVI:
        setup |= {"labels_key": "cell_type", "unlabeled_category": "Unknown"}
    kind.setup_anndata(adata, **setup)
    model = kind(adata, **{"n_hidden": 16, "n_latent": 3, **options})
    model.train(3, train_size=0.7, **QUIET)
    return model


def weights(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_only_the_posterior_changes_and_the_elbo_of_the_cells_gains(kind, options, adata):
    model = make(adata, kind, **options)
    cells, before = model.validation_indices, weights(model)
    refined = model.refine_posterior(indices=cells, max_epochs=30, plan_kwargs={"lr": 0.02}, **QUIET)
    after = weights(refined)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Where labels lie, of which neither latents nor rho are made, is forgotten.
    changed -= set(getattr(model.module, "aside", ()))
    assert changed
    assert not [name for name in changed if name.startswith(GENERATIVE)]
    if kind is GMVAE:
        assert any(name.startswith("trunk") for name in changed)
    # Of the model that was asked nothing changed, and both can be trained in full again.
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert all(p.requires_grad for m in (model, refined) for p in m.module.parameters())
    assert refined.config == getattr(refined.module, "config", model.config) == model.config
    assert refined.get_elbo(indices=cells) > model.get_elbo(indices=cells) + 0.1
    looks = refined.validation_history["elbo_validation"]
    assert looks.index[0] == 0
    assert looks.iloc[0] > looks.min()
    refined.train(1, **QUIET)
    assert any(
        name.startswith(("decoder", "mean")) and not torch.equal(after[name], value)
        for name, value in weights(refined).items()
    )


@torch.no_grad()
def integral(model, cell):
    """log of the integral of p(x | z) p(z) over a grid of z, by the trapezoidal rule."""
    (minibatch,) = model._minibatches(None, [cell], None)
    z = torch.linspace(-6, 6, 601)
    library, _ = model.module.library(minibatch)
    log_p = model.module.log_likelihood(
        z.unsqueeze(1), library.expand(len(z)).contiguous(), repeated(minibatch, len(z))
    )
    joint = log_p.double().numpy() + scipy.stats.norm.logpdf(z.double().numpy())
    return scipy.special.logsumexp(joint) + np.log(float(z[1] - z[0]))


def test_it_is_a_tighter_bound_on_the_same_log_likelihood(adata):
    """log p(x) by a grid over z depends on the decoder alone: the encoder comes nearer to it from below."""
    model = make(adata, n_latent=1)
    cells = model.validation_indices[:6]
    exact = np.array([integral(model, int(cell)) for cell in cells])
    refined = model.refine_posterior(indices=cells, max_epochs=150, plan_kwargs={"lr": 0.02}, **QUIET)
    gaps = []
    for one in (model, refined):
        elbo = np.mean([one.get_elbo(indices=cells, seed=seed) for seed in range(60)])
        gaps.append(exact.mean() - elbo)
        marginal = one.get_marginal_ll(indices=cells, n_mc_samples=500, return_mean=False)
        np.testing.assert_allclose(marginal, exact, atol=0.2)
    assert 0 < gaps[1] < 0.5 * gaps[0], gaps


def test_weights_that_are_best_already_are_kept(adata):
    """A rate that only spoils them: the look before the first step is the best, and its weights come back."""
    model = make(adata)
    model = model.refine_posterior(max_epochs=40, plan_kwargs={"lr": 0.02}, **QUIET)
    again = model.refine_posterior(max_epochs=10, plan_kwargs={"lr": 0.3, "n_steps_lr_warmup": 0}, **QUIET)
    assert len(again.validation_history) > 1
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(model).items())


def test_of_a_saved_model_from_a_store_on_disk_within_a_budget_it_is_the_same(adata, small_store, tmp_path):
    model = make(adata)
    model.save(tmp_path / "model")
    cells = model.validation_indices
    one = model.refine_posterior(indices=cells, max_epochs=5, **QUIET)
    atlas = atlasvi.open(small_store)
    other = SCVI.load(tmp_path / "model").refine_posterior(atlas, cells, max_epochs=5, **QUIET)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
    narrow = SCVI.load(tmp_path / "model").refine_posterior(
        atlas, cells, max_epochs=5, memory_budget=1 << 16, num_workers=2, **QUIET
    )
    assert narrow.get_elbo(atlas, cells) > model.get_elbo(indices=cells)
    other.save(tmp_path / "refined")
    loaded = SCVI.load(tmp_path / "refined", atlas)
    assert loaded.get_elbo(indices=cells) == other.get_elbo(atlas, cells)
    assert loaded._training["refined"]["n_obs"] == len(cells)


def test_what_cannot_be_is_refused(adata):
    SCVI.setup_anndata(adata, gene_mask=None)
    with pytest.raises(NotTrainedError):
        SCVI(adata).refine_posterior()
    model = make(adata)
    with pytest.raises(OptionError, match="max_epochs must be"):
        model.refine_posterior(max_epochs=0)
    with pytest.raises(OptionError, match="did you mean 'lr'"):
        model.refine_posterior(plan_kwargs={"llr": 1})
    DCA.setup_anndata(adata, gene_mask=None)
    autoencoder = DCA(adata)
    autoencoder.train(1, **QUIET)
    with pytest.raises(OptionError, match="DCA has no posterior"):
        autoencoder.refine_posterior()
    # p(z) is made of the encoder: with another encoder it would be another model.
    with pytest.raises(OptionError, match="prior='vamp'"):
        make(adata, prior="vamp", n_prior_components=3).refine_posterior()
