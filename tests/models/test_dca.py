"""DCA: the published preprocessing, layers and loss, and that it denoises."""

import numpy as np
import pytest
import torch
from scipy.stats import nbinom

from atlasvi.errors import OptionError
from atlasvi.models.dca import DCA
from atlasvi.types import Noise


def build(adata, **options):
    DCA.setup_anndata(adata, gene_mask=None)
    return DCA(adata, **options)


def minibatch_of(model, n=300):
    return next(model._minibatches(None, np.arange(n), n))


def test_the_input_is_divided_by_size_factors_logged_and_standardised(adata):
    """As scanpy's normalize_total, log1p and scale, which the authors' code calls."""
    dense = adata.X.toarray().astype(np.float64)
    dense[:, 3] = 0  # a gene without counts is not divided by 0
    adata.X = type(adata.X)(dense)
    total = dense.sum(1, keepdims=True)
    y = np.log1p(dense / total * np.median(total))
    deviation = y.std(0, ddof=1)
    standard = torch.from_numpy((y - y.mean(0)) / np.where(deviation > 0, deviation, 1)).float()
    model = build(adata)
    layer = model.module.standardise
    with torch.no_grad():
        ours = layer(minibatch_of(model).counts, None)
        expected = standard @ layer.weight + layer.bias
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_first_layer_are_those_of_the_dense_one(adata):
    model = build(adata)
    layer, counts = model.module.standardise, minibatch_of(model, 40).counts
    upstream = torch.randn(40, 64)
    layer(counts, None).backward(upstream)
    ours = layer.weight.grad.clone()
    layer.weight.grad = None
    x = torch.log1p(counts.to_dense() / layer.size_factor(counts).unsqueeze(1))
    (((x - layer.gene_mean) / layer.gene_deviation) @ layer.weight + layer.bias).backward(upstream)
    torch.testing.assert_close(ours, layer.weight.grad, rtol=1e-3, atol=1e-4)


def test_the_layers_are_those_of_the_paper(adata):
    widths = {name: tuple(p.shape) for name, p in build(adata).module.named_parameters()}
    assert widths["input.linears.0.weight"] == (60, 64)
    assert widths["bottleneck.linears.0.weight"] == (64, 32)
    assert widths["decoder.mlp.linears.0.weight"] == (32, 64)
    for head in ("scale", "pi", "log_theta"):
        assert widths[f"decoder.{head}.weight"] == (60, 64)


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_the_loss_is_that_of_scipy_and_the_ridge(dispersion, ridge, adata):
    model = build(adata, dispersion=dispersion, ridge=ridge)
    model.train(2, enable_progress_bar=False)
    module, minibatch = model.module, minibatch_of(model)
    with torch.no_grad():
        terms = module.loss(minibatch, Noise(0, 0, minibatch.rows))
        b = module.encode(minibatch).loc
        h = module.decoder.hidden(b, _nothing(minibatch))
        theta = module.log_theta if dispersion == "gene" else module.decoder.log_theta(h)
        theta, pi = theta.double().exp().numpy(), module.decoder.pi(h).double().sigmoid().numpy()
        mu = (
            (module.decode_log_rho(b, minibatch).exp() * module.library(minibatch)[0][:, None])
            .double()
            .numpy()
        )
    total = adata.X.sum(1).A1
    np.testing.assert_allclose(module.library(minibatch)[0], total / np.median(total), rtol=1e-6)
    x = adata.X.toarray()
    p = (1 - pi) * nbinom.pmf(x, theta, theta / (theta + mu)) + pi * (x == 0)
    expected = -np.log(p).sum(1)
    np.testing.assert_allclose(terms.reconstruction, expected, rtol=1e-4)
    assert float(terms.total) == pytest.approx(expected.mean() + ridge * (pi**2).sum(1).mean(), rel=1e-4)


def _nothing(minibatch):
    from atlasvi.models.dca import _nothing

    return _nothing(minibatch)


def test_the_ridge_lowers_dropout(adata):
    shares = []
    for ridge in (0.0, 30.0):
        model = build(adata, ridge=ridge)
        model.train(20, batch_size=64, plan_kwargs={"lr": 0.01}, enable_progress_bar=False)
        minibatch = minibatch_of(model)
        with torch.no_grad():
            h = model.module.decoder.hidden(model.module.encode(minibatch).loc, _nothing(minibatch))
            shares.append(float(model.module.decoder.pi(h).sigmoid().mean()))
    assert shares[1] < shares[0] / 2


def test_it_denoises(adata):
    """What is denoised is nearer to the means that counts were drawn from than the counts are."""
    rng = np.random.default_rng(1)
    group = adata.obs["cell_type"].cat.codes.to_numpy()
    profile = rng.gamma(0.5, 3.0, (3, 60)) + 0.05
    mu = profile[group] * rng.lognormal(0, 0.4, (300, 1))
    adata.X = type(adata.X)(rng.poisson(mu).astype(np.float32))
    model = build(adata, n_hidden=16, n_latent=2, gene_likelihood="nb", dispersion="gene")
    model.train(60, batch_size=64, plan_kwargs={"lr": 0.01}, enable_progress_bar=False)
    denoised = model.expression(library_size="latent").compute()
    error = [((np.log1p(what) - np.log1p(mu)) ** 2).mean() for what in (denoised, adata.X.toarray())]
    assert error[0] < 0.3 * error[1]


def test_what_cannot_be_is_refused(adata):
    for options, said in (
        ({"dispersion": "gene-batch"}, "gene-batch"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": 1.0, "gene_likelihood": "nb"}, "dropout"),
        ({"n_latent": 0}, "n_latent"),
        ({"gene_likelihood": "normal"}, "normal"),
    ):
        with pytest.raises(OptionError, match=said):
            build(adata, **options)
    DCA.setup_anndata(adata, gene_mask=None, size_factor_key="size_factor")
    with pytest.raises(OptionError, match="size_factor_key='size_factor'"):
        DCA(adata)
