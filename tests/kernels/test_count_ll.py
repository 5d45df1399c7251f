import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from atlasvi_kernels import CSR, count_log_likelihood
from atlasvi_kernels.count_ll.op import LIKELIHOODS, MEANS

NAMES = ("logits", "library", "theta", "pi_logits")


def make(b, g, *, likelihood, mean="softmax", dispersion="gene", density=0.2, seed=0, largest=30):
    """Counts and float64 parameters of a case."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, largest, (b, g)) * (rng.random((b, g)) < density)
    tensors = {
        "logits": torch.from_numpy(rng.normal(0, 2, (b, g))),
        "library": torch.from_numpy(rng.uniform(1, 1000, b) / (1000 if mean == "exp" else 1)),
        "theta": None,
        "pi_logits": None,
    }
    theta_index = None
    if likelihood in ("nb", "zinb"):
        shape = {"gene": (g,), "gene-batch": (3, g), "gene-cell": (b, g)}[dispersion]
        tensors["theta"] = torch.from_numpy(rng.gamma(1, 3, shape) + 0.01)
        if dispersion == "gene-batch":
            theta_index = torch.from_numpy(rng.integers(0, 3, b))
    if likelihood in ("zip", "zinb"):
        tensors["pi_logits"] = torch.from_numpy(rng.normal(-1, 3, (b, g)))
    return torch.from_numpy(x), tensors, theta_index


def run(x, tensors, theta_index, *, dtype, backend, likelihood, mean="softmax", upstream=None):
    """Log-likelihood and gradients by name."""
    counts = CSR.from_torch(x)
    leaves = {
        name: None if t is None else t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()
    }
    log_p = count_log_likelihood(
        counts, leaves["logits"], leaves["library"], leaves["theta"], pi_logits=leaves["pi_logits"],
        theta_index=theta_index, likelihood=likelihood, mean=mean, backend=backend,
    )  # fmt: skip
    upstream = torch.ones(len(x)) if upstream is None else upstream
    (log_p * upstream.to(dtype)).sum().backward()
    return log_p.detach().double(), {k: t.grad.double() for k, t in leaves.items() if t is not None}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_reference_is_scipys_mass_function(likelihood):
    x, t, _ = make(3, 40, likelihood=likelihood, seed=1)
    log_p, _ = run(x, t, None, dtype=torch.float64, backend="reference", likelihood=likelihood)
    mu = t["library"][:, None] * torch.softmax(t["logits"], 1)
    if likelihood in ("nb", "zinb"):
        theta = t["theta"].expand_as(mu).numpy()
        p = scipy.stats.nbinom.pmf(x.numpy(), theta, theta / (theta + mu.numpy()))
    else:
        p = scipy.stats.poisson.pmf(x.numpy(), mu.numpy())
    if likelihood in ("zip", "zinb"):
        pi = torch.sigmoid(t["pi_logits"]).numpy()
        p = pi * (x.numpy() == 0) + (1 - pi) * p
    np.testing.assert_allclose(log_p.numpy(), np.log(p).sum(1), rtol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("mean", MEANS)
def test_reference_gradients_are_those_of_finite_differences(likelihood, mean):
    x, t, _ = make(2, 5, likelihood=likelihood, mean=mean, largest=5)
    given = [v.clone().requires_grad_() for v in t.values() if v is not None]
    names = [k for k, v in t.items() if v is not None]

    def function(*values):
        by_name = dict(zip(names, values, strict=True))
        return count_log_likelihood(
            CSR.from_torch(x), by_name["logits"], by_name["library"], by_name.get("theta"),
            pi_logits=by_name.get("pi_logits"), likelihood=likelihood, mean=mean, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, given)


# 1037 genes: one full tile of 1024 and a ragged one, and no multiple of any vector width.
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize(("likelihood", "mean"), list(itertools.product(LIKELIHOODS, MEANS)))
def test_numba_agrees_with_the_float64_reference(likelihood, mean, dispersion):
    for density, upstream in [(0.003, None), (0.2, torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])), (1.0, None)]:
        x, t, index = make(5, 1037, likelihood=likelihood, mean=mean, dispersion=dispersion, density=density)
        given = {"likelihood": likelihood, "mean": mean, "upstream": upstream}
        expected, expected_grad = run(x, t, index, dtype=torch.float64, backend="reference", **given)
        got, grad = run(x, t, index, dtype=torch.float32, backend="numba", **given)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for name in grad:
            error = (grad[name] - expected_grad[name]).norm() / expected_grad[name].norm()
            assert error < 1e-4, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_extremes_stay_finite_and_right(likelihood):
    """theta 1e-4 to 1e6, logits to +-60, library 1 to 1e7, counts to 1e6, empty rows, empty genes."""
    g = 400
    rng = np.random.default_rng(3)
    x = np.zeros((8, g), np.int64)
    x[2:, : g // 2] = np.round(10 ** rng.uniform(0, 6, (6, g // 2))) * (rng.random((6, g // 2)) < 0.3)
    tensors = {
        "logits": torch.from_numpy(rng.uniform(-60, 60, (8, g))),
        "library": torch.from_numpy(10 ** np.linspace(0, 7, 8)),
        "theta": torch.from_numpy(10 ** rng.uniform(-4, 6, g)) if likelihood in ("nb", "zinb") else None,
        "pi_logits": torch.from_numpy(rng.uniform(-60, 60, (8, g)))
        if likelihood in ("zip", "zinb")
        else None,
    }
    x = torch.from_numpy(x)
    # The reference sees what float32 can hold of the inputs: the comparison is of the computing.
    tensors = {k: None if v is None else v.float().double() for k, v in tensors.items()}
    expected, expected_grad = run(
        x, tensors, None, dtype=torch.float64, backend="reference", likelihood=likelihood
    )
    got, grad = run(x, tensors, None, dtype=torch.float32, backend="numba", likelihood=likelihood)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
    for name in grad:
        assert torch.isfinite(grad[name]).all(), name
        error = (grad[name] - expected_grad[name]).norm() / expected_grad[name].norm()
        assert error < 1e-4, f"gradient of {name}: {error:.1e}"


def test_where_dropout_and_zero_case_both_vanish():
    """Beyond exp(-87) float32 has nothing left; those entries go through float64."""
    tensors = {
        "logits": torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64),
        "library": torch.tensor([1e6], dtype=torch.float64),
        "theta": torch.tensor([1e5, 1e5, 1e5], dtype=torch.float64),
        "pi_logits": torch.tensor([[-100.0, -200.0, -90.0]], dtype=torch.float64),
    }
    x = torch.tensor([[0, 0, 5]])
    expected, expected_grad = run(
        x, tensors, None, dtype=torch.float64, backend="reference", likelihood="zinb"
    )
    got, grad = run(x, tensors, None, dtype=torch.float32, backend="numba", likelihood="zinb")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    for name in grad:
        torch.testing.assert_close(grad[name], expected_grad[name], rtol=1e-4, atol=1e-6)


def test_zinb_tends_to_nb_and_nb_to_poisson():
    x, t, _ = make(4, 50, likelihood="zinb")
    x = x.clamp(max=3)
    nb = {**t, "pi_logits": None}
    poisson = {**nb, "theta": None}
    options = {"dtype": torch.float64, "backend": "reference"}
    no_dropout = run(
        x, {**t, "pi_logits": torch.full_like(t["pi_logits"], -50)}, None, likelihood="zinb", **options
    )
    torch.testing.assert_close(no_dropout[0], run(x, nb, None, likelihood="nb", **options)[0])
    no_spread = run(x, {**nb, "theta": torch.full_like(t["theta"], 1e9)}, None, likelihood="nb", **options)
    torch.testing.assert_close(
        no_spread[0], run(x, poisson, None, likelihood="poisson", **options)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("index_type", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("data_type", [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float32])
def test_integer_types_unsorted_columns_and_explicit_zeros_do_not_matter(index_type, data_type):
    x, t, _ = make(3, 20, likelihood="zinb")
    expected, _ = run(x, t, None, dtype=torch.float32, backend="numba", likelihood="zinb")
    rows = []
    for row in x:
        columns = torch.cat([row.nonzero()[:, 0], (row == 0).nonzero()[:2, 0]]).flip(0)
        rows.append((columns, row[columns]))
    counts = CSR(
        torch.tensor([0, *np.cumsum([len(c) for c, _ in rows])]),
        torch.cat([c for c, _ in rows]).to(index_type),
        torch.cat([v for _, v in rows]).to(data_type),
        20,
    )
    got = count_log_likelihood(
        counts,
        t["logits"].float(),
        t["library"].float(),
        t["theta"].float(),
        pi_logits=t["pi_logits"].float(),
    )
    torch.testing.assert_close(got.double(), expected)


def test_library_goes_with_its_row_when_rows_are_in_another_order():
    x, t, _ = make(6, 30, likelihood="nb")
    log_p, grad = run(x, t, None, dtype=torch.float32, backend="numba", likelihood="nb")
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {**t, "logits": t["logits"][order], "library": t["library"][order]}
    log_p2, grad2 = run(x[order], moved, None, dtype=torch.float32, backend="numba", likelihood="nb")
    torch.testing.assert_close(log_p2, log_p[order])
    torch.testing.assert_close(grad2["library"], grad["library"][order])


def test_a_second_backward_gives_the_same():
    x, t, _ = make(3, 20, likelihood="zinb")
    leaf = t["logits"].float().requires_grad_()
    log_p = count_log_likelihood(
        CSR.from_torch(x), leaf, t["library"].float(), t["theta"].float(), pi_logits=t["pi_logits"].float()
    )
    (first,) = torch.autograd.grad(log_p.sum() * 3, leaf, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(log_p.sum() * 3, leaf)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 33)])
def test_odd_shapes(shape):
    b, g = shape
    counts = CSR.from_torch(torch.ones(b, g))
    arguments = (counts, torch.zeros(b, g), torch.ones(b), torch.ones(g))
    got = count_log_likelihood(*arguments, likelihood="nb", backend="numba")
    expected = count_log_likelihood(*arguments, likelihood="nb", backend="reference")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": torch.zeros(2, 4)}, r"logits must be of shape \(2, 3\), is \(2, 4\)"),
        ({"library": torch.ones(3)}, r"library must be of shape \(2,\)"),
        ({"theta": torch.ones(4)}, r"theta must be of shape \(3,\) or \(2, 3\)"),
        ({"theta": torch.ones(3, dtype=torch.float64)}, "theta is torch.float64, logits are torch.float32"),
        ({"theta": None}, "needs theta"),
        ({"pi_logits": torch.zeros(2, 3)}, "takes no pi_logits"),
        ({"likelihood": "gauss"}, "likelihood 'gauss'"),
        ({"mean": "relu"}, "mean 'relu'"),
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"theta_index": torch.tensor([0, 3]), "theta": torch.ones(2, 3)}, "theta_index must lie in"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    arguments = {
        "logits": torch.zeros(2, 3),
        "library": torch.ones(2),
        "theta": torch.ones(3),
        "likelihood": "nb",
        **change,
    }
    with pytest.raises(ValueError, match=says):
        count_log_likelihood(CSR.from_torch(torch.ones(2, 3)), **arguments)


def test_a_backend_asked_for_never_falls_back():
    counts = CSR.from_torch(torch.ones(1, 2))
    with pytest.raises(ValueError, match="'numba' takes float32 on the CPU"):
        count_log_likelihood(
            counts, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64),
            likelihood="poisson", backend="numba",
        )  # fmt: skip


@pytest.mark.parametrize("n", [15, 60, 1024])
def test_a_row_is_computed_alike_wherever_its_memory_lies(n):
    """A compiled loop that finds its arrays near each other may take another path, and add in another
    order: the same seed would then not give the same weights."""
    from atlasvi_kernels.count_ll import cpu

    rng = np.random.default_rng(0)
    inputs = {"mu": rng.gamma(1, 1, n), "theta": rng.gamma(1, 1, n), "pi": rng.normal(0, 3, n), "g_theta": 0}
    names = ("mu", "theta", "pi", "u", "g_theta", "g_pi", "f_zero", "d_zero", "log1p_ratio")

    def run(order, gap):
        buffer = np.full(len(names) * (n + gap), np.float32(3), np.float32)
        at = {name: buffer[i * (n + gap) : i * (n + gap) + n] for i, name in enumerate(order)}
        for name, values in inputs.items():
            at[name][:] = values
        one = np.float32(1)
        likes = [at[name] for name in ("f_zero", "d_zero", "log1p_ratio")]
        cpu._zero_zinb(at["mu"], one, at["theta"], at["pi"], one, at["u"], at["g_theta"], at["g_pi"], *likes)
        seen = [cpu._sum(at["f_zero"]), cpu._sum(at["u"]), *(at[name].copy() for name in names)]
        cpu._zero_nb(at["mu"], one, at["theta"], one, at["u"], at["g_theta"], *likes)
        seen += [cpu._sum(at["f_zero"]), cpu._sum(at["u"]), *(at[name].copy() for name in names)]
        cpu._exp_shifted(at["pi"], one, at["mu"])
        cpu._pull(at["u"], at["mu"], np.float32(0.3), np.float32(0.5))
        return [*seen, cpu._sum(at["mu"]), *(at[name].copy() for name in names)]

    expected = run(names, 4096)
    for _ in range(100):
        got = run(rng.permutation(names), int(rng.choice([0, 1, 4, 16])))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)
