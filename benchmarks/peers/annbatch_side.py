"""annbatch's side of `benchmarks.streaming` and `benchmarks.scale.conversion`. Runs in its environment.

Both as its documentation has them: zarrs as the codec pipeline; its own conversion with its shuffle; its
loader with random chunks of neighbours. obs is left out of the loader, which then slices no data frame.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from annbatch import DatasetCollection, Loader
from zarr.codecs import BloscCodec

from benchmarks.scale.answer import answer, check_and_time, peak

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def minibatches(store: str, batch_size: int, chunk_size: int, preload_nchunks: int) -> Iterator[Any]:
    """One epoch. The loader is kept for the next, and with it what it knows of the store."""
    for piece in _loader(store, batch_size, chunk_size, preload_nchunks):
        yield piece["X"], piece["index"]


@cache
def _loader(store: str, batch_size: int, chunk_size: int, preload_nchunks: int) -> Loader:
    loader = Loader(
        batch_size=batch_size, chunk_size=chunk_size, preload_nchunks=preload_nchunks, shuffle=True,
        return_index=True, preload_to_gpu=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    return loader.use_collection(DatasetCollection(store), load_adata=_counts_alone)


def _counts_alone(group: zarr.Group) -> anndata.AnnData:
    return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))


def convert(files: list[str], out: str, level: int, dtype: str | None) -> dict[str, Any]:
    """Its own conversion, shuffled as a whole, until everything is on the disk.

    Args:
        files: to convert.
        out: folder to write.
        level: of lz4.
        dtype: of the counts; ``None`` leaves them float32 as they are. Its genes are as narrow as can be.
    """
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    DatasetCollection(out).add_adatas(
        files, load_adata=partial(_lazy, dtype=dtype), shuffle=True, rng=np.random.default_rng(0),
        zarr_compressor=(BloscCodec(cname="lz4", clevel=level, shuffle="shuffle"),),
    )  # fmt: skip
    for path in [*Path(out).rglob("*"), Path(out)]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return {"seconds": time.perf_counter() - begun, "peak": peak()}


def _lazy(path: str, dtype: str | None) -> anndata.AnnData:
    adata = anndata.experimental.read_lazy(path)
    counts = adata.X if dtype is None else adata.X.map_blocks(lambda block: block.astype(dtype), dtype=dtype)
    return anndata.AnnData(X=counts, obs=adata.obs.to_memory(), var=adata.var.to_memory())


if __name__ == "__main__":
    epochs = check_and_time({"annbatch": minibatches}, lambda x: (x.indptr, x.indices, x.data))
    answer({**epochs, "convert": convert})
