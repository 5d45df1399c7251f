"""An atlas without its counts: latents, library sizes and normalisers in one folder, and rho as a store.

::

    my.atlasvi/
      index.json      format, number of cells and genes, sizes and checksums of all files
      model/          the model, as `save` writes it
      cells.zarr/     an AnnData Zarr store: obs, var, obsm["X_scVI"], obsm["X_scVI_scale"];
                      layers/rho is described there and stored nowhere
      latent.zarr/    library sizes, codes, numbers of cells, normalisers
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from atlasvi_kernels import CSR
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

from atlasvi.errors import CorruptError, OptionError, StoreError, VersionError
from atlasvi.infer.decode import Decoding, Request, piece_rows
from atlasvi.infer.encoded import Encoded
from atlasvi.store.atlas import Atlas
from atlasvi.store.base import Source
from atlasvi.store.fields import Codes
from atlasvi.store.frame import (
    NAMES,
    create_array,
    index,
    keys,
    read_column,
    read_strings,
    to_strings,
    write_column,
    write_frame,
)
from atlasvi.store.metadata import consolidate
from atlasvi.stream import default_workers

FORMAT = 1
INDEX, MODEL, CELLS, LATENT = "index.json", "model", "cells.zarr", "latent.zarr"
RHO = "layers/rho"
# Cells and genes of a chunk of rho: 2 MiB.
CHUNK = (1024, 512)
LARGEST_READ = 2 << 30
_ROWS = 1 << 17
_SHARES = ("loc", "scale", "library", "library_scale", "rows")
_CODES = ("batch_index", "labels", "cat_covs", "cont_covs", "size_factor")


# --- writing --------------------------------------------------------------------------------------


def fill_normalisers(
    module: torch.nn.Module, cells: Encoded, n_vars: int, batches: Iterable[int | None], n_samples: int
) -> None:
    """Compute the log-normalisers of some samples (of seed 0) and batches for all cells.

    Args:
        module: satisfies `types.DecodesLinearly`; else none are kept.
        cells: where they are kept.
        n_vars: genes of the model.
        batches: codes, or ``None`` for each cell's own.
        n_samples: posterior samples.
    """
    device = next(module.parameters()).device
    for code in batches:
        request = Request(
            torch.tensor([0], device=device), () if code is None else (code,), n_samples=n_samples
        )
        answer = Decoding(module, request, cells, n_vars)
        for start in range(0, len(cells), piece_rows(cells, 1)):
            block = cells.read(start, min(start + piece_rows(cells, 1), len(cells)), device)
            answer(block, np.empty((len(block.cells), 1), np.float32))


def write_cells(
    folder: Path, atlas: Atlas, cells: Encoded, var_names: tuple[str, ...], obs: list[str]
) -> None:
    """Write `CELLS` and `LATENT`.

    Args:
        folder: where.
        atlas: whose columns of obs and var are taken.
        cells: its latents, with the normalisers that are to be kept.
        var_names: the model's genes.
        obs: columns of obs.
    """
    encoding: Any = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
    nested: Any = {"encoding-type": "dict", "encoding-version": "0.1.0"}
    group: Any = zarr.open_group(folder / CELLS, mode="w", zarr_format=3, attributes=encoding)
    for part in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        group.create_group(part, attributes=nested)
    frame = write_frame(group, "obs", len(cells))
    for start in range(0, len(cells), NAMES):
        stop = min(start + NAMES, len(cells))
        frame["_index"][start:stop] = cells.read_names(start, stop)
    for key in obs:
        write_column(frame, key, atlas.obs_column(key))
    write_frame(group, "var", len(var_names))["_index"][...] = to_strings(var_names)
    for key, values in (("X_scVI", cells.loc), ("X_scVI_scale", cells.scale)):
        _write(group["obsm"], key, values)
        group[f"obsm/{key}"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    rho = group.create_array(
        RHO, shape=(len(cells), len(var_names)), dtype=np.float32, chunks=CHUNK, compressors=None,
        fill_value=float("nan"),
    )  # fmt: skip
    rho.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    # In one file, so that a client that cannot list folders finds all.
    consolidate(folder / CELLS)

    latent = zarr.open_group(folder / LATENT, mode="w", zarr_format=3)
    for key in _SHARES[2:]:
        if getattr(cells, key) is not None:
            _write(latent, key, getattr(cells, key))
    for key in _CODES:
        if getattr(cells.codes, key) is not None:
            _write(latent, key, getattr(cells.codes, key))
    kept = latent.create_group("normalisers")
    for i, (key, values) in enumerate(cells.normalisers.items()):
        _write(kept, str(i), values)
        kept[str(i)].attrs["key"] = list(key)


def _write(group: Any, key: str, values: NDArray[Any]) -> None:
    array = create_array(group, key, values.shape, values.dtype, _ROWS)
    for start in range(0, len(values), _ROWS):
        array[start : start + _ROWS] = values[start : start + _ROWS]


def write_index(folder: Path, **about: Any) -> None:
    """Write `INDEX`: what it is, and the size and checksum of every other file."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / INDEX).write_text(json.dumps({"format": FORMAT, **about, "files": files}, indent=1))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------


def read_index(folder: Path, *, verify: bool) -> dict[str, Any]:
    """What `write_index` wrote, after a look at all files.

    Args:
        folder: of the published atlas.
        verify: read them all, and compare their checksums.

    Raises:
        StoreError: the folder is no published atlas.
        VersionError: it was written by a newer atlasvi.
        CorruptError: a file is missing, or is not what it was; it is named.
    """
    place = folder / INDEX
    if not place.is_file():
        raise StoreError(
            f"{str(folder)!r} is no published atlas: it has no {INDEX}; make one: atlasvi publish"
        )
    try:
        found: dict[str, Any] = json.loads(place.read_text())
        written, files = int(found["format"]), dict(found["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{str(place)!r} is damaged ({error}); copy the folder again") from error
    if written > FORMAT:
        raise VersionError(
            f"{str(folder)!r} has format {written}, this atlasvi reads up to {FORMAT}: "
            "pip install --upgrade atlasvi"
        )

    def check(name: str) -> None:
        path, said = folder / name, files[name]
        if not path.is_file():
            raise CorruptError(f"{str(folder)!r} lacks {name!r}; copy the folder again")
        size = path.stat().st_size
        if size != said["bytes"]:
            raise CorruptError(
                f"{str(path)!r} has {size:,} bytes of {said['bytes']:,}; copy the folder again"
            )
        if verify and _checksum(path) != said["sha256"]:
            raise CorruptError(f"the checksum of {str(path)!r} is not that of its publication; copy it again")

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(check, files))
    return found


def read_cells(folder: Path, n_vars: int) -> Encoded:
    """The latents of a published atlas, as `write_cells` left them."""
    group: Any = zarr.open_group(folder / CELLS, mode="r")
    latent: Any = zarr.open_group(folder / LATENT, mode="r")

    def share(key: str) -> Any:
        return latent[key][...] if key in latent else None

    codes = Codes(**{key: share(key) for key in _CODES}, gene_columns=np.arange(n_vars))
    names = index(group["obs"])
    about = json.loads((folder / INDEX).read_text())
    cells = Encoded(
        group["obsm/X_scVI"][...], group["obsm/X_scVI_scale"][...], share("library"), share("library_scale"),
        codes, share("rows"), lambda start, stop: read_strings(names, slice(start, stop)), about["weights"],
    )  # fmt: skip
    for _, array in latent["normalisers"].arrays():
        seed, sample, code, precision = array.attrs["key"]
        cells.normalisers[seed, sample, code, precision] = array[...]
    return cells


class PublishedCells(Source):
    """Names and columns of a published atlas, for questions of which cells; there are no counts to read.

    Args:
        folder: of the published atlas.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._group: Any = zarr.open_group(folder / CELLS, mode="r")

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._folder)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        n_obs, n_vars = (int(index(self._group[table]).shape[0]) for table in ("obs", "var"))
        return n_obs, n_vars

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells."""
        return read_strings(index(self._group["obs"]))

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return read_strings(index(self._group["var"]))

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs that were published."""
        return keys(self._group["obs"])

    def obs_column(self, key: str) -> Any:
        """One of them."""
        return read_column(self._group["obs"], key)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Refused.

        Raises:
            OptionError: always.
        """
        raise OptionError(f"{self.name!r} is a published atlas, which has no counts; ask the atlas it is of")


# --- rho as a Zarr store --------------------------------------------------------------------------


class RhoStore(WrapperStore[LocalStore]):
    """A read-only Zarr store: an AnnData whose layer ``rho`` is decoded, chunk by chunk, when it is read.

    rho is that of sample 0 of seed 0, each cell in its own batch. A read of more than 2 GiB at once is
    refused.

    Args:
        folder: of the published atlas.
        module: of its model.
        cells: its latents.
        n_vars: genes of the model.
    """

    def __init__(self, folder: Path, module: torch.nn.Module, cells: Encoded, n_vars: int) -> None:
        super().__init__(LocalStore(folder / CELLS, read_only=True))
        self.folder = folder
        self._module, self._cells, self._n_vars = module.eval(), cells, n_vars
        self._grid = -(-len(cells) // CHUNK[0]), -(-n_vars // CHUNK[1])
        self._at_work = threading.BoundedSemaphore(default_workers())

    def __str__(self) -> str:
        return f"rho of {str(self.folder)!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RhoStore) and other.folder == self.folder

    __hash__ = None  # type: ignore[assignment]

    def with_read_only(self, read_only: bool = False) -> RhoStore:
        """The same: it cannot be written to.

        Raises:
            OptionError: it is to be written to.
        """
        if not read_only:
            raise OptionError(f"{self} is decoded when read and cannot be written to; open it with mode='r'")
        return RhoStore(self.folder, self._module, self._cells, self._n_vars)

    def chunk_of(self, key: str) -> tuple[int, int] | None:
        """Row and column in the grid of chunks, if the key is that of a chunk of rho."""
        parts = key.removeprefix(f"{RHO}/c/").split("/") if key.startswith(f"{RHO}/c/") else []
        if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
            return None
        i, j = int(parts[0]), int(parts[1])
        return (i, j) if i < self._grid[0] and j < self._grid[1] and f"{RHO}/c/{i}/{j}" == key else None

    def decode(self, i: int, j: int) -> bytes:
        """The bytes of a chunk, of which what lies beyond the last cell or gene is NaN."""
        rows, columns = CHUNK
        genes = torch.arange(j * columns, min((j + 1) * columns, self._n_vars))
        start, stop = i * rows, min((i + 1) * rows, len(self._cells))
        device = next(self._module.parameters()).device
        chunk = np.full(CHUNK, np.nan, np.dtype("<f4"))
        with self._at_work:
            found = np.empty((stop - start, len(genes)), np.float32)
            answer = Decoding(self._module, Request(genes.to(device)), self._cells, self._n_vars)
            answer(self._cells.read(start, stop, device), found)
        chunk[: stop - start, : len(genes)] = found
        return chunk.tobytes()

    def read(self, key: str) -> bytes | None:
        """A file or a chunk, or ``None`` where there is neither; for who is not asynchronous."""
        at = self.chunk_of(key)
        if at is not None:
            return self.decode(*at)
        path = self.folder / CELLS / key
        # Neither "..", nor a link that leads elsewhere.
        if not path.resolve().is_relative_to((self.folder / CELLS).resolve()) or not path.is_file():
            return None
        return path.read_bytes()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of a key: see `zarr.abc.store.Store`.

        Raises:
            OptionError: it is of a read of more than 2 GiB.
        """
        prototype = prototype or default_buffer_prototype()
        at = self.chunk_of(key)
        if at is None:
            return await super().get(key, prototype, byte_range)
        # zarr makes a task for each chunk of a read before it reads the first, and a few more.
        n_bytes = 4 * CHUNK[0] * CHUNK[1] * len(asyncio.all_tasks())
        if n_bytes > LARGEST_READ:
            whole = 4 * len(self._cells) * self._n_vars
            raise OptionError(
                f"a read of about {n_bytes / 2**30:.1f} GiB of rho at once is refused (all of it is "
                f"{whole / 2**30:.1f} GiB); slice it, or read it lazily: dask.array.from_zarr"
            )
        value = await asyncio.to_thread(self.decode, *at)
        return prototype.buffer.from_bytes(within(value, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several values: see `zarr.abc.store.Store`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is a key: see `zarr.abc.store.Store`."""
        return self.chunk_of(key) is not None or await super().exists(key)

    async def list(self) -> AsyncIterator[str]:
        """All keys; chunks of rho among them."""
        async for key in super().list():
            yield key
        for i in range(self._grid[0]):
            for j in range(self._grid[1]):
                yield f"{RHO}/c/{i}/{j}"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin so."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names in a folder."""
        place = prefix.strip("/")
        if place == f"{RHO}/c" or place.startswith(f"{RHO}/c/"):
            row = place.removeprefix(f"{RHO}/c").strip("/")
            for k in range(self._grid[1] if row else self._grid[0]):
                yield str(k)
            return
        async for name in super().list_dir(prefix):
            yield name
        if place == RHO:
            yield "c"


def within(value: bytes, byte_range: ByteRequest | None) -> bytes:
    """The part of some bytes that is asked for."""
    if isinstance(byte_range, RangeByteRequest):
        return value[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return value[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return value[max(0, len(value) - byte_range.suffix) :]
    return value


__all__ = ["RhoStore", "fill_normalisers", "read_cells", "read_index", "within", "write_cells", "write_index"]
