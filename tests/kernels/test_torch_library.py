"""What registration with torch promises: compile, autocast, fake tensors, the checks of `opcheck`."""

import pytest
import torch

from atlasvi_kernels import CSR, count_log_likelihood

NAMES = ("logits", "library", "theta", "pi_logits")


@pytest.fixture
def case():
    """Counts and parameters of four cells."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (4, 37), generator=generator)
    t = {
        "logits": torch.randn(4, 37, generator=generator),
        "library": torch.full((4,), 50.0),
        "theta": torch.rand(37, generator=generator) + 0.1,
        "pi_logits": torch.randn(4, 37, generator=generator),
    }
    return CSR.from_torch(x), t


def gradients(function, counts, t, upstream=None):
    leaves = {k: v.clone().requires_grad_() for k, v in t.items()}
    log_p = function(counts.indptr, counts.indices, counts.data, *leaves.values())
    grads = torch.autograd.grad(log_p, list(leaves.values()), torch.ones(4) if upstream is None else upstream)
    return log_p.detach(), dict(zip(NAMES, grads, strict=True))


def zinb(indptr, indices, data, logits, library, theta, pi_logits):
    counts = CSR(indptr, indices, data, logits.shape[1])
    return count_log_likelihood(counts, logits * 1, library, theta, pi_logits=pi_logits)


@pytest.mark.parametrize("upstream", [None, torch.tensor([1.0, -2.0, 0.5, 0.0])])
def test_compiled_without_a_break_it_gives_the_same(case, upstream):
    compiled = torch.compile(zinb, backend="aot_eager", fullgraph=True)
    got, grad = gradients(compiled, *case, upstream)
    expected, expected_grad = gradients(zinb, *case, upstream)
    torch.testing.assert_close(got, expected)
    for name in NAMES:
        torch.testing.assert_close(grad[name], expected_grad[name], msg=name)


def test_compiling_refuses_inplace(case):
    counts, t = case

    @torch.compile(backend="aot_eager", fullgraph=True)
    def inplace(logits):
        return count_log_likelihood(counts, logits, t["library"], t["theta"], likelihood="nb", inplace=True)

    with pytest.raises(Exception, match="inplace=True is for eager mode"):
        inplace(t["logits"].clone().requires_grad_())


def test_autocast_widens_half_precision_logits(case):
    counts, t = case
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(37, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        log_p = count_log_likelihood(counts, logits, t["library"], t["theta"], likelihood="nb")
    (got,) = torch.autograd.grad(log_p.sum(), hidden)
    leaf = logits.detach().double().requires_grad_()
    exact = count_log_likelihood(
        counts, leaf, t["library"].double(), t["theta"].double(), likelihood="nb", backend="reference"
    )
    torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-4)
    (u,) = torch.autograd.grad(exact.sum(), leaf)
    expected = u @ weight.double()
    assert (got.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_torch_finds_nothing_wrong_with_the_op(case, with_gradient):
    counts, t = case
    parameters = [v.clone().requires_grad_(with_gradient) for v in t.values()]
    arguments = (
        counts.indptr, counts.indices, counts.data, *parameters, None, "zinb", "softmax", "numba", 1.0,
        with_gradient,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.atlasvi_kernels.count_ll.default, arguments)


def test_fake_tensors_have_the_shapes_of_real_ones(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    counts, t = case
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(v) for v in (counts.indptr, counts.indices, counts.data, *t.values())]
        assert zinb(*fake).shape == (4,)
