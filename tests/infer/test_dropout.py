"""Imputed counts, and the probability that a zero is technical."""

import anndata
import numpy as np
import pytest
import scipy.stats

from atlasvi.errors import OptionError
from atlasvi.infer import sample
from atlasvi.infer.write import write_expression
from atlasvi.models.scvi import SCVI


def build(adata, likelihood="zinb", **options):
    SCVI.setup_anndata(adata, batch_key="batch", gene_mask=None)
    model = SCVI(adata, n_hidden=16, n_latent=3, gene_likelihood=likelihood, **options)
    model.train(2, batch_size=64, enable_progress_bar=False, plan_kwargs={"lr": 0.01})
    return model


@pytest.mark.parametrize("likelihood", ["zinb", "zip"])
def test_it_is_bayes_rule(likelihood, adata):
    model = build(adata, likelihood)
    p = {k: v.astype(float) for k, v in model.get_likelihood_parameters().items()}
    theta = p.get("dispersions")
    zero = (
        np.exp(-p["mean"]) if theta is None else scipy.stats.nbinom.pmf(0, theta, theta / (theta + p["mean"]))
    )
    expected = p["dropout"] / (p["dropout"] + (1 - p["dropout"]) * zero)
    x = adata.X.toarray()
    found = model.technical_zeros().compute()
    np.testing.assert_allclose(found, np.where(x == 0, expected, 0), rtol=1e-4, atol=1e-7)
    assert (found[x > 0] == 0).all() and (x > 0).any()
    # Of latents alone nobody knows what was zero.
    np.testing.assert_allclose(model.technical_zeros(model.encode()).compute(), expected, rtol=1e-4)


def test_nothing_depends_on_cells_genes_or_chunks_asked_for(adata, monkeypatch):
    model = build(adata)
    whole = model.technical_zeros(n_samples=2).compute()
    monkeypatch.setattr(sample, "_PIECE_BYTES", 1)
    some = model.technical_zeros(cells=[200, 7], genes=["gene-8", "gene-3"], n_samples=2, memory_budget=1)
    np.testing.assert_allclose(some.compute(), whole[[200, 7]][:, [8, 3]], rtol=2e-5)


def test_imputed_counts_are_the_mean_before_dropout(adata):
    model = build(adata)
    mean = model.get_likelihood_parameters(gene_list=["gene-5"])["mean"]
    np.testing.assert_allclose(model.denoised_counts(genes=["gene-5"]).compute(), mean, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [({}, {"likelihood": "nb"}, "'nb' has no dropout"), ({"transform_batch": ["b1", "b2"]}, {}, "one")],
)
def test_what_cannot_be_is_refused(how, options, words, adata):
    with pytest.raises(OptionError, match=words):
        build(adata, **options).technical_zeros(**how)


def test_layers_are_written_beside_it(adata, tmp_path):
    model = build(adata)
    counts, zeros = model.denoised_counts(memory_budget=1), model.technical_zeros(memory_budget=1)
    assert counts.npartitions > 1
    write_expression(
        counts, model.atlas.read_names, list(model.fields.var_names), tmp_path / "imputed.zarr",
        overwrite=False, advance=lambda *_: None, layers={"technical_zero": zeros},
    )  # fmt: skip
    back = anndata.read_zarr(tmp_path / "imputed.zarr")
    np.testing.assert_allclose(back.X, counts.compute(), rtol=2e-5)
    np.testing.assert_allclose(back.layers["technical_zero"], zeros.compute(), rtol=2e-5)
