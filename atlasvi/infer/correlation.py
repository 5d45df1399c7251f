"""Correlations between genes of expression drawn from the posterior, none of which is held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.decode import Request
from atlasvi.infer.encoded import Source
from atlasvi.infer.normalized import refuse_large
from atlasvi.infer.sample import generates, parameters, rows_at_once
from atlasvi_kernels import counter_gamma

# Classes of a gene's values, whose middle ranks stand for ranks: of fewer values each has its own.
CLASSES = 1024


def correlation_matrix(
    module: torch.nn.Module, source: Source, n_vars: int, request: Request, kind: str
) -> NDArray[np.float64]:
    """``(k, k)`` correlations of w ~ Gamma(shape theta, mean l rho) over cells and draws of z.

    The mean over batches of that under each, if several are asked for. What is held is k x k, never
    cells x k. For ``"spearman"`` cells are gone through twice: ranks are those of 1,024 classes of about
    equally many values, exact for up to 1,024 values a gene, and else off by far less than the draws vary.

    Args:
        module: satisfies `types.GeneratesCounts`.
        source: of the cells.
        n_vars: genes of the model.
        request: genes, batches, library size, number of samples, seed.
        kind: ``"spearman"`` or ``"pearson"``.

    Raises:
        OptionError: it would be larger than 2 GiB, or of fewer than two values.
    """
    n_out = n_vars if request.genes is None else len(request.genes)
    refuse_large((n_out, n_out, 2), "correlations", "ask for fewer genes with gene_list=")
    if source.n_obs * request.n_samples < 2:
        raise OptionError(
            "a correlation is of at least two cells or samples; give more indices= or n_samples="
        )
    known = generates(module).eval()
    total = np.zeros((n_out, n_out))
    codes = request.batches or (None,)
    for code in codes:
        edges, ranks = None, None
        if kind == "spearman":
            edges = np.sort(_pilot(known, source, request, code, n_out), axis=1)
            counts = np.zeros((n_out, edges.shape[1] + 1), np.int64)
            for values in _blocks(known, source, request, code, n_out):
                _count(values, edges, counts)
            # Middle of the ranks of a class, from the middle of all: no sum grows large.
            before = np.cumsum(counts, axis=1) - counts
            ranks = before + (counts - counts.sum(1, keepdims=True)) / 2
            ranks /= max(1.0, float(np.abs(ranks).max()))
        total += _pearson(_blocks(known, source, request, code, n_out), edges, ranks, n_out)
    return total / len(codes)


def _blocks(
    module: Any, source: Source, request: Request, code: int | None, n_out: int
) -> Iterator[NDArray[np.float32]]:
    """``(B, k)`` values of some cells at one draw, over all cells and draws."""
    device = next(module.parameters()).device
    step = rows_at_once(n_out)
    genes = torch.arange(n_out) if request.genes is None else request.genes
    for start in range(0, source.n_obs, step):
        block = source.read(start, min(start + step, source.n_obs), device)
        for sample in range(request.n_samples):
            found = parameters(module, block, request, sample, code)
            if found.theta is None:
                yield found.mu.cpu().numpy()
            else:
                yield counter_gamma(request.seed, sample, block.cells.rows, genes, found.mu, found.theta)


def _pilot(
    module: Any, source: Source, request: Request, code: int | None, n_out: int
) -> NDArray[np.float32]:
    """``(k, at most CLASSES)`` values of cells spread over the source, as ``request`` has them."""
    n = source.n_obs * request.n_samples
    wanted = np.arange(n) if n <= CLASSES else np.linspace(0, n - 1, CLASSES).astype(np.int64)
    device = next(module.parameters()).device
    genes = torch.arange(n_out) if request.genes is None else request.genes
    samples, cells = np.divmod(wanted, source.n_obs)
    found = np.empty((n_out, len(wanted)), np.float32)
    step = rows_at_once(n_out)
    for sample in np.unique(samples).tolist():
        at = np.flatnonzero(samples == sample)
        for start in range(0, source.n_obs, step):
            stop = min(start + step, source.n_obs)
            here = at[(cells[at] >= start) & (cells[at] < stop)]
            if not len(here):
                continue
            block = source.read(start, stop, device)
            p = parameters(module, block, request, sample, code)
            keep = torch.from_numpy(cells[here] - start)
            mu = p.mu[keep]
            if p.theta is None:
                found[:, here] = mu.cpu().numpy().T
            else:
                theta = p.theta if p.theta.dim() == 1 else p.theta[keep]
                rows = block.cells.rows[keep]
                found[:, here] = counter_gamma(request.seed, sample, rows, genes, mu, theta).T
    return found


@numba.njit(nogil=True, cache=True)
def _class_of(value, edges):  # type: ignore[no-untyped-def]
    low, high = 0, len(edges)
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)
def _count(values, edges, counts):  # type: ignore[no-untyped-def]
    for i in range(values.shape[0]):
        for g in range(values.shape[1]):
            counts[g, _class_of(values[i, g], edges[g])] += 1


@numba.njit(nogil=True, cache=True)
def _rank(values, edges, ranks, out):  # type: ignore[no-untyped-def]
    for i in range(values.shape[0]):
        for g in range(values.shape[1]):
            out[i, g] = ranks[g, _class_of(values[i, g], edges[g])]


def _pearson(
    blocks: Iterator[NDArray[np.float32]],
    edges: NDArray[np.float32] | None,
    ranks: NDArray[np.float64] | None,
    n_out: int,
) -> NDArray[np.float64]:
    product, total, n, shift = np.zeros((n_out, n_out)), np.zeros(n_out), 0, None
    for values in blocks:
        exact = np.empty(values.shape)
        if edges is None:
            exact[:] = values
        else:
            _rank(values, edges, ranks, exact)
        # About the mean: else a small variance would be the difference of large sums.
        shift = exact.mean(0) if shift is None else shift
        exact -= shift
        product += exact.T @ exact
        total += exact.sum(0)
        n += len(exact)
    covariance = product - np.outer(total, total) / n
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = covariance / np.outer(deviation, deviation)
    np.fill_diagonal(found, np.where(deviation > 0, 1.0, np.nan))
    return np.clip(found, -1, 1)


__all__ = ["correlation_matrix"]
