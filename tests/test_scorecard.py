"""The scorecard: its numbers by other hands, what it says of cells and models, and the same bytes twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from atlasvi_kernels import CSR
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

import atlasvi
from atlasvi.errors import (
    AtlasviError,
    GenesError,
    ModelError,
    NotTrainedError,
    ObsError,
    OptionError,
    StoreError,
    VersionError,
)
from atlasvi.scorecard import Scorecard, measures, page
from atlasvi.scorecard.terminal import rows, table
from atlasvi.store.identity import Checksum, look
from tests.conftest import make_adata
from tests.test_report import Page

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 1  # of cells that have every gene
LITTLE = {"n_splits": 2, "n_replicates": 3, "n_mc_samples": 20, "picture": False}
LABELLED = {**LITTLE, "label_key": "cell_type"}


def trained(kind, data, setup=None, **options):
    kind.setup_anndata(data, **{"batch_key": "batch", "gene_mask": None, **(setup or {})})
    model = kind(data, **options)
    model.train(3, enable_progress_bar=False)
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorecard") / "cells.zarr"
    atlasvi.ingest(make_adata(400, 60, SEED), path)
    return path


@pytest.fixture(scope="module")
def model(store):
    return trained(atlasvi.SCVI, atlasvi.open(store), n_latent=4, n_hidden=16)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("scorecard") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def card(model):
    return atlasvi.evaluate(model, **LABELLED)


# --- the numbers --------------------------------------------------------------------------------


def test_the_likelihood_is_the_models_on_the_cells_that_it_kept_apart(model, card):
    found, cells = card.likelihood, model.validation_indices
    elbo = model.get_elbo(indices=cells, return_mean=False)
    assert found.kept_apart and found.n_cells == len(cells) == 40
    assert found.elbo == pytest.approx(elbo.mean(), rel=1e-5)
    assert found.elbo_error == pytest.approx(elbo.std(ddof=1) / np.sqrt(len(cells)), rel=1e-4)
    reconstruction = model.get_reconstruction_error(indices=cells)["reconstruction_loss"]
    assert found.reconstruction == pytest.approx(reconstruction, rel=1e-5)
    assert found.kl == pytest.approx(-found.elbo - found.reconstruction, abs=1e-3)
    marginal = model.get_marginal_ll(indices=cells, n_mc_samples=20)
    assert found.marginal == pytest.approx(marginal, rel=1e-5)
    assert found.marginal_elbo == found.elbo and found.marginal > found.elbo
    counts = make_adata(400, 60, SEED).X.toarray()[cells]
    assert found.zero_share == pytest.approx((counts == 0).mean(), rel=1e-5)


def test_the_marginal_is_of_as_many_held_out_cells_as_asked(model):
    found = atlasvi.evaluate(model, n_held_out=10, **LITTLE).likelihood
    assert (found.n_cells, found.marginal_cells) == (40, 10)
    assert found.marginal_elbo != found.elbo


def test_scores_of_the_latent_are_scikit_learns(model, card):
    latent = model.get_latent_representation()
    obs = make_adata(400, 60, SEED).obs
    found, (own, pca) = card.latents, card.latents.scores
    clusters = KMeans(3, n_init=20, random_state=0).fit_predict(latent)
    assert own.ari == pytest.approx(adjusted_rand_score(obs["cell_type"], clusters), abs=1e-5)
    nmi = normalized_mutual_info_score(obs["cell_type"], clusters, average_method="geometric")
    assert own.nmi == pytest.approx(nmi, abs=1e-5)
    assert own.label_silhouette == pytest.approx(silhouette_score(latent, obs["cell_type"]), abs=1e-5)
    assert own.batch_silhouette == pytest.approx(silhouette_score(latent, obs["batch"]), abs=1e-5)
    assert found.ceiling == pytest.approx(scipy.stats.entropy(obs["batch"].value_counts()), abs=1e-5)
    assert 0 < own.entropy < found.ceiling
    assert (found.n_cells, found.n_labelled, found.n_labels, found.n_batches) == (400, 400, 3, 2)
    # The types of this data are far apart, and PCA must find them.
    assert pca.ari > 0.9 and pca.name == "PCA baseline"


def test_metrics_are_of_a_sample_where_there_are_more_cells(model):
    few = atlasvi.evaluate(model, n_cells=100, **LABELLED).latents
    assert few.n_cells == 100 and few.n_neighbors == 50
    other = atlasvi.evaluate(model, n_cells=100, seed=1, **LABELLED).latents
    assert few.scores[0].label_silhouette != other.scores[0].label_silhouette


def test_zeros_and_moments_of_the_counts_are_theirs(model, card):
    cells = model.validation_indices
    adata = make_adata(400, 60, SEED)
    counts, batch = adata.X.toarray()[cells], adata.obs["batch"].to_numpy()[cells]
    found = card.predictive
    assert [check.group for check in (found.all_cells, *found.batches)] == [None, "b1", "b2"]
    for check, chosen in zip(
        (found.all_cells, *found.batches), (batch != "", batch == "b1", batch == "b2"), strict=True
    ):
        assert check.n_cells == chosen.sum()
        assert check.zeros == pytest.approx((counts[chosen] == 0).mean(), rel=1e-5)
        assert check.n_detected == ((counts[chosen] > 0).mean(0) >= 0.05).sum()
    drawn = np.stack(
        [draw.toarray() for draw in model.posterior_predictive_sample(indices=cells, n_samples=3)]
    )
    check = found.all_cells
    assert check.zeros_replicated == pytest.approx((drawn == 0).mean(), rel=1e-5)
    gap = np.abs((drawn == 0).mean((0, 1)) - (counts == 0).mean(0)).mean()
    assert check.zeros_gap == pytest.approx(gap, rel=1e-4)
    often = (counts > 0).mean(0) >= 0.05
    ratio = np.median((drawn.mean((0, 1)) / counts.mean(0).clip(1e-9))[often])
    assert check.mean_ratio == pytest.approx(ratio, rel=1e-4)
    ratio = np.median((drawn.var(1, ddof=1).mean(0) / counts.var(0, ddof=1).clip(1e-9))[often])
    assert check.variance_ratio == pytest.approx(ratio, rel=1e-4)
    difference = drawn.sum(1).astype(int) - counts.sum(0).astype(int)
    beyond = (difference < 0).all(0) | (difference > 0).all(0)
    assert check.mean_beyond == pytest.approx(beyond.mean(), rel=1e-4)
    assert found.by_chance == 0.5


def test_the_farthest_genes_are_far(card):
    for gap in card.predictive.farthest:
        assert gap.statistic in ("variance", "zero_share") and gap.observed != gap.replicated
    ratios = [abs(np.log(g.replicated / g.observed)) for g in card.predictive.farthest[:5]]
    assert ratios == sorted(ratios, reverse=True)


def test_nothing_is_called_in_noise_and_all_where_the_threshold_is_zero(monkeypatch):
    rng = np.random.default_rng(0)
    mu = rng.gamma(1.0, 2.0, 40) * rng.lognormal(0, 0.3, (300, 1))
    noise = anndata.AnnData(sp.csr_matrix(rng.negative_binomial(2.0, 2.0 / (2.0 + mu)).astype(np.float32)))
    model = trained(atlasvi.SCVI, noise, {"batch_key": None}, n_latent=3, n_hidden=16)
    found = atlasvi.evaluate(model, **LITTLE).calibration
    assert (found.group, found.n_group, found.n_each, len(found.splits)) == (None, 300, 100, 2)
    assert found.share_called == 0 and 0 < found.largest < 3
    monkeypatch.setattr(measures, "_THRESHOLD", 0.0)
    assert atlasvi.evaluate(model, **LITTLE).calibration.share_called > 0.5


def test_the_group_is_the_largest_unless_named(model, card):
    sizes = make_adata(400, 60, SEED).obs["cell_type"].value_counts()
    assert (card.calibration.group, card.calibration.n_group) == (sizes.index[0], sizes.iloc[0])
    named = atlasvi.evaluate(model, group=sizes.index[-1], **LABELLED).calibration
    assert (named.group, named.n_group) == (sizes.index[-1], sizes.iloc[-1])
    assert named.n_each == min(100, sizes.iloc[-1] // 2)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*underfitting:UserWarning")
def test_spike_ins_have_no_types_and_no_differences(data_dir):
    ercc = anndata.read_h5ad(data_dir / "zeisel_ERCC.h5ad")
    atlasvi.SCVI.setup_anndata(ercc, gene_mask=None)
    model = atlasvi.SCVI(ercc, n_latent=3, n_hidden=16)
    model.train(10, enable_progress_bar=False)
    found = atlasvi.evaluate(model, **LABELLED)
    assert found.calibration.share_called == 0
    assert abs(found.latents.scores[0].ari) < 0.05
    assert found.likelihood.zero_share < 0.9 and "the more are" in found.likelihood.zero_word


# --- which cells --------------------------------------------------------------------------------


def test_of_another_atlas_all_cells_are_taken_and_it_is_said(model, store):
    found = atlasvi.evaluate(model, atlasvi.open(store)[:300], **LITTLE)
    assert not found.likelihood.kept_apart and found.likelihood.n_cells == 300
    assert "not the one" in found.likelihood.which
    expected = model.get_elbo(indices=np.arange(300))
    assert found.likelihood.elbo == pytest.approx(expected, rel=1e-5)
    html = found.to_html()
    assert "Likelihood, not held out" in html and "not the one" in html


def test_the_atlas_is_known_again_by_its_counts(model, store):
    adata = make_adata(400, 60, SEED)
    assert model.was_trained_on() and model.was_trained_on(adata) and model.was_trained_on(store)
    assert model.was_trained_on(adata[:, ::-1].copy())  # genes are matched by name
    assert not model.was_trained_on(adata[::-1].copy())
    adata.X.data[adata.X.indptr[250]] += 1  # of a cell that is not looked at
    assert model.was_trained_on(adata)
    adata.X.data[adata.X.indptr[399]] += 1
    assert not model.was_trained_on(adata)


def test_a_model_of_an_earlier_version_does_not_say(folder, store, tmp_path):
    description = json.loads((folder / "model.json").read_text())
    assert description.pop("looks_like") is not None
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.json").write_text(json.dumps(description))
    (old / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    found = atlasvi.evaluate(old, store, **LITTLE)
    assert not found.likelihood.kept_apart and "does not say" in found.likelihood.which


def test_where_none_were_kept_apart_it_is_said():
    adata = make_adata(200, 30)
    atlasvi.PPCA.setup_anndata(adata, gene_mask=None)
    model = atlasvi.PPCA(adata, n_latent=3)
    model.train(train_size=1.0, enable_progress_bar=False)
    found = atlasvi.evaluate(model, **LITTLE).likelihood
    assert not found.kept_apart and "was trained on them" in found.which
    assert found.name == "log-likelihood" and found.kl == 0
    assert found.elbo == pytest.approx(model.get_elbo(), rel=1e-5)


# --- every model --------------------------------------------------------------------------------

PARTS = {
    "likelihood": "likelihood",
    "predictive": "predictive checks",
    "calibration": "calibration of differential expression",
}
# No density of the prior is known; or there is no posterior of a latent; or the likelihood is exact.
WITHOUT_MARGINAL = ("SCANVI", "DCA", "GaussianVAE", "PCA", "PPCA", "FactorAnalysis")


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("SCANVI", ("likelihood", "predictive", "calibration", "latents")),
        ("LinearSCVI", ("likelihood", "predictive", "calibration", "latents")),
        ("SCVAE", ("likelihood", "predictive", "calibration", "latents")),
        ("GMVAE", ("likelihood", "predictive", "calibration", "latents")),
        ("DCA", ("likelihood", "calibration", "latents")),
        ("GaussianVAE", ("likelihood", "latents")),
        ("FactorAnalysis", ("likelihood", "latents")),
        ("PPCA", ("likelihood", "latents")),
        ("PCA", ("latents",)),
        ("ACTINN", ()),
    ],
)
def test_what_a_model_cannot_say_is_listed(name, has):
    kind, adata = getattr(atlasvi, name), make_adata(250, 40)
    setup = {
        "SCANVI": {"labels_key": "cell_type", "unlabeled_category": "NK"},
        "ACTINN": {"labels_key": "cell_type"},
    }.get(name, {})
    options = {} if name == "ACTINN" else {"n_latent": 3}
    model = trained(kind, adata, setup, **options)
    found = atlasvi.evaluate(model, **(LITTLE if setup else LABELLED))
    assert tuple(part for part in (*PARTS, "latents") if getattr(found, part) is not None) == has
    reasons = {one.part: one.reason for one in found.not_applicable}
    for part, words in PARTS.items():
        assert (words in reasons) == (part not in has)
    if "likelihood" in has:
        expected = model.get_elbo(indices=model.validation_indices)
        assert found.likelihood.elbo == pytest.approx(expected, rel=1e-5)
        assert ("marginal likelihood" in reasons) == (name in WITHOUT_MARGINAL)
    assert all(reason and name in reason for reason in reasons.values())
    if name == "SCANVI":  # cells without a label are left out of what labels are for
        n = int((adata.obs["cell_type"] != "NK").sum())
        assert (found.latents.n_labelled, found.latents.n_labels) == (n, 2)
        assert found.calibration.group != "NK" and "left out" in found.to_html()
    assert Scorecard.from_json(found.to_json()) == found
    assert all(one.reason.split(":")[0] in Page(found.to_html()).text for one in found.not_applicable)


def test_counts_over_their_totals_have_no_likelihood():
    model = trained(atlasvi.PPCA, make_adata(200, 30), n_latent=3, transform="cp10k")
    found = atlasvi.evaluate(model, **LITTLE)
    assert found.likelihood is None and "totals" in found.not_applicable[0].reason


def test_a_column_with_one_level_or_none_named_is_not_applicable(model):
    adata = make_adata(400, 60, SEED)
    adata.obs["same"] = "one"
    found = atlasvi.evaluate(model, adata, label_key="same", **LITTLE)
    reasons = {one.part: one.reason for one in found.not_applicable}
    assert reasons == {"label conservation": "400 cells have 1 levels of 'same': 'one'"}
    assert found.latents.scores[0].ari is None and found.latents.scores[0].entropy is not None
    assert found.calibration.group == "one"
    adata.obs["cell"] = adata.obs_names.to_numpy()
    found = atlasvi.evaluate(model, adata, label_key="cell", batch_key="same", **LITTLE)
    reasons = {one.part: one.reason for one in found.not_applicable}
    assert reasons["label conservation"].startswith("400 cells have 400 levels of 'cell'")
    assert reasons["batch mixing"] == "400 cells have 1 levels of 'same': 'one'"
    assert reasons["calibration of differential expression"].endswith("too few to compare 20 with 20 others")
    assert found.predictive.batches == ()


# --- the same twice -----------------------------------------------------------------------------


def test_the_same_call_gives_the_same_bytes(model, card, folder, store):
    assert atlasvi.evaluate(model, **LABELLED).to_json() == card.to_json()
    assert atlasvi.evaluate(folder, store, num_workers=0, **LABELLED).to_json() == card.to_json()
    assert atlasvi.evaluate(folder, store, memory_budget="1MB", **LABELLED).to_json() == card.to_json()


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path, value


@pytest.mark.parametrize("at_once", [64, 5000])
def test_nothing_depends_on_how_many_cells_are_taken_at_once(model, card, monkeypatch, at_once):
    from atlasvi.scorecard import making

    for module in (making, measures):
        monkeypatch.setattr(module, "CELLS_AT_ONCE", at_once)
    other = dict(leaves(json.loads(atlasvi.evaluate(model, **LABELLED).to_json())))
    expected = dict(leaves(json.loads(card.to_json())))
    assert other.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, float):
            assert other[path] == pytest.approx(value, rel=2e-5, abs=2e-6), path
        else:
            assert other[path] == value, path


def test_the_json_has_neither_date_nor_place_and_comes_back_as_it_was(card, store):
    text = card.to_json()
    assert str(store.parent) not in text and json.loads(text)["atlas"] == "cells.zarr"
    assert Scorecard.from_json(text) == card
    assert Scorecard.from_json(text).to_json() == text
    raw = json.loads(text)
    assert list(raw) == ["format", *(f.name for f in fields(Scorecard) if f.name != "pictures")]
    assert all(value == float(f"{value:.6g}") for _, value in leaves(raw) if isinstance(value, float))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("format"), "'format'"),
        (lambda raw: raw.update(colour="red"), "colour"),
        (lambda raw: raw["latents"].pop("scores"), "scores"),
        (lambda raw: raw.update(provenance=3), "not a scorecard"),
    ],
)
def test_what_is_no_scorecard_is_refused(card, change, words):
    raw = json.loads(card.to_json())
    change(raw)
    with pytest.raises(ModelError, match=words):
        Scorecard.from_json(json.dumps(raw))
    with pytest.raises(ModelError, match="not a scorecard"):
        Scorecard.from_json("{")
    with pytest.raises(VersionError, match="format 99"):
        Scorecard.from_json(json.dumps({**json.loads(card.to_json()), "format": 99}))


# --- from what ----------------------------------------------------------------------------------


def test_the_hash_of_the_weights_is_that_of_the_file_and_changes_with_one(model, card, folder):
    file = (folder / "weights.safetensors").read_bytes()
    assert card.provenance.weights_sha256 == hashlib.sha256(file).hexdigest()
    parameter = next(model.module.parameters())
    before = parameter.data.flatten()[0].item()
    try:
        parameter.data.flatten()[0] += 1e-3
        assert atlasvi.evaluate(model, **LITTLE).provenance.weights_sha256 != card.provenance.weights_sha256
    finally:
        parameter.data.flatten()[0] = before
    assert card.provenance.order_seed == 0 and not card.provenance.is_shuffled
    assert card.provenance.versions["torch"] == torch.__version__
    assert card.provenance.options["label_key"] == "cell_type"


def test_the_hash_of_the_counts_is_of_what_is_counted_and_not_of_how_it_is_stored(model, card):
    expected = card.provenance.counts_sha256

    def of(adata):
        few = {**LITTLE, "n_splits": 1, "n_cells": 60, "n_held_out": 5}
        return atlasvi.evaluate(model, adata, **few).provenance.counts_sha256

    adata = make_adata(400, 60, SEED)
    assert of(adata) == expected and of(adata[:, ::-1].copy()) == expected
    explicit = adata.copy()
    explicit.X = sp.csr_matrix((explicit.X.data, explicit.X.indices, explicit.X.indptr), explicit.X.shape)
    explicit.X.data[3], lost = 0, explicit.X.data[3]
    dropped = explicit.copy()
    dropped.X.eliminate_zeros()
    assert lost and of(explicit) == of(dropped) != expected
    adata.X.data[-1] += 1
    assert of(adata) != expected


@pytest.mark.parametrize("cuts", [[], [1], [0, 3, 3, 7]])
def test_the_checksum_does_not_depend_on_the_cut_and_tells_rows_apart(cuts):
    counts = CSR.from_scipy((sp.random(9, 5, 0.4, "csr", rng=0) * 10).ceil())
    whole, pieces = Checksum("abcde"), Checksum("abcde")
    whole.add(counts)
    for a, b in zip([0, *cuts], [*cuts, 9], strict=True):
        pieces.add(counts.row_range(a, b))
    assert pieces.hexdigest() == whole.hexdigest()
    # The same entries with a row's end elsewhere.
    indptr, indices, data = (part.copy() for part in counts.numpy())
    k = int(np.flatnonzero(np.diff(indptr) > 0)[0]) + 1
    indptr[k] -= 1
    other = Checksum("abcde")
    other.add(CSR.from_numpy(indptr, indices, data, 5))
    named = Checksum("abcdf")
    named.add(counts)
    assert len({whole.hexdigest(), other.hexdigest(), named.hexdigest()}) == 3


def test_a_look_reads_no_more_than_64_cells(store):
    atlas = atlasvi.open(store)
    seen = []
    read = atlas.read_rows
    atlas.read_rows = lambda rows: seen.append(rows) or read(rows)
    assert look(atlas) == look(atlasvi.open(store))
    assert sum(rows.stop - rows.start for rows in seen) == 64


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_key": "cel_type"}, ObsError, "did you mean 'cell_type'"),
        ({"batch_key": "bacth"}, ObsError, "did you mean 'batch'"),
        ({"label_key": "cell_type", "group": "NKK"}, ObsError, "did you mean 'NK'"),
        ({"group": "NK"}, OptionError, "label_key"),
        ({"n_splits": 0}, OptionError, "n_splits must be a whole number of at least 1, is 0"),
        ({"n_cells": -3}, OptionError, "n_cells"),
    ],
)
def test_wrong_options_are_one_line(model, options, error, words):
    with pytest.raises(error, match=words) as caught:
        atlasvi.evaluate(model, **{**LITTLE, **options})
    assert isinstance(caught.value, AtlasviError) and "\n" not in str(caught.value)


def test_wrong_data_and_models_are_one_line(model, store, tmp_path):
    with pytest.raises(GenesError, match="lacks 20 of the model's 60 genes"):
        atlasvi.evaluate(model, make_adata(400, 60, SEED)[:, :40].copy(), **LITTLE)
    with pytest.raises(ModelError, match="not a model folder"):
        atlasvi.evaluate(tmp_path, store, **LITTLE)
    with pytest.raises(AtlasviError, match="too few cells"):
        atlasvi.evaluate(model, atlasvi.open(store)[:2], **LITTLE)
    adata = make_adata(100, 20)
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    with pytest.raises(NotTrainedError, match="call train"):
        atlasvi.evaluate(atlasvi.SCVI(adata), **LITTLE)
    broken = trained(atlasvi.SCVI, make_adata(100, 20), n_latent=2, n_hidden=8)
    for parameter in broken.module.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(AtlasviError, match="came out as nan"):
        atlasvi.evaluate(broken, **LITTLE)


def test_it_is_written_whole_and_not_over_something(card, tmp_path):
    card.write(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == card.to_json()
    with pytest.raises(StoreError, match="already"):
        card.write(tmp_path / "a.json")
    card.write(tmp_path / "a.json", overwrite=True)
    card.write(tmp_path / "card")
    assert sorted(p.name for p in (tmp_path / "card").iterdir()) == ["scorecard.html", "scorecard.json"]
    with pytest.raises(StoreError, match="already"):
        card.write(tmp_path / "card")
    (tmp_path / "card" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes.txt'"):
        card.write(tmp_path / "card", overwrite=True)
    with pytest.raises(OptionError, match=r"'a.html' names no scorecard"):
        card.write(tmp_path / "a.html")
    with pytest.raises(StoreError, match="no folder"):
        card.write(tmp_path / "none" / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        card.write(tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "card", "file"]


# --- the page and the table ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictured(model):
    adata = make_adata(400, 60, SEED)
    adata.obs["donor<b>"] = adata.obs["donor"].cat.rename_categories(lambda name: f"{name}&")
    return atlasvi.evaluate(
        model, adata, **{**LABELLED, "picture": True}, batch_key="donor<b>", n_cells=60
    )  # 60 cells: a small picture is a fast one


def test_the_page_says_what_the_card_says(pictured):
    text = Page(pictured.to_html()).text
    for words in (
        "SCVI on AnnData", "Held-out likelihood", f"{pictured.likelihood.elbo:,.1f}".replace("-", "−"),
        f"{pictured.likelihood.zero_share:.1%} of these counts are zero", "for looking and not for measuring",
        "By cell_type", "By donor<b>", "60 of 400 cells",
        "PCA baseline", f"{pictured.latents.scores[0].ari:.3f}", "d0&", "donor<b>", "Genes farthest off",
        pictured.predictive.farthest[0].gene, "called beyond 3", "Genes called, worst split",
        pictured.provenance.weights_sha256, pictured.provenance.counts_sha256, torch.__version__,
    ):  # fmt: skip
        assert words in text, words


def test_the_page_stands_alone_and_is_accessible(pictured):
    html = pictured.to_html()
    found = Page(html)
    assert "<script" not in html and "http" not in html and "url(" not in html and "@import" not in html
    assert "<b>&" not in html and "prefers-color-scheme:dark" in html
    images = [attrs for tag, attrs in found.tags if tag == "svg" and "role" in attrs]
    # Two views, three panels of all cells and of each donor, and the strip.
    assert len(images) == 2 + 3 * 5 + 1 and all(a["role"] == "img" and a["aria-label"] for a in images)
    headers = [attrs for tag, attrs in found.tags if tag == "th"]
    assert headers and all(a["scope"] in ("row", "col") for a in headers)
    assert [tag for tag, _ in found.tags].count("caption") == [tag for tag, _ in found.tags].count("table")
    assert pictured.to_html() == html


def test_one_batch_is_no_picture_of_its_own():
    adata = make_adata(100, 30)
    model = trained(atlasvi.PCA, adata, {"batch_key": None}, n_latent=3)
    found = atlasvi.evaluate(model, **{**LABELLED, "picture": True}, n_cells=60)
    html = found.to_html()
    assert "By cell_type" in html and "By batch" not in html and "60 of 100 cells" in html
    unlabelled = replace(found.pictures.embedding, types=None)
    html = replace(found, pictures=replace(found.pictures, embedding=unlabelled)).to_html()
    assert "By batch" in html


def test_a_card_read_again_has_a_page_without_what_only_pictures_have(card):
    html = Scorecard.from_json(card.to_json()).to_html()
    assert "Counts drawn from the model" in html and "Genes farthest off" in html
    assert "The latent space" not in html and "replicated" not in html


def test_a_share_of_zeros_near_one_is_warned_of(card):
    found = replace(card.likelihood, zero_share=0.97)
    assert "97.0%" in found.zero_word and "says little" in found.zero_word
    assert "says little" in page.scorecard_html(replace(card, likelihood=found))


def test_points_beyond_the_threshold_are_in_colour_and_none_hides_another():
    import re

    from atlasvi import plots

    svg = plots.threshold_strip(
        [0.5, 0.5, 0.5, 4.0], 3.0, titles=list("abcd"), x_label="x", threshold_label="t", alt="z"
    )
    drawn = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5" fill="([^"]+)"', svg)
    assert len(set(drawn)) == 4 and [fill for *_, fill in drawn].count("var(--accent-2)") == 1


def test_the_table_has_every_part_and_what_is_missing(card, model):
    said = {name: (value, beside) for name, value, beside in rows(card)}
    assert said["ELBO"][0] == f"{card.likelihood.elbo:,.1f}"
    assert said["ARI"][0] == f"{card.latents.scores[0].ari:.3f}" and "PCA" in said["ARI"][1]
    assert "ceiling" in said["batch mixing"][1]
    assert "2 times" in said["genes called where none differ"][1]
    unlabelled = {name: beside for name, _, beside in rows(atlasvi.evaluate(model, **LITTLE))}
    assert "not applicable" in unlabelled["label conservation"]
    assert table(card).row_count == len(list(rows(card)))


def test_a_frame_of_one_group_is_drawn_as_before_and_thinned_when_asked():
    from atlasvi import plots

    frame = pd.DataFrame(
        {
            "statistic": np.repeat(["mean", "variance", "zero_share"], 50),
            "observed": 0.5, "replicated": 0.4, "p": 0.0,
        }
    )  # fmt: skip
    panels = plots.predictive_panels(frame, max_genes=20)
    assert [(name, said) for name, said, _ in panels] == [
        (name, "50 of 50 genes beyond") for name in ("mean", "variance", "share of zeros")
    ]
    assert all(svg.count("h.01") == 20 for *_, svg in panels)
