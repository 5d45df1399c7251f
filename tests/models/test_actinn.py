"""ACTINN: published preprocessing and layers, genes of reference and query, calibrated probabilities."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from atlasvi.errors import GenesError, NotTrainedError, ObsError, OptionError
from atlasvi.models.actinn import ACTINN


@pytest.fixture
def cells():
    """600 cells of three types, in counts that are told apart, though not always."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 600)
    mu = rng.gamma(0.5, 1.0, (3, 80))[kind] * rng.lognormal(0, 0.5, (600, 1)) + 0.02
    return anndata.AnnData(
        sp.csr_matrix(rng.poisson(mu).astype(np.float32)),
        pd.DataFrame({"type": np.array(["T", "B", "NK"])[kind]}, index=[f"cell-{i}" for i in range(600)]),
        pd.DataFrame(index=[f"g{g}" for g in range(80)]),
    )


def build(cells, *args, **options):
    ACTINN.setup_anndata(cells, labels_key="type", gene_mask=None)
    return ACTINN(cells, *args, **options)


def train(model, max_epochs=20, **options):
    options = {"batch_size": 64, "plan_kwargs": {"lr": 0.003}, "enable_progress_bar": False, **options}
    model.train(max_epochs, **options)
    return model


@pytest.mark.parametrize("transform", ["published", "lecture"])
def test_the_input_and_the_layers_are_those_published(transform, cells):
    """Written out densely, and the gradient of the first layer through the sparse way."""
    model = build(cells, transform=transform, filter_genes=False)
    minibatch = next(model._minibatches(None, np.arange(50), 50))
    counts = cells.X.toarray()[:50].astype(np.float64)
    total = counts.sum(1, keepdims=True)
    x = np.log2(1 + 1e4 * counts / total) if transform == "published" else np.log2(1e4 * (counts + 1) / total)
    module = model.module
    shapes = [tuple(module.weight.shape)] + [tuple(layer.weight.shape) for layer in module.hidden]
    assert shapes == [(80, 100), (50, 100), (25, 50), (3, 25)]
    h = torch.from_numpy(x).float() @ module.weight + module.bias
    for layer in module.hidden:
        h = layer(F.relu(h))
    torch.testing.assert_close(module.class_logits(minibatch), h, rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(F.cross_entropy(h, minibatch.labels), module.weight)
    (found,) = torch.autograd.grad(module.loss(minibatch, None).total, module.weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_extreme_genes_are_left_out(cells):
    """The highest and lowest 1 % by mean, then by deviation, with numpy on the dense matrix."""
    model = build(cells)
    counts = cells.X.toarray().astype(np.float64)
    x = np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True))
    kept = np.ones(80, bool)
    for values in (x.mean(0), x.std(0)):
        low, high = np.percentile(values[kept], [1, 99])
        kept &= (values >= low) & (values <= high)
    assert 70 < kept.sum() < 80
    assert model.genes == tuple(cells.var_names[kept])
    minibatch = next(model._minibatches(None, np.arange(5), 5))
    before = model.module.class_logits(minibatch)
    with torch.no_grad():
        model.module.weight[torch.from_numpy(~kept)] = 100
    torch.testing.assert_close(model.module.class_logits(minibatch), before)


@pytest.mark.parametrize("transform", ["published", "lecture"])
def test_it_classifies_a_query_with_other_genes_and_no_labels(transform, cells):
    reference, query = cells[:400].copy(), cells[400:, ::-1][:, :70].copy()
    truth = query.obs.pop("type")
    model = build(reference, query, transform=transform)
    assert set(model.genes) <= set(query.var_names)
    train(model)
    predicted = model.predict(query)
    assert (predicted == truth).mean() > 0.9
    soft = model.predict(query, soft=True)
    assert list(soft.columns) == ["B", "NK", "T"]
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    sure = soft.max(axis=1)
    unknown = model.predict(query, threshold=float(sure.median()), unknown="?")
    assert (unknown == "?").mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(unknown[unknown != "?"], predicted[unknown != "?"])
    query.obs["type"] = "of a kind that is not known"
    np.testing.assert_array_equal(model.predict(query), predicted)


HAVE_NO_LABEL = {
    "gaps": lambda kind: kind.where(np.arange(600) > 3),
    "gaps among categories": lambda kind: kind.where(np.arange(600) > 3).astype("category"),
    "gaps only": lambda kind: np.full(600, np.nan),
    "one that is not known": lambda kind: kind.mask(np.arange(600) < 4, "Treg"),
}


@pytest.mark.parametrize("change", HAVE_NO_LABEL.values(), ids=HAVE_NO_LABEL)
def test_labels_of_a_query_may_have_gaps_until_they_are_asked_for(change, cells, tmp_path):
    model = train(build(cells), 1)
    model.save(tmp_path / "m")
    expected, elbo = model.predict(), model.get_elbo(indices=range(4, 9))
    cells.obs["type"] = change(cells.obs["type"])
    np.testing.assert_array_equal(model.predict(cells), expected)
    query = ACTINN.load(tmp_path / "m", cells)
    np.testing.assert_array_equal(query.predict(), expected)
    if cells.obs["type"].notna().any():
        assert query.get_elbo(indices=range(4, 9)) == pytest.approx(elbo)
    for ask in (query.get_elbo, query.get_reconstruction_error, lambda: train(query, 1)):
        with pytest.raises(ObsError, match=r"the first 'cell-0', have none of the labels .* 'type'"):
            ask()


def test_probabilities_are_calibrated(cells):
    """After calibration, no other temperature has a lower cross-entropy on the cells that were kept."""
    model = train(build(cells), 30)
    before = model.get_elbo(indices=model.validation_indices)
    temperature = model.calibrate()
    assert abs(np.log(temperature)) > 0.05  # else it shows nothing
    best = model.get_elbo(indices=model.validation_indices)
    assert best > before
    for other in (0.97, 1.03):
        model.module.temperature.fill_(temperature * other)
        assert model.get_elbo(indices=model.validation_indices) < best
    assert model.calibrate() == pytest.approx(temperature)


def test_what_cannot_be_is_refused(cells):
    with pytest.raises(NotTrainedError):
        build(cells).predict()
    with pytest.raises(OptionError, match="'log'"):
        build(cells, transform="log")
    other = cells.copy()
    other.var_names = [f"ENSG{g}" for g in range(80)]
    with pytest.raises(GenesError, match="none of the reference's 80 genes"):
        build(cells, other)
    with pytest.raises(GenesError, match="of 2 genes that both have, none is left"):
        build(cells, cells[:, :2].copy())
    with pytest.raises(OptionError, match="train_size"):
        train(build(cells), 1, train_size=1.0).calibrate()
    with pytest.raises(OptionError, match="no latent"):
        train(build(cells), 1).get_latent_representation()
    ACTINN.setup_anndata(cells)
    with pytest.raises(OptionError, match="labels_key="):
        ACTINN(cells)
    cells.obs["type"] = "T"
    with pytest.raises(ObsError, match="one label, 'T'"):
        build(cells)
