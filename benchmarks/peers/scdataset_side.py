"""scDataset's side of `benchmarks.streaming`. Runs in its environment.

Blocks of neighbours in random order, as its documentation advises, of counts that AnnData reads where they
are: the Zarr store that atlasvi wrote, with zarrs as the codec pipeline, or the files of HDF5.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
import zarr
from scdataset import BlockShuffling, scDataset

from benchmarks.scale.answer import answer, check_and_time

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


class Files:
    """Rows of several matrices on disk, one after the other."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts
        self._edges = np.cumsum([0, *(part.shape[0] for part in parts)])

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        """Of rows in ascending order. Neighbours are read as a slice: AnnData is slower with numbers."""
        begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        starts, stops = rows[begins], rows[[*begins[1:] - 1, -1]] + 1
        return sp.vstack(
            [
                part[max(start, low) - low : min(stop, high) - low]
                for start, stop in zip(starts, stops, strict=True)
                for part, low, high in zip(self._parts, self._edges[:-1], self._edges[1:], strict=True)
                if start < high and stop > low
            ],
            format="csr",
        )


def minibatches(store: str, batch_size: int, block_size: int, fetch_factor: int) -> Iterator[Any]:
    """One epoch, in this process. What it knows of the store is kept for the next.

    Processes of the loader's own came to no end with zarrs, whose threads do not survive a fork.
    """
    yield from torch.utils.data.DataLoader(
        _dataset(store, batch_size, block_size, fetch_factor), batch_size=None
    )


@cache
def _dataset(store: str, batch_size: int, block_size: int, fetch_factor: int) -> scDataset:
    return scDataset(
        _counts(store), BlockShuffling(block_size), batch_size, fetch_factor,
        fetch_callback=lambda counts, rows: (counts[rows], rows),
        batch_callback=lambda fetched, some: (fetched[0][some], fetched[1][some]),
    )  # fmt: skip


@cache
def _counts(store: str) -> Files:
    if store.endswith(".zarr"):
        return Files([anndata.io.sparse_dataset(zarr.open_group(store, mode="r")["X"])])
    return Files([anndata.read_h5ad(path, backed="r").X for path in sorted(Path(store).glob("*.h5ad"))])


def _arrays(counts: Any) -> Any:
    return counts.indptr, counts.indices, counts.data


if __name__ == "__main__":
    answer(check_and_time({"scDataset": minibatches}, _arrays))
