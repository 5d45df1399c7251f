"""Layers against the same written out densely with torch's own."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from atlasvi_kernels import CSR

from atlasvi.nn.decoder import Decoder, LinearHead
from atlasvi.nn.encoder import Encoder
from atlasvi.nn.layers import MLP, Covariates, InputLinear
from atlasvi.types import Noise

B, G, H = 7, 11, 5


@pytest.fixture
def counts():
    return torch.poisson(torch.full((B, G), 0.7))


@pytest.fixture
def covariates():
    codes = torch.stack(
        [torch.randint(0, 3, (B,)), torch.zeros(B, dtype=torch.int64), torch.randint(0, 2, (B,))], 1
    )
    return Covariates(codes, torch.randn(B, 2))


def csr(dense):
    return CSR.from_scipy(sp.csr_matrix(dense.numpy().astype(np.uint16)))


def mlp(n_in=G, n_layers=2, **options):
    how = {"inject": True, "dropout_rate": 0.0, "batch_norm": False, "layer_norm": False, "stream": 16}
    return MLP(n_in, H, n_layers, (3, 1, 2), 2, **{**how, **options})


def one_hot(covariates):
    codes = covariates.codes
    return torch.cat([covariates.continuous, F.one_hot(codes[:, 0], 3), F.one_hot(codes[:, 2], 2)], 1)


@pytest.mark.parametrize("sparse", [True, False])
def test_covariates_are_rows_of_the_weight_of_a_one_hot_code(sparse, counts, covariates):
    layer = InputLinear(G, H, (3, 1, 2), 2)
    x = torch.log1p(counts)
    found = layer(csr(counts) if sparse else x, covariates)
    # The covariate of one level says nothing and has no row.
    assert layer.covariate_weight.shape == (2 + 3 + 2, H)
    expected = torch.cat([x, one_hot(covariates)], 1) @ torch.cat([layer.weight, layer.covariate_weight])
    torch.testing.assert_close(found, expected + layer.bias)
    weights = torch.randn(B, H)
    mine = torch.autograd.grad((found * weights).sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(((expected + layer.bias) * weights).sum(), list(layer.parameters()))
    for (name, _), one, other in zip(layer.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_without_covariates_there_is_no_weight_for_them():
    assert InputLinear(G, H, (1, 1)).covariate_weight is None


@pytest.mark.parametrize("inject", [True, False])
def test_covariates_go_into_every_layer_or_the_first_only(inject, covariates):
    layers = mlp(inject=inject).linears
    assert layers[0].covariate_weight.shape[0] == 7
    assert (layers[1].covariate_weight is not None) is inject
    if inject:
        assert layers[1].covariate_weight.shape[0] == 5  # numbers go into the first only


def test_norms_are_torchs_with_scvi_tools_settings(counts, covariates):
    network = mlp(n_layers=1, batch_norm=True, layer_norm=True)
    h = network.linears[0](csr(counts), covariates)
    expected = F.relu(F.layer_norm(F.batch_norm(h, None, None, training=True, eps=0.001), (H,)))
    torch.testing.assert_close(network(csr(counts), covariates, None), expected)
    torch.testing.assert_close(network.batch_norms[0].running_mean, 0.01 * h.mean(0))


def test_dropout_is_keyed_by_the_cell_and_keeps_the_mean(counts, covariates):
    network = MLP(
        G, 4000, 1, (), 0, inject=True, dropout_rate=0.25, batch_norm=False, layer_norm=False, stream=16
    )
    rows = torch.arange(100, 100 + B)
    whole = network(csr(counts), covariates, Noise(0, 3, rows))
    none = network(csr(counts), covariates, None)
    dropped = (whole == 0) & (none > 0)
    assert float(dropped.sum() / (none > 0).sum()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(whole[~dropped], none[~dropped] / 0.75)
    turned = torch.arange(B - 1, -1, -1)
    some = network(csr(counts[turned]), covariates, Noise(0, 3, rows[turned]))
    torch.testing.assert_close(some, whole[turned])
    assert not torch.equal(network(csr(counts), covariates, Noise(0, 4, rows)), whole)
    network.eval()
    torch.testing.assert_close(network(csr(counts), covariates, Noise(0, 3, rows)), none)


def test_the_posterior_has_a_floor_under_its_variance(counts, covariates):
    encoder = Encoder(mlp(), H, 3)
    with torch.no_grad():
        encoder.log_variance.bias.fill_(-1000.0)
    posterior = encoder(csr(counts), covariates, None)
    torch.testing.assert_close(posterior.scale, torch.full((B, 3), 0.01))
    reference = torch.distributions.Normal(posterior.loc.double(), posterior.scale.double())
    prior = torch.distributions.Normal(torch.tensor(0.3).double(), torch.tensor(1.7).double())
    torch.testing.assert_close(
        posterior.kl_divergence(0.3, 1.7).double(),
        torch.distributions.kl_divergence(reference, prior).sum(-1),
        rtol=1e-5,
        atol=1e-5,
    )


def test_heads_can_be_asked_for_some_genes_and_the_normaliser_in_tiles(covariates):
    decoder = Decoder(mlp(4), H, G, has_pi=True, has_theta=True)
    h = decoder.hidden(torch.randn(B, 4), covariates)
    genes = torch.tensor([10, 0, 3])
    for head in (decoder.scale, decoder.pi, decoder.log_theta):
        torch.testing.assert_close(decoder.genes(head, h, genes), head(h)[:, genes])
    expected = decoder.scale(h).logsumexp(-1, keepdim=True)
    for tile in (1, 4, 4096):
        torch.testing.assert_close(decoder.log_normaliser(h, tile), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_folded_into_a_linear_head_is_that_of_its_logits(bias: bool) -> None:
    torch.manual_seed(0)
    n_cells, n_in, n_vars = 40, 7, 30
    head = LinearHead(n_in, n_vars, bias=bias, batch_norm=True)
    assert head.norm is not None
    theirs = torch.nn.BatchNorm1d(n_vars, momentum=0.01, eps=0.001)
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2.0)
        head.norm.bias.normal_()
    theirs.load_state_dict(head.norm.state_dict())
    upstream = torch.randn(n_cells, n_vars)
    h = torch.randn(n_cells, n_in) @ torch.randn(n_in, n_in) + 3.0
    found = []
    for logits in (head, lambda x: theirs(head.linear(x))):
        x = h.clone().requires_grad_()
        y = logits(x)
        found.append([y, *torch.autograd.grad((y * upstream).sum(), [x, head.linear.weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    (head(h) * upstream).sum().backward()
    (theirs(head.linear(h)) * upstream).sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(head.norm.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(head.norm.get_buffer(name), buffer)
    head.eval()
    theirs.eval()
    torch.testing.assert_close(head(h), theirs(head.linear(h)), rtol=1e-4, atol=1e-4)


def test_a_norm_of_one_cell_is_refused_as_torch_does() -> None:
    head = LinearHead(3, 5, bias=False, batch_norm=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        head(torch.ones(1, 3))
