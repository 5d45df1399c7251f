"""Highly variable genes as Seurat v3 and scanpy choose them, in two passes over an atlas.

Stuart et al. 2019: in each batch the log variance of the genes is fitted by their log mean (loess), counts
are standardised with the fitted variance and clipped at sqrt(n), and genes are ranked by the variance of
what results. A clipped count contributes a constant, so a second pass over the few counts that are above
the limit of their gene is all that the clipped sums need.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import CellsError, OptionError
from atlasvi.store.fields import level_codes
from atlasvi.store.stats import (
    CARRY,
    CELLS,
    SQUARE,
    SUM,
    add_entry,
    add_genes,
    gene_sums,
    merged,
    moments_of,
    refuse_no_cells,
)

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

# By what the genes are sorted: (rank in ascending order, number of batches in descending order), or the
# other way round, as the paper has it.
FLAVORS = ("seurat_v3", "seurat_v3_paper")


def highly_variable_genes(
    atlas: Atlas,
    n_top_genes: int = 2000,
    *,
    batch_key: str | None = None,
    flavor: str = "seurat_v3",
    span: float = 0.3,
    num_workers: int | None = None,
    memory_budget: int | str | None = None,
    client: distributed.Client | None = None,
) -> pd.DataFrame:
    """The body of `Atlas.highly_variable_genes`, which says what the arguments are."""
    _check(n_top_genes, flavor, span)
    refuse_no_cells(atlas)
    loess = _import_loess()
    codes, batches = level_codes(atlas, batch_key)
    n = np.bincount(codes, minlength=len(batches))
    if n.min() < 2:
        raise CellsError(
            f"batch {batches[int(n.argmin())]!r} of {atlas.name} has {n.min()} cell, where nothing varies; "
            "leave batches of one cell out"
        )
    # On a cluster too counts are added up here: sums of every batch would be more to send than the counts.
    read = partial(atlas.iter_blocks, num_workers=num_workers, memory_budget=memory_budget, client=client)
    sums = gene_sums(len(batches), atlas.n_vars)
    for counts, at in read():
        add_genes(counts, codes[at], sums)
    mean, std = np.empty(sums.shape[:2]), np.empty(sums.shape[:2])
    for b, level in enumerate(batches):
        mean[b], variance = moments_of(sums[b], int(n[b]))
        std[b] = _fitted_std(loess, mean[b], variance, span, f"batch {level!r} of {atlas.name}")
    limit = std * np.sqrt(n)[:, None] + mean
    above = gene_sums(len(batches), atlas.n_vars)
    for counts, at in read():
        indptr, indices, data = counts.numpy()
        _add_above(indptr, indices, data, codes[at], limit, above)
    normed = np.stack(
        [
            _normed_variance(sums[b], above[b], limit[b], mean[b], std[b], int(n[b]))
            for b in range(len(batches))
        ]
    )
    frame = pd.DataFrame(index=pd.Index(atlas.var_names.astype(object)))
    frame["means"], frame["variances"] = moments_of(merged(sums), atlas.n_obs)
    return _ranked(frame, normed, n_top_genes, flavor, with_batches=batch_key is not None)


def _check(n_top_genes: int, flavor: str, span: float) -> None:
    if flavor not in FLAVORS:
        raise OptionError(f"flavor={flavor!r} is not supported; pass {' or '.join(map(repr, FLAVORS))}")
    if n_top_genes < 1:
        raise OptionError(f"n_top_genes={n_top_genes} cannot be: ask for at least 1")
    if not 0 < span <= 1:
        raise OptionError(f"span={span} cannot be: it is the share of genes fitted together, 0.3 as a rule")


def _import_loess() -> Any:
    try:
        from skmisc.loess import loess
    except ImportError as error:
        raise OptionError(
            f"highly variable genes are fitted by scikit-misc, which cannot be imported ({error}); "
            "install it: pip install 'atlasvi[hvg]'"
        ) from error
    return loess


def _fitted_std(
    loess: Any, mean: NDArray[np.float64], variance: NDArray[np.float64], span: float, where: str
) -> NDArray[np.float64]:
    """The standard deviation that a gene of each mean has as a rule; 1 for genes that do not vary."""
    varies = variance > 0
    log_variance = np.zeros(len(mean))
    if varies.any():
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=span, degree=2)
        try:
            model.fit()
            log_variance[varies] = model.outputs.fitted_values
        except ValueError as error:
            raise OptionError(
                f"{where}: the variance of its {int(varies.sum())} genes that vary cannot be fitted by their "
                f"mean ({' '.join(str(error).split())}); leave small batches out, or pass a larger span "
                f"than {span}"
            ) from error
    std: NDArray[np.float64] = np.sqrt(10**log_variance)
    return std


def _normed_variance(
    sums: NDArray[np.uint64],
    above: NDArray[np.uint64],
    limit: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    n: int,
) -> NDArray[np.float64]:
    """Variance of the standardised counts, those above the limit taken to be at it."""
    below = sums - above
    # Modulo 2^64, with a borrow where it passed zero.
    below[:, CARRY] -= sums[:, SQUARE] < above[:, SQUARE]
    n_above = above[:, CELLS].astype(float)
    total = below[:, SUM] + n_above * limit
    square = below[:, CARRY] * 2.0**64 + below[:, SQUARE] + n_above * limit**2
    return 1 / ((n - 1) * std**2) * (n * mean**2 + square - 2 * total * mean)


def _ranked(
    frame: pd.DataFrame, normed: NDArray[np.float64], n_top_genes: int, flavor: str, *, with_batches: bool
) -> pd.DataFrame:
    """Add the ranks and the choice. Genes that tie keep their order, so that the choice is one."""
    ranks = np.argsort(np.argsort(-normed, axis=1, kind="stable"), axis=1, kind="stable").astype(np.float32)
    is_top = ranks < n_top_genes
    n_batches = is_top.sum(axis=0)
    rank = np.ma.median(np.ma.masked_array(ranks, ~is_top), axis=0).filled(np.nan)
    # NaN, a gene at the top of no batch, sorts last.
    keys = (-n_batches, rank) if flavor == "seurat_v3" else (rank, -n_batches)
    chosen = np.zeros(len(frame), bool)
    chosen[np.lexsort(keys)[:n_top_genes]] = True
    frame["variances_norm"] = normed.mean(axis=0)
    frame["highly_variable_rank"] = rank
    if with_batches:
        frame["highly_variable_nbatches"] = n_batches
    frame["highly_variable"] = chosen
    return frame


@numba.njit(nogil=True, cache=True)
def _add_above(indptr, indices, data, groups, limit, sums):  # type: ignore[no-untyped-def]
    """As `add_genes`, of the counts above the limit of their group and gene alone."""
    for b in range(len(indptr) - 1):
        of_group, limits = sums[groups[b]], limit[groups[b]]
        for k in range(indptr[b], indptr[b + 1]):
            if np.float64(data[k]) > limits[indices[k]]:
                add_entry(of_group[indices[k]], np.uint64(data[k]))


__all__ = ["FLAVORS", "highly_variable_genes"]
