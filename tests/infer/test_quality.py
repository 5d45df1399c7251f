"""Scores of cells: equal to the module's own numbers, free of depth, and high for cells that fit nothing."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
from sklearn.metrics import roc_auc_score

import atlasvi
from atlasvi.errors import OptionError
from atlasvi.infer.quality import beside_like_depth


@pytest.fixture(scope="module")
def model():
    simulation = atlasvi.Simulation(1_500, 150, n_types=4, n_batches=1, doublet_rate=0, empty_rate=0, seed=3)
    adata = simulation.to_anndata()
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata, n_hidden=32)
    model.train(15, batch_size=128, plan_kwargs={"lr": 0.01}, enable_progress_bar=False)
    return model


def test_numbers_are_the_modules_own(model):
    found = model.cell_quality(n_samples=1, seed=4)
    error = model.get_reconstruction_error(return_mean=False, seed=4)["reconstruction_loss"]
    np.testing.assert_allclose(found["reconstruction_error"], error, rtol=1e-6)
    counts = np.asarray(model.atlas.read_rows(slice(None)).to_dense())
    np.testing.assert_array_equal(found["total_counts"], counts.sum(1))
    np.testing.assert_array_equal(found["n_genes"], (counts > 0).sum(1))
    assert list(found.index) == list(model.atlas.obs_names)


def test_minibatches_and_order_change_nothing(model):
    whole, small = model.cell_quality(), model.cell_quality(batch_size=97)
    np.testing.assert_allclose(whole["reconstruction_error"], small["reconstruction_error"], rtol=1e-5)
    some = model.cell_quality(indices=[7, 900, 31])
    names = whole.index[[7, 900, 31]]
    assert list(some.index) == list(names)
    np.testing.assert_allclose(
        some["reconstruction_error"], whole.loc[names, "reconstruction_error"], rtol=1e-5
    )


def test_the_score_does_not_know_depth_where_the_error_does(model):
    found = model.cell_quality()
    total = found["total_counts"]
    assert scipy.stats.spearmanr(total, found["reconstruction_error"])[0] > 0.8
    assert abs(scipy.stats.spearmanr(total, found["depth_score"])[0]) < 0.1


def test_cells_whose_genes_are_exchanged_stand_out_at_any_depth(model):
    counts = np.asarray(model.atlas.read_rows(slice(None)).to_dense())
    rng = np.random.default_rng(0)
    strange = rng.choice(len(counts), 75, replace=False)
    counts[strange] = rng.permuted(counts[strange], axis=1)  # the totals stay
    adata = anndata.AnnData(sp.csr_matrix(counts), var=model.atlas.var)
    found = model.cell_quality(adata)
    is_strange = np.isin(np.arange(len(counts)), strange)
    assert roc_auc_score(is_strange, found["depth_score"]) > 0.97
    assert roc_auc_score(is_strange, found["depth_score"]) > roc_auc_score(
        is_strange, found["reconstruction_error"]
    )


def test_a_known_trend_and_spread_are_taken_out():
    rng = np.random.default_rng(0)
    total = np.exp(rng.uniform(np.log(100), np.log(10_000), 8_000))
    noise = rng.normal(size=8_000)
    score = beside_like_depth(3 * total**0.9 + total**0.5 * noise, total)
    assert np.corrcoef(score, noise)[0, 1] > 0.97
    assert 0.9 < score.std() < 1.15


def test_few_cells_and_equal_cells_have_scores_too():
    assert beside_like_depth(np.array([1.0, 2.0, 4.0]), np.array([5.0, 5.0, 5.0])) == pytest.approx(
        [-0.6744897, 0.0, 2 * 0.6744897]
    )
    assert (beside_like_depth(np.ones(4), np.ones(4)) == 0).all()


def test_no_draws_are_refused(model):
    with pytest.raises(OptionError, match="n_samples must be a whole number of at least 1, is 0"):
        model.cell_quality(n_samples=0)
