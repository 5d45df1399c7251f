"""The Triton kernels against float64: run by test_triton.py in a process of its own, on the CPU through
Triton's interpreter, which has to be chosen before triton is imported, or on a GPU.
"""

import itertools
import os

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from atlasvi_kernels import CSR, count_log_likelihood, csr_linear, math_gpu
from atlasvi_kernels.count_ll import gpu, reference
from atlasvi_kernels.csr_linear import gpu as linear_gpu

# numpy, which stands in for the GPU, warns of what lanes compute that are then left out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAMES = ("logits", "library", "theta", "pi_logits")
LIKELIHOODS = ("poisson", "zip", "nb", "zinb")


def make(b, g, *, likelihood, mean="softmax", dispersion="gene", densities=(0.0, 0.01, 0.05, 0.3), seed=0):
    """Counts, one density a row in turn, and float32 parameters by name."""
    rng = np.random.default_rng(seed)
    density = np.resize(densities, b)[:, None]
    x = torch.from_numpy(rng.integers(1, 200, (b, g)) * (rng.random((b, g)) < density))
    theta = theta_index = None
    if "nb" in likelihood:
        shape = {"gene": (g,), "table": (4, g), "cell": (b, g)}[dispersion]
        theta = torch.from_numpy(rng.gamma(1, 3, shape) + 0.01).float()
        if dispersion == "table":
            theta_index = torch.from_numpy(rng.choice([0, 1, 3], b))  # no cell takes row 2
    tensors = {
        "logits": torch.from_numpy(rng.normal(0, 2, (b, g))).float(),
        "library": torch.from_numpy(rng.uniform(1, 1000, b) / (1000 if mean == "exp" else 1)).float(),
        "theta": theta,
        "pi_logits": torch.from_numpy(rng.normal(-1, 3, (b, g))).float() if "zi" in likelihood else None,
    }
    return x, tensors, theta_index


def scrambled(x, indices=torch.uint16, data=torch.uint8):
    """The CSR of ``x`` with columns out of order and some zeros among the entries."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for row in x:
        zeros = (row == 0).nonzero()[:3, 0]
        kept = torch.cat([row.nonzero()[:, 0], zeros])
        columns.append(kept[torch.randperm(len(kept), generator=generator)])
    indptr = torch.tensor([0, *itertools.accumulate(len(c) for c in columns)])
    values = torch.cat([row[c] for row, c in zip(x, columns, strict=True)] or [x.new_zeros(0)])
    flat = torch.cat(columns or [x.new_zeros(0)])
    return CSR(indptr, flat.to(indices), values.to(data), x.shape[1])


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor | CSR) else value


def run(counts, tensors, theta_index, likelihood, mean, *, weights=None, scale=1.0, **options):
    """``(log_p, gradients by name)`` of the Triton kernels, on the CPU in float64."""
    given = [on_device(tensors[name]) for name in NAMES]
    log_p, gradients = gpu.run(
        on_device(counts), *given, on_device(theta_index), likelihood, mean, weights=on_device(weights),
        scale=scale, **{"with_gradient": True, "inplace": False, **options},
    )  # fmt: skip
    assert log_p.dtype == torch.float32
    log_p = log_p.double().cpu()
    if gradients is None:
        return log_p, None
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert (gradient is None) == (tensors[name] is None), name
        if gradient is not None:
            assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape, name
    return log_p, {n: g.double().cpu() for n, g in zip(NAMES, gradients, strict=True) if g is not None}


def expected(x, tensors, theta_index, likelihood, mean, upstream=None):
    """The same of the reference, in float64."""
    leaves = {k: None if t is None else t.double().requires_grad_() for k, t in tensors.items()}
    theta = leaves["theta"]
    if theta is not None:
        theta = theta[None] if theta.dim() == 1 else theta if theta_index is None else theta[theta_index]
    log_p = reference.log_likelihood(
        CSR.from_torch(x), leaves["logits"], leaves["library"], theta, leaves["pi_logits"],
        likelihood=likelihood, mean=mean,
    )  # fmt: skip
    (log_p * (torch.ones(len(x)) if upstream is None else upstream)).sum().backward()
    return log_p.detach(), {k: t.grad for k, t in leaves.items() if t is not None}


def compare(got, right, *, value=1e-5, gradient=1e-4):
    """``value`` of the sum of the terms' magnitudes, which is |log_p| as no term is above 0; norms."""
    assert torch.isfinite(got[0]).all()
    torch.testing.assert_close(got[0], right[0], rtol=value, atol=0)
    assert got[1].keys() == right[1].keys()
    for name, g in got[1].items():
        assert torch.isfinite(g).all(), name
        error = (g - right[1][name]).norm() / right[1][name].norm()
        assert error < gradient, f"gradient of {name}: {error:.1e}"


# 2100 genes: a whole block of 2,048 and a ragged one. Five cells: two for each of the programs, and one.
CASES = [
    (likelihood, mean, dispersion)
    for likelihood, mean in itertools.product(LIKELIHOODS, ("softmax", "exp"))
    for dispersion in (("gene", "table", "cell") if "nb" in likelihood else ("none",))
]


@pytest.mark.parametrize(("likelihood", "mean", "dispersion"), CASES)
def test_agrees_with_the_float64_reference(likelihood, mean, dispersion):
    x, t, index = make(5, 2100, likelihood=likelihood, mean=mean, dispersion=dispersion)
    weights = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])
    got = run(scrambled(x), t, index, likelihood, mean, weights=weights, scale=0.7)
    compare(got, expected(x, t, index, likelihood, mean, 0.7 * weights.double()), gradient=1e-5)


@pytest.mark.parametrize("mean", ["softmax", "exp"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_value_alone_and_gradients_in_place_are_the_same_bits(likelihood, mean):
    x, t, index = make(4, 90, likelihood=likelihood, mean=mean, dispersion="table")
    counts = scrambled(x)
    log_p, gradients = run(counts, t, index, likelihood, mean)
    alone, none = run(counts, t, index, likelihood, mean, with_gradient=False)
    assert none is None
    assert torch.equal(alone, log_p)

    given = [on_device(None if t[name] is None else t[name].clone()) for name in NAMES]
    # A tensor that is not whole rows, too: its gradient has to arrive in it all the same.
    wide = torch.zeros(4, 180, device=DEVICE)
    wide[:, ::2] = given[0]
    given[0] = wide[:, ::2]
    _, written = gpu.run(
        on_device(counts), *given, on_device(index), likelihood, mean,
        weights=None, scale=1.0, with_gradient=True, inplace=True,
    )  # fmt: skip
    for name, tensor, gradient in zip(NAMES, given, written, strict=True):
        if tensor is not None:
            assert torch.equal(gradient.double().cpu(), gradients[name]), name
            assert (gradient.data_ptr() == tensor.data_ptr()) == (name in ("logits", "pi_logits")), name
    assert not wide[:, 1::2].any()


def test_a_row_of_many_blocks(monkeypatch):
    """Ratios of four blocks share a logarithm: of forty, it would have nothing left to be taken of."""
    monkeypatch.setattr(gpu, "_BLOCK", 16)
    monkeypatch.setattr(gpu, "_NNZ_BLOCK", 16)
    x, t, _ = make(2, 645, likelihood="zip", mean="exp", densities=(0.0, 0.1))
    t["pi_logits"], t["library"] = t["pi_logits"] * 0, t["library"] * 1000  # so that a ratio is about -1/2
    got = run(scrambled(x), t, None, "zip", "exp")
    compare(got, expected(x, t, None, "zip", "exp"), gradient=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_with_in_float32(dtype):
    x, t, _ = make(4, 130, likelihood="zinb")
    t = {k: v.to(dtype) if k in ("logits", "pi_logits") else v for k, v in t.items()}
    right = expected(x, t, None, "zinb", "softmax")
    # Gradients are rounded once, to their own type; what is kept in float32 is as precise as ever.
    log_p, gradients = run(scrambled(x), t, None, "zinb", "softmax")
    compare((log_p, gradients), right, gradient=torch.finfo(dtype).eps)
    for name in ("library", "theta"):
        assert (gradients[name] - right[1][name]).norm() < 1e-5 * right[1][name].norm(), name


def extremes(likelihood):
    """theta 1e-4 to 1e6, logits to +-60, library 1 to 1e7, counts to 1e6, p to +-100, rows of zeros."""
    g = 300
    rng = np.random.default_rng(3)
    x = np.zeros((6, g), np.int64)
    x[2:, : g // 2] = np.round(10 ** rng.uniform(0, 6, (4, g // 2))) * (rng.random((4, g // 2)) < 0.3)
    return torch.from_numpy(x), {
        "logits": torch.from_numpy(rng.uniform(-60, 60, (6, g))).float(),
        "library": torch.from_numpy(10 ** np.linspace(0, 7, 6)).float(),
        "theta": torch.from_numpy(10 ** rng.uniform(-4, 6, g)).float() if "nb" in likelihood else None,
        "pi_logits": torch.from_numpy(rng.uniform(-100, 100, (6, g))).float() if "zi" in likelihood else None,
    }


@pytest.mark.parametrize("mean", ["softmax", "exp"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_extremes_stay_finite_and_right(likelihood, mean):
    x, t = extremes(likelihood)
    got = run(scrambled(x, data=torch.int32), t, None, likelihood, mean)
    compare(got, expected(x, t, None, likelihood, mean))


@pytest.mark.skipif(DEVICE != "cpu", reason="the GPU's own instructions are used on a GPU")
@pytest.mark.parametrize("case", ["usual", "extreme"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_errors_of_a_gpus_own_instructions_are_borne(likelihood, case, monkeypatch):
    """No subnormals, and errors as large as the PTX manual allows exp2, log2 and reciprocal, at random."""
    from triton.runtime.interpreter import InterpreterBuilder

    rng = np.random.default_rng(0)

    def worse(name, relative, absolute=0.0):
        exact = getattr(InterpreterBuilder, name)

        def inexact(self, *arguments):
            out = exact(self, *arguments)
            if out.data.dtype == np.float32:
                off = rng.uniform(-1, 1, out.data.shape)
                added = np.where(np.abs(out.data) < 1, absolute * off, 0.0)
                out.data = (out.data * (1 + relative * off) + added).astype(np.float32)
                out.data = np.where(np.abs(out.data) < 2.0**-126, np.float32(0), out.data)
            return out

        monkeypatch.setattr(InterpreterBuilder, name, inexact)

    worse("create_exp2", 2.0**-22)
    worse("create_log2", 2.0**-22, absolute=2.0**-22)
    worse("create_fdiv", 2.0**-23)
    x, t = extremes(likelihood) if case == "extreme" else make(3, 300, likelihood=likelihood)[:2]
    for mean in ("softmax", "exp"):
        got = run(scrambled(x, data=torch.int32), t, None, likelihood, mean)
        other = run(scrambled(x, data=torch.int32), t, None, likelihood, mean)
        assert not torch.equal(got[1]["logits"], other[1]["logits"])  # the errors are there
        compare(got, expected(x, t, None, likelihood, mean))


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_nothing_is_lost_where_count_mean_and_theta_are_large_and_near_each_other(likelihood):
    # log p is about -8 here, and made of terms of 1e7.
    x = torch.tensor([[1_000_000], [999_000], [1_001_500], [12], [11], [1]])
    library = torch.tensor([1e6, 1e6, 1e6, 12.0, 12.0, 1.0])
    for theta in (1e-4, 0.3, 11.0, 1e3, 1e6) if likelihood == "nb" else (None,):
        t = {
            "logits": torch.zeros(6, 1),
            "library": library,
            "theta": None if theta is None else torch.full((6, 1), theta),
            "pi_logits": None,
        }
        got = run(scrambled(x, data=torch.int64), t, None, likelihood, "exp")
        right = expected(x, t, None, likelihood, "exp")
        compare(got, right)
        if theta is not None:
            torch.testing.assert_close(got[1]["theta"], right[1]["theta"], rtol=1e-4, atol=1e-14)


def test_where_dropout_and_zero_case_both_vanish():
    t = {
        "logits": torch.tensor([[0.0, 0.0, 3.0, 0.0]]),
        "library": torch.tensor([1e6]),
        "theta": torch.full((4,), 1e5),
        "pi_logits": torch.tensor([[-100.0, -200.0, -90.0, 300.0]]),
    }
    x = torch.tensor([[0, 0, 5, 0]])
    compare(run(scrambled(x), t, None, "zinb", "softmax"), expected(x, t, None, "zinb", "softmax"))


def test_the_smallest_means_keep_their_share_of_the_value():
    """Where every f is about -1e-7, a row without counts is not the rounding errors of its genes."""
    t = {
        "logits": torch.linspace(-1, 1, 200)[None],
        "library": torch.tensor([1e-7]),
        "theta": torch.full((200,), 0.5),
        "pi_logits": torch.linspace(-5, 5, 200)[None],
    }
    x = torch.zeros(1, 200, dtype=torch.int64)
    for likelihood in ("zinb", "zip", "nb"):
        used = {
            **t,
            "theta": t["theta"] if "nb" in likelihood else None,
            "pi_logits": t["pi_logits"] if "zi" in likelihood else None,
        }
        compare(
            run(scrambled(x), used, None, likelihood, "exp"),
            expected(x, used, None, likelihood, "exp"),
        )


@pytest.mark.parametrize("indices", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("data", [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float32])
def test_types_of_counts_do_not_matter(indices, data):
    x, t, _ = make(2, 40, likelihood="poisson", densities=(0.3,))
    compare(
        run(scrambled(x, indices, data), t, None, "poisson", "exp"), expected(x, t, None, "poisson", "exp")
    )


def test_wide_types_hold_wide_values():
    x = torch.zeros(1, 66_000, dtype=torch.int64)
    x[0, 65_999], x[0, 40_000], x[0, 3] = 60_000, 300, 1
    t = {"logits": torch.zeros(1, 66_000), "library": torch.tensor([7e4]), "theta": None, "pi_logits": None}
    right = expected(x, t, None, "poisson", "softmax")
    compare(run(scrambled(x, torch.uint32, torch.uint16), t, None, "poisson", "softmax"), right)
    x, t["logits"] = x[:, :40_001], t["logits"][:, :40_001]  # beyond what int16 holds
    right = expected(x, t, None, "poisson", "softmax")
    compare(run(scrambled(x, torch.uint16, torch.int32), t, None, "poisson", "softmax"), right)


@pytest.mark.parametrize("dispersion", ["gene", "table", "cell"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 33)])
def test_odd_shapes(shape, dispersion):
    b, g = shape
    x, t, index = make(b, g, likelihood="zinb", dispersion=dispersion, densities=(1.0,))
    got = run(scrambled(x), t, index, "zinb", "softmax")
    right = expected(x, t, index, "zinb", "softmax")
    torch.testing.assert_close(got[0], right[0], rtol=1e-5, atol=0)
    for name, gradient in got[1].items():
        torch.testing.assert_close(gradient, right[1][name], rtol=1e-4, atol=1e-5)


def test_shared_theta_adds_up_over_many_programs(monkeypatch):
    """More programs than cells of a row of theta, more cells than programs, rows that no cell takes."""
    x, t, _ = make(6, 20, likelihood="nb", dispersion="table")
    t["theta"] = torch.cat([t["theta"], t["theta"]])
    for most, index in [(2, [6, 1, 1, 6, 1, 0]), (6, [3] * 6), (3, [0, 7, 1, 6, 5, 0])]:
        monkeypatch.setattr(gpu, "_most_programs", lambda _, most=most: most)
        index = torch.tensor(index)
        compare(run(scrambled(x), t, index, "nb", "exp"), expected(x, t, index, "nb", "exp"))


def test_the_public_op_takes_them():
    x, t, _ = make(3, 40, likelihood="zinb")
    leaves = {k: on_device(v.clone()).requires_grad_() for k, v in t.items()}
    log_p = count_log_likelihood(
        on_device(scrambled(x)), leaves["logits"], leaves["library"], leaves["theta"],
        pi_logits=leaves["pi_logits"], backend="triton",
    )  # fmt: skip
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (log_p * on_device(upstream)).sum().backward()
    got = log_p.detach().double().cpu(), {k: v.grad.double().cpu() for k, v in leaves.items()}
    compare(got, expected(x, t, None, "zinb", "softmax", upstream.double()))


@triton.jit
def _each_function(ys, ts, ratios, out, N: tl.constexpr):
    i = tl.arange(0, N)
    y, t = tl.load(ys + i), tl.load(ts + i)
    rest, product, slope = math_gpu.stirling(y)
    log1p, excess, small = math_gpu.log1p_excess(t * -1.0)
    tl.store(out + i, rest - math_gpu.log_absolute(product))
    tl.store(out + N + i, slope)
    tl.store(out + 2 * N + i, math_gpu.log_excess(t, tl.load(ratios + i)))
    tl.store(out + 3 * N + i, log1p)
    tl.store(out + 4 * N + i, tl.where(small, excess, 0.0))
    tl.store(out + 5 * N + i, math_gpu.one_minus_exp_minus(y))


def test_functions_agree_with_mpmath():
    n = 1024
    y = torch.from_numpy(10 ** np.linspace(-5, 7, n)).float()
    t = np.concatenate([-(10 ** np.linspace(-6, 4, n // 2)), 10 ** np.linspace(-6, -1e-3, n // 2)])
    t = torch.from_numpy(t).float()
    ratios = -torch.log1p(-t.double()).float()
    out = torch.empty(6, n).to(DEVICE)
    _each_function[(1,)](on_device(y), on_device(t), on_device(ratios), out, N=n)
    out = out.double().cpu().numpy()

    mpmath.mp.dps = 40
    ys, ts = [[mpmath.mpf(v) for v in tensor.double().tolist()] for tensor in (y, t)]
    half = mpmath.mpf(1) / 2
    rest = [mpmath.loggamma(v) - (v - half) * mpmath.log(v) + v - mpmath.log(2 * mpmath.pi) / 2 for v in ys]
    slope = [mpmath.log(v) - half / v - mpmath.digamma(v) for v in ys]
    excess = [-mpmath.log(1 - v) - v for v in ts]
    below = [mpmath.log(1 - v) for v in ts]
    small = [-v - b if abs(v) < 0.25 else mpmath.mpf(0) for v, b in zip(ts, below, strict=True)]
    rise = [1 - mpmath.exp(-v) for v in ys]
    # rest stands beside terms of size 1 and more; the others have to keep their relative precision.
    for name, got, right, rtol, atol in [
        ("rest", out[0], rest, 1e-6, 2e-6),
        ("slope", out[1], slope, 1e-4, 0),
        ("log_excess", out[2], excess, 1e-6, 0),
        ("log1p", out[3], below, 1e-6, 0),
        ("excess", out[4], small, 3e-6, 0),
        ("1 - exp(-y)", out[5], rise, 1e-6, 0),
    ]:
        np.testing.assert_allclose(got, np.array(right, np.float64), rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (4, 40, 150), (0, 4, 2), (3, 0, 2), (2, 3, 0)])
def test_csr_linear_is_the_dense_product(shape, dtype):
    b, g, h = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (b, g), generator=generator) * (torch.rand(b, g, generator=generator) < 0.4)
    x[:, g // 2 :] *= torch.rand(b, 1, generator=generator) < 0.5
    weight = torch.randn(g, h, generator=generator).to(dtype)
    upstream = torch.randn(b, h, generator=generator).to(dtype)
    counts = on_device(scrambled(x))
    values = torch.log1p(counts.data.float())
    out = linear_gpu.forward(counts.indptr, counts.indices, values, on_device(weight))
    g_weight = linear_gpu.backward(counts.indptr, counts.indices, values, on_device(upstream), g)
    again = linear_gpu.backward(counts.indptr, counts.indices, values, on_device(upstream), g)
    assert torch.equal(g_weight, again)

    dense, w, u = torch.log1p(x.double()), weight.double(), upstream.double()
    for got, right, magnitude in [
        (out, dense @ w, dense @ w.abs()),
        (g_weight, dense.T @ u, dense.T @ u.abs()),
    ]:
        assert got.dtype == dtype
        # float32 sums, right to a few ulp of the sum of their terms' magnitudes; then rounded once.
        close = 2e-6 * magnitude + torch.finfo(dtype).eps * right.abs()
        assert ((got.double().cpu() - right).abs() <= close).all()


def test_the_public_csr_linear_takes_them():
    x = torch.tensor([[0, 2, 0, 1], [3, 0, 0, 0]])
    weight = on_device(torch.randn(4, 3)).requires_grad_()
    y = csr_linear(on_device(scrambled(x)), weight, backend="triton")
    dense = torch.log1p(x.float())
    torch.testing.assert_close(y.cpu(), dense @ weight.detach().cpu())
    upstream = torch.randn(2, 3)
    y.backward(on_device(upstream))
    torch.testing.assert_close(weight.grad.cpu(), dense.T @ upstream)
