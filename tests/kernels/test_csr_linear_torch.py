"""csr_linear among torch's own: registered operation, compiled, under autocast."""

import subprocess
import sys

import pytest
import torch

from atlasvi_kernels import CSR, csr_linear

G, H = 33, 20


def make(b=7, dtype=torch.float32, seed=0):
    """Counts, weight, bias, scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (b, G), generator=generator) * (torch.rand(b, G, generator=generator) < 0.3)
    weight, bias = (torch.randn(s, generator=generator, dtype=dtype) for s in ((G, H), (H,)))
    scale = torch.rand(b, generator=generator) + 0.5
    return CSR.from_torch(x.to(torch.uint8)), weight.requires_grad_(), bias.requires_grad_(), scale


def gradients(y, *leaves):
    return y, *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_torch_finds_the_operations_well_registered(backend):
    counts, weight, _, _ = make()
    entries = counts.indptr, counts.indices.to(torch.uint16), counts.data.float()
    upstream = torch.randn(7, H, requires_grad=True)
    ops = torch.ops.atlasvi_kernels
    torch.library.opcheck(ops.csr_linear.default, (*entries, weight, backend))
    torch.library.opcheck(ops.csr_linear_backward.default, (*entries, upstream, G, backend))


@pytest.mark.parametrize("index_type", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_whole_it_gives_the_same_bits(backend, index_type):
    def function(indptr, indices, data, weight, bias, scale):
        counts = CSR(indptr, indices, data, G)
        return csr_linear(counts, weight, bias, scale=scale, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for b in (7, 9):  # another number of cells and of entries: shapes become symbols
        counts, weight, bias, scale = make(b, seed=b)
        arguments = counts.indptr, counts.indices.to(index_type), counts.data, weight, bias, scale
        for got, want in zip(
            gradients(compiled(*arguments), weight, bias),
            gradients(function(*arguments), weight, bias),
            strict=True,
        ):
            assert torch.equal(got, want)


def test_counts_can_be_an_argument_of_a_compiled_function():
    counts, weight, bias, scale = make()
    compiled = torch.compile(csr_linear, backend="aot_eager", fullgraph=True)
    y = compiled(counts, weight, bias, scale=scale)
    for got, want in zip(
        gradients(y, weight, bias),
        gradients(csr_linear(counts, weight, bias, scale=scale), weight, bias),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_it_stays_in_float32(backend):
    counts, weight, bias, scale = make()
    expected = gradients(csr_linear(counts, weight, bias, scale=scale, backend=backend), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = csr_linear(counts, weight, bias, scale=scale, backend=backend)
    for got, want in zip(gradients(y, weight, bias), expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_weights_of_bfloat16():
    counts, weight, bias, scale = make(dtype=torch.bfloat16)
    expected = csr_linear(counts, weight.float(), bias.float(), scale=scale).detach()
    y = csr_linear(counts, weight, bias, scale=scale)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        y, g_weight, _ = gradients(csr_linear(counts, weight, bias, scale=scale), weight, bias)
    torch.testing.assert_close(y, expected)
    assert g_weight.dtype == torch.bfloat16


def test_vectors_of_second_derivatives():
    counts, weight, _, _ = make()
    y = csr_linear(counts, weight)
    (first,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    dense = torch.log1p(counts.to_dense(torch.float64))
    w = weight.detach().double().requires_grad_()
    (first,) = torch.autograd.grad((dense @ w).pow(3).sum(), w, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), w)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_call_does_not_import_the_compiler():
    code = (
        "import sys, torch, atlasvi_kernels as ak; w = torch.ones(3, 2, requires_grad=True); "
        "ak.csr_linear(ak.CSR.from_torch(torch.ones(2, 3)), w).sum().backward(); "
        "assert w.grad is not None and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
