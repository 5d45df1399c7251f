"""Writing ``obsm`` of a store: the old state or the new one, whenever the writer is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from atlasvi.errors import OptionError, SpaceError, StoreError
from atlasvi.store.metadata import ROOT, Metadata, only_writer

_ENCODING: dict[str, Any] = {"encoding-type": "array", "encoding-version": "0.2.0"}
_DICT: dict[str, Any] = {"encoding-type": "dict", "encoding-version": "0.1.0"}


def write_obsm(stores: Sequence[tuple[Path, int]], key: str, blocks: Iterable[Any], width: int) -> None:
    """Write blocks as ``obsm[key]`` of an AnnData on disk, or of several whose cells follow each other.

    The array of a Zarr store is written beside the store and moved in; of an ``.h5ad``, which cannot be
    changed safely in place, a copy is written and takes its place. Nothing is moved before all are whole.

    Args:
        stores: paths of Zarr stores or ``.h5ad``, each with its number of cells.
        key: what stands there is replaced.
        blocks: ``(rows, width)`` arrays or tensors in the order of the cells.
        width: number of columns.

    Raises:
        OptionError: blocks that do not fit.
        SpaceError: the disk is full.
        StoreError: it cannot be written there.
    """
    # Beside and not inside: AnnData would take an unknown member of the store for part of it.
    partials = [path.parent / f".{path.name}.obsm-{key}.partial" for path, _ in stores]
    # What the blocks raise while they are made is theirs, not a failure to write.
    ours = _Ours(blocks)
    path = stores[0][0]
    try:
        parts = _cut(ours, [n for _, n in stores])
        for (path, n), partial, part in zip(stores, partials, parts, strict=True):
            _remove(partial)
            (_into_zarr if path.is_dir() else _into_hdf5)(path, partial, key, part, (n, width))
        for (path, _), partial in zip(stores, partials, strict=True):
            if path.is_dir():
                _move_in(path, partial, key)
            else:
                # A reader that has the old file open keeps it until it lets go.
                os.replace(partial, path)
    except OSError as error:
        if ours.raised is error or isinstance(error, StoreError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(
                f"no space left to write obsm[{key!r}] of {str(path)!r}; free some and run it again"
            ) from error
        raise StoreError(
            f"obsm[{key!r}] of {str(path)!r} cannot be written ({error}); check that you may write there"
        ) from error
    finally:
        for partial in partials:
            _remove(partial)


def _cut(blocks: Iterable[Any], lengths: list[int]) -> Iterator[Iterable[Any]]:
    """The blocks of each store, one store after the other; the last has all that remain."""
    if len(lengths) == 1:
        yield blocks
        return
    remaining = iter(blocks)
    rest: list[Any] = []

    def first(n: int) -> Iterator[Any]:
        while n and (rest or (block := next(remaining, None)) is not None):
            values = rest.pop() if rest else np.asarray(block)
            yield values[:n]
            if len(values) > n:
                rest.append(values[n:])
            n -= min(n, len(values))

    for n in lengths[:-1]:
        yield first(n)
    yield chain(rest, remaining)


class _Ours:
    """The blocks, with what was raised while making them kept apart."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        self._blocks = blocks
        self.raised: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._blocks
        except GeneratorExit:
            raise
        except BaseException as error:
            self.raised = error
            raise


def _into_zarr(path: Path, partial: Path, key: str, blocks: Iterable[Any], shape: tuple[int, int]) -> None:
    array = zarr.create_array(
        store=str(partial),
        shape=shape,
        chunks=(_chunk_rows(shape), max(shape[1], 1)),
        dtype="float32",
        zarr_format=3 if (path / "zarr.json").exists() else 2,
        attributes=_ENCODING,
    )
    _fill(array, blocks, shape)


def _into_hdf5(path: Path, partial: Path, key: str, blocks: Iterable[Any], shape: tuple[int, int]) -> None:
    shutil.copyfile(path, partial)
    with h5py.File(partial, "r+") as file:
        if "obsm" not in file:
            file.create_group("obsm").attrs.update(_DICT)
        if key in file["obsm"]:
            del file["obsm"][key]
        chunks = (_chunk_rows(shape), shape[1]) if min(shape) > 0 else None
        array = file["obsm"].create_dataset(key, shape, "float32", chunks=chunks)
        array.attrs.update(_ENCODING)
        _fill(array, blocks, shape)


def _chunk_rows(shape: tuple[int, int]) -> int:
    """One chunk holds about 1 MB, whatever the width; a few of that are held while it is put together."""
    return max(1, min(shape[0], (1 << 18) // max(shape[1], 1)))


def _fill(array: Any, blocks: Iterable[Any], shape: tuple[int, int]) -> None:
    """Write blocks one after another, whole chunks at a time so that none is written twice."""
    n_obs, width = shape
    # Copied at once into one array: small blocks kept until the next chunk lie between the large ones that
    # the readers take and free, and the heap grows around them.
    chunk = np.empty((_chunk_rows(shape), width), np.float32)
    n_held = row = 0
    for block in blocks:
        values = np.asarray(block, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != width:
            raise OptionError(f"a block of {values.shape} was given where (rows, {width}) is to be written")
        while len(values):
            n = min(len(chunk) - n_held, len(values))
            chunk[n_held : n_held + n] = values[:n]
            values, n_held = values[n:], n_held + n
            if n_held == len(chunk):
                _put(array, row, chunk)
                row, n_held = row + n_held, 0
    if n_held:
        _put(array, row, chunk[:n_held])
    if row + n_held != n_obs:
        raise OptionError(
            f"{row + n_held} rows were given to be written for {n_obs} cells; give one row a cell"
        )


def _put(array: Any, row: int, values: NDArray[np.float32]) -> None:
    if row + len(values) > array.shape[0]:
        raise OptionError(
            f"more rows were given to be written than the {array.shape[0]} cells; give one row a cell"
        )
    array[row : row + len(values)] = values


def _move_in(path: Path, partial: Path, key: str) -> None:
    with only_writer(path):
        if (path / ROOT).exists() and (metadata := Metadata.read(path)).is_consolidated:
            _move_in_known(metadata, partial, key)
            return
        group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        if "obsm" not in group:
            group.create_group("obsm", attributes=_DICT)
        # A stale copy of the metadata would hide the new array, or promise one that is not there.
        copy = path / ".zmetadata"
        was_consolidated = copy.exists()
        copy.unlink(missing_ok=True)
        _swap(path / "obsm" / key, partial)
        if was_consolidated:
            zarr.consolidate_metadata(str(path))


def _move_in_known(metadata: Metadata, partial: Path, key: str) -> None:
    """Move the array into a store whose root says what there is, and say it there."""
    path, nodes, name = metadata.path, metadata.nodes, f"obsm/{key}"
    node = json.loads((partial / ROOT).read_text())
    n_obs = nodes[f"obs/{nodes['obs']['attributes']['_index']}"]["shape"][0]
    if node["shape"][0] != n_obs:
        raise StoreError(
            f"{str(path)!r} has {n_obs:,} cells by now, so that obsm[{key!r}] of {node['shape'][0]:,} is not "
            "written; open it again"
        )
    if "obsm" not in nodes:
        nodes["obsm"] = {"attributes": _DICT, "zarr_format": 3, "node_type": "group"}
        metadata.write_nodes()
    stale = [k for k in nodes if k == name or k.startswith(f"{name}/")]
    if stale and nodes[name] != node:
        # Killed after this, it leaves nothing under the key, rather than chunks taken for what they are not.
        for k in stale:
            del nodes[k]
        metadata.write()
    _swap(path / name, partial)
    nodes[name] = node
    metadata.write()


def _swap(final: Path, partial: Path) -> None:
    old = partial.with_suffix(".old")
    _remove(old)
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
