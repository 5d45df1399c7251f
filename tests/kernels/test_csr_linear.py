import pytest
import torch
from atlasvi_kernels import CSR, csr_linear


@pytest.mark.parametrize("transform", ["log1p", "none"])
@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (64, 200, 128), (3, 10, 1), (0, 4, 2)])
def test_value_and_gradients_are_those_of_the_dense_product(shape, backend, transform):
    b, g, h = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 6, (b, g), generator=generator) * (torch.rand(b, g, generator=generator) < 0.3)
    weight = torch.randn(g, h, generator=generator).requires_grad_()
    bias = torch.randn(h, generator=generator).requires_grad_()
    upstream = torch.randn(b, h, generator=generator)
    y = csr_linear(CSR.from_torch(x.to(torch.uint8)), weight, bias, transform=transform, backend=backend)
    got = torch.autograd.grad(y, (weight, bias), upstream)

    dense = torch.log1p(x.double()) if transform == "log1p" else x.double()
    w, c, u = weight.detach().double(), bias.detach().double(), upstream.double()
    # float32 sums are right to a few ulp of the sum of their terms' magnitudes, not of the sum.
    for name, value, expected, magnitude in [
        ("y", y, dense @ w + c, dense @ w.abs() + c.abs()),
        ("weight", got[0], dense.T @ u, dense.T @ u.abs()),
        ("bias", got[1], u.sum(0), u.abs().sum(0)),
    ]:
        assert ((value.double() - expected).abs() <= 2e-6 * magnitude).all(), name


def test_what_does_not_fit_is_named():
    counts = CSR.from_torch(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"weight must be \(3, H\)"):
        csr_linear(counts, torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"bias must be \(2,\)"):
        csr_linear(counts, torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="transform 'sqrt'"):
        csr_linear(counts, torch.ones(3, 2), transform="sqrt")
    with pytest.raises(ValueError, match="'numba' takes float32"):
        csr_linear(counts, torch.ones(3, 2, dtype=torch.float64), backend="numba")
