"""Where counts come from: AnnData files and objects, 10x files, Matrix Market folders, one interface.

`open_source` says what a path holds by looking into it, never by its ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray

from atlasvi.errors import AtlasviError, CorruptError, NotAnAtlasError, OptionError, StoreError
from atlasvi.store import frame
from atlasvi.store.base import Extras, Source
from atlasvi.store.columns import ColumnRows
from atlasvi.store.remote import is_url, open_group
from atlasvi.store.rows import BackedRows, MemoryRows, Rows, SparseRows, group_rows, member, reading
from atlasvi_kernels import CSR

FORMAT = 1
RAW = "raw"


def open_source(
    what: str | Path | anndata.AnnData | Source, layer: str | None = None, *, scratch: Path | None = None
) -> Source:
    """Open whatever holds counts.

    Args:
        what: an AnnData ``.h5ad`` or ``.zarr`` (an atlas is one), the URL of a Zarr one, a 10x ``.h5``, a
            folder with ``matrix.mtx``, an AnnData (in memory, backed or lazy), or any `Source`, returned as
            it is.
        layer: where the counts are: ``None`` for ``X``, the name of a layer, or ``"raw"`` for ``raw.X``.
        scratch: folder for temporary files (Matrix Market, and what is stored by genes, is put into rows on
            disk); by default the system's.

    Raises:
        StoreError: no such file, or one in a format that is not known; a server that does not answer.
        NotAnAtlasError: a folder that is none of these, or that an ingest never finished.
        CorruptError: a truncated or damaged file.
        OptionError: the layer is not there, or the matrix is of a kind that is not known.
    """
    if isinstance(what, anndata.AnnData):
        return AnnDataSource(what, layer, scratch)
    if not isinstance(what, (str, Path)):
        if not hasattr(what, "read_rows"):
            kind = type(what).__name__
            raise OptionError(f"counts cannot be read from a {kind}; pass a path or an AnnData")
        return _as_it_is(what, layer)
    if is_url(what):
        return _zarr_source(lambda: open_group(str(what)), str(what), None, layer, scratch)
    path = Path(what)
    if not path.exists():
        raise StoreError(f"no such file or folder: {str(path)!r}")
    if path.name in ("matrix.mtx", "matrix.mtx.gz"):
        path = path.parent
    if path.is_dir():
        return _open_folder(path, layer, scratch)
    return _open_hdf5(path, layer, scratch)


def _as_it_is(what: Any, layer: str | None) -> Source:
    if not isinstance(what, Source):
        what = OtherSource(what)
    return what if layer is None or layer == what.layer else what.other(layer)


def _open_folder(path: Path, layer: str | None, scratch: Path | None) -> Source:
    from atlasvi.store.mtx import MtxSource, is_mtx_folder

    if is_mtx_folder(path):
        _only_x(path, layer)
        return MtxSource(path, scratch)
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        raise NotAnAtlasError(
            f"{str(path)!r} is not an atlas: neither a Zarr store nor a folder with matrix.mtx; give the "
            "folder that `atlasvi ingest` wrote"
        )
    return _zarr_source(lambda: zarr.open_group(path, mode="r"), str(path), path, layer, scratch)


def _zarr_source(
    open_it: Callable[[], zarr.Group], name: str, path: Path | None, layer: str | None, scratch: Path | None
) -> Source:
    try:
        group = open_it()
    except AtlasviError:
        raise
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise CorruptError(f"{name!r}: damaged Zarr metadata ({error}); copy it again") from error
    if group.attrs.get("encoding-type") != "anndata":
        raise NotAnAtlasError(
            f"{name!r} is a Zarr store but not an AnnData (an ingest that never finished?); ingest again"
        )
    return GroupSource(group, name, path, layer, scratch)


def _open_hdf5(path: Path, layer: str | None, scratch: Path | None) -> Source:
    with path.open("rb") as file:
        if file.read(8) != b"\x89HDF\r\n\x1a\n":
            raise StoreError(
                f"{str(path)!r} is in a format that is not known; give an .h5ad, a .zarr, a 10x .h5 or a "
                "folder with matrix.mtx, barcodes.tsv and features.tsv"
            )
    try:
        group = h5py.File(path, "r")
    except OSError as error:
        raise CorruptError(f"{str(path)!r} is truncated ({error}); copy it again") from error
    try:
        return _hdf5_source(group, path, layer, scratch)
    except BaseException:
        group.close()
        raise


def _hdf5_source(group: h5py.File, path: Path, layer: str | None, scratch: Path | None) -> Source:
    if "obs" in group and "var" in group:
        if not isinstance(group["obs"], h5py.Group):
            raise StoreError(f"{str(path)!r} is of anndata < 0.7; read it with anndata and write it again")
        return GroupSource(group, str(path), path, layer, scratch)
    tables = [key for key in group if isinstance(group[key], h5py.Group) and "barcodes" in group[key]]
    if len(tables) == 1:
        _only_x(path, layer)
        return TenxSource(group, group[tables[0]], path)
    if tables:
        genomes = ", ".join(tables)
        raise StoreError(f"{str(path)!r} holds several genomes ({genomes}); write each to its own file")
    raise StoreError(f"{str(path)!r} is HDF5 but neither an AnnData nor a 10x matrix")


def _only_x(path: Path, layer: str | None) -> None:
    if layer is not None:
        raise OptionError(f"{str(path)!r} holds one matrix and no layer {layer!r}; leave layer out")


def _matrix_place(layer: str | None, layers: list[str], has_raw: bool, name: str) -> tuple[str, str]:
    """Key in an AnnData group and words for an error, of the matrix that ``layer`` means."""
    if layer is None:
        return "X", "X"
    if layer in layers:
        return f"layers/{layer}", f"layers[{layer!r}]"
    if layer == RAW and has_raw:
        return "raw/X", "raw.X"
    known = [*(repr(key) for key in layers), *(["'raw'"] if has_raw else [])]
    choice = f"there are {', '.join(known)}, or leave layer out for X" if known else "leave layer out for X"
    raise OptionError(f"{name!r} has no layer {layer!r}; {choice}")


class OtherSource(Source):
    """Any object with the properties and methods of a `Source`, without being one.

    It must have ``name``, ``shape``, ``obs_names``, ``var_names`` and ``read_rows``; columns of obs and var
    and ``read_names`` are used where they are there.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.layer = getattr(inner, "layer", None)

    @property
    def name(self) -> str:
        """Its own name."""
        return str(self._inner.name)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        n_obs, n_vars = self._inner.shape
        return int(n_obs), int(n_vars)

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows, if it knows them."""
        return getattr(self._inner, "indptr", None)

    @cached_property
    def _names(self) -> NDArray[Any]:
        return frame.to_strings(self._inner.obs_names)

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells."""
        return self._names

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of some cells."""
        read = getattr(self._inner, "read_names", None)
        return self._names[start:stop] if read is None else frame.to_strings(read(start, stop))

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return frame.to_strings(self._inner.var_names)

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs."""
        return list(getattr(self._inner, "obs_keys", ()))

    def obs_column(self, key: str) -> Any:
        """One column of obs."""
        return frame.plain_column(self._inner.obs_column(key))

    @property
    def var_keys(self) -> list[str]:
        """Columns of var."""
        return list(getattr(self._inner, "var_keys", ()))

    def var_column(self, key: str) -> Any:
        """One column of var."""
        return frame.plain_column(self._inner.var_column(key))

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        rows: CSR = self._inner.read_rows(start, stop)
        return rows


class GroupSource(Source):
    """An AnnData in an HDF5 file or a Zarr store.

    Args:
        group: h5py or zarr group.
        name: path or URL.
        path: of what is on disk, else ``None``.
        layer: where the counts are.
        scratch: folder for temporary files.
    """

    def __init__(
        self, group: Any, name: str, path: Path | None, layer: str | None, scratch: Path | None = None
    ) -> None:
        self._group, self._name, self.path, self.layer, self._scratch = group, name, path, layer, scratch
        self._format = dict(group.attrs).get("atlasvi")
        self.is_checked = self._format is not None
        self.is_shuffled = self._format is not None and bool(self._format["shuffle"])
        if self._format is not None and int(self._format["format"]) > FORMAT:
            raise StoreError(
                f"{name!r} has format {self._format['format']}, made by a newer atlasvi; this one reads "
                f"up to {FORMAT}: upgrade atlasvi"
            )
        layers = _members(group, "layers")
        if layer is not None and layer not in layers and f"layers/{layer}" in group:
            layers.append(layer)  # of a server that does not list what it has
        key, self._place = _matrix_place(layer, layers, "raw/X" in group, name)
        if key not in group:
            raise StoreError(f"{name!r} has no {self._place}; name the layer with counts: layer=...")
        self._var = group["raw/var"] if key == "raw/X" else group["var"]
        place = f"{name!r} {self._place}"
        self.by_genes = _is_by_genes(group[key])
        self._rows: Rows = (
            ColumnRows(group[key], place, scratch)
            if self.by_genes
            else group_rows(group, key, place, is_ours=self._format is not None)
        )
        self._check_shape()

    def _check_shape(self) -> None:
        names = tuple(int(frame.index(table).shape[0]) for table in (self._group["obs"], self._var))
        if names != self._rows.shape:
            raise CorruptError(
                f"{self._name!r}: {self._place} has shape {self._rows.shape} but there are names of "
                f"{names[0]} cells and {names[1]} genes; write it again"
            )

    @property
    def name(self) -> str:
        """The path or URL."""
        return self._name

    @property
    def attributes(self) -> dict[str, Any] | None:
        """What `ingest` wrote about the atlas, or ``None`` where this is not one."""
        return self._format

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._rows.shape

    @property
    def place(self) -> str:
        """Which matrix."""
        return self._place

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows."""
        return self._rows.indptr

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells."""
        return self.read_names(0, self.shape[0])

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of some cells, read from disk."""
        with reading(f"{self.name!r} obs_names", start, stop):
            return frame.read_strings(frame.index(self._group["obs"]), slice(start, stop))

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        with reading(f"{self.name!r} var_names", 0, self.shape[1]):
            return frame.read_strings(frame.index(self._var))

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs."""
        return frame.keys(self._group["obs"])

    def obs_column(self, key: str) -> Any:
        """One column of obs."""
        with reading(f"{self.name!r} obs[{key!r}]", 0, self.shape[0]):
            return frame.read_column(self._group["obs"], key)

    @property
    def var_keys(self) -> list[str]:
        """Columns of var."""
        return frame.keys(self._var)

    def var_column(self, key: str) -> Any:
        """One column of var."""
        with reading(f"{self.name!r} var[{key!r}]", 0, self.shape[1]):
            return frame.read_column(self._var, key)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        return self._rows.read(start, stop)

    def extras(self) -> Extras:
        """What is in obsm and uns, and the names of the rest."""
        group = self._group
        obsm = {key: group["obsm"][key] for key in _members(group, "obsm")}
        arrays = {key: node for key, node in obsm.items() if not hasattr(node, "keys")}
        frames = tuple(k for k, node in obsm.items() if node.attrs.get("encoding-type") == "dataframe")
        others = [key for key in obsm if key not in arrays and key not in frames]
        left_out = [f"obsm[{key!r}]" for key in others]
        for part in ("obsp", "varm", "varp"):
            left_out += [f"{part}[{key!r}]" for key in _members(group, part)]
        if not _lists(group):
            left_out.append("obsm, uns and the rest, as the server does not list what it has")
        elsewhere = (["X"] if "X" in group else []) + _members(group, "layers")
        elsewhere += [RAW] if "raw/X" in group else []
        mine = self.layer if self.layer is not None else "X"
        uns = (lambda: dict(read_elem(group["uns"]))) if _members(group, "uns") else None
        return Extras(arrays, frames, uns, tuple(left_out), tuple(key for key in elsewhere if key != mine))

    def obsm_frame(self, key: str) -> Any:
        """One table of obsm."""
        return read_elem(self._group["obsm"][key])

    def other(self, layer: str | None) -> Source:
        """The same file, another matrix."""
        return GroupSource(self._group, self._name, self.path, layer, self._scratch)

    def values(self, n: int) -> Iterator[NDArray[Any]]:
        """Some values."""
        return self._rows.values(n) if isinstance(self._rows, ColumnRows) else super().values(n)

    def close(self) -> None:
        """Close the file, and remove what was put into rows."""
        if isinstance(self._rows, ColumnRows):
            self._rows.close()
        if isinstance(self._group, h5py.File):
            self._group.close()


def _lists(group: Any) -> bool:
    """Whether it is known which members a group has: not over HTTP, unless metadata are consolidated."""
    is_remote = isinstance(group, zarr.Group) and not group.store.supports_listing
    return not is_remote or group.metadata.consolidated_metadata is not None


def _members(group: Any, key: str) -> list[str]:
    """Names of the members of ``group[key]``, as far as that is known."""
    return list(group[key]) if _lists(group) and key in group else []


class AnnDataSource(Source):
    """An AnnData object: in memory, backed by a file, or lazy."""

    def __init__(self, adata: anndata.AnnData, layer: str | None, scratch: Path | None = None) -> None:
        self.layer = layer
        self._adata, self._scratch = adata, scratch
        layers = [str(key) for key in adata.layers]
        key, self._place = _matrix_place(layer, layers, adata.raw is not None, "AnnData")
        raw = key == "raw/X"
        matrix = adata.raw.X if raw else adata.X if layer is None else adata.layers[layer]
        if matrix is None:
            raise OptionError("AnnData has no X; name the layer that holds counts: layer=...")
        if adata.isbacked and adata.is_view:
            raise OptionError("this is a view of a backed AnnData; pass adata.to_memory(), or all of it")
        self._rows = _anndata_rows(matrix, f"AnnData {self._place}", scratch)
        self.by_genes = isinstance(self._rows, ColumnRows)
        self._var = adata.raw.var if raw else adata.var

    @property
    def in_memory(self) -> bool:
        """Whether the counts are in the memory of this process already."""
        return not self._adata.isbacked

    @property
    def name(self) -> str:
        """``AnnData``."""
        return "AnnData"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._rows.shape

    @property
    def place(self) -> str:
        """Which matrix."""
        return self._place

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows, of a sparse matrix in memory."""
        return self._rows.indptr

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells."""
        return frame.to_strings(self._adata.obs_names)

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of some cells."""
        return frame.to_strings(self._adata.obs_names[start:stop])

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return frame.to_strings(self._var.index)

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs."""
        return [str(key) for key in self._adata.obs.columns]

    def obs_column(self, key: str) -> Any:
        """One column of obs."""
        return _column(self._adata.obs, key)

    @property
    def var_keys(self) -> list[str]:
        """Columns of var."""
        return [str(key) for key in self._var.columns]

    def var_column(self, key: str) -> Any:
        """One column of var."""
        return _column(self._var, key)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        return self._rows.read(start, stop)

    def extras(self) -> Extras:
        """What is in obsm and uns, and the names of the rest."""
        adata = self._adata
        arrays = {k: v for k, v in adata.obsm.items() if isinstance(v, np.ndarray) or hasattr(v, "dask")}
        frames = tuple(k for k, v in adata.obsm.items() if hasattr(v, "columns"))
        left_out = [f"obsm[{key!r}]" for key in adata.obsm if key not in arrays and key not in frames]
        for part in ("obsp", "varm", "varp"):
            left_out += [f"{part}[{key!r}]" for key in getattr(adata, part)]
        elsewhere = (["X"] if adata.X is not None else []) + [str(key) for key in adata.layers]
        elsewhere += [RAW] if adata.raw is not None else []
        mine = self.layer if self.layer is not None else "X"
        uns = (lambda: dict(adata.uns)) if len(adata.uns) else None
        return Extras(arrays, frames, uns, tuple(left_out), tuple(key for key in elsewhere if key != mine))

    def obsm_frame(self, key: str) -> Any:
        """One table of obsm."""
        table = self._adata.obsm[key]
        return table.to_memory() if hasattr(table, "to_memory") else table

    def other(self, layer: str | None) -> Source:
        """The same object, another matrix."""
        return AnnDataSource(self._adata, layer, self._scratch)

    def values(self, n: int) -> Iterator[NDArray[Any]]:
        """Some values."""
        return self._rows.values(n) if isinstance(self._rows, ColumnRows) else super().values(n)

    def close(self) -> None:
        """Remove what was put into rows; the AnnData stays as it is."""
        if isinstance(self._rows, ColumnRows):
            self._rows.close()


def _column(table: Any, key: str) -> Any:
    # A lazy table's column alone forgets its categories; the table, when it is read, does not.
    return frame.plain_column((table[[key]].to_memory() if hasattr(table, "to_memory") else table)[key])


def _anndata_rows(matrix: Any, place: str, scratch: Path | None) -> Rows:
    if isinstance(matrix, anndata.abc.CSCDataset):
        return ColumnRows(matrix.group, place, scratch)
    is_lazy_csc = hasattr(matrix, "dask") and getattr(matrix._meta, "format", None) == "csc"
    if is_lazy_csc and matrix.numblocks[0] == 1:
        raise OptionError(
            f"{place} is lazy and stored as csc_matrix, by genes: each block of cells would take a read of "
            "all of it; make an atlas of the file: atlasvi.ingest('data.h5ad', 'atlas.zarr')"
        )
    on_disk = isinstance(matrix, (h5py.Dataset, anndata.abc.CSRDataset))
    return BackedRows(matrix, place) if on_disk else MemoryRows(matrix, place)


def _is_by_genes(node: Any) -> bool:
    return hasattr(node, "keys") and node.attrs.get("encoding-type") == "csc_matrix"


class TenxSource(Source):
    """A 10x Genomics ``.h5``: genes x cells by columns, which is cells x genes by rows.

    Only features of type "Gene Expression" are kept (antibodies, guides and peaks are not counts of
    genes); what was left out is named.
    """

    def __init__(self, file: h5py.File, group: h5py.Group, path: Path) -> None:
        self._file, self._group, self.path = file, group, path
        n_features, n_obs = (int(n) for n in group["shape"][...])
        where = f"{str(path)!r} {group.name}"
        self._rows = SparseRows(
            group["indptr"], member(group, "indices"), member(group, "data"), n_features, where
        )
        features = group["features"] if "features" in group else group
        self._ids = features["id"] if "id" in features else features["genes"]
        self._symbols = features["name"] if "name" in features else features["gene_names"]
        self._kept = np.arange(n_features)
        self._left_out: tuple[str, ...] = ()
        if "feature_type" in features:
            self._keep_genes(frame.read_strings(features["feature_type"]))
        self._shape = (n_obs, len(self._kept))
        if not n_obs == self._rows.shape[0] == len(group["barcodes"]):
            raise CorruptError(
                f"{where}: {n_obs} cells in shape, {self._rows.shape[0]} in indptr, {len(group['barcodes'])} "
                "barcodes; the file is damaged, copy it again"
            )

    def _keep_genes(self, kinds: NDArray[Any]) -> None:
        is_gene = kinds == "Gene Expression"
        if not is_gene.any():
            raise OptionError(f"{str(self.path)!r} has no features of type 'Gene Expression'")
        others, counts = np.unique(kinds[~is_gene], return_counts=True)
        self._left_out = tuple(f"{n} features of type {k!r}" for k, n in zip(others, counts, strict=True))
        self._column_of = np.where(is_gene, np.cumsum(is_gene) - 1, -1)
        self._kept = np.flatnonzero(is_gene)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._shape

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows; unknown where features are left out."""
        return None if self._left_out else self._rows.indptr

    @property
    def obs_names(self) -> NDArray[Any]:
        """Barcodes."""
        return frame.read_strings(self._group["barcodes"])

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Some barcodes."""
        return frame.read_strings(self._group["barcodes"], slice(start, stop))

    @property
    def var_names(self) -> NDArray[Any]:
        """Gene symbols."""
        return frame.read_strings(self._symbols)[self._kept]

    @property
    def var_keys(self) -> list[str]:
        """``gene_ids``."""
        return ["gene_ids"]

    def var_column(self, key: str) -> Any:
        """Gene ids."""
        if key != "gene_ids":
            raise KeyError(key)
        return frame.read_strings(self._ids)[self._kept]

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        part = self._rows.read(start, stop)
        return part.take_columns(self._column_of, self._shape[1]) if self._left_out else part

    def extras(self) -> Extras:
        """The features that are not genes."""
        return Extras(left_out=self._left_out)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


__all__ = ["AnnDataSource", "GroupSource", "OtherSource", "Source", "TenxSource", "open_source"]
