"""The definition in plain PyTorch: the counts made dense, any float type, any device."""

from __future__ import annotations

import torch

from ..csr import CSR


def forward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``(B, H)``: the matrix of values times ``weight`` (G, H), in the values' type."""
    return CSR(indptr, indices, values, len(weight)).to_dense(values.dtype) @ weight.to(values.dtype)


def backward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, upstream: torch.Tensor, n_vars: int
) -> torch.Tensor:
    """``(G, H)``, the gradient of ``weight``: the matrix of values, transposed, times ``upstream`` (B, H)."""
    return CSR(indptr, indices, values, n_vars).to_dense(values.dtype).T @ upstream.to(values.dtype)
