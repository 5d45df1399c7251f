"""SCANVI: labels for cells that have none, labelled cells in every step, and what it takes of a SCVI."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import mahalanobis
from sklearn.metrics import log_loss, roc_auc_score

import atlasvi
from atlasvi.errors import NotTrainedError, ObsError, OptionError
from atlasvi.infer import classify
from atlasvi.models import base, scanvi
from atlasvi.models.scanvi import SCANVI, WithLabelled
from atlasvi.models.scvi import SCVI
from atlasvi.stream import Epochs, Room
from atlasvi.train.fit import evaluate


@pytest.fixture
def cells():
    """400 cells of three types that are easily told apart; one in eight has its label."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 400)
    mu = rng.gamma(0.5, 4.0, (3, 40))[kind] + 0.1
    names = np.array(["T", "B", "NK"])[kind]
    obs = pd.DataFrame(
        {
            "truth": names,
            "label": np.where(np.arange(400) % 8 == 0, names, "Unknown"),
            "batch": rng.choice(["b1", "b2"], 400),
        },
        index=[f"cell-{i}" for i in range(400)],
    )
    return anndata.AnnData(
        sp.csr_matrix(rng.poisson(mu).astype(np.float32)),
        obs,
        pd.DataFrame(index=[f"g{g}" for g in range(40)]),
    )


def build(cells, **options):
    SCANVI.setup_anndata(cells, "label", "Unknown", batch_key="batch", gene_mask=None)
    return SCANVI(cells, **{"n_hidden": 16, "n_latent": 4, **options})


def train(model, max_epochs=15, **options):
    options = {"batch_size": 64, "plan_kwargs": {"lr": 0.01}, "enable_progress_bar": False, **options}
    model.train(max_epochs, **options)
    return model


def test_counts_kept_on_the_device_train_to_the_same_weights(cells, monkeypatch):
    """Labelled cells and all of them, of which each has its part of the room."""
    fresh = train(build(cells, balance_labels=True), 4).module.state_dict()
    for n_bytes in (1 << 30, 10_000):
        monkeypatch.setattr(base, "room_for_counts", lambda device, takes, n=n_bytes: Room(device, n))
        kept = train(build(cells, balance_labels=True), 4).module.state_dict()
        assert all(torch.equal(kept[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("options", [{}, {"linear_classifier": True, "balance_labels": True}], ids=str)
def test_cells_without_labels_get_the_right_ones(options, cells):
    model = train(build(cells, **options))
    hidden = (cells.obs["label"] == "Unknown").to_numpy()
    predicted = model.predict()
    assert (predicted == cells.obs["truth"])[hidden].mean() > 0.95
    soft = model.predict(soft=True)
    assert list(soft.columns) == list(model.labels)
    assert set(model.labels) == {"T", "B", "NK"}
    assert list(soft.index) == list(cells.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(soft.columns[soft.to_numpy().argmax(1)], predicted)
    np.testing.assert_array_equal(model.predict(indices=[7, 3]), predicted[[7, 3]])
    drawn = model.predict(soft=True, use_posterior_mean=False, seed=1)
    assert not np.allclose(drawn, soft)
    np.testing.assert_allclose(
        model.predict(soft=True, use_posterior_mean=False, seed=1, batch_size=7), drawn, rtol=1e-4
    )


def test_a_query_needs_no_labels_and_may_have_others(cells, tmp_path):
    model = train(build(cells), 3)
    expected = model.predict(soft=True)
    for change in (lambda obs: obs.drop(columns="label"), lambda obs: obs.assign(label="something else")):
        query = cells.copy()
        query.obs = change(query.obs)
        np.testing.assert_array_equal(model.predict(query, soft=True), expected)
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(SCANVI.load(tmp_path / "m").predict(query, soft=True), expected)


HAVE_NO_LABEL = {
    "gaps": lambda label: label.where(np.arange(400) % 5 > 0),
    "gaps among categories": lambda label: label.where(np.arange(400) % 5 > 0).astype("category"),
    "gaps only": lambda label: np.full(400, np.nan),
    "gaps only, of categories": lambda label: pd.Categorical([None] * 400, ["T"]),
    "one that is not known": lambda label: label.mask(np.arange(400) == 16, "Treg"),
}


@pytest.mark.parametrize("change", HAVE_NO_LABEL.values(), ids=HAVE_NO_LABEL)
def test_only_cells_of_a_query_that_have_no_known_label_count_as_without_one(change, cells, tmp_path):
    model = train(build(cells), 1)
    model.save(tmp_path / "m")
    expected = model.predict(soft=True)
    cells.obs["label"] = change(cells.obs["label"])
    np.testing.assert_array_equal(model.predict(cells, soft=True), expected)
    codes = [model.labels.index(x) if x in model.labels else 3 for x in cells.obs["label"].astype(object)]
    queries = SCANVI.load(tmp_path / "m", cells), SCANVI.load_query_data(cells, tmp_path / "m")
    for query in queries:
        np.testing.assert_array_equal(query._codes.labels, codes)
    train(queries[1], 1)


def test_a_query_may_have_fewer_labels_than_a_minibatch_takes(cells):
    reference = train(build(cells), 1)
    cells.obs["label"] = np.where(np.arange(400) == 16, "T", None)
    train(SCANVI.load_query_data(cells, reference), 1, train_size=1.0)


@pytest.mark.parametrize("few", [1, 20])
def test_distances_are_mahalanobis_and_99_percent_of_a_labels_cells_are_within_one(few, cells, monkeypatch):
    monkeypatch.setattr(classify, "_FEW", few)  # the labels have 13, 16 and 21 cells
    model = train(build(cells), 3)
    loc, variance = model.get_latent_representation(return_dist=True)
    label = cells.obs["label"].to_numpy()
    sizes = {name: (label == name).sum() for name in model.labels}
    off = [loc[label == name] - loc[label == name].mean(0, dtype=float) for name in model.labels]
    within = np.cov(np.concatenate(off).T, ddof=0)  # the means are zero
    expected, own = np.empty((400, 3)), {}
    for k, name in enumerate(model.labels):
        of = loc[label == name].astype(float)
        covariance = within if sizes[name] < few else np.cov(of.T, ddof=0)
        inverse = np.linalg.inv(covariance + np.diag(variance[label == name].mean(0)))
        expected[:, k] = [mahalanobis(z, of.mean(0), inverse) for z in loc]
        own[name] = expected[label == name, k]
    for k, name in enumerate(model.labels):
        of = np.concatenate(list(own.values())) if sizes[name] < few else own[name]
        expected[:, k] /= np.sqrt(np.quantile(of**2, 0.99))
    found = model.label_distances()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert list(found.columns) == list(model.labels) and list(found.index) == list(cells.obs_names)
    some = model.label_distances(indices=[5, 2], batch_size=1)
    pd.testing.assert_frame_equal(some, found.iloc[[5, 2]])
    # Of labels with many cells some are taken.
    monkeypatch.setattr(scanvi, "_CELLS_PER_LABEL", 5)
    model.locate_labels(seed=1)
    fewer = model.label_distances()
    assert not np.allclose(fewer, found)
    model.locate_labels(seed=1)
    pd.testing.assert_frame_equal(model.label_distances(), fewer)


def test_cells_of_a_type_that_nobody_labelled_lie_far_from_all_labels(cells):
    is_new = (cells.obs["truth"] == "NK").to_numpy()
    cells.obs["label"] = np.where(is_new | (np.arange(400) % 3 > 0), "Unknown", cells.obs["truth"])
    model = train(build(cells))
    nearest = model.label_distances().to_numpy().min(1)
    assert roc_auc_score(is_new, nearest) > 0.95
    within = model.predict(max_distance=1)
    np.testing.assert_array_equal(within == "Unknown", nearest > 1)
    np.testing.assert_array_equal(within[nearest <= 1], model.predict()[nearest <= 1])
    assert (within == "Unknown")[is_new].mean() > 0.8 and (within == "Unknown")[~is_new].mean() < 0.15
    for wrong in ({"max_distance": 0}, {"max_distance": float("nan")}, {"max_distance": 1, "soft": True}):
        with pytest.raises(OptionError, match="max_distance="):
            model.predict(**wrong)


def test_where_labels_lie_is_saved_and_stays_while_latents_do(cells, tmp_path):
    model = train(build(cells), 3)
    expected = model.label_distances()
    model.save(tmp_path / "m")
    pd.testing.assert_frame_equal(SCANVI.load(tmp_path / "m").label_distances(cells), expected)
    query = cells.copy()
    query.obs = query.obs.assign(batch="b3").drop(columns="label")
    mapped = train(SCANVI.load_query_data(query, model), 1)
    np.testing.assert_allclose(mapped.label_distances(cells), expected, rtol=1e-5)
    moved = train(SCANVI.load_query_data(query, model, unfrozen=True), 1)
    for other in moved, mapped.refine_posterior(max_epochs=1, enable_progress_bar=False):
        with pytest.raises(OptionError, match=r"locate_labels\(\)"):
            other.label_distances()
    pd.testing.assert_frame_equal(model.label_distances(), expected)
    with pytest.raises(ObsError, match="no cell has one of the labels 'B', 'NK', 'T'"):
        moved.locate_labels()
    thawed = train(SCANVI.load_query_data(query, model, freeze_batchnorm_encoder=False), 1)
    with pytest.raises(OptionError, match="moved latents without labels"):
        thawed.label_distances()
    moved.locate_labels(cells)
    own = moved.label_distances(cells).to_numpy()
    has_label = (cells.obs["label"] != "Unknown").to_numpy()
    of = [moved.labels.index(name) for name in cells.obs["label"][has_label]]
    assert np.mean(own[has_label, of] <= 1) == pytest.approx(0.99, abs=0.02)


def test_a_label_may_have_one_cell_and_one_without_any_is_infinitely_far(cells):
    model = train(build(cells), 2)
    few = cells[np.r_[0:60]].copy()
    few.obs["label"] = np.where(np.arange(60) == 0, "T", "Unknown")
    few.obs.iloc[[1, 2, 3], few.obs.columns.get_loc("label")] = "B"
    model.locate_labels(few)
    far = model.label_distances()
    assert np.isinf(far["NK"]).all() and np.isfinite(far[["T", "B"]]).all(axis=None)
    assert far["T"].iloc[0] == pytest.approx(0, abs=1e-6)


def test_latents_that_are_at_hand_stay_those_of_the_model(cells):
    model = train(build(cells), 1)
    encoded = model.encode()
    model.locate_labels(cells[:200].copy())
    assert model.get_normalized_expression(encoded, return_numpy=True).shape == cells.shape


def test_training_that_is_refused_leaves_the_distances(cells, tmp_path):
    model = train(build(cells), 1)
    expected = model.label_distances()
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(Exception, match=r"mine\.txt"):
        train(model, 1, checkpoint=tmp_path)
    pd.testing.assert_frame_equal(model.label_distances(), expected)


def test_a_folder_of_before_says_how_to_find_where_labels_lie(cells, tmp_path):
    model = train(build(cells), 2)
    model.save(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "weights.safetensors")
    for name in ("label_mean", "label_covariance"):
        del weights[name]
    save_file(weights, tmp_path / "m" / "weights.safetensors")
    old = SCANVI.load(tmp_path / "m", cells)
    np.testing.assert_array_equal(old.predict(soft=True), model.predict(soft=True))
    with pytest.raises(OptionError, match="earlier version"):
        old.predict(max_distance=1.0)
    old.locate_labels()
    pd.testing.assert_frame_equal(old.label_distances(), model.label_distances())


def test_training_that_is_cut_short_leaves_no_distances_of_other_weights(cells):
    model = train(build(cells), 1)

    def stop(record):
        raise OSError("enough")

    with pytest.raises(OSError, match="enough"):
        train(model, 2, on_epoch=stop)
    with pytest.raises(OptionError, match="did not reach its end"):
        model.label_distances()


def test_a_loaded_model_goes_on_with_its_labels(cells, tmp_path):
    train(build(cells), 1).save(tmp_path / "m")
    again = SCANVI.load(tmp_path / "m", cells)
    codes = again._codes.labels
    assert (codes == 3).sum() == (cells.obs["label"] == "Unknown").sum()
    train(again)
    assert (again.predict() == cells.obs["truth"]).mean() > 0.95


def test_it_starts_where_a_scvi_ended(cells):
    SCVI.setup_anndata(cells, batch_key="batch", gene_mask=None)
    scvi = SCVI(cells, n_hidden=16, n_latent=4, gene_likelihood="nb")
    with pytest.raises(NotTrainedError):
        SCANVI.from_scvi_model(scvi, "Unknown", "label")
    train(scvi, 10)
    with pytest.raises(OptionError, match="labels_key"):
        SCANVI.from_scvi_model(scvi, "Unknown")
    model = SCANVI.from_scvi_model(scvi, "Unknown", "label", linear_classifier=True)
    assert (model.config.gene_likelihood, model.config.n_hidden) == ("nb", 16)
    before = scvi.module.state_dict()
    assert all(
        (value == before[name]).all() for name, value in model.module.state_dict().items() if name in before
    )
    assert model._default_epochs(400, model.plan) == 10
    train(model, None)
    assert len(model.records) == 10
    assert (model.predict() == cells.obs["truth"]).mean() > 0.95
    model = SCANVI.from_scvi_model(scvi, "Unknown", "label", linear_classifier=True)
    train(model, None, schedule="adaptive", plan_kwargs={"lr": 0.03, "patience": 2})
    assert 10 < len(model.records) < 400  # it ends by itself
    assert (model.predict() == cells.obs["truth"]).mean() > 0.95


def test_by_scvi_tools_schedule_training_neither_ends_nor_is_undone_by_what_is_looked_at(cells):
    """The weights are those of the last step."""
    seen = []
    model = build(cells)
    weight = model.module.classifier.out.weight
    train(model, 4, schedule="scvi-tools", on_epoch=lambda record: seen.append(weight.detach().clone()))
    assert [check.step for check in model.checks] == [6, 12, 18, 24]
    assert (model.module.classifier.out.weight == seen[-1]).all()
    assert not (seen[-1] == seen[-2]).all()


def test_the_weights_kept_are_those_of_the_best_look_at_cells_and_labels(cells):
    """The ELBO says nothing of the labels; their cross-entropy, beside scikit-learn's, is looked at too."""
    cells.obs["label"] = np.where(np.arange(400) % 2, cells.obs["truth"], "Unknown")
    model = build(cells)
    train(model, 400, plan_kwargs={"lr": 0.03, "patience": 2})
    assert len(model.records) < 400
    best = min(model.checks, key=lambda check: check.validation_loss)
    assert best.step < model.checks[-1].step
    kept = model.validation_indices
    labelled = kept[(cells.obs["label"] != "Unknown").to_numpy()[kept]]
    soft = model.predict(indices=labelled, soft=True)
    of_labels = log_loss(cells.obs["label"].iloc[labelled], soft[sorted(soft)])
    # To the rounding of the probabilities, float32 near 1, fifty times over.
    assert best.validation_loss - best.elbo_validation == pytest.approx(50 * of_labels, rel=1e-3, abs=1e-4)
    shown = model.validation_history["validation_loss"]
    assert shown.min() == best.validation_loss
    assert shown.idxmin() == best.step
    assert set(model.history["validation_loss"]["validation_loss"].dropna()) <= set(shown)


def test_what_it_looks_at_does_not_depend_on_how_the_cells_are_cut(cells):
    model = train(build(cells), 1)
    found = [
        evaluate(model.module, Epochs(model.atlas, model._codes, batch_size=n, shuffle=False)(), seed=0,
                 device=torch.device("cpu")).means()
        for n in (400, 7)
    ]  # fmt: skip
    assert found[0][0] > found[0][1] + 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_labelled_cells_come_with_every_minibatch_in_whatever_epoch(cells):
    model = build(cells)
    epochs = model._training_epochs(
        lambda positions, weights=None, **_: Epochs(
            model.atlas, model._codes, batch_size=16, positions=positions, weights=weights, num_workers=0
        ),
        np.arange(400),
    )
    assert isinstance(epochs, WithLabelled)
    seen = []
    for epoch in range(2):
        minibatches = list(epochs(epoch))
        assert sorted(np.concatenate([m.rows for m in minibatches])) == list(range(400))
        assert all((m.labelled.labels < 3).all() for m in minibatches)
        seen.append(np.concatenate([m.labelled.rows for m in minibatches]))
        tail = list(epochs(epoch, 5))
        for one, other in zip(minibatches[5:], tail, strict=True):
            assert (one.rows == other.rows).all()
            assert (one.labelled.rows == other.labelled.rows).all()
    assert set(seen[0]) == set(np.flatnonzero(cells.obs["label"] != "Unknown"))
    assert not np.array_equal(seen[0], seen[1])


def test_labels_can_come_equally_often(cells):
    rare = (cells.obs["label"] == "T") & (np.arange(400) > 60)
    cells.obs.loc[rare, "label"] = "Unknown"
    model = build(cells, balance_labels=True)
    epochs = model._training_epochs(
        lambda positions, weights=None, **_: Epochs(
            model.atlas, model._codes, batch_size=16, positions=positions, weights=weights, num_workers=0
        ),
        np.arange(400),
    )
    labels = np.concatenate([m.labelled.labels for epoch in range(20) for m in epochs(epoch)])
    for epoch in range(4):  # rounds of balanced cells differ in length
        whole = list(epochs(epoch))
        for start in range(len(whole)):
            tail = list(epochs(epoch, start))
            for one, other in zip(whole[start:], tail, strict=True):
                assert (one.labelled.rows == other.labelled.rows).all()
    shares = np.bincount(labels, minlength=3) / len(labels)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)


def test_a_store_is_trained_on_as_an_anndata_is(cells, tmp_path):
    atlasvi.ingest(cells, tmp_path / "a.zarr")
    with atlasvi.open(tmp_path / "a.zarr") as atlas:
        model = train(build(atlas))
        assert (model.predict() == cells.obs["truth"]).mean() > 0.95


def test_what_cannot_be_is_refused(cells):
    with pytest.raises(OptionError, match="labels_key="):
        SCANVI.setup_anndata(cells)
    for options, said in (
        ({"dispersion": "gene-label"}, "gene-label"),
        ({"classification_ratio": -1.0}, "classification_ratio"),
        ({"linear_classifier": True, "classifier_n_layers": 2}, "linear classifier"),
    ):
        with pytest.raises(OptionError, match=said):
            build(cells, **options)
    with pytest.raises(OptionError, match="balance_labels"):
        train(build(cells), n_samples_per_label=10)
    cells.obs["label"] = "Unknown"
    with pytest.raises(ObsError, match="no level but 'Unknown'"):
        build(cells)
    cells.obs.iloc[:2, cells.obs.columns.get_loc("label")] = "T"
    with pytest.raises(ObsError, match="at least 3"):
        train(build(cells))
