"""scvi-tools' side of `benchmarks.streaming`: its own loader over a matrix in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import anndata
import scvi

from benchmarks.scale.answer import answer, check_and_time


def minibatches(store: str, batch_size: int, sparse: bool) -> Iterator[Any]:
    """One epoch."""
    for piece in _loader(store, batch_size, sparse):
        yield piece["X"], piece["ind_x"][:, 0].numpy()


@cache
def _loader(store: str, batch_size: int, sparse: bool) -> Any:
    manager = _manager(store)
    return scvi.dataloaders.AnnDataLoader(
        manager, shuffle=True, batch_size=batch_size, load_sparse_tensor=sparse
    )


@cache
def _manager(store: str) -> Any:
    adata = anndata.read_zarr(store)
    adata.X = adata.X.astype("float32")
    # Of a category that it knows as the number of the cell: which cells a minibatch has.
    adata.obs["number"] = range(adata.n_obs)
    fields = scvi.data.fields
    manager = scvi.data.AnnDataManager(fields=[
        fields.LayerField("X", None, is_count_data=True), fields.NumericalObsField("ind_x", "number"),
    ])  # fmt: skip
    manager.register_fields(adata)
    return manager


def _arrays(counts: Any) -> Any:
    counts = counts.to_sparse_csr()
    return counts.crow_indices().numpy(), counts.col_indices().numpy(), counts.values().numpy()


if __name__ == "__main__":
    answer(check_and_time({"scvi-tools": minibatches}, _arrays))
