"""The fused heads against layers and the float64 reference; and that cells x genes never exists."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from atlasvi_kernels import CSR, linear_count_log_likelihood, products
from atlasvi_kernels.count_ll.op import LIKELIHOODS, MEANS
from atlasvi_kernels.linear_count_ll import blocks


def make(b, g, h, *, likelihood, mean="softmax", dispersion="gene", biases=True, seed=0):
    """Counts and float64 parameters by name, and theta_index."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=0.3):
        return torch.from_numpy(rng.normal(0, scale, shape))

    x = torch.from_numpy(rng.integers(1, 9, (b, g)) * (rng.random((b, g)) < 0.3))
    t = {"hidden": normal(b, h, scale=1), "weight": normal(g, h)}
    t["library"] = torch.from_numpy(rng.uniform(1, 900, b) / (900 if mean == "exp" else 1))
    index = None
    if likelihood in ("nb", "zinb") and dispersion == "head":
        t["theta_weight"] = normal(g, h)
    elif likelihood in ("nb", "zinb"):
        shape = {"gene": (g,), "gene-batch": (3, g), "gene-cell": (b, g)}[dispersion]
        t["theta"] = torch.from_numpy(rng.gamma(1, 3, shape) + 0.05)
        if dispersion == "gene-batch":
            index = torch.from_numpy(rng.integers(0, 3, b))
    if likelihood in ("zip", "zinb"):
        t["pi_weight"] = normal(g, h)
    if biases:
        weights = [name for name in t if name.endswith("weight")]
        t |= {name.replace("weight", "bias"): normal(g) for name in weights}
    return x, t, index


def run(x, t, index, *, dtype, upstream, **options):
    leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in t.items()}
    log_p = linear_count_log_likelihood(CSR.from_torch(x), **leaves, theta_index=index, **options)
    grads = torch.autograd.grad(log_p, list(leaves.values()), upstream.to(log_p.dtype))
    return log_p.detach().double(), {k: g.double() for k, g in zip(leaves, grads, strict=True)}


def assert_agrees(got, expected, *, value, gradient):
    (log_p, grad), (log_p2, grad2) = got, expected
    assert ((log_p - log_p2).abs() <= value * log_p2.abs()).all()
    assert grad.keys() == grad2.keys()
    for name in grad:
        error = (grad[name] - grad2[name]).norm() / grad2[name].norm()
        assert error < gradient, f"gradient of {name}: {error:.1e}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four cells, so that few cells make several, the last of them ragged."""
    monkeypatch.setattr(blocks, "block_rows", lambda n_linear, n_vars: 4)


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell", "head"])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_value_and_gradients_are_those_of_layers_in_float64(likelihood, mean, dispersion, small_blocks):
    if likelihood in ("poisson", "zip") and dispersion != "gene":
        pytest.skip("no theta")
    for biases, upstream in [(True, torch.ones(10)), (False, torch.linspace(-1, 2, 10))]:
        x, t, index = make(10, 83, 7, likelihood=likelihood, mean=mean, dispersion=dispersion, biases=biases)
        given = {"likelihood": likelihood, "mean": mean, "upstream": upstream}
        expected = run(x, t, index, dtype=torch.float64, backend="reference", **given)
        got = run(x, t, index, dtype=torch.float32, backend="numba", **given)
        assert_agrees(got, expected, value=1e-5, gradient=1e-4)


def test_reference_gradients_are_those_of_finite_differences():
    x, t, _ = make(2, 5, 3, likelihood="zinb", dispersion="head")
    names = list(t)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return linear_count_log_likelihood(CSR.from_torch(x), **given, backend="reference")

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in t.values()])


@pytest.mark.parametrize("expected_upstream", [1.0, -0.1])
def test_a_mean_and_the_upstream_expected(expected_upstream, small_blocks):
    x, t, _ = make(10, 50, 6, likelihood="zinb")
    upstream = torch.full((10,), -0.1)
    expected = run(x, t, None, dtype=torch.float64, backend="reference", upstream=upstream)
    leaves = {k: v.float().requires_grad_() for k, v in t.items()}
    log_p = linear_count_log_likelihood(CSR.from_torch(x), **leaves, upstream=expected_upstream)
    grads = torch.autograd.grad(-log_p.mean(), list(leaves.values()))
    got = log_p.detach().double(), {k: g.double() for k, g in zip(leaves, grads, strict=True)}
    assert_agrees(got, expected, value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("how", ["matmul_dtype", "autocast"])
def test_half_precision_products_are_right_to_a_hundredth(how, has_units, small_blocks, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: has_units)
    x, t, _ = make(10, 83, 64, likelihood="zinb", dispersion="head")
    t = {k: v * 0.3 if k.endswith("weight") else v for k, v in t.items()}
    upstream = torch.ones(10)
    expected = run(x, t, None, dtype=torch.float64, backend="reference", upstream=upstream)
    if how == "matmul_dtype":
        got = run(x, t, None, dtype=torch.float32, matmul_dtype=torch.bfloat16, upstream=upstream)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = run(x, t, None, dtype=torch.float32, upstream=upstream)
    assert_agrees(got, expected, value=1e-2, gradient=1e-2)
    exact = run(x, t, None, dtype=torch.float32, upstream=upstream)
    assert not torch.equal(got[0], exact[0])  # or the type was not heeded


def test_compiled_without_a_break_it_gives_the_same(small_blocks):
    x, t, _ = make(6, 40, 5, likelihood="zinb")
    counts = CSR.from_torch(x)
    names = list(t)

    def function(indptr, indices, data, *values):
        given = dict(zip(names, values, strict=True))
        return linear_count_log_likelihood(CSR(indptr, indices, data, 40), **given)

    found = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [v.float().requires_grad_() for v in t.values()]
        log_p = call(counts.indptr, counts.indices, counts.data, *leaves)
        found.append([log_p, *torch.autograd.grad(log_p.mean(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_finds_nothing_wrong_with_the_op(small_blocks):
    x, t, _ = make(6, 11, 5, likelihood="nb")
    counts = CSR.from_torch(x)
    t = {k: v.float().requires_grad_() for k, v in t.items()}
    arguments = (
        counts.indptr, counts.indices, counts.data, t["hidden"], t["library"], t["weight"], t["bias"], None,
        None, t["theta"], None, None, None, "nb", "softmax", "numba", torch.float32, 1.0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.atlasvi_kernels.linear_count_ll.default, arguments)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 1, 1), (1, 33, 2)])
def test_odd_shapes(shape):
    x, t, _ = make(*shape, likelihood="nb")
    upstream = torch.ones(shape[0])
    expected = run(x, t, None, dtype=torch.float64, backend="reference", likelihood="nb", upstream=upstream)
    got = run(x, t, None, dtype=torch.float32, backend="numba", likelihood="nb", upstream=upstream)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": torch.zeros(3, 4)}, r"hidden must be \(2, H\), is \(3, 4\)"),
        ({"weight": torch.zeros(3, 5)}, r"weight must be of shape \(3, 4\), is \(3, 5\)"),
        ({"bias": torch.zeros(4)}, r"bias must be of shape \(3,\), is \(4,\)"),
        (
            {"library": torch.ones(2, dtype=torch.float64)},
            "library is torch.float64, hidden is torch.float32",
        ),
        ({"theta_weight": torch.zeros(3, 4)}, "both given"),
        ({"theta": None}, "needs theta"),
        ({"theta": None, "theta_bias": torch.zeros(3)}, "theta_bias is given without theta_weight"),
        ({"pi_weight": torch.zeros(3, 4)}, "takes no pi_logits"),
        ({"theta_index": torch.zeros(2)}, "theta_index must be"),
        ({"backend": "numba", "hidden": torch.zeros(2, 4, dtype=torch.float64)}, "one floating type"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "library": torch.ones(2),
        "theta": torch.ones(3) if "theta_index" not in change else torch.ones(2, 3),
        "likelihood": "nb",
        **change,
    }
    with pytest.raises(ValueError, match=says):
        linear_count_log_likelihood(CSR.from_torch(torch.ones(2, 3)), **arguments)


_MEMORY = """
import numpy as np, torch
import atlasvi_kernels as ak
from atlasvi.memory import Watch, give_back

def measure(b, g, h=32):
    rng = np.random.default_rng(0)
    columns = np.sort(rng.integers(0, g // 50, (b, 50)) + np.arange(50) * (g // 50)).ravel()
    counts = ak.CSR.from_numpy(np.arange(b + 1) * 50, columns, rng.integers(1, 9, b * 50).astype(np.uint8), g)
    hidden = torch.randn(b, h, requires_grad=True)
    heads = [torch.randn(g, h).mul_(0.1).requires_grad_() for _ in range(2)]
    library, theta = torch.full((b,), 500.0), torch.ones(g, requires_grad=True)
    give_back()
    with Watch(interval=0.001) as watch:
        ll = ak.linear_count_log_likelihood(counts, hidden, heads[0], library, theta, pi_weight=heads[1])
        ll.sum().backward()
    returned = sum(t.grad.nbytes for t in (hidden, *heads, theta))
    print(watch.peak_bytes - watch.before_bytes - returned)

measure(64, 500)
for b in (1024, 4096):
    measure(b, 20_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_no_matrix_of_cells_and_genes_is_made():
    done = subprocess.run([sys.executable, "-c", _MEMORY], stdout=subprocess.PIPE, text=True, check=True)
    _, few, many = map(int, done.stdout.split())
    assert many < 4096 * 20_000 * 4 / 10
    # What grows with cells is the gradient of hidden and the counts in other types, not cells x genes.
    assert many - few < 4 << 20
