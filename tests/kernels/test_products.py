"""The faster library gives float32 products, or is not used."""

from __future__ import annotations

import pytest
import torch

from atlasvi_kernels import products


def test_fast_products_are_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 300, generator=generator)
    b = torch.randn(300, 150, generator=generator)
    with products.fast_products():
        found = a @ b
    # bfloat16 factors would be off by 0.05; float32 is by 1e-5.
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=0, atol=2e-4)


def test_the_switch_is_put_back_also_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), products.fast_products():
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.bfloat16() @ b.bfloat16()).float()

    monkeypatch.setattr(torch, "mm", rounding)
    products.onednn_is_exact.cache_clear()
    try:
        assert not products.onednn_is_exact()
        before = torch.backends.mkldnn.matmul.fp32_precision
        with products.fast_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        products.onednn_is_exact.cache_clear()
