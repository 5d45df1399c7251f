"""rho for results that fit in memory: a data frame, each draw, or draws of cells chosen at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import OptionError
from atlasvi.infer.decode import Decoding, Request, lazy_expression, piece_rows
from atlasvi.infer.encoded import Source
from atlasvi.infer.importance import importance_weights
from atlasvi.progress import bar

LARGEST_DENSE = 2 << 30


@dataclass(frozen=True)
class Weighting:
    """How importance weights are measured; see `atlasvi.infer.importance`.

    Args:
        max_cells: cells that they are measured on, at most.
        truncation: bring the smallest up to the mean.
        n_mc_samples: draws for the likelihood of each of these cells.
    """

    max_cells: int
    truncation: bool
    n_mc_samples: int

    @classmethod
    def of(cls, weights: str | None, max_cells: int, truncation: bool, n_mc_samples: int) -> Weighting | None:
        """Of arguments as people give them; ``None`` for draws that are all alike.

        Raises:
            OptionError: weights that there are not, or numbers below 1.
        """
        if weights not in (None, "uniform", "importance"):
            raise OptionError(f"weights {weights!r} is not supported; choose one of uniform, importance")
        if max_cells < 1 or n_mc_samples < 1:
            raise OptionError(f"max_cells {max_cells} and n_mc_samples {n_mc_samples} must be at least 1")
        return cls(max_cells, truncation, n_mc_samples) if weights == "importance" else None


def refuse_large(shape: tuple[int, ...], what: str, instead: str) -> None:
    """Refuse an array of float32 that is not to be made in memory.

    Raises:
        OptionError: it is larger than 2 GiB; names its size and what to do instead.
    """
    n_bytes = 4 * int(np.prod(shape, dtype=object))
    if n_bytes > LARGEST_DENSE:
        sizes = " x ".join(f"{n:,}" for n in shape)
        raise OptionError(f"{sizes} are {n_bytes / 2**30:.1f} GiB of {what}; {instead}")


def normalized_expression(
    module: torch.nn.Module,
    source: Source,
    names: Callable[[], NDArray[Any]],
    genes: list[str],
    n_vars: int,
    request: Request,
    *,
    n_samples_overall: int | None,
    weighting: Weighting | None,
    return_numpy: bool | None,
    silent: bool,
) -> Any:
    """What ``get_normalized_expression`` returns; arguments as there.

    Args:
        module: satisfies `types.Decodes`.
        source: of the cells.
        names: gives theirs.
        genes: names of the genes asked for.
        n_vars: genes of the model.
        request: what is asked.
        n_samples_overall: rows instead of one a cell, or ``None``.
        weighting: of the draws that these rows are chosen from.
        return_numpy: an array instead of a data frame.
        silent: show no progress bar.
    """
    if n_samples_overall is None and weighting is not None:
        raise OptionError("weights='importance' chooses draws of all cells; say how many: n_samples_overall=")
    n_layers = 1 if request.return_mean else request.n_samples
    n_rows = source.n_obs if n_samples_overall is None else n_samples_overall
    refuse_large(
        (n_rows * n_layers, len(genes)), "rho",
        "ask for fewer with indices= or gene_list=, or use the lazy model.expression(...)",
    )  # fmt: skip
    rows: Any = slice(None)
    with bar("decode", n_rows, "cells", enabled=not silent) as advance:
        if n_samples_overall is None:
            values = lazy_expression(module, source, n_vars, request).compute(scheduler="threads")
            if n_layers == 1:
                values = values.reshape(n_rows, len(genes))
        else:
            rows, values = _overall(module, source, n_vars, request, n_samples_overall, weighting)
        advance(n_rows, "")
    if return_numpy or values.ndim == 3:
        return values
    import pandas as pd

    return pd.DataFrame(values, index=names()[rows].astype(object), columns=genes)


def _overall(
    module: torch.nn.Module,
    source: Source,
    n_vars: int,
    request: Request,
    n_rows: int,
    weighting: Weighting | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draws chosen with replacement from a pool of some for each cell: ``(n_rows,)`` cells, and their rho."""
    if n_rows < 1 or request.n_samples > 1:
        raise OptionError(
            f"n_samples_overall {n_rows} with n_samples {request.n_samples}: need at least 1, and n_samples=1"
        )
    if weighting is not None and len(request.batches) > 1:
        raise OptionError("importance weights are of one batch; give transform_batch one, or none")
    n_samples = n_rows // source.n_obs + 1
    module.eval()
    p = None
    if weighting is not None:
        p = importance_weights(
            module, source, n_samples, request,
            max_cells=weighting.max_cells, truncation=weighting.truncation,
            n_mc_samples=weighting.n_mc_samples,
        )  # fmt: skip
    generator = np.random.Generator(np.random.Philox(key=request.seed))
    chosen = generator.choice(n_samples * source.n_obs, n_rows, p=p)
    samples, cells = np.divmod(chosen, source.n_obs)
    device = next(module.parameters()).device
    answer = Decoding(module, request, source, n_vars)
    values = np.empty((n_rows, answer.n_out), np.float32)
    step = piece_rows(source, answer.n_out)
    for sample in np.unique(samples):
        decoding = Decoding(
            module, replace(request, first_sample=int(sample), return_mean=True), source, n_vars
        )
        for start in range(0, source.n_obs, step):
            stop = min(start + step, source.n_obs)
            wanted = np.flatnonzero((samples == sample) & (cells >= start) & (cells < stop))
            if len(wanted):
                found = np.empty((stop - start, answer.n_out), np.float32)
                decoding(source.read(start, stop, device), found)
                values[wanted] = found[cells[wanted] - start]
    return cells, values
