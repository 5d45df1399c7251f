"""Matrix Market folders: text of genes x cells, turned into rows of cells on disk in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import CorruptError, OptionError, StoreError
from atlasvi.store import frame
from atlasvi.store.base import STRING, Extras, Source
from atlasvi.store.rows import SparseRows
from atlasvi.store.spill import FileArray, Spill, append
from atlasvi_kernels import CSR

LINES = 1 << 19
_BROKEN = (ValueError, EOFError, OSError, zlib.error, pd.errors.ParserError)


def is_mtx_folder(path: Path) -> bool:
    """Whether the folder holds ``matrix.mtx`` or ``matrix.mtx.gz``."""
    return _find(path, "matrix.mtx") is not None


class MtxSource(Source):
    """A folder with ``matrix.mtx``, ``barcodes.tsv``, ``features.tsv`` (or ``genes.tsv``), plain or gzipped.

    The text is read once, when rows are first asked for, into temporary files that `close` removes.
    """

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        self.path, self._scratch = path, scratch
        self._matrix = _required(path, "matrix.mtx")
        self._shape_in_file, self._nnz = _header(self._matrix)
        self._names = _table(_required(path, "barcodes.tsv"))[0]
        features = _table(_required(path, "features.tsv", "genes.tsv"))
        n_features, n_obs = len(features[0]), len(self._names)
        if self._shape_in_file not in ((n_features, n_obs), (n_obs, n_features)):
            raise CorruptError(
                f"{str(self._matrix)!r} is {self._shape_in_file[0]} x {self._shape_in_file[1]} but there are "
                f"{n_features} features and {n_obs} barcodes; the folder is not whole, copy it again"
            )
        self._genes_first = self._shape_in_file == (n_features, n_obs)
        self._ids, self._symbols = features[0], features[1] if len(features) > 1 else features[0]
        kinds = features[2] if len(features) > 2 else None
        is_gene = np.ones(n_features, bool) if kinds is None else kinds == "Gene Expression"
        if not is_gene.any():
            raise OptionError(f"{str(path)!r} has no features of type 'Gene Expression'")
        self._column_of = np.where(is_gene, np.cumsum(is_gene) - 1, -1)
        self._kept = np.flatnonzero(is_gene)
        others = [] if kinds is None else zip(*np.unique(kinds[~is_gene], return_counts=True), strict=True)
        self._left_out = tuple(f"{n} features of type {kind!r}" for kind, n in others)
        self._rows: SparseRows | None = None
        self._folder: Path | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return len(self._names), len(self._kept)

    @property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows; asking converts the file."""
        return None if self._left_out else self._converted().indptr

    @property
    def obs_names(self) -> NDArray[Any]:
        """Barcodes."""
        return self._names

    @property
    def var_names(self) -> NDArray[Any]:
        """Gene symbols (ids, where there are no symbols)."""
        return self._symbols[self._kept]

    @property
    def var_keys(self) -> list[str]:
        """``gene_ids``."""
        return ["gene_ids"]

    def var_column(self, key: str) -> Any:
        """Gene ids."""
        if key != "gene_ids":
            raise KeyError(key)
        return self._ids[self._kept]

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        part = self._converted().read(start, stop)
        return part.take_columns(self._column_of, self.shape[1]) if self._left_out else part

    def extras(self) -> Extras:
        """The features that are not genes."""
        return Extras(left_out=self._left_out)

    def close(self) -> None:
        """Remove the temporary files."""
        with self._lock:
            if self._folder is not None:
                shutil.rmtree(self._folder)
            self._folder = self._rows = None

    def _converted(self) -> SparseRows:
        with self._lock:
            if self._rows is None:
                self._rows = self._convert()
            return self._rows

    def _convert(self) -> SparseRows:
        self._folder = Path(tempfile.mkdtemp(prefix="atlasvi-mtx-", dir=self._scratch))
        try:
            files = self._straight()
        except _NotSorted:
            files = self._sorted()
        return SparseRows(*files, len(self._ids), f"{str(self._matrix)!r}")

    def _straight(self) -> tuple[NDArray[np.int64], FileArray, FileArray]:
        """The file's own order, where that is by cells."""
        assert self._folder is not None
        counts, before = np.zeros(len(self._names), np.int64), 0
        indices, values = self._folder / "indices.bin", self._folder / "values.bin"
        with indices.open("wb") as index_file, values.open("wb") as value_file:
            for cells, genes, entries in self._entries():
                if cells[0] < before or bool((cells[1:] < cells[:-1]).any()):
                    raise _NotSorted
                before = int(cells[-1])
                counts[cells[0] : before + 1] += np.bincount(cells - cells[0])
                append(index_file, genes.astype(np.uint32))
                append(value_file, np.ascontiguousarray(entries))
        return _offsets(counts), FileArray(indices, np.uint32), FileArray(values, np.float64)

    def _sorted(self) -> tuple[NDArray[np.int64], FileArray, FileArray]:
        """Sorted by cells through buckets on disk."""
        assert self._folder is not None
        counts = np.zeros(len(self._names), np.int64)
        spill = Spill(self._folder, len(self._names), self._nnz, np.float64)
        for cells, genes, entries in self._entries():
            first = int(cells.min())
            counts[first : int(cells.max()) + 1] += np.bincount(cells - first)
            spill.add(cells, genes, entries)
        indptr = _offsets(counts)
        indices, values = spill.begin_merge(indptr)
        for bucket in range(spill.n_buckets):
            spill.merge(bucket)
        return indptr, indices, values

    def _entries(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
        """Cells, genes (both from 0) and values, a chunk of lines at a time."""
        n_read = 0
        with _text(self._matrix) as file:
            _skip_header(file)
            for table in self._chunks(file):
                first, second = (table[k].to_numpy() for k in (0, 1))
                n_read += len(table)
                limits = zip((first, second), self._shape_in_file, strict=True)
                if any(v.min() < 1 or v.max() > limit for v, limit in limits):
                    raise self._broken("an index outside the matrix")
                genes, cells = (first, second) if self._genes_first else (second, first)
                yield cells - 1, genes - 1, table[2].to_numpy()
        if n_read != self._nnz:
            raise self._broken(f"{n_read} entries of {self._nnz}")

    def _chunks(self, file: io.TextIOBase) -> Iterator[pd.DataFrame]:
        types = {0: np.int64, 1: np.int64, 2: np.float64}
        try:
            yield from pd.read_csv(
                file, sep=r"\s+", header=None, names=[0, 1, 2], dtype=types, chunksize=LINES, comment="%"
            )
        except pd.errors.EmptyDataError:
            return
        except _BROKEN as error:
            raise self._broken(str(error).splitlines()[0]) from error

    def _broken(self, what: str) -> CorruptError:
        return CorruptError(f"{str(self._matrix)!r}: {what}; the file is truncated or damaged, copy it again")


class _NotSorted(Exception):
    """The entries do not come cell by cell."""


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _find(path: Path, *names: str) -> Path | None:
    candidates = [path / (name + end) for name in names for end in ("", ".gz")]
    return next((file for file in candidates if file.is_file()), None)


def _required(path: Path, *names: str) -> Path:
    found = _find(path, *names)
    if found is None:
        raise StoreError(f"{str(path)!r} has matrix.mtx but no {' or '.join(names)} (plain or .gz); add it")
    return found


def _text(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open("rt")


def _skip_header(file: Any) -> tuple[str, str]:
    """Read up to the line of sizes: the banner and that line."""
    banner = file.readline()
    line = file.readline()
    while line.startswith("%") or (line and not line.strip()):
        line = file.readline()
    return banner, line


def _header(path: Path) -> tuple[tuple[int, int], int]:
    """Shape and number of entries."""
    try:
        with _text(path) as file:
            banner, line = _skip_header(file)
        words = banner.lower().split()
        n_rows, n_columns, nnz = (int(word) for word in line.split())
    except _BROKEN as error:
        raise CorruptError(f"{str(path)!r} does not begin as a Matrix Market file; copy it again") from error
    if words[:3] != ["%%matrixmarket", "matrix", "coordinate"] or words[3] not in ("integer", "real"):
        raise OptionError(
            f"{str(path)!r} is a {' '.join(words[1:])!r}; it must be a 'matrix coordinate integer' or 'real'"
        )
    return (n_rows, n_columns), nnz


def _table(path: Path) -> list[NDArray[Any]]:
    """Columns of a tab-separated file without a header, as strings."""
    parts: list[list[NDArray[Any]]] = []
    with contextlib.suppress(pd.errors.EmptyDataError), _text(path) as file:
        tables = pd.read_csv(
            file, sep="\t", header=None, dtype=str, quoting=3, keep_default_na=False, chunksize=1 << 16
        )
        parts = [[frame.to_strings(table[k].to_numpy(object)) for k in table] for table in tables]
    if not parts:
        return [np.zeros(0, STRING)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
