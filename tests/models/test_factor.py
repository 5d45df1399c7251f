"""PCA, PPCA and factor analysis, held against scikit-learn, scipy and the closed forms."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import multivariate_normal
from sklearn import decomposition

import atlasvi
from atlasvi.errors import ModelError, NotTrainedError, OptionError
from atlasvi.models import factor
from atlasvi.models.factor import PCA, PPCA, FactorAnalysis
from atlasvi.stream import Epochs

KINDS = [PCA, PPCA, FactorAnalysis]
EXACT = {"rtol": 1e-6}


def build(kind, data, n_latent=3, **options):
    kind.setup_anndata(data, gene_mask=None)
    return kind(data, n_latent, **options)


def fit(model, max_epochs=None, **options):
    model.train(max_epochs, **{"enable_progress_bar": False, **options})
    return model


def logs(adata, cells=slice(None)):
    return np.log1p(adata.X.toarray()[cells].astype(np.float64))


@pytest.fixture(params=["one pass", "a pass for each product"])
def solver(request, monkeypatch):
    if request.param != "one pass":
        monkeypatch.setattr(factor, "LARGEST_COVARIANCE", 0)
    return request.param


def test_pca_is_scikit_learns(adata, solver):
    model = fit(build(PCA, adata, 5), 100, train_size=1.0, tol=1e-14)
    peer = decomposition.PCA(5, svd_solver="full").fit(logs(adata))
    latent = model.get_latent_representation()
    np.testing.assert_allclose(latent, peer.transform(logs(adata)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.get_loadings(), peer.components_.T, atol=1e-6)
    np.testing.assert_allclose(model.explained_variance_ratio, peer.explained_variance_ratio_, **EXACT)


def test_ppca_is_its_closed_form(adata, solver):
    """The likelihood of held-out cells, from scipy's density of N(m, W W' + s2 I) and the Jacobian."""
    model = fit(build(PPCA, adata), 100, tol=1e-14)
    trained, held_out = logs(adata, model.train_indices), logs(adata, model.validation_indices)
    covariance = np.cov(trained.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    noise = values[:-3].mean()
    vectors = vectors[:, -3:] * np.sqrt(values[-3:] - noise)
    density = multivariate_normal(trained.mean(0), vectors @ vectors.T + noise * np.eye(60))
    expected = density.logpdf(held_out) - held_out.sum(1)
    found = model.get_elbo(indices=model.validation_indices, return_mean=False)
    np.testing.assert_allclose(found, expected, **EXACT)
    marginal = model.get_marginal_ll(indices=model.validation_indices, return_mean=False)
    np.testing.assert_allclose(marginal, expected, **EXACT)
    in_training = (density.logpdf(trained) - trained.sum(1)).mean()
    np.testing.assert_allclose(-model.records[-1].elbo_train, in_training, **EXACT)
    np.testing.assert_allclose(model.module.noise.numpy(), noise, **EXACT)


def test_the_posterior_of_ppca_is_bayes_rule(adata):
    model = fit(build(PPCA, adata))
    weight, noise = model.module.weight.numpy(), model.module.noise.numpy()[0]
    mean, variance = model.get_latent_representation(return_dist=True)
    joint = weight @ weight.T + noise * np.eye(60)
    expected = (logs(adata) - model.module.mean.numpy()) @ np.linalg.solve(joint, weight)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    left = np.eye(3) - weight.T @ np.linalg.solve(joint, weight)
    np.testing.assert_allclose(variance[0], np.diag(left), rtol=1e-5)


def test_factor_analysis_is_scikit_learns(adata):
    adata = adata[:, :25].copy()
    model = fit(build(FactorAnalysis, adata, 2), 20_000, tol=1e-13)
    peer = decomposition.FactorAnalysis(2, tol=1e-10, max_iter=20_000, svd_method="lapack")
    peer.fit(logs(adata, model.train_indices))
    for cells in (model.train_indices, model.validation_indices):
        y = logs(adata, cells)
        np.testing.assert_allclose(
            model.get_elbo(indices=cells, return_mean=False), peer.score_samples(y) - y.sum(1), **EXACT
        )
    np.testing.assert_allclose(
        -model.records[-1].elbo_train, model.get_elbo(indices=model.train_indices), **EXACT
    )
    np.testing.assert_allclose(model.module.noise.numpy(), peer.noise_variance_, rtol=1e-3)


def test_em_never_loses_and_is_the_same_whatever_the_solver(adata, monkeypatch):
    one = fit(build(FactorAnalysis, adata), 20, tol=0)
    loss = [record.elbo_train for record in one.records]
    assert (np.diff(loss) < 0).all()
    monkeypatch.setattr(factor, "LARGEST_COVARIANCE", 0)
    other = fit(build(FactorAnalysis, adata), 20, tol=0)
    np.testing.assert_allclose(other.module.weight.numpy(), one.module.weight.numpy(), rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_a_file_and_memory_give_the_same(kind, adata, small_store, tmp_path):
    model = fit(build(kind, adata))
    model.save(tmp_path / "m")
    again = kind.load(tmp_path / "m", small_store)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    with atlasvi.open(small_store) as atlas:
        streamed = fit(build(kind, atlas))
        np.testing.assert_allclose(streamed.get_loadings(), model.get_loadings(), rtol=1e-8, atol=1e-10)


def test_expression_over_its_total(adata):
    model = fit(build(PCA, adata, transform="cp10k"), train_size=1.0)
    shares = adata.X.toarray() / adata.X.sum(1).A1[:, None] * 1e4
    peer = decomposition.PCA(3, svd_solver="full").fit(np.log1p(shares))
    np.testing.assert_allclose(model.explained_variance_ratio, peer.explained_variance_ratio_, **EXACT)


def test_genes_and_cells_without_counts_are_finite(adata):
    dense = adata.X.toarray()
    dense[[0, 7]] = 0
    dense[:, 4] = 0
    adata.X = sp.csr_matrix(dense)
    for kind in KINDS:
        model = fit(build(kind, adata, **({"transform": "cp10k"} if kind is PCA else {})))
        assert np.isfinite(model.get_latent_representation()).all()
        if kind is not PCA:
            assert np.isfinite(model.get_elbo(return_mean=False)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(kind, adata, solver, tmp_path, monkeypatch):
    """Passes that were written are not gone through again."""
    passes, counts = [], Epochs.counts
    stop_after = 1 if solver == "one pass" and kind is not FactorAnalysis else 3
    monkeypatch.setattr(Epochs, "counts", lambda self: passes.append(1) or counts(self))
    whole = fit(build(kind, adata), tol=1e-6)
    in_all = len(passes)
    passes.clear()

    def stop(record):
        if record.epoch + 1 == stop_after:
            raise OSError("stopped")

    kept = {"checkpoint": tmp_path / "c", "checkpoint_every_seconds": 0, "tol": 1e-6}
    with pytest.raises(OSError, match="stopped"):
        fit(build(kind, adata), on_epoch=stop, **kept)
    resumed = fit(build(kind, adata), resume=True, **kept)
    assert len(passes) == in_all + (solver != "one pass")  # the step that was under way comes again
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name
    assert [r.elbo_train for r in resumed.records] == [r.elbo_train for r in whole.records]
    # One that came to its end is there at once, and takes more steps if they are asked for.
    passes.clear()
    again = fit(build(kind, adata), resume=True, **kept)
    assert not passes
    assert torch.equal(again.module.weight, whole.module.weight)


def test_a_fit_of_few_steps_goes_on_when_more_are_asked_for(adata, tmp_path):
    kept = {"checkpoint": tmp_path / "c", "tol": 0}
    fit(build(FactorAnalysis, adata), 3, **kept)
    more, whole = (fit(build(FactorAnalysis, adata), 8, resume=r, **kept) for r in (True, False))
    assert len(more.records) == 8
    assert torch.equal(more.module.weight, whole.module.weight)


def test_a_checkpoint_of_another_fit_is_refused(adata, tmp_path):
    kept = {"checkpoint": tmp_path / "c", "tol": 1e-6}
    fit(build(PPCA, adata), **kept)
    for ask, error, said in (
        (lambda: fit(build(PCA, adata), resume=True, **kept), ModelError, "model='PPCA', now 'PCA'"),
        (lambda: fit(build(PPCA, adata, 4), resume=True, **kept), ModelError, "config.n_latent=3, now 4"),
        (lambda: fit(build(PPCA, adata), resume=True, **{**kept, "tol": 1e-3}), ModelError, "tol=1e-06, now"),
        (lambda: fit(build(PPCA, adata), resume=True, seed=1, **kept), ModelError, "seed=0, now 1"),
        (lambda: fit(build(PPCA, adata[:-1].copy()), resume=True, **kept), ModelError, "other|made with"),
        (lambda: fit(build(PPCA, adata), resume=True), OptionError, "needs checkpoint="),
    ):
        with pytest.raises(error, match=said):
            ask()
    (tmp_path / "c" / "fit.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is damaged.*fit\.safetensors"):
        fit(build(PPCA, adata), resume=True, **kept)


def test_what_cannot_be_is_refused(adata):
    with pytest.raises(NotTrainedError):
        build(PCA, adata).get_loadings()
    for ask, said in (
        (lambda: build(PCA, adata, 0), "n_latent must be a whole number of at least 1"),
        (lambda: fit(build(PCA, adata, 60)), "below the number of genes, 60"),
        (lambda: build(PCA, adata, transform="log"), "'log'.*log1p"),
        (lambda: fit(build(PCA, adata)).get_elbo(), "PPCA"),
        (lambda: fit(build(PCA, adata)).get_marginal_ll(), "PPCA"),
        (lambda: fit(build(PPCA, adata, transform="cp10k")).get_elbo(), "log1p"),
        (lambda: fit(build(PCA, adata)).expression(), "no expression of cells"),
        (lambda: fit(build(PCA, adata), plan_kwargs={}), "PCA.train.plan_kwargs"),
        (lambda: fit(build(PCA, adata), 0), "max_epochs"),
        (lambda: build(PPCA, adata, 2.5), "n_latent must be a whole number of at least 1, is 2.5"),
        (lambda: build(PPCA, adata, True), "n_latent must be a whole number"),
        (lambda: fit(build(PCA, adata), tol=float("nan")), "tol must be a number of at least 0, is nan"),
        (lambda: fit(build(PCA, adata), checkpoint_every_seconds="a"), "checkpoint_every_seconds must be"),
    ):
        with pytest.raises(OptionError, match=said):
            ask()
