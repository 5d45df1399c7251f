"""Latents and expression on disk, block by block, as AnnData reads them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlasvi.errors import CellsError, OptionError, SpaceError, StoreError
from atlasvi.files import is_among, replacing_folder
from atlasvi.infer.decode import chunk_of
from atlasvi.progress import Advance
from atlasvi.store.atlas import Atlas
from atlasvi.store.atlas import open as open_atlas
from atlasvi.store.frame import NAMES, create_array, to_strings, write_frame
from atlasvi.store.space import naming_a_full_disk
from atlasvi.store.tasks import run_tasks
from atlasvi.stream import default_workers

if TYPE_CHECKING:
    import dask.array as da
    import pandas as pd

_ENCODING: Any = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
_DICT: Any = {"encoding-type": "dict", "encoding-version": "0.1.0"}


def write_latent(
    blocks: Iterable[NDArray[np.float32]],
    atlas: Atlas,
    n_latent: int,
    out: Path | None,
    key: str,
    advance: Advance,
) -> None:
    """Write latents into ``obsm[key]`` of the atlas (of each, if it is several), or of an h5ad of its cells.

    Args:
        blocks: ``(rows, n_latent)`` each, in the order of the cells.
        atlas: whose cells they are.
        n_latent: dimensions.
        out: an ``.h5ad``, or another store; the atlas itself when ``None``.
        key: of obsm.
        advance: told the number of cells so far.

    Raises:
        OptionError: ``out`` is not an h5ad or a store.
        CellsError: its cells are not the atlas's.
    """

    def counted() -> Iterator[NDArray[np.float32]]:
        done = 0
        for block in blocks:
            yield block
            done += len(block)
            advance(done, "")

    if out is None and (atlas.path is not None or atlas.is_several):
        atlas.write_obsm(key, counted(), n_latent)
        return
    if out is None:
        raise OptionError(
            f"obsm[{key!r}] cannot be written to {atlas.name!r}, which is not on this disk; name an .h5ad or "
            "a store that has the same cells, with --out"
        )
    if not out.exists():
        raise OptionError(f"there is no {str(out)!r} to write obsm[{key!r}] into; name an atlas or an .h5ad")
    with open_atlas(out) as target:
        _check_cells(target, atlas)
    open_atlas(out).write_obsm(key, counted(), n_latent)


def _check_cells(target: Atlas, atlas: Atlas) -> None:
    if target.n_obs != atlas.n_obs or not np.array_equal(target.obs_names, atlas.obs_names):
        raise CellsError(
            f"{target.name} has {target.n_obs:,} cells and {atlas.name} {atlas.n_obs:,}, or in another "
            "order; latents are written to the cells they are of"
        )


def reader(names: NDArray[np.generic]) -> Callable[[int, int], NDArray[np.generic]]:
    """``(start, stop) ->`` some of these names."""
    return lambda start, stop: names[start:stop]


def write_expression(
    rho: da.Array,
    read_names: Callable[[int, int], NDArray[np.generic]],
    var_names: list[str],
    out: Path,
    *,
    overwrite: bool,
    advance: Advance,
    read: Iterable[Path] = (),
    layers: Mapping[str, da.Array] | None = None,
    elsewhere: Callable[[Path, Sequence[tuple[int, int]]], Iterator[int]] | None = None,
) -> None:
    """Compute a lazy array chunk by chunk into an AnnData Zarr store with it as X, and others as layers.

    Args:
        rho: cells x genes; chunks of rows.
        read_names: ``(start, stop) ->`` names of these cells, such as ``atlas.read_names``.
        var_names: names of the genes.
        out: the store.
        overwrite: replace what is there.
        advance: told the number of cells so far.
        read: stores that the array is computed from, which are not replaced.
        layers: more arrays of the same cells and genes, and in the same chunks.
        elsewhere: has others compute X, and write it: of the place of the array and the ranges of its chunks
            it gives the number of cells done, again and again; see `on_cluster.decode_on`.

    Raises:
        StoreError: there is something already, or it is what is read.
        SpaceError: the disk is full; nothing is left behind.
    """
    if is_among(out, read):
        raise StoreError(f"{str(out)!r} is what is read from; name another place for the result")
    if out.exists() and not overwrite:
        raise StoreError(f"there is a {str(out)!r} already; pass --overwrite, or name another place")
    if out.exists() and not (out / "zarr.json").exists() and not (out / ".zgroup").exists():
        raise StoreError(f"{str(out)!r} is not a Zarr store and will not be replaced; name another place")
    with replacing_folder(out) as new:
        group = zarr.open_group(new, mode="w", zarr_format=3, attributes=_ENCODING)
        for part in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            group.create_group(part, attributes=_DICT)
        names = write_frame(group, "obs", rho.shape[0])["_index"]
        for start in range(0, rho.shape[0], NAMES):
            stop = min(start + NAMES, rho.shape[0])
            names[start:stop] = read_names(start, stop)
        write_frame(group, "var", rho.shape[1])["_index"][...] = to_strings(var_names)
        named = {"X": rho, **{f"layers/{name}": layer for name, layer in (layers or {}).items()}}
        arrays = [
            (create_array(group, name, lazy.shape, np.float32, max(lazy.chunks[0][0], 1)), lazy)
            for name, lazy in named.items()
        ]
        for array, _ in arrays:
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        starts = np.concatenate([[0], np.cumsum(rho.chunks[0])])

        def put(index: int) -> None:
            for array, lazy in arrays:
                array[starts[index] : starts[index + 1]] = chunk_of(lazy, index)

        ranges = list(pairwise(starts.tolist()))
        try:
            if elsewhere is not None:
                for done in elsewhere(new / "X", ranges):
                    advance(done, "")
                return
            # One task decodes a chunk and writes it: were these two, Dask could decode ahead of the writing.
            run_tasks(
                put, range(len(ranges)), rho.chunks[0], label="decoding", workers=default_workers(),
                progress=lambda label, done, total: advance(done, ""),
            )  # fmt: skip
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SpaceError(
                    f"no space left to write {str(out)!r} ({rho.nbytes / 2**30:.1f} GiB before compression); "
                    "free some, or ask for fewer genes"
                ) from error
            raise


def write_labels(
    probabilities: Callable[[NDArray[np.int64]], pd.DataFrame],
    n_obs: int,
    out: Path,
    separator: str,
    *,
    threshold: float,
    unknown: str,
    advance: Advance,
    distances: Callable[[NDArray[np.int64]], pd.DataFrame] | None = None,
    max_distance: float = np.inf,
) -> Counter[str]:
    """Write a table with a row a cell: its name, its label, and under ``p(label)`` the probability of each.

    Args:
        probabilities: of cells at these positions: cells x labels, the rows by their names.
        n_obs: number of cells.
        out: the file; with ``.gz`` at its end it is compressed.
        separator: of columns.
        threshold: cells whose most probable label is less probable are called ``unknown``.
        unknown: their label.
        advance: told the number of cells so far.
        distances: of cells from each label; the least gets a column, ``distance``.
        max_distance: cells whose least is larger are called ``unknown`` too.

    Returns:
        Number of cells of each label.

    Raises:
        SpaceError: the disk is full; a table that was there stays.
    """
    found: Counter[str] = Counter()
    part = out.with_name(f".part-{out.name}")
    try:
        with naming_a_full_disk(out, lambda: 0):
            for start in range(0, n_obs, NAMES):
                cells = np.arange(start, min(start + NAMES, n_obs))
                table = probabilities(cells)
                best = table.to_numpy().argmax(1)
                labels = np.asarray(table.columns, dtype=object)[best]
                labels[table.to_numpy().max(1) < threshold] = unknown
                table = table.rename(columns=lambda label: f"p({label})")
                if distances is not None:
                    nearest = distances(cells).to_numpy().min(1)
                    labels[nearest > max_distance] = unknown
                    table.insert(0, "distance", nearest)
                found.update(labels.tolist())
                table.insert(0, "label", labels)
                # Members of a gzip file may follow each other.
                table.to_csv(
                    part, sep=separator, index_label="cell", header=start == 0, mode="a" if start else "w",
                    float_format="%.6g",
                )  # fmt: skip
                advance(int(cells[-1]) + 1, "")
            os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return found


__all__ = ["reader", "write_expression", "write_labels", "write_latent"]
