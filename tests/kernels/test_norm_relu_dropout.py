"""Batch norm, ReLU and dropout in one, against torch's own modules in double precision."""

import pytest
import torch
from atlasvi_kernels import norm_relu_dropout

EPS = 1e-3


def make(n, h, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, h, generator=generator) + 5 * torch.randn(h, generator=generator)
    weight, bias = torch.rand(h, generator=generator) + 0.5, torch.randn(h, generator=generator)
    kept = torch.rand(n, h, generator=generator) >= 0.3
    return x, weight, bias, kept, torch.randn(n, h, generator=generator)


def by_torch(x, weight, bias, kept, rate):
    """The moments too, as torch's running ones with a momentum of 1 have them."""
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    y = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=EPS)
    y = y.relu() if kept is None else y.relu() * kept / (1 - rate)
    return y, mean.detach(), variance.detach() * (len(x) - 1) / len(x)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (7, 3), (128, 128), (130, 100), (2100, 128)])
def test_values_moments_and_gradients_are_those_of_torch(shape, drops, backend):
    x, weight, bias, kept, upstream = make(*shape)
    kept = kept if drops else None
    found = []
    for function, dtype in ((norm_relu_dropout, torch.float32), (by_torch, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        options = {"eps": EPS, "backend": backend} if function is norm_relu_dropout else {}
        y, mean, variance = function(*leaves, kept=kept, rate=0.3, **options)
        assert not mean.requires_grad and not variance.requires_grad
        found.append([y.detach(), mean, variance, *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4)


def test_the_bits_do_not_depend_on_threads():
    x, weight, bias, kept, upstream = make(3000, 112)
    found, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y, *moments = norm_relu_dropout(*leaves, kept=kept, rate=0.3)
            found.append([y.detach(), *moments, *torch.autograd.grad(y, leaves, upstream)])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiled_without_a_break_it_gives_the_same():
    x, weight, bias, kept, upstream = make(9, 20)

    def function(x, weight, bias):
        return norm_relu_dropout(x, weight, bias, kept=kept, rate=0.3)[0]

    found = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = call(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(1, 3)}, r"B of at least 2.*\(1, 3\)"),
        ({"weight": torch.ones(4)}, r"weight must be \(3,\).*\(4,\)"),
        ({"bias": torch.ones(3).double()}, "bias must be.*float64"),
        ({"kept": torch.ones(5, 3)}, "kept must be.*bool.*float32"),
        ({"rate": 1.0}, r"rate must be in \[0, 1\)"),
        ({"backend": "triton"}, "no backend 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = {"x": torch.rand(5, 3), "weight": torch.ones(3), "bias": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=words):
        norm_relu_dropout(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)
