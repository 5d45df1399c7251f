"""The faster library gives float32 products, or is not used."""

from __future__ import annotations

import platform
from pathlib import Path

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


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="needs Linux's flags"
)
def test_whether_the_processor_multiplies_bfloat16_is_what_the_system_says() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert products.multiplies_bfloat16() == bool(flags & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize("has_units", [True, False])
def test_a_factor_is_rounded_whatever_type_it_is_multiplied_as(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: has_units)
    factor = torch.tensor([1 + 2.0**-12, 1 + 2.0**-7, -3.0])
    found = products.as_factor(factor, torch.bfloat16)
    assert found.dtype == (torch.bfloat16 if has_units else torch.float32)
    assert found.tolist() == [1.0, 1 + 2.0**-7, -3.0]
    assert products.as_factor(factor, torch.float32) is factor
