"""Readers of row ranges out of one matrix: on disk or in memory, sparse or dense."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import scipy.sparse as sp
import zarr
from atlasvi_kernels import CSR
from numpy.typing import NDArray
from zarr.storage import LocalStore

from atlasvi.errors import CorruptError, OptionError, StoreError
from atlasvi.store.hdf5 import ChunkedVector
from atlasvi.store.offsets import Offsets
from atlasvi.store.remote import RemoteStore, RemoteVector, side_by_side
from atlasvi.store.shards import DamagedShard, ShardedVector

_ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
_COUNTS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32))
_config_lock = threading.Lock()


class Rows(Protocol):
    """Reads rows of one matrix."""

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows, or ``None`` where that is not known before reading."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        ...

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        ...


def with_zarrs(make: Callable[[], Any]) -> Any:
    """The zarr array (or arrays) that ``make`` opens or creates, with zarrs as the codec pipeline.

    An array keeps the pipeline it was opened with, so the process-wide setting is back as it was on return.
    """
    with _config_lock, zarr.config.set(_ZARRS):
        return make()


def member(group: Any, key: str) -> Any:
    """An array of an HDF5 or Zarr group, to be read as fast as where it lies allows."""
    if isinstance(group, zarr.Group) and isinstance(group.store, LocalStore):
        return with_zarrs(lambda: group[key])
    array = group[key]
    return (ChunkedVector.of(array) or array) if isinstance(array, h5py.Dataset) else array


def plain(values: NDArray[Any], place: str) -> NDArray[Any]:
    """The same numbers in a type that `CSR` takes.

    Raises:
        OptionError: values that are not real numbers.
    """
    if values.dtype in _COUNTS:
        return values
    if values.dtype.kind not in "biuf":
        raise OptionError(f"{place} holds {values.dtype} where counts must be numbers; convert it first")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    wider = {"bool": np.uint8, "float16": np.float32, "longdouble": np.float64, "uint64": np.float64}
    # An uint64 beyond 2**53 loses digits in float64, but is far above any count that is accepted.
    return values.astype(wider[values.dtype.name]) if values.dtype.name in wider else values


class MemoryRows:
    """A matrix in memory: CSR, CSC (converted once), dense, or a Dask array of any of these."""

    def __init__(self, matrix: Any, place: str) -> None:
        if sp.issparse(matrix) and matrix.format != "csr":
            matrix = matrix.tocsr()
        self._matrix = matrix
        self._place = place
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.indptr: NDArray[np.int64] | None = (
            np.asarray(matrix.indptr, np.int64) if sp.issparse(matrix) else None
        )

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        part = self._matrix[start:stop]
        if hasattr(part, "dask"):
            # In this thread: the caller already decides how many blocks are read at a time.
            part = part.compute(scheduler="synchronous")
        if not sp.issparse(part):
            part = np.asarray(part)
            # scipy's matrices have no half precision.
            part = sp.csr_matrix(part.astype(np.float32) if part.dtype == np.float16 else part)
        part = part.tocsr()
        if not part.has_canonical_format:
            part = part.copy()
            part.sum_duplicates()
        return CSR.from_numpy(part.indptr, part.indices, plain(part.data, self._place), self.shape[1])


class BackedRows:
    """The X of a backed AnnData, read by its own slicing, one thread at a time."""

    def __init__(self, matrix: Any, place: str) -> None:
        self._inner = MemoryRows(_Sliced(matrix), place)
        self.shape = self._inner.shape
        self.indptr: NDArray[np.int64] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        with self._lock:
            return self._inner.read(start, stop)


class _Sliced:
    """Lets `MemoryRows` slice an on-disk matrix by rows."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix
        self.shape = matrix.shape

    def __getitem__(self, rows: slice) -> Any:
        return self._matrix[rows]


class DenseRows:
    """A dense matrix on disk, read in slabs of rows that are made sparse at once."""

    def __init__(self, array: Any, place: str) -> None:
        self._array = array
        self._place = place
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        self.indptr = None

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        with reading(self._place, start, stop):
            part = sp.csr_matrix(plain(np.asarray(self._array[start:stop]), self._place))
        return CSR.from_numpy(part.indptr, part.indices, part.data, self.shape[1])


class SparseRows:
    """A CSR matrix on disk: three arrays of an HDF5 or Zarr group.

    Args:
        indptr: the offsets, kept as `Offsets` (2 bytes a cell).
        indices: array with ``[a:b]``.
        data: array with ``[a:b]``.
        n_vars: number of columns.
        place: file and group, for errors.

    Raises:
        CorruptError: offsets that cannot be, on opening.
    """

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        data: Any,
        n_vars: int,
        place: str,
    ) -> None:
        with reading(place, 0, indptr.shape[0] - 1):
            self.indptr: Any = Offsets(indptr)
        self._indices, self._data, self._place = indices, data, place
        self.shape = (len(self.indptr) - 1, int(n_vars))
        lengths = int(indices.shape[0]), int(data.shape[0])
        if self.indptr[0] != 0 or self.indptr.falls or not self.indptr[-1] == lengths[0] == lengths[1]:
            raise CorruptError(
                f"{place}: indptr runs from {self.indptr[0]} to {self.indptr[-1]} where there are "
                f"{lengths[0]} indices and {lengths[1]} values; the file is damaged, write it again"
            )

    def read(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        offsets = self.indptr[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        try:
            with reading(self._place, start, stop):
                indices, data = self._entries(slice(first, last))
        except DamagedShard as damaged:
            at = [damaged.first, damaged.last - 1]
            rows = np.searchsorted(self.indptr, at, side="right") - 1
            raise CorruptError(
                f"{damaged}: the counts of rows {rows[0]} to {rows[1]} are damaged; "
                "copy the atlas again or ingest it again"
            ) from damaged
        indices = _index_type(indices)
        is_checked = isinstance(self._indices, ShardedVector)  # by checksums
        if len(indices) and not is_checked and not 0 <= indices.min() <= indices.max() < self.shape[1]:
            raise CorruptError(
                f"{self._place}: a column outside 0 to {self.shape[1] - 1} in rows {start} to {stop}; "
                "the file is damaged, write it again"
            )
        return CSR.from_numpy(offsets - first, indices, plain(data, self._place), self.shape[1])

    def _entries(self, run: slice) -> tuple[NDArray[Any], NDArray[Any]]:
        if isinstance(self._indices, RemoteVector) and isinstance(self._data, RemoteVector):
            return side_by_side(self._indices, self._data, run)
        return self._indices[run], self._data[run]


def _index_type(indices: NDArray[Any]) -> NDArray[Any]:
    if indices.dtype == np.uint64 or not indices.dtype.isnative:
        return indices.astype(np.int64)
    return indices


class reading(AbstractContextManager[None]):
    """Turns what a reader raises inside the block into a `CorruptError` naming file and rows.

    A `StoreError`, which says itself what is wrong, as where a server does not answer, is told the rows.
    """

    def __init__(self, place: str, start: int, stop: int) -> None:
        self._where = f"{place}: rows {start} to {stop} cannot be read"

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StoreError):
            raise type(error)(f"{self._where}: {error}") from error
        if isinstance(error, (OSError, RuntimeError, ValueError, EOFError)):
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptError(
                f"{self._where} ({detail}); the file is truncated or damaged, copy or write it again"
            ) from error


def group_rows(group: Any, key: str, place: str, *, is_ours: bool) -> Rows:
    """The reader of the matrix ``group[key]`` of an HDF5 or Zarr file.

    Args:
        group: h5py or zarr group.
        key: where the matrix is, as ``"X"`` or ``"layers/counts"``.
        place: file and matrix, for errors.
        is_ours: whether `ingest` made it, so that a shard that is missing is damage.

    Raises:
        OptionError: a matrix of a kind that is not known.
    """
    node = group[key]
    if not hasattr(node, "keys"):
        return DenseRows(member(group, key), place)
    encoding = str(node.attrs.get("encoding-type", ""))
    if encoding != "csr_matrix":
        raise OptionError(
            f"{place} is stored as {encoding or 'an unknown kind of matrix'}, which cannot be read by cells; "
            "convert it first: adata.X = adata.X.tocsr(), then write it again"
        )
    n_vars = int(node.attrs["shape"][1])
    vector = _vector if is_ours and isinstance(group, zarr.Group) else member
    return SparseRows(node["indptr"], vector(node, "indices"), vector(node, "data"), n_vars, place)


def _vector(group: zarr.Group, key: str) -> Any:
    """A long array of an atlas, straight from its shards where they are laid out as `ingest` does."""
    array: Any = member(group, key)
    if isinstance(group.store, RemoteStore):
        return RemoteVector.of(array.store_path, array) or array
    if isinstance(group.store, LocalStore):
        return ShardedVector.of(Path(group.store.root, array.path), array) or array
    return array


__all__ = [
    "BackedRows",
    "DenseRows",
    "MemoryRows",
    "Rows",
    "SparseRows",
    "group_rows",
    "member",
    "plain",
    "reading",
    "with_zarrs",
]
