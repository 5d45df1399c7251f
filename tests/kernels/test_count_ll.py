import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from atlasvi_kernels import CSR, count_log_likelihood, count_log_likelihood_entries
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


# 4133 genes: one full tile of 4096 and a ragged one, and no multiple of any vector width.
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize(("likelihood", "mean"), list(itertools.product(LIKELIHOODS, MEANS)))
def test_numba_agrees_with_the_float64_reference(likelihood, mean, dispersion):
    for density, upstream in [(0.001, None), (0.2, torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])), (1.0, None)]:
        x, t, index = make(5, 4133, likelihood=likelihood, mean=mean, dispersion=dispersion, density=density)
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
@pytest.mark.parametrize("kind", range(4))
def test_a_row_is_computed_alike_wherever_its_memory_lies(n, kind):
    """A compiled loop that finds its arrays near each other may take another path, and add in another
    order: the same seed would then not give the same weights."""
    from atlasvi_kernels.count_ll import cpu

    rng = np.random.default_rng(0)
    inputs = {"mu": rng.gamma(1, 1, n), "theta": rng.gamma(1, 1, n), "pi": rng.normal(0, 3, n), "g_theta": 0}
    inputs |= {"inv_theta": rng.gamma(1, 1, n), "x": rng.integers(1, 9, n), "a": rng.normal(0, 1, n)}
    names = (*inputs, "p", "u", "g_pi")
    scratch = tuple(np.full((8, n), np.float32(3)))

    def run(order, gap):
        buffer = np.full(len(names) * (n + gap), np.float32(3), np.float32)
        at = {name: buffer[i * (n + gap) : i * (n + gap) + n] for i, name in enumerate(order)}
        for name, values in inputs.items():
            at[name][:] = values
        of = [at[name] for name in ("mu", "theta", "inv_theta", "pi", "p")]
        to = [at[name] for name in ("u", "g_theta", "g_pi")]
        span, one = (np.uintp(0), np.uintp(n)), np.float32(1)
        seen = [cpu._zero_case(kind, *span, one, *of, one, *to, scratch)]
        seen += [cpu._largest(at["a"], *span), cpu._exp_shifted(at["a"], *span, one, at["mu"])]
        counts = [n, at["x"], 0.5, at["a"], at["mu"]]
        if kind >= 2:
            seen.append(cpu._nb_at_counts(*counts, at["theta"], at["inv_theta"], at["u"], at["g_theta"]))
        else:
            seen.append(cpu._at_counts(*counts, at["u"]))
        seen.append(cpu._not_inflated(n, at["pi"], one, at["g_pi"]))
        cpu._pull(at["u"], at["mu"], np.float32(0.3), np.float32(0.5))
        return [*seen, *(at[name].copy() for name in names)]

    expected = run(names, 4096)
    for _ in range(100):
        got = run(rng.permutation(names), int(rng.choice([0, 1, 4, 16])))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("upstream", [1.0, -0.25])
def test_inplace_gives_the_same_gradients_in_the_logits_own_memory(likelihood, upstream):
    x, t, _ = make(4, 300, likelihood=likelihood)
    expected, expected_grad = run(
        x,
        t,
        None,
        dtype=torch.float32,
        backend="numba",
        likelihood=likelihood,
        upstream=torch.full((4,), -0.5),
    )
    leaves = {k: None if v is None else v.float().requires_grad_() for k, v in t.items()}
    # As a layer makes them: not leaves.
    heads = {k: None if leaves[k] is None else leaves[k] * 1 for k in ("logits", "pi_logits")}
    log_p = count_log_likelihood(
        CSR.from_torch(x), heads["logits"], leaves["library"], leaves["theta"], pi_logits=heads["pi_logits"],
        likelihood=likelihood, inplace=True, upstream=upstream,
    )  # fmt: skip
    torch.testing.assert_close(log_p.detach().double(), expected, rtol=0, atol=0)
    # It is d log_p / d logits times what backward is expected to bring.
    made = expected_grad["logits"] / -0.5 * upstream
    torch.testing.assert_close(heads["logits"].detach().double(), made, rtol=1e-6, atol=1e-9)
    (log_p * -0.5).sum().backward()
    for name in expected_grad:
        torch.testing.assert_close(leaves[name].grad.double(), expected_grad[name], rtol=1e-6, atol=1e-9)


def test_inplace_says_what_it_cannot_do():
    x, t, _ = make(3, 20, likelihood="nb")
    leaf = t["logits"].float().requires_grad_()
    given = {"likelihood": "nb", "inplace": True}
    rest = (t["library"].float(), t["theta"].float())
    log_p = count_log_likelihood(CSR.from_torch(x), leaf * 1, *rest, **given)
    with pytest.raises(RuntimeError, match="same upstream gradient for every cell"):
        (log_p * torch.arange(3.0)).sum().backward()
    log_p = count_log_likelihood(CSR.from_torch(x), leaf * 1, *rest, **given)
    log_p.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this is the second"):
        log_p.sum().backward()
    head = leaf * 1
    other = head.sigmoid().sum() + (head**2).sum()  # which needs what head was
    count_log_likelihood(CSR.from_torch(x), head, *rest, **given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with torch.no_grad():
        head = leaf * 1
        count_log_likelihood(CSR.from_torch(x), head, *rest, **given)
    torch.testing.assert_close(head, leaf, rtol=0, atol=0)
    with pytest.raises(ValueError, match="contiguous logits"):
        count_log_likelihood(CSR.from_torch(x), torch.stack([leaf, leaf], 2)[..., 0], *rest, **given)


@pytest.mark.parametrize("upstream", [1.0, -1 / 3, 7.0])
def test_the_upstream_expected_changes_nothing_but_time(upstream):
    x, t, _ = make(3, 40, likelihood="zinb")
    for comes in (torch.full((3,), -1 / 3), torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3)):
        grads = []
        for expected in (1.0, upstream):
            leaves = {k: v.float().requires_grad_() for k, v in t.items()}
            log_p = count_log_likelihood(
                CSR.from_torch(x), leaves["logits"], leaves["library"], leaves["theta"],
                pi_logits=leaves["pi_logits"], upstream=expected,
            )  # fmt: skip
            grads.append(torch.autograd.grad(log_p, list(leaves.values()), comes))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-9)


def test_entries_are_scipys_and_sum_to_the_whole():
    x, t, index = make(5, 30, likelihood="zinb", dispersion="gene-batch")
    whole, _ = run(x, t, index, dtype=torch.float64, backend="reference", likelihood="zinb")
    mu = t["library"][:, None] * torch.softmax(t["logits"], 1)
    theta, pi = t["theta"][index], torch.sigmoid(t["pi_logits"]).numpy()
    zero = scipy.stats.nbinom.pmf(0, theta.numpy(), (theta / (theta + mu)).numpy())
    chunks = list(
        count_log_likelihood_entries(
            CSR.from_torch(x),
            t["logits"],
            t["library"],
            t["theta"],
            pi_logits=t["pi_logits"],
            theta_index=index,
            rows=2,
        )
    )
    assert [(c.rows.start, c.rows.stop) for c in chunks] == [(0, 2), (2, 4), (4, 5)]
    torch.testing.assert_close(torch.cat([c.log_prob for c in chunks]).sum(1), whole)
    dropout = torch.cat([c.dropout for c in chunks]).numpy()
    expected = np.where(x.numpy() == 0, pi / (pi + (1 - pi) * zero), 0)
    np.testing.assert_allclose(dropout, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        next(count_log_likelihood_entries(CSR.from_torch(x), t["logits"], t["library"], t["theta"],
                                          pi_logits=t["pi_logits"], theta_index=index, rows=0))  # fmt: skip
