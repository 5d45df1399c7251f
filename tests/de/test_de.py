"""Groups, draws and pairs: against brute force on a tiny model, and the properties that must hold."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from sklearn.mixture import GaussianMixture

import atlasvi
from atlasvi.de import sampling
from atlasvi.de.change import estimate_delta, shortest_interval
from atlasvi.de.decoding import _Z
from atlasvi.de.groups import groups_of
from atlasvi.de.table import expected_fdr_calls
from atlasvi.errors import CellsError, NotTrainedError, ObsError, OptionError
from atlasvi.types import Noise
from tests.conftest import make_adata

QUIET = {"silent": True}


def trained(data, **setup):
    atlasvi.SCVI.setup_anndata(data, gene_mask=None, **{"batch_key": "batch", **setup})
    model = atlasvi.SCVI(data, n_latent=4, n_hidden=16)
    model.train(12, batch_size=64, schedule="scvi-tools", plan_kwargs={"lr": 0.02}, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model():
    return trained(make_adata(400, 60))


def all_log_rho(model, n_draws, seed=0, batch=None):
    """``(n_draws, n_obs, G)`` from the module itself, all at once."""
    (minibatch,) = list(model._minibatches(None, None, 10_000))
    if batch is not None:
        from dataclasses import replace

        minibatch = replace(minibatch, batch_index=torch.full_like(minibatch.batch_index, batch))
    with torch.no_grad():
        q = model.module.encode(minibatch)
        draws = [q.rsample(Noise(seed, s, minibatch.rows).normal(4, _Z)) for s in range(n_draws)]
        return torch.stack([model.module.decode_log_rho(z, minibatch) for z in draws]).numpy()


def exact_probability(a, b):
    """``(G,)`` share of all pairs of rows in which the first is higher."""
    out = np.empty(a.shape[1])
    for g in range(a.shape[1]):
        out[g] = np.searchsorted(np.sort(b[:, g]), a[:, g], side="left").mean() / len(b)
    return out


def in_order(model, frame):
    return frame.loc[list(model.fields.var_names)]


@pytest.mark.parametrize("batch", [None, 1])
def test_probabilities_are_those_of_all_pairs_of_all_draws(model, batch):
    types = model.atlas.obs_column("cell_type")
    rho = all_log_rho(model, 30, seed=9, batch=batch)
    a, b = rho[:, types == "T"].reshape(-1, 60), rho[:, types == "B"].reshape(-1, 60)
    correct = {} if batch is None else {"batch_correction": True, "batchid1": "b2", "batchid2": ["b2"]}
    found = model.differential_expression(
        None, "cell_type", "T", "B", n_samples_overall=20_000, **correct, **QUIET
    )
    expected = exact_probability(a, b)
    assert expected.max() > 0.8  # there is something to find
    gap = np.abs(in_order(model, found)["proba_m1"] - expected)
    assert gap.max() < 5 * np.sqrt(0.25 / 20_000) + 5 * np.sqrt(1 / 6 / len(a))
    for side, rows in (("scale1", a), ("scale2", b)):
        np.testing.assert_allclose(in_order(model, found)[side], np.exp(rows).mean(0), rtol=0.03)


def test_rows_are_decoded_and_counted_as_the_design_says(model):
    """Every number of a small question, from the module alone."""
    found = model.differential_expression(None, "cell_type", "T", "B", n_samples_overall=500, seed=3, **QUIET)
    groups = groups_of(model.atlas, "cell_type", ["T"], "B", None, None)
    chosen = sampling.choose_cells(model.atlas, groups.codes, 2, 500, 3)
    assert [sorted(c) for c in chosen] == [list(np.flatnonzero(groups.codes == g)) for g in (0, 1)]
    design = sampling.pooled_design(groups, chosen, 500, (np.array([-1]), np.array([-1])), 3)
    rho = all_log_rho(model, design.draws.max() + 1, seed=3)
    a, b = (rho[design.draws[pool], design.cells[pool]] for pool in (0, 1))
    frame = in_order(model, found)
    np.testing.assert_allclose(frame["proba_m1"], (a > b).mean(0), atol=2 / 500)
    np.testing.assert_allclose(frame["scale1"], np.exp(a).mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        frame["bayes_factor"], np.log(frame.proba_m1 + 1e-8) - np.log(frame.proba_m2 + 1e-8)
    )
    change = in_order(
        model,
        model.differential_expression(
            None, "cell_type", "T", "B", mode="change", delta=0.3, pseudocounts=2e-3, n_samples_overall=500,
            seed=3, cred_interval_lvls=0.8, **QUIET,
        ),
    )  # fmt: skip
    ratio = np.log2((np.exp(a) + 2e-3) / (np.exp(b) + 2e-3))
    lfc = np.log2((np.exp(a) + 2e-6) / (np.exp(b) + 2e-6))
    p = np.maximum((ratio >= 0.3).mean(0), (ratio < -0.3).mean(0))
    np.testing.assert_allclose(change["proba_de"], p, atol=2 / 500)
    for column, value in {
        "lfc_mean": lfc.mean(0), "lfc_median": np.median(lfc, 0), "lfc_std": lfc.std(0),
        "lfc_min": lfc.min(0), "lfc_max": lfc.max(0),
    }.items():  # fmt: skip
        np.testing.assert_allclose(change[column], value, rtol=1e-4, atol=1e-4)
    inside = (lfc >= change["lfc_confidence_interval_0.8_min"].to_numpy()) & (
        lfc <= change["lfc_confidence_interval_0.8_max"].to_numpy()
    )
    assert np.abs(inside.mean(0) - 0.8).max() < 0.01


def test_a_model_whose_rho_is_no_softmax_is_asked_alike():
    adata = make_adata(200, 30)
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 100
    sized = trained(adata, size_factor_key="size")
    assert sized.module.softmax_head() is None
    found = in_order(
        sized, sized.differential_expression(None, "cell_type", "T", "B", n_samples_overall=300, **QUIET)
    )
    groups = groups_of(sized.atlas, "cell_type", ["T"], "B", None, None)
    chosen = sampling.choose_cells(sized.atlas, groups.codes, 2, 300, 0)
    design = sampling.pooled_design(groups, chosen, 300, (np.array([-1]), np.array([-1])), 0)
    rho = all_log_rho(sized, design.draws.max() + 1)
    a, b = (rho[design.draws[pool], design.cells[pool]] for pool in (0, 1))
    np.testing.assert_allclose(found["proba_m1"], (a > b).mean(0), atol=2 / 300)
    np.testing.assert_allclose(found["scale2"], np.exp(b).mean(0), rtol=1e-5)
    with pytest.raises(OptionError, match="precision='bfloat16' is for models whose expression is a softmax"):
        sized.differential_expression(None, "cell_type", "T", "B", precision="bfloat16", **QUIET)


def test_rounded_products_change_next_to_nothing(model):
    """Errors of rho below a percent: a few of the pairs change sides, of genes that are alike."""
    ask = {"groupby": "cell_type", "group1": "T", "group2": "B", "n_samples_overall": 2000, **QUIET}
    exact, rounded = (
        in_order(model, model.differential_expression(**ask, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    gap = np.abs(exact["proba_m1"] - rounded["proba_m1"])
    assert 0 < gap.max() < 0.02
    np.testing.assert_allclose(exact["scale1"], rounded["scale1"], rtol=0.01)


def test_the_papers_estimator_averages_bayes_factors_of_pairs_over_weighted_batches(model):
    found = in_order(
        model,
        model.differential_expression(
            None, "cell_type", "T", "B", estimator="paper", n_cells=10, n_draws=20, seed=1, **QUIET
        ),
    )
    codes = np.asarray(model.atlas.obs_column("batch").codes)
    weights = np.bincount(codes) / len(codes)
    groups = groups_of(model.atlas, "cell_type", ["T"], "B", None, None)
    one, two = sampling.choose_cells(model.atlas, groups.codes, 2, 10, 1)
    rho = [all_log_rho(model, 20, seed=1, batch=b) for b in (0, 1)]
    factors = []
    for a, b in zip(one, two, strict=True):
        p = sum(w * (r[:, a] > r[:, b]).mean(0) for w, r in zip(weights, rho, strict=True))
        factors.append(np.log((p + 0.025) / (1 - p + 0.025)))
    np.testing.assert_allclose(found["bayes_factor"], np.mean(factors, 0), atol=0.05)
    assert found["bayes_factor"].abs().max() <= np.log(1.025 / 0.025) + 1e-9


def test_one_versus_rest_is_each_label_against_all_others(model):
    """All in one pass: as each label by itself, within the noise of sampling."""
    every = model.differential_expression(groupby="cell_type", **QUIET)
    assert list(every["comparison"].unique()) == ["T vs Rest", "B vs Rest", "NK vs Rest"]
    types = np.asarray(model.atlas.obs_column("cell_type"))
    rho = all_log_rho(model, 20, seed=5)
    for label in ("T", "B", "NK"):
        one = every[every["group1"] == label]
        a, b = rho[:, types == label].reshape(-1, 60), rho[:, types != label].reshape(-1, 60)
        assert np.abs(in_order(model, one)["proba_m1"] - exact_probability(a, b)).max() < 0.04
        counts = np.asarray(model.atlas.read_rows(slice(None)).to_dense())
        np.testing.assert_allclose(
            in_order(model, one)["raw_mean1"], counts[types == label].mean(0), rtol=1e-6
        )
        np.testing.assert_allclose(
            in_order(model, one)["raw_mean2"], counts[types != label].mean(0), rtol=1e-6
        )
        share = (counts[types != label] > 0).mean(0)
        np.testing.assert_allclose(in_order(model, one)["non_zeros_proportion2"], share)
        alone = model.differential_expression(None, "cell_type", label, **QUIET)
        assert np.abs(in_order(model, one)["proba_m1"] - in_order(model, alone)["proba_m1"]).max() < 0.05


def test_the_rest_is_made_of_the_others_in_proportion():
    sizes = [50, 10, 140]
    adata = make_adata(200, 12)
    adata.obs["kind"] = pd.Categorical.from_codes(np.repeat([0, 1, 2], sizes), ["a", "b", "c"])
    atlas = atlasvi.store.atlas.Atlas.from_anndata(adata)
    groups = groups_of(atlas, "kind", None, None, None, None)
    chosen = sampling.choose_cells(atlas, groups.codes, 3, 300, 0)
    design = sampling.pooled_design(groups, chosen, 300, (np.array([-1]), np.array([-1])), 0)
    assert np.array_equal(np.bincount(design.twos[0], minlength=3), [0, 20, 280])
    assert np.array_equal(
        np.bincount(design.twos[1], minlength=3), np.round(300 * np.array([50, 0, 140]) / 190)
    )
    np.testing.assert_allclose(design.shares.sum(1), 1)
    # A group of 50 cells gives 300 rows: each cell six times, each time another draw.
    pairs = set(zip(design.cells[0].tolist(), design.draws[0].tolist(), strict=True))
    assert len(pairs) == 300
    assert np.array_equal(np.unique(design.cells[0], return_counts=True)[1], np.full(50, 6))


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "change"}, {"estimator": "paper", "n_cells": 8, "n_draws": 30}]
)
def test_nothing_depends_on_the_cutting(model, arguments, monkeypatch):
    ask = {"groupby": "cell_type", "n_samples_overall": 300, **arguments, **QUIET}
    before = model.differential_expression(**ask)
    monkeypatch.setattr("atlasvi.de.sampling._CHUNK", 37)
    monkeypatch.setattr("atlasvi.de.decoding._PIECE_BYTES", 60 * 4 * 3 * 7)
    monkeypatch.setattr("atlasvi.de.change._CHANGE_BYTES", 60 * 4 * 300 // 3)
    monkeypatch.setattr("atlasvi.stream.plan.MEMORY_BUDGET", 1 << 16)
    after = model.differential_expression(**ask)
    for column in before.columns:
        if before[column].dtype.kind == "f":
            ordered = before.groupby("comparison")[column].apply(lambda x: x.sort_index())
            np.testing.assert_allclose(
                ordered,
                after.groupby("comparison")[column].apply(lambda x: x.sort_index()),
                rtol=2e-4,
                atol=7e-3,
            )


def test_cells_are_chosen_at_random_and_by_their_own_numbers(model):
    codes = np.zeros(400, np.int8)
    codes[100:] = -1
    (few,) = sampling.choose_cells(model.atlas, codes, 1, 10, 0)
    assert len(few) == len(set(few)) == 10 and few.max() < 100
    (more,) = sampling.choose_cells(model.atlas, codes, 1, 20, 0)
    assert np.array_equal(more[:10], few)
    codes[few[3]] = -1  # to leave one out changes nobody else
    (without,) = sampling.choose_cells(model.atlas, codes, 1, 10, 0)
    assert np.array_equal(without, np.delete(more[:11], 3))
    hits = np.concatenate(
        [sampling.choose_cells(model.atlas, np.zeros(400, np.int8), 1, 40, seed)[0] for seed in range(200)]
    )
    assert scipy.stats.chisquare(np.bincount(hits, minlength=400)).pvalue > 1e-3


def test_the_same_seed_gives_the_same_and_another_gives_another(model):
    one, again, other = (
        model.differential_expression(None, "cell_type", "T", "B", seed=seed, **QUIET) for seed in (4, 4, 5)
    )
    pd.testing.assert_frame_equal(one, again)
    assert not np.array_equal(one["proba_m1"], other.loc[one.index, "proba_m1"])


def test_cells_may_be_positions_masks_or_a_query(model):
    types = np.asarray(model.atlas.obs_column("cell_type"))
    t, b = types == "T", types == "B"
    ways = [
        (t, b), (t.tolist(), np.flatnonzero(b)), (np.flatnonzero(t) - 400, "cell_type == 'B'"),
        ("cell_type == 'T' and age > 0", "cell_type == 'B'"),
    ]  # fmt: skip
    frames = [model.differential_expression(idx1=one, idx2=two, **QUIET) for one, two in ways]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], frame)
    assert "comparison" not in frames[0]
    rest = model.differential_expression(idx1=t, **QUIET)
    counts = np.asarray(model.atlas.read_rows(np.flatnonzero(~t)).to_dense())
    np.testing.assert_allclose(in_order(model, rest)["raw_mean2"], counts.mean(0), rtol=1e-6)


def test_several_of_the_levels_against_one(model):
    found = model.differential_expression(None, "cell_type", ["T", "NK"], "B", **QUIET)
    assert list(found["comparison"].unique()) == ["T vs B", "NK vs B"]
    every = model.differential_expression(None, "cell_type", None, "B", **QUIET)
    assert set(every["comparison"].unique()) == {"T vs B", "NK vs B"}


def test_new_data_and_views_are_asked_like_the_models_own(model, tmp_path):
    view = model.atlas[50:]
    found = model.differential_expression(view, "cell_type", "T", "B", **QUIET)
    types = np.asarray(view.obs_column("cell_type"))
    counts = np.asarray(view.read_rows(np.flatnonzero(types == "T")).to_dense())
    np.testing.assert_allclose(in_order(model, found)["raw_mean1"], counts.mean(0), rtol=1e-6)
    path = tmp_path / "a.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a gene without counts
        atlasvi.ingest(make_adata(400, 60), path)
    stored = model.differential_expression(path, "cell_type", "T", "B", **QUIET)
    own = model.differential_expression(None, "cell_type", "T", "B", **QUIET)
    np.testing.assert_allclose(
        in_order(model, stored)["proba_m1"], in_order(model, own)["proba_m1"], atol=2e-3
    )


def test_outliers_are_left_out_of_draws_and_not_of_raw_means(model):
    found = model.differential_expression(None, "cell_type", "T", "B", filter_outlier_cells=True, **QUIET)
    plain = model.differential_expression(None, "cell_type", "T", "B", **QUIET)
    assert not np.array_equal(found["proba_m1"], plain.loc[found.index, "proba_m1"])
    np.testing.assert_array_equal(found["raw_mean1"], plain.loc[found.index, "raw_mean1"])
    with pytest.raises(CellsError, match="too few to find outliers"):
        model.differential_expression(idx1=[1, 2, 3], idx2=[4, 5, 6], filter_outlier_cells=True, **QUIET)


def test_without_raw_counts_there_are_no_columns_of_them(model):
    found = model.differential_expression(None, "cell_type", "T", "B", all_stats=False, **QUIET)
    plain = model.differential_expression(None, "cell_type", "T", "B", **QUIET)
    assert not [column for column in found if column.startswith("raw")]
    pd.testing.assert_frame_equal(found, plain[found.columns])


def test_calls_follow_expected_false_discoveries_and_the_threshold(model):
    p = np.array([0.9, 0.999, 0.5, 0.98, 0.97])
    assert expected_fdr_calls(p, 0.05).tolist() == [True, True, False, True, True]
    assert expected_fdr_calls(p, 0.02).tolist() == [False, True, False, True, True]
    change = model.differential_expression(None, "cell_type", "T", mode="change", fdr_target=0.2, **QUIET)
    called = change["is_de_fdr_0.2"].to_numpy()
    assert called.any() and change["proba_not_de"][called].mean() <= 0.2
    vanilla = model.differential_expression(None, "cell_type", "T", bf_threshold=1.0, **QUIET)
    assert np.array_equal(vanilla["is_de_bf_1"], vanilla["bayes_factor"].abs() > 1)


def test_delta_is_estimated_from_three_modes():
    rng = np.random.default_rng(0)
    mean = np.concatenate([rng.normal(-2, 0.1, 50), rng.normal(0, 0.1, 900), rng.normal(3, 0.1, 50)])
    assert estimate_delta(mean, 0) == pytest.approx(0.6 * 2.5, rel=0.02)
    centres = np.sort(GaussianMixture(3, random_state=0).fit(mean[:, None]).means_.ravel())
    assert estimate_delta(mean, 0) == pytest.approx(0.6 * np.abs(centres[[0, 2]]).mean())
    assert estimate_delta(mean / 100, 0) == 0.1


def test_delta_none_is_asked_of_the_model(model):
    found = model.differential_expression(None, "cell_type", "T", "B", mode="change", delta=None, **QUIET)
    assert found["delta"].nunique() == 1 and found["delta"].iloc[0] >= 0.1
    given = model.differential_expression(
        None, "cell_type", "T", "B", mode="change", delta=found["delta"].iloc[0], **QUIET
    )
    np.testing.assert_array_equal(found["proba_de"], given["proba_de"])


def test_intervals_are_the_shortest():
    rng = np.random.default_rng(1)
    draws = np.sort(rng.gamma(2.0, size=(3, 4001)).astype(np.float32), axis=1)
    for row, (low, high) in zip(draws, shortest_interval(draws, 0.9), strict=True):
        n = int(0.9 * len(row))
        assert np.isclose(high - low, (row[n:] - row[:-n]).min())


# --- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ObsError, "'cell_typ'; did you mean 'cell_type'", {"groupby": "cell_typ"}),
        (ObsError, "no level 'NKK'; did you mean 'NK'", {"groupby": "cell_type", "group1": "NKK"}),
        (ObsError, "no level 'zzz'", {"groupby": "cell_type", "group1": "T", "group2": "zzz"}),
        (CellsError, "both 'T'.*overlap", {"groupby": "cell_type", "group1": "T", "group2": "T"}),
        (CellsError, "overlap: 2 cells", {"idx1": [1, 2, 3], "idx2": [2, 3, 4]}),
        (CellsError, "none of the 400 cells", {"idx1": [], "idx2": [1]}),
        (CellsError, "none of the 400 cells", {"idx1": np.zeros(400, bool), "idx2": [1]}),
        (CellsError, "mask of 7 cells", {"idx1": np.ones(7, bool), "idx2": [1]}),
        (CellsError, "cell 400 was asked for", {"idx1": [400], "idx2": [1]}),
        (CellsError, "all cells", {"idx1": np.ones(400, bool)}),
        (CellsError, "no cell of .* fits idx1", {"idx1": "age > 1000"}),
        (ObsError, "cannot be asked", {"idx1": "agee > 10"}),
        (ObsError, "cannot be asked", {"idx1": "age >"}),
        (OptionError, "nobody is compared", {}),
        (OptionError, "both say who", {"groupby": "cell_type", "idx1": [1]}),
        (OptionError, "idx2 was given without", {"idx2": [1]}),
        (OptionError, "group1 is empty", {"groupby": "cell_type", "group1": []}),
        (OptionError, "n_samples_overall must be", {"groupby": "cell_type", "n_samples_overall": 0}),
        (OptionError, "n_draws must be a whole number of at least 1", {"groupby": "cell_type", "n_draws": 0}),
        (OptionError, "mode 'chang' is not one of", {"groupby": "cell_type", "mode": "chang"}),
        (OptionError, "fdr_target", {"groupby": "cell_type", "fdr_target": 0}),
        (OptionError, "delta must be", {"groupby": "cell_type", "mode": "change", "delta": -1}),
        (OptionError, "cred_interval_lvls", {"groupby": "cell_type", "cred_interval_lvls": [1.5]}),
        (OptionError, "of mode=", {"groupby": "cell_type", "mode": "change", "estimator": "paper"}),
        (OptionError, "need batch_correction=True", {"groupby": "cell_type", "batchid1": ["b1"]}),
        (
            OptionError, "batchid1 is empty",
            {"groupby": "cell_type", "batch_correction": True, "batchid1": []},
        ),
        (
            ObsError, "batchid1 'b3' is not a batch.*b1",
            {"groupby": "cell_type", "batch_correction": True, "batchid1": ["b3"]},
        ),
        (
            OptionError, "share some batches and not all",
            {"groupby": "cell_type", "batch_correction": True, "batchid1": ["b1"]},
        ),
        (OptionError, "weights='importance'", {"groupby": "cell_type", "weights": "importance"}),
        (OptionError, "use_permutation", {"groupby": "cell_type", "use_permutation": True}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(model, error, match, arguments):
    with pytest.raises(error, match=match) as caught:
        model.differential_expression(**arguments, **QUIET)
    assert "\n" not in str(caught.value)


def test_a_model_without_batches_is_not_asked_for_one():
    model = trained(make_adata(60, 20), batch_key=None)
    for arguments in ({"batch_correction": True}, {"batchid1": ["b1"]}):
        with pytest.raises(OptionError, match="without batch_key"):
            model.differential_expression(None, "cell_type", "T", "B", **arguments, **QUIET)
    assert len(model.differential_expression(None, "cell_type", "T", "B", estimator="paper", **QUIET)) == 20


def test_one_level_is_compared_with_nothing():
    adata = make_adata(60, 20)
    adata.obs["same"] = "x"
    model = trained(adata)
    with pytest.raises(CellsError, match="nothing to compare"):
        model.differential_expression(groupby="same", **QUIET)


@pytest.mark.filterwarnings("ignore:.*cells for")
def test_a_model_that_is_not_trained_says_so():
    adata = make_adata(60, 20)
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    with pytest.raises(NotTrainedError):
        atlasvi.SCVI(adata).differential_expression(groupby="cell_type")


def test_known_genes_of_interferon_are_found(data_dir):
    """PBMC with and without interferon beta (Kang et al. 2018): its best known targets stand out."""
    adata = anndata.read_h5ad(data_dir / "kang_pbmc_ifnb.h5ad")
    total = np.asarray(adata.X.sum(0)).ravel()
    adata = adata[:, np.argsort(-total)[:1200]].copy()
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata)
    model.train(
        12, batch_size=128, plan_kwargs={"lr": 4e-3, "n_epochs_kl_warmup": 5}, enable_progress_bar=False
    )
    levels = list(adata.obs["batch"].astype("category").cat.categories)
    treated = next(level for level in levels if "stim" in level.lower())
    found = model.differential_expression(None, "batch", treated, **QUIET)
    known = ["ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20", "MX1", "LY6E"]
    rank = pd.Series(np.arange(len(found)), found.index)
    assert rank[known].max() < 40, rank[known].to_dict()
    assert found.loc["ISG15", "bayes_factor"] > 1.5
    assert found.loc[known, "raw_mean1"].gt(found.loc[known, "raw_mean2"]).all()
