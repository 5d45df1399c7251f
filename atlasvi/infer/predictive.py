"""Posterior predictive checks: statistics of each gene, of the counts and of counts drawn from the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
import pandas as pd
import torch
from atlasvi_kernels.parallel import in_parallel, n_threads
from numpy.typing import NDArray

from atlasvi.infer.decode import Request
from atlasvi.infer.encoded import encode_block
from atlasvi.infer.sample import draw_counts, generates
from atlasvi.types import Minibatch

STATISTICS = ("mean", "variance", "zero_share")
# What is added up for each gene; of integers, so that no sum depends on how the cells were cut.
_SUM, _SQUARE, _DETECTED = range(3)


@torch.no_grad()
def predictive_sums(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    groups: NDArray[np.int64],
    n_groups: int,
    n_vars: int,
    request: Request,
) -> NDArray[np.int64]:
    """``(1 + n_samples, n_groups, k, 3)`` sums, of squares too, and cells detected: observed, then each draw.

    Args:
        module: satisfies `types.GeneratesCounts`.
        minibatches: of the cells, in order.
        device: of the module.
        groups: ``(n,)`` of the cells, in the same order.
        n_groups: number of them.
        n_vars: genes of the model.
        request: genes, number of samples and seed.
    """
    known = generates(module).eval()
    genes = np.arange(n_vars) if request.genes is None else request.genes.cpu().numpy()
    column_of = np.full(n_vars, -1, np.int64)
    column_of[genes] = np.arange(len(genes))
    sums = np.zeros((1 + request.n_samples, n_groups, len(genes), 3), np.int64)
    done = 0
    for minibatch in minibatches:
        at = np.arange(done, done + len(minibatch))
        done += len(minibatch)
        _add_sparse(*minibatch.counts.numpy(), column_of, groups[at], sums[0])
        block = encode_block(known, minibatch.to(device), at)
        for sample in range(request.n_samples):
            counts = draw_counts(known, block, request, sample, None)
            parts = n_threads(max(1, len(genes) // 256))
            in_parallel(_add_dense, len(genes), counts, groups[at], sums[1 + sample], parts=parts)
    return sums


@numba.njit(nogil=True, cache=True)
def _add_sparse(indptr, indices, data, column_of, groups, sums):  # type: ignore[no-untyped-def]
    for b in range(len(indptr) - 1):
        of_group = sums[groups[b]]
        for k in range(indptr[b], indptr[b + 1]):
            column, value = column_of[indices[k]], np.int64(data[k])
            if column >= 0 and value > 0:
                of_group[column, _SUM] += value
                of_group[column, _SQUARE] += value * value
                of_group[column, _DETECTED] += 1


@numba.njit(nogil=True, cache=True)
def _add_dense(part, start, stop, counts, groups, sums):  # type: ignore[no-untyped-def]
    for b in range(len(counts)):
        of_group = sums[groups[b]]
        for g in range(start, stop):
            value = np.int64(counts[b, g])
            if value > 0:
                of_group[g, _SUM] += value
                of_group[g, _SQUARE] += value * value
                of_group[g, _DETECTED] += 1


def check_table(
    sums: NDArray[np.int64],
    sizes: NDArray[np.int64],
    var_names: Sequence[str],
    levels: Sequence[str] | None,
) -> pd.DataFrame:
    """The result of `CountModel.posterior_predictive_check`.

    Args:
        sums: from `predictive_sums`.
        sizes: ``(n_groups,)`` cells of each group.
        var_names: ``(k,)`` of the genes.
        levels: of the groups, or ``None`` for all cells in one; those without cells are left out.
    """
    frames = []
    for g in np.flatnonzero(sizes).tolist():
        n = int(sizes[g])
        for statistic, values in zip(STATISTICS, _statistics(sums[:, g], n), strict=True):
            observed, drawn = values[0], values[1:]
            columns: dict[str, Any] = {} if levels is None else {"group": levels[g]}
            columns |= {
                "statistic": statistic,
                "observed": observed,
                "replicated": drawn.mean(0),
                "low": drawn.min(0),
                "high": drawn.max(0),
                "p": (drawn > observed).mean(0) + 0.5 * (drawn == observed).mean(0),
            }
            frames.append(pd.DataFrame(columns, index=pd.Index(list(var_names), dtype=object)))
    return pd.concat(frames)


def _statistics(sums: NDArray[np.int64], n: int) -> tuple[NDArray[np.float64], ...]:
    """Mean, variance (with n - 1) and share of zeros, each ``(1 + n_samples, k)``."""
    total, square, detected = (sums[..., i].astype(np.float64) for i in (_SUM, _SQUARE, _DETECTED))
    mean = total / n
    variance = np.maximum(square - total * mean, 0) / (n - 1) if n > 1 else np.full_like(mean, np.nan)
    return mean, variance, 1 - detected / n


__all__ = ["STATISTICS", "check_table", "predictive_sums"]
