"""Measures against scikit-learn, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from atlasvi_kernels import CSR
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from atlasvi.errors import CellsError, ObsError, OptionError
from atlasvi.metrics import (
    clustering_scores,
    decode_check,
    entropy_of_batch_mixing,
    pca_latent,
    score_latent,
    silhouette,
    subsample,
)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1_200)
    return rng.normal(size=(1_200, 3)) + 12 * np.eye(4)[labels, :3], labels


def test_clusters_of_blobs_and_of_noise(blobs):
    latent, labels = blobs
    scores = clustering_scores(latent, labels, seed=0)
    assert scores.ari == pytest.approx(1, abs=0.01) and scores.nmi == pytest.approx(1, abs=0.02)
    assert (scores.n_clusters, scores.n_used) == (4, 1_200)
    shuffled = clustering_scores(latent, np.random.default_rng(1).permutation(labels), seed=0)
    assert abs(shuffled.ari) < 0.02 and shuffled.nmi < 0.02


def test_nmi_is_geometric_and_merged_clusters_cost():
    # Two of four equal, well separated groups fall together: mutual information log 2 over sqrt(log 2 log 4).
    latent = np.repeat([[0.0], [1.0], [100.0], [101.0]], 50, axis=0)
    scores = clustering_scores(latent, np.repeat(list("abcd"), 50), seed=0, n_clusters=2)
    assert scores.nmi == pytest.approx(np.log(2) / np.sqrt(np.log(2) * np.log(4)))
    # By pairs: together in both 4*C(50,2), in clusters 2*C(100,2), in labels 4*C(50,2), of C(200,2).
    together, clusters, pairs = 4 * 1225, 2 * 4950, 19900
    chance = clusters * together / pairs
    assert scores.ari == pytest.approx((together - chance) / ((clusters + together) / 2 - chance))


def test_subsamples_are_seeded_and_said(blobs):
    latent, labels = blobs
    assert clustering_scores(latent, labels, seed=0, max_cells=300).n_used == 300
    rows = subsample(1_000, 10, seed=1)
    assert np.array_equal(rows, subsample(1_000, 10, seed=1)) and len(set(rows)) == 10
    assert (np.diff(rows) > 0).all() and not np.array_equal(rows, subsample(1_000, 10, seed=2))
    assert np.array_equal(subsample(5, 10, seed=0), np.arange(5))


def mixing_by_brute_force(latent, batch, cells, k):
    total = 0.0
    for cell in cells:
        distance = ((latent - latent[cell]) ** 2).sum(1)
        distance[cell] = np.inf
        share = np.bincount(batch[np.argsort(distance)[:k]]) / k
        total -= sum(p * np.log(p) for p in share if p > 0)
    return total / len(cells)


def test_mixing_is_what_brute_force_says():
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 3, 400)
    latent = rng.normal(size=(400, 4)) + batch[:, None] * 0.5
    score = entropy_of_batch_mixing(latent, batch, seed=7, n_neighbors=20, n_cells=60, n_repeats=2)
    drawn = np.random.default_rng(7).integers(0, 400, (2, 60))
    expected = [mixing_by_brute_force(latent, batch, cells, 20) for cells in drawn]
    assert score.entropy == pytest.approx(np.mean(expected))
    assert score.spread == pytest.approx(np.std(expected))


def test_mixing_is_zero_apart_and_the_ceiling_when_mixed():
    rng = np.random.default_rng(0)
    batch = rng.choice(list("abc"), 3_000, p=[0.5, 0.3, 0.2])
    latent = rng.normal(size=(3_000, 3))
    mixed = entropy_of_batch_mixing(latent, batch, seed=0)
    assert mixed.ceiling == pytest.approx(1.0297, abs=0.02)
    # The plug-in entropy of 50 draws of 3 levels is short of the truth by about (3 - 1) / (2 * 50).
    assert mixed.entropy == pytest.approx(mixed.ceiling - 0.02, abs=0.015)
    apart = latent + 100.0 * (batch == "a")[:, None] + 200.0 * (batch == "b")[:, None]
    assert entropy_of_batch_mixing(apart, batch, seed=0).entropy == 0
    one = entropy_of_batch_mixing(latent, ["only"] * 3_000, seed=0)
    assert one.entropy == 0 and one.ceiling == 0


def test_a_cell_is_not_its_own_neighbour_even_among_twins():
    # Ten cells on each spot, spots of one batch but for one odd cell each.
    latent = np.repeat(np.arange(20.0)[:, None] * 10, 10, axis=0)
    batch = np.tile([1] + [0] * 9, 20)
    score = entropy_of_batch_mixing(latent, batch, seed=0, n_neighbors=9, n_cells=4_000, n_repeats=1)
    usual = scipy.stats.entropy([8, 1])
    assert score.entropy == pytest.approx(0.9 * usual, abs=0.02)


def test_silhouette_is_that_of_sklearn(blobs):
    latent, labels = blobs
    assert silhouette(latent, labels, seed=0) == (pytest.approx(silhouette_score(latent, labels)), 1_200)
    assert silhouette(latent, labels, seed=0, max_cells=100)[1] == 100


@pytest.mark.parametrize("labels", [["T"] * 6, list("abcdef")])
def test_a_silhouette_needs_two_labels_and_cells_that_share_one(labels):
    with pytest.raises(ObsError, match=rf"{len(set(labels))} levels? among 6 cells looked at"):
        silhouette(np.eye(6), labels, seed=0)


def test_scores_leave_out_what_is_not_kept(blobs):
    latent, labels = blobs
    batch = pd.Categorical(np.where(np.arange(1_200) % 2, "x", "y"))
    keep = labels != 3
    scores = score_latent("it", latent, labels, batch, seed=0, keep=keep)
    assert scores.clustering.n_clusters == 3 and scores.clustering.n_used == keep.sum() == scores.n_silhouette
    assert scores.mixing.ceiling == pytest.approx(np.log(2), abs=1e-3)
    assert scores.name == "it" and scores.silhouette > 0.5


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(size=(6, 120))) [rng.integers(0, 6, 900)]  # fmt: skip
    matrix = rng.poisson(rates * rng.lognormal(0, 0.3, (900, 1)))
    matrix[17] = 0
    return sp.csr_matrix(matrix)


def log_normalised(counts, target):
    dense = counts.toarray().astype(float)
    total = dense.sum(1, keepdims=True)
    return np.log1p(dense / np.where(total > 0, total, 1) * target)


def blocks(counts, size):
    return lambda: (CSR.from_scipy(counts[i : i + size]) for i in range(0, counts.shape[0], size))


def test_pca_is_that_of_sklearn(counts):
    found = pca_latent(blocks(counts, 128), n_components=5, seed=0)
    totals = np.asarray(counts.sum(1)).ravel()
    assert found.target_sum == np.median(totals[totals > 0])
    data = log_normalised(counts, found.target_sum)
    oracle = PCA(5, svd_solver="full").fit(data)
    assert np.allclose(found.mean, oracle.mean_, atol=1e-5)
    assert np.allclose(found.explained_variance, oracle.explained_variance_, rtol=1e-3)
    assert np.allclose(np.abs((found.components * oracle.components_).sum(1)), 1, atol=1e-3)
    sign = np.sign((found.components * oracle.components_).sum(1))
    assert np.allclose(found.latent * sign, oracle.transform(data), atol=0.02)
    assert found.latent.dtype == np.float32 and found.latent.shape == (900, 5)


def test_pca_does_not_depend_on_the_blocks(counts):
    a = pca_latent(blocks(counts, 900), n_components=4, seed=0, target_sum=1e3)
    b = pca_latent(blocks(counts, 77), n_components=4, seed=0, target_sum=1e3)
    # float32 sums in another order.
    assert np.allclose(a.latent, b.latent, atol=1e-3) and b.target_sum == 1e3
    assert (a.components[np.arange(4), np.abs(a.components).argmax(1)] > 0).all()


def test_decode_check_against_scipy():
    rng = np.random.default_rng(0)
    labels = rng.choice(list("pqrs"), 200)
    true = rng.dirichlet(np.ones(12), 200)
    decoded = true * rng.lognormal(0, 0.5, true.shape)
    check = decode_check(decoded, true, labels)
    assert check.pearson_log == pytest.approx(
        scipy.stats.pearsonr(np.log(decoded).ravel(), np.log(true).ravel()).statistic
    )
    frames = [pd.DataFrame(values).groupby(labels).mean() for values in (decoded, true)]
    expected = [scipy.stats.spearmanr(frames[0][g], frames[1][g]).statistic for g in range(12)]
    assert np.allclose(check.spearman_per_gene, expected)
    assert np.allclose(check.decoded_mean, frames[0]) and np.allclose(check.true_mean, frames[1])
    assert check.types == ("p", "q", "r", "s") and check.n_cells == 200
    assert check.median_log_ratio == pytest.approx(np.median(np.abs(np.log2(decoded / true))))
    same = decode_check(true, true, labels)
    assert same.pearson_log == pytest.approx(1) and same.spearman_median == pytest.approx(1)


def test_a_gene_without_differences_has_no_rank_correlation():
    true = np.tile([0.5, 0.2, 0.3], (6, 1))
    true[:3, 1] = 0.1
    check = decode_check(true, true, list("aaabbb"))
    assert np.isnan(check.spearman_per_gene[[0, 2]]).all() and check.spearman_median == pytest.approx(1)


def test_wrong_input_is_named():
    latent = np.zeros((10, 2))
    with pytest.raises(CellsError, match="labels has 9 entries for 10 cells"):
        clustering_scores(latent, ["a"] * 9, seed=0)
    with pytest.raises(ObsError, match="batch has no value at cell 1"):
        entropy_of_batch_mixing(latent, ["a", None, *["b"] * 8], seed=0, n_neighbors=3)
    with pytest.raises(OptionError, match="n_neighbors is 50 for 10 cells; give 1 to 9"):
        entropy_of_batch_mixing(latent, ["a"] * 10, seed=0)
    with pytest.raises(OptionError, match="n_clusters is 11 for 10 cells"):
        clustering_scores(latent, ["a"] * 10, seed=0, n_clusters=11)
    with pytest.raises(OptionError, match="n_components is 10 for 3 genes"):
        pca_latent(lambda: [CSR.from_scipy(sp.csr_matrix(np.eye(3)))], seed=0)
    with pytest.raises(CellsError, match="no cells"):
        pca_latent(lambda: [], seed=0)
    with pytest.raises(CellsError, match=r"decoded is \(10, 2\) and true \(10, 3\)"):
        decode_check(latent, np.zeros((10, 3)), ["a"] * 10)
