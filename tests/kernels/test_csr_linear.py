import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlasvi.memory import Watch
from atlasvi_kernels import CSR, csr_linear
from tests.strategies import COUNT_TYPES, count_matrices

INDEX_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
# The last is of three tiles forward and six backward, and enough work for several threads.
SHAPES = [(1, 1, 1), (7, 33, 5), (64, 200, 128), (3, 10, 1), (0, 4, 2), (4, 0, 3), (5, 8, 0), (20, 3000, 128)]


def make(b, g, h, *, density=0.3, seed=0):
    """Counts (dense, integer), weight, bias, scale and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (b, g), generator=generator) * (torch.rand(b, g, generator=generator) < density)
    weight, bias, upstream = (torch.randn(s, generator=generator) for s in ((g, h), (h,), (b, h)))
    return x, weight, bias, torch.rand(b, generator=generator) + 0.5, upstream


def run(counts, weight, bias, upstream, **options):
    """``(y, gradient of weight, gradient of bias)``."""
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    y = csr_linear(counts, weight, bias, **options)
    return y.detach(), *torch.autograd.grad(y, (weight, bias), upstream)


def assert_is_dense_product(got, x, weight, bias, upstream, *, scale=None, transform="log1p"):
    """Against torch's product in float64; ``x`` dense."""
    dense = x.double() if scale is None else x.double() * scale.double()[:, None]
    dense = torch.log1p(dense) if transform == "log1p" else dense
    w, c, u = weight.double(), bias.double(), upstream.double()
    # float32 sums are right to a few ulp of the sum of their terms' magnitudes, not of the sum.
    for name, value, expected, magnitude in [
        ("y", got[0], dense @ w + c, dense @ w.abs() + c.abs()),
        ("weight", got[1], dense.T @ u, dense.T @ u.abs()),
        ("bias", got[2], u.sum(0), u.abs().sum(0)),
    ]:
        assert value.shape == expected.shape, name
        assert ((value.double() - expected).abs() <= 2e-6 * magnitude).all(), name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transform", ["log1p", "none"])
@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_dense_product(shape, backend, transform, scaled):
    x, weight, bias, scale, upstream = make(*shape)
    scale = scale if scaled else None
    counts = CSR.from_torch(x.to(torch.uint8))
    got = run(counts, weight, bias, upstream, transform=transform, scale=scale, backend=backend)
    assert_is_dense_product(got, x, weight, bias, upstream, scale=scale, transform=transform)


@pytest.mark.parametrize("h", [2, 4, 15, 16, 20, 63, 64, 65, 100, 127, 129, 213, 256])
def test_every_number_of_hidden_units_is_covered_by_the_blocks(h):
    x, weight, bias, _, upstream = make(9, 50, h)
    assert_is_dense_product(run(CSR.from_torch(x), weight, bias, upstream), x, weight, bias, upstream)


@settings(max_examples=60, deadline=None)
@given(
    count_matrices(dtypes=tuple(t for t in COUNT_TYPES if t != "uint64")),
    st.sampled_from(INDEX_TYPES),
    st.integers(1, 20),
    st.sampled_from(["numba", "reference"]),
)
def test_any_type_and_order_of_entries(matrix, index_type, h, backend):
    counts = CSR.from_numpy(matrix.indptr, matrix.indices.astype(index_type), matrix.data, matrix.shape[1])
    _, weight, bias, _, upstream = make(*matrix.shape, h)
    x = torch.from_numpy(matrix.toarray().astype(np.float64))
    got = run(counts, weight, bias, upstream, backend=backend)
    assert_is_dense_product(got, x, weight, bias, upstream)


def shuffled(counts, seed=0):
    """The same matrix, the entries of each row in another order."""
    rng = np.random.default_rng(seed)
    indptr, indices, data = counts.numpy()
    order = np.concatenate([a + rng.permutation(b - a) for a, b in itertools.pairwise(indptr)])
    return CSR.from_numpy(indptr, indices[order], data[order], counts.n_vars)


def test_entries_out_of_order_over_several_tiles():
    x, weight, bias, _, upstream = make(20, 3000, 128)
    counts = CSR.from_torch(x)
    got = run(shuffled(counts), weight, bias, upstream)
    assert_is_dense_product(got, x, weight, bias, upstream)
    # A gene's gradient is summed over cells in their order, whatever that of the genes.
    assert torch.equal(got[1], run(counts, weight, bias, upstream)[1])


def test_same_bits_on_any_number_of_threads_wherever_the_memory_lies():
    x, weight, bias, scale, upstream = make(20, 3000, 130)
    counts = CSR.from_torch(x)
    expected = run(counts, weight, bias, upstream, scale=scale)
    unaligned = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(weight.shape)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            for w in (weight, unaligned):
                for got, want in zip(run(counts, w, bias, upstream, scale=scale), expected, strict=True):
                    assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


def test_explicit_zeros_add_nothing():
    x, weight, bias, _, upstream = make(7, 33, 5)
    everything = CSR.from_numpy(np.arange(8) * 33, np.tile(np.arange(33), 7), x.numpy().ravel(), 33)
    for got, want in zip(
        run(everything, weight, bias, upstream), run(CSR.from_torch(x), weight, bias, upstream), strict=True
    ):
        assert torch.equal(got, want)


def test_strides_of_the_inputs_and_of_the_gradient():
    x, weight, bias, _, upstream = make(7, 33, 20)
    across = upstream.T.contiguous().T
    got = run(CSR.from_torch(x), weight.T.contiguous().T, bias, across)
    assert_is_dense_product(got, x, weight, bias, upstream)
    got = run(CSR.from_torch(x), weight, bias, torch.ones(()).expand(7, 20))
    assert_is_dense_product(got, x, weight, bias, torch.ones(7, 20))
    indptr, indices, data = CSR.from_torch(x).numpy()
    every_other = [torch.from_numpy(np.stack([a, a + 1], 1))[:, 0] for a in (indptr, indices, data)]
    assert_is_dense_product(run(CSR(*every_other, 33), weight, bias, upstream), x, weight, bias, upstream)


def test_scale_normalises_each_cell_to_one_library():
    x, weight, bias, _, _ = make(7, 33, 5)
    x[:, 0] = 1
    counts = CSR.from_torch(x)
    y = csr_linear(counts, weight, bias, scale=1e4 / counts.row_sums())
    normalised = torch.log1p(1e4 * x / x.sum(1, keepdim=True))
    torch.testing.assert_close(y, normalised @ weight + bias)


@pytest.mark.parametrize("transform", ["log1p", "none"])
def test_reference_has_first_and_second_derivatives(transform):
    x, weight, bias, scale, _ = make(4, 6, 3)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()

    def function(w, c):
        return csr_linear(
            CSR.from_torch(x), w, c, transform=transform, scale=scale.double(), backend="reference"
        )

    assert torch.autograd.gradcheck(function, (weight, bias))
    assert torch.autograd.gradgradcheck(function, (weight, bias))


def banded(b, g, per_row):
    """Sparse counts made without a dense matrix: every so many genes, each row from another one on."""
    step = g // per_row
    indices = (np.arange(per_row) * step)[None, :] + (np.arange(b) % step)[:, None]
    data = np.ones(b * per_row, np.uint8)
    return CSR.from_numpy(np.arange(b + 1) * per_row, indices.ravel().astype(np.uint16), data, g)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_the_counts_are_never_made_dense(backend):
    b, g, h = 2000, 20_000, 16
    counts, weight = banded(b, g, g // 20), torch.randn(g, h).requires_grad_()
    csr_linear(banded(5, 20, 2), torch.randn(20, h).requires_grad_(), backend=backend).sum().backward()
    with Watch(interval=0.001) as watch:
        csr_linear(counts, weight, backend=backend).sum().backward()
    taken, dense = watch.peak_bytes - watch.before_bytes, 4 * b * g
    if backend == "reference":
        assert taken > 0.9 * dense, "a dense copy must be seen, or the test shows nothing"
    else:
        # 8 bytes a non-zero, of which there is one in 20, and the outputs.
        assert taken < 0.2 * dense


def test_what_does_not_fit_is_named():
    counts, weight = CSR.from_torch(torch.ones(2, 3)), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"weight must be \(3, H\), is \(4, 2\)"):
        csr_linear(counts, torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"bias must be \(2,\), is \(3,\)"):
        csr_linear(counts, weight, torch.ones(3))
    with pytest.raises(ValueError, match=r"scale must be \(2,\), is \(3,\)"):
        csr_linear(counts, weight, scale=torch.ones(3))
    with pytest.raises(ValueError, match="transform 'sqrt'"):
        csr_linear(counts, weight, transform="sqrt")
    with pytest.raises(ValueError, match=r"weight must be of a float type, is torch\.int64"):
        csr_linear(counts, weight.long())
    with pytest.raises(ValueError, match="weight is on meta, counts are on cpu"):
        csr_linear(counts, weight.to("meta"))
    with pytest.raises(ValueError, match="'numba' takes float32"):
        csr_linear(counts, weight.double(), backend="numba")
    with pytest.raises(ValueError, match="scale requires a gradient"):
        csr_linear(counts, weight, scale=torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"counts\.data requires a gradient"):
        csr_linear(CSR(counts.indptr, counts.indices, counts.data.requires_grad_(), 3), weight)


@pytest.mark.parametrize("column", [-1, 3, 2**20])
@pytest.mark.parametrize("at", [0, 3])
def test_a_column_outside_the_matrix_is_named(column, at):
    indices = np.array([0, 1, 0, 2])
    indices[at] = column
    counts = CSR.from_numpy(np.array([0, 2, 4]), indices, np.ones(4, np.uint8), 3)
    with pytest.raises(ValueError, match=rf"{column} in row {at // 2}; columns must lie in \[0, 3\)"):
        csr_linear(counts, torch.ones(3, 2))


@pytest.mark.parametrize("indptr", [[0, 2, 5], [0, 3, 2, 4], [-1, 2, 4]])
def test_offsets_that_leave_the_entries_are_refused(indptr):
    counts = CSR.from_numpy(np.array(indptr), np.array([0, 1, 0, 2]), np.ones(4, np.uint8), 3)
    with pytest.raises(ValueError, match="indptr must rise from 0 to 4"):
        csr_linear(counts, torch.ones(3, 2))
