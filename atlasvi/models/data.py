"""The data of a model: what was set up, how it is split, the moments of its library sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import CellsError, OptionError
from atlasvi.nn import ranks
from atlasvi.store.atlas import Atlas
from atlasvi.store.atlas import open as open_atlas
from atlasvi.store.fields import Codes, from_uns
from atlasvi.store.stats import LibraryMoments, LogTotals, count_cells
from atlasvi.types import FieldMap, Minibatch

if TYPE_CHECKING:
    import anndata

Data: TypeAlias = "Atlas | anndata.AnnData | str | Path"


def library_moments(atlas: Atlas, codes: Codes, n_batch: int) -> LibraryMoments:
    """One pass over the cells; cells without counts are left out, as scvi-tools does."""
    moments, no_sets = LogTotals(n_batch), np.zeros((0, len(codes.gene_columns)), bool)
    for counts, positions in atlas.iter_blocks(columns=codes.gene_columns):
        moments.add(count_cells(counts, no_sets).totals, codes.batch_index[positions])
    return moments.result()


def registered(adata: Data, model: str) -> tuple[Atlas, FieldMap]:
    """The data as an `Atlas`, and what ``setup_anndata`` was told about it."""
    if isinstance(adata, str | Path):
        adata = open_atlas(adata)
    if isinstance(adata, Atlas):
        atlas, fields = adata, adata.registration
    else:
        fields = from_uns(adata)
        atlas = Atlas.from_anndata(adata, layer=fields.layer if fields else None)
    if fields is None:
        raise OptionError(f"the data were not set up; call {model}.setup_anndata(adata, batch_key=...) first")
    return atlas, fields


def with_cells(atlas: Atlas) -> Atlas:
    """The data, if there is a cell.

    Raises:
        CellsError: there is none.
    """
    if atlas.n_obs == 0:
        raise CellsError(f"{atlas.name} has no cells, as a view that chose none: there is nothing to answer")
    return atlas


@contextmanager
def registered_as(atlas: Atlas, fields: FieldMap) -> Iterator[None]:
    """For as long as a model is built: an atlas set up otherwise than its owner set it up."""
    before, atlas.registration = atlas.registration, fields
    try:
        yield
    finally:
        atlas.registration = before


def split_options(
    n_obs: int, train_size: float | None, validation_size: float | None, shuffle: bool, seed: int
) -> dict[str, Any]:
    """The arguments of `split_cells` as a model keeps them, from those of ``train``."""
    return {
        "n_obs": n_obs, "train_size": 0.9 if train_size is None else train_size,
        "validation_size": validation_size, "shuffle": shuffle, "seed": seed,
    }  # fmt: skip


def split_cells(
    n_obs: int, train_size: float, validation_size: float | None, shuffle: bool, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training, validation and remaining cells, each in increasing order.

    Raises:
        OptionError: shares that are not shares, or too few cells to train on.
    """
    # A model folder has the shares as Python's floats, and is to give the same cells.
    train_size = float(train_size)
    validation_size = 1 - train_size if validation_size is None else float(validation_size)
    if not 0 < train_size <= 1 or not 0 <= validation_size <= 1 or train_size + validation_size > 1 + 1e-9:
        raise OptionError(
            f"train_size {train_size} and validation_size {validation_size} must be shares of 1 in sum"
        )
    n_train = int(np.ceil(train_size * n_obs))
    n_validation = min(int(np.floor(validation_size * n_obs + 1e-9)), n_obs - n_train)
    if n_train < 3:
        raise OptionError(f"{n_train} of {n_obs} cells are too few to train on; at least 3 are needed")
    order = np.arange(n_obs)
    if shuffle:
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(n_obs)
    # They are held throughout training: 4 bytes a cell rather than 8.
    order = order.astype(np.int32 if n_obs < 1 << 31 else np.int64)
    cuts = np.split(order, [n_train, n_train + n_validation])
    return np.sort(cuts[0]), np.sort(cuts[1]), np.sort(cuts[2])


def gene_shares(minibatches: Iterable[Minibatch], n_vars: int) -> torch.Tensor:
    """``(G,)`` float32, the genes' shares of all counts, half a count added to each so that none is 0."""
    totals = torch.zeros(n_vars, dtype=torch.float64)
    for minibatch in minibatches:
        counts = minibatch.counts
        totals.index_add_(0, counts.indices.long().cpu(), counts.data.double().cpu())
    ranks.sum_in_place([totals])
    totals += 0.5
    return (totals / totals.sum()).float()


__all__ = [
    "Data",
    "LibraryMoments",
    "gene_shares",
    "library_moments",
    "registered",
    "registered_as",
    "split_cells",
    "split_options",
    "with_cells",
]
