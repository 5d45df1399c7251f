"""The Triton backend: a program for each cell forward and for each gene backward, no atomics.

Backward needs the entries by gene. They are sorted, stably, so that a gene's cells are added in the order of
the cells: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ENTRIES = 16  # rows that a program takes at once, each one line of memory and its own partial sum
_MOST_UNITS = 128  # hidden units of a program
_WARPS = 4


def forward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``out[b] = sum_k values[k] weight[indices[k]]`` over the entries k of row b, summed in float32.

    Args:
        indptr: ``(B + 1,)`` int64.
        indices: ``(nnz,)`` any integer type.
        values: ``(nnz,)`` float32, the transformed counts.
        weight: ``(G, H)`` float32, bfloat16 or float16.

    Returns:
        ``(B, H)`` of the type of ``weight``.
    """
    return _gather(indptr, indices, values, weight.detach().contiguous())


def backward(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, upstream: torch.Tensor, n_vars: int
) -> torch.Tensor:
    """``g_weight[g] = sum of values[k] upstream[b]`` over the entries k of all rows b with column g.

    Returns:
        ``(n_vars, H)`` of the type of ``upstream``.
    """
    # Widened, since torch does not sort every unsigned type on every device.
    columns, order = torch.sort(indices.to(torch.int32), stable=True)
    rows = torch.repeat_interleave(
        torch.arange(len(indptr) - 1, dtype=torch.int32, device=indptr.device),
        indptr.diff(),
        output_size=len(indices),
    )
    starts = torch.searchsorted(columns, torch.arange(n_vars + 1, dtype=torch.int32, device=indptr.device))
    return _gather(starts, rows[order], values[order], upstream.contiguous())


def _gather(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """The sparse matrix times ``matrix``."""
    n_rows, n_units = len(indptr) - 1, matrix.shape[1]
    out = torch.empty(n_rows, n_units, dtype=matrix.dtype, device=matrix.device)
    units = min(triton.next_power_of_2(max(n_units, 1)), _MOST_UNITS)
    if out.numel():
        with torch.cuda.device_of(matrix):  # Triton launches on the current device
            # Rows along the first axis of the grid, which alone goes beyond 65,535.
            _add_rows[(n_rows, triton.cdiv(n_units, units))](
                indptr, indices, values, matrix, out, n_units,
                ENTRIES=_ENTRIES, UNITS=units, num_warps=_WARPS,
            )  # fmt: skip
    return out


@triton.jit
def _add_rows(  # type: ignore[no-untyped-def]
    indptr, indices, values, matrix, out, n_units, ENTRIES: tl.constexpr, UNITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    start, stop = tl.load(indptr + row), tl.load(indptr + row + 1)
    # A partial sum for each of the rows taken at once: they meet only at the end.
    total = tl.zeros([ENTRIES, UNITS], tl.float32)
    for k in range(start, stop, ENTRIES):
        e = k + tl.arange(0, ENTRIES)
        there = e < stop
        value = tl.load(values + e, mask=there, other=0.0).to(tl.float32)
        at = tl.load(indices + e, mask=there, other=0).to(tl.int64)
        line = tl.load(
            matrix + at[:, None] * n_units + unit[None, :],
            mask=there[:, None] & (unit < n_units)[None, :],
            other=0.0,
        )
        total += value[:, None] * line.to(tl.float32)
    tl.store(out + row * n_units + unit, tl.sum(total, 0), mask=unit < n_units)
