"""Counts drawn from a model: their distribution, and that nothing depends on chunks."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from atlasvi.errors import CellsError, OptionError
from atlasvi.infer import correlation, sample
from atlasvi.models.scvi import SCVI

N_OBS, N_VARS = 300, 60
# Which a model may well draw.
pytestmark = pytest.mark.filterwarnings("ignore:.*have no counts")


def build(adata, **options):
    SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type", gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3, **options)
    model.train(2, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    return model


@pytest.fixture(params=["zinb", "poisson, latent library"])
def model(request, adata):
    name, _, latent = request.param.partition(",")
    return build(adata, gene_likelihood=name, use_observed_lib_size=not latent)


def moments(parameters):
    """Mean and variance of counts."""
    mu = parameters["mean"].astype(float)
    pi = parameters.get("dropout", np.zeros(1))
    over = 1 / parameters["dispersions"] if "dispersions" in parameters else 0.0
    return (1 - pi) * mu, (1 - pi) * mu * (1 + mu * (pi + over))


def test_counts_have_the_moments_of_their_parameters(model):
    how = {"indices": [5], "n_samples": 400}
    counts = np.stack([c.toarray()[0] for c in model.posterior_predictive_sample(**how)])
    mean, variance = moments(model.get_likelihood_parameters(**how))
    # Draws of z differ, so the variance of each count given its z does; the mean of many is normal.
    z = (counts - mean[:, 0]).sum(0) / np.sqrt(variance[:, 0].sum(0))
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    assert np.abs(z).max() < 5


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "zip", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_parameters_are_those_of_the_likelihood(likelihood, dispersion, adata):
    """-log p(x|z) by scipy from the parameters is what the model says itself."""
    model = build(adata, gene_likelihood=likelihood, dispersion=dispersion)
    p = {k: v.astype(float) for k, v in model.get_likelihood_parameters().items()}
    x = adata.X.toarray()
    if likelihood.endswith("nb"):
        theta = p["dispersions"]
        log_p = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + p["mean"]))
    else:
        log_p = scipy.stats.poisson.logpmf(x, p["mean"])
    if likelihood.startswith("zi"):
        log_p = np.where(x > 0, np.log1p(-p["dropout"]) + log_p,
                         np.log(p["dropout"] + (1 - p["dropout"]) * np.exp(log_p)))  # fmt: skip
    assert set(p) == {"mean"} | ({"dispersions"} if likelihood.endswith("nb") else set()) | (
        {"dropout"} if likelihood.startswith("zi") else set()
    )
    found = model.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
    np.testing.assert_allclose(-log_p.sum(1), found, rtol=1e-4)


def test_a_count_depends_on_its_seed_sample_cell_and_gene_alone(model, monkeypatch):
    whole = [c.toarray() for c in model.posterior_predictive_sample(n_samples=2, seed=3)]
    assert (whole[0] != whole[1]).any()
    cells, genes = [250, 3, 17], ["gene-9", "gene-2"]
    monkeypatch.setattr(sample, "_PIECE_BYTES", 1)
    for data in (None, model.encode()):
        some = model.posterior_predictive_sample(data, indices=cells, gene_list=genes, n_samples=2, seed=3)
        for part, all_of_it in zip(some, whole, strict=True):
            # A mean that is rounded otherwise in its last bit may move a count that sat on the edge.
            assert (part.toarray() != all_of_it[cells][:, [9, 2]]).sum() <= 1
    other = model.posterior_predictive_sample(seed=4)
    assert isinstance(other, sp.csr_matrix)
    assert (other.toarray() != whole[0]).any()


def test_samples_are_written_as_an_atlas_samples_one_after_the_other(model, tmp_path):
    atlas = model.posterior_predictive_sample(n_samples=2, out=tmp_path / "again.zarr")
    expected = model.posterior_predictive_sample(n_samples=2)
    back = anndata.read_zarr(tmp_path / "again.zarr")
    assert (back.X != sp.vstack(expected)).nnz == 0
    assert back.obs_names[0] == "cell-0-sample0" and back.obs_names[-1] == "cell-299-sample1"
    assert back.obs["batch"].tolist() == 2 * model.atlas.obs_column("batch").tolist()
    assert atlas.shape == (600, 60)


def test_several_batches_are_the_mean_of_counts_under_each(model, tmp_path):
    each = [model.posterior_predictive_sample(transform_batch=b).toarray() for b in ("b1", "b2")]
    both = model.posterior_predictive_sample(transform_batch=["b1", "b2"])
    np.testing.assert_allclose(both.toarray(), np.mean(each, axis=0))
    with pytest.raises(OptionError, match="no counts"):
        model.posterior_predictive_sample(transform_batch=["b1", "b2"], out=tmp_path / "x.zarr")


def test_what_would_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr(sample, "LARGEST_DENSE", 1000)
    with pytest.raises(OptionError, match=r"300 cells.*GiB.*out="):
        model.posterior_predictive_sample()
    monkeypatch.setattr("atlasvi.infer.normalized.LARGEST_DENSE", 1000)
    with pytest.raises(OptionError, match="lazy=True"):
        model.get_likelihood_parameters()
    lazy = model.get_likelihood_parameters(lazy=True)
    assert lazy["mean"][:3].compute().shape == (3, N_VARS)


def test_parameters_of_each_draw_and_their_mean(model):
    each = model.get_likelihood_parameters(n_samples=3, gene_list=["gene-4"], indices=range(70))
    mean = model.get_likelihood_parameters(
        n_samples=3, gene_list=["gene-4"], indices=range(70), give_mean=True
    )
    one = model.get_likelihood_parameters(gene_list=["gene-4"], indices=range(70))
    for key, value in each.items():
        assert value.shape == (3, 70, 1)
        np.testing.assert_allclose(value.mean(0), mean[key], rtol=1e-5)
        np.testing.assert_allclose(value[0], one[key], rtol=1e-5)
    rho = model.expression(library_size="latent", genes=["gene-4"], cells=range(70)).compute()
    np.testing.assert_allclose(one["mean"], rho, rtol=1e-4)


def test_library_sizes(model, adata):
    if not model.module.library_is_latent:
        with pytest.raises(OptionError, match="give_mean=False"):
            model.get_latent_library_size()
        found = model.get_latent_library_size(give_mean=False, indices=[4, 2])
        np.testing.assert_allclose(found, np.asarray(adata.X[[4, 2]].sum(1)).reshape(2, 1))
        return
    mean = model.get_latent_library_size()
    draws = np.stack([model.get_latent_library_size(give_mean=False, seed=s) for s in range(300)])
    assert mean.shape == (N_OBS, 1)
    error = draws.std(0) / np.sqrt(300)
    assert (np.abs(draws.mean(0) - mean) < 5 * error).all()


# --- cells that nobody saw -----------------------------------------------------------------------


def test_cells_from_the_prior(model, tmp_path):
    n = 2000
    cells = model.sample_prior(n, seed=1)
    assert cells.shape == (n, N_VARS)
    x = cells.read_rows(slice(None)).to_scipy().toarray()
    np.testing.assert_array_equal(cells.read_rows([1500, 3]).to_scipy().toarray(), x[[1500, 3]])
    source = cells._source._source
    z = torch.cat([source.read(a, a + 500, torch.device("cpu")).draw(1, 0) for a in range(0, n, 500)])
    assert scipy.stats.kstest(z.numpy().ravel(), "norm").pvalue > 1e-3
    # Batches and depths are those of the data.
    share = (np.asarray(cells.obs_column("batch")) == "b1").mean()
    assert abs(share - (np.asarray(model.atlas.obs_column("batch")) == "b1").mean()) < 0.06
    if not model.module.library_is_latent and not model.module.likelihood.has_pi:
        assert x.sum(1).mean() == pytest.approx(
            model.atlas.read_rows(slice(None)).to_scipy().sum(1).mean(), rel=0.1
        )
    written = model.sample_prior(50, seed=1, transform_batch="b2", out=tmp_path / "prior.zarr")
    assert set(written.obs_column("batch")) == {"b2"}
    assert written.obs_names[7] == "prior-7"


def test_a_latent_library_is_drawn_from_the_prior_of_the_batch_asked_for(adata):
    deep = np.where(adata.obs["batch"] == "b2", 8, 1)
    adata.X = sp.diags(deep.astype(np.float32)) @ adata.X
    model = build(adata, gene_likelihood="poisson", use_observed_lib_size=False)
    prior = model.module.library_log_mean, model.module.library_log_var
    means = (prior[0] + prior[1] / 2).exp().tolist()
    assert means[1] > 5 * means[0]
    for batch, mean in zip(("b1", "b2"), means, strict=True):
        drawn = model.sample_prior(1000, transform_batch=batch, seed=1).read_rows(slice(None))
        assert drawn.to_scipy().sum(1).mean() == pytest.approx(mean, rel=0.1)


def test_cells_near_a_cell(model):
    cells = model.encode()
    near = sample.nearest(cells, 7, 10)
    distance = np.square(cells.loc - cells.loc[7]).sum(1)
    assert near[0] == 7
    np.testing.assert_array_equal(np.sort(distance[near]), np.sort(distance)[:10])
    found = model.sample_neighbourhood(7, 3000, cells, n_neighbors=10, seed=2)
    source = found._source._source
    z = source.read(0, 3000, torch.device("cpu")).draw(2, 0).numpy()
    mean = cells.loc[near].mean(0)
    variance = (cells.scale[near] ** 2 + cells.loc[near] ** 2).mean(0) - mean**2
    assert (np.abs(z.mean(0) - mean) < 5 * np.sqrt(variance / 3000)).all()
    np.testing.assert_allclose(z.var(0), variance, rtol=0.15)
    assert set(found.obs_column("batch")) == {model.atlas.obs_column("batch")[7]}
    totals = found.read_rows(slice(0, 500)).to_scipy().sum(1)
    assert 0 < totals.mean() < 3 * cells.library[7]


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda m: m.sample_prior(0), OptionError, "n_cells"),
        (lambda m: m.sample_neighbourhood(300, 5), CellsError, "300"),
        (lambda m: m.sample_neighbourhood(3, 5, n_neighbors=0), OptionError, "n_neighbors"),
        (lambda m: m.posterior_predictive_sample(n_samples=0), OptionError, "n_samples"),
        (lambda m: m.posterior_predictive_sample(dataloader=1), OptionError, "dataloader"),
        (lambda m: m.get_feature_correlation_matrix(correlation_type="kendall"), OptionError, "kendall"),
        (lambda m: m.get_feature_correlation_matrix(indices=[1], n_samples=1), OptionError, "two"),
        (lambda m: m.get_likelihood_parameters(transform_batch=["b1", "b2"]), OptionError, "one"),
    ],
)
def test_what_cannot_be_is_refused(ask, error, words, model):
    with pytest.raises(error, match=words):
        ask(model)


# --- correlations ---------------------------------------------------------------------------------


def drawn(model, request, code=None):
    source, _ = model._source(None, None)
    n_out = len(request.genes)
    return np.concatenate(list(correlation._blocks(model.module, source, request, code, n_out)))


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlations_are_numpys_and_scipys(kind, model, monkeypatch):
    genes = ["gene-1", "gene-30", "gene-7"]
    request = model._request(genes, None, 1000.0, 3)
    values = drawn(model, request)
    assert values.shape == (900, 3)
    if kind == "pearson":
        expected = np.corrcoef(values.astype(float), rowvar=False)
    else:
        expected = scipy.stats.spearmanr(values).statistic
    monkeypatch.setattr(sample, "_PIECE_BYTES", 1)
    found = model.get_feature_correlation_matrix(n_samples=3, correlation_type=kind, gene_list=genes)
    assert list(found.index) == list(found.columns) == genes
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ranks_of_classes_are_near_those_of_all_values(model, monkeypatch):
    genes = [f"gene-{g}" for g in range(6)]
    expected = scipy.stats.spearmanr(drawn(model, model._request(genes, None, 1000.0, 5))).statistic
    monkeypatch.setattr(correlation, "CLASSES", 200)
    found = model.get_feature_correlation_matrix(n_samples=5, gene_list=genes).to_numpy()
    # Draws of 1,500 values vary by ten times as much.
    assert 0 < np.abs(found - expected).max() < 3e-3


def test_correlations_of_several_batches_are_averaged(model):
    genes = ["gene-1", "gene-2"]
    each = [model.get_feature_correlation_matrix(transform_batch=b, gene_list=genes) for b in ("b1", "b2")]
    both = model.get_feature_correlation_matrix(transform_batch=["b1", "b2"], gene_list=genes)
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2)


def test_a_matrix_that_would_not_fit_is_refused(model, monkeypatch):
    monkeypatch.setattr("atlasvi.infer.normalized.LARGEST_DENSE", 1000)
    with pytest.raises(OptionError, match="gene_list"):
        model.get_feature_correlation_matrix()
