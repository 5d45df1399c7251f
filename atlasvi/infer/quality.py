"""How well the model knows each cell: the likelihood of its counts, and that beside cells of its depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.types import Minibatch, Noise, Trains

# Cells of like depth that a score is told from, at least, and depths at which that is done, at most.
_FEWEST_CELLS, _MOST_DEPTHS = 100, 200
# The median distance from the median is this share of a normal's standard deviation.
_MAD_OF_NORMAL = 0.6744897501960817


@dataclass(frozen=True, slots=True, eq=False)
class CellQuality:
    """What is known of each cell.

    Args:
        total: ``(n,)`` float64, counts of the model's genes.
        n_genes: ``(n,)`` int64, genes with a count.
        error: ``(n,)`` float64, -log p(x | z) in nats, mean over draws of z: the higher, the worse.
    """

    total: NDArray[np.float64]
    n_genes: NDArray[np.int64]
    error: NDArray[np.float64]


@torch.no_grad()
def cell_quality(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    *,
    n_samples: int,
    seed: int,
) -> CellQuality:
    """One pass over the cells; a draw depends on (seed, draw, cell) alone.

    Args:
        module: satisfies `types.Trains`.
        minibatches: of the cells, in order.
        device: of the module.
        n_samples: draws of z.
        seed: of the draws.

    Raises:
        OptionError: ``n_samples`` below 1.
    """
    if n_samples < 1:
        raise OptionError(f"n_samples must be at least 1, is {n_samples}")
    assert isinstance(module, Trains)
    module.eval()
    totals, detected, errors = [], [], []
    for minibatch in minibatches:
        indptr, _, data = minibatch.counts.numpy()
        rows = np.repeat(np.arange(len(minibatch)), np.diff(indptr))
        totals.append(np.bincount(rows, weights=data, minlength=len(minibatch)))
        detected.append(np.bincount(rows[data > 0], minlength=len(minibatch)))
        cells = minibatch.to(device)
        draws = [
            module.loss(cells, Noise(seed, sample, cells.rows)).reconstruction.double()
            for sample in range(n_samples)
        ]
        errors.append(torch.stack(draws).mean(0).cpu().numpy())
    return CellQuality(*(np.concatenate(parts) for parts in (totals, detected, errors)))


def beside_like_depth(error: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each cell's error is from the median of cells of its depth, in standard deviations.

    Cells are sorted by their total and cut into stretches of 100 and more. The median of each is taken, and
    interpolated by log total; then the median distance from that, divided by 0.674 for a standard deviation.

    Args:
        error: ``(n,)`` nats.
        total: ``(n,)`` counts.

    Returns:
        ``(n,)`` float64: about normal for most cells; 0 where all cells of a depth have the same error.
    """
    depth = np.log1p(total)
    n_depths = int(np.clip(len(error) // _FEWEST_CELLS, 1, _MOST_DEPTHS))
    stretches = np.array_split(np.argsort(depth, kind="stable"), n_depths)
    at = np.array([np.median(depth[cells]) for cells in stretches])
    centres = np.array([np.median(error[cells]) for cells in stretches])
    # Of what the trend leaves: within a stretch it may rise by more than cells differ.
    away = error - np.interp(depth, at, centres)
    spreads = np.array([np.median(np.abs(away[cells])) for cells in stretches])
    spread = np.interp(depth, at, spreads / _MAD_OF_NORMAL)
    score = np.zeros(len(error))
    np.divide(away, spread, out=score, where=spread > 0)
    return score
