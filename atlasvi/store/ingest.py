"""From files of counts to one atlas on disk, out of core.

Two passes over the inputs. The first checks every value and counts what each cell keeps; with that the
place of every entry in the store is known, so the second writes one shard a task, in any order. A shuffle
spills the entries to disk in between. Everything is written beside the atlas-to-be, in a hidden folder
that takes its name only when whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.errors import CellsError, OptionError, SpaceError, StoreError
from atlasvi.store import frame
from atlasvi.store.base import STRING, Extras, Source
from atlasvi.store.counts import checked_rows
from atlasvi.store.genes import GeneJoin, Join, join_genes
from atlasvi.store.layout import Layout, choose_layout, codecs
from atlasvi.store.merge import merge, take
from atlasvi.store.rows import with_zarrs
from atlasvi.store.sources import FORMAT, open_source
from atlasvi.store.spill import FileArray, Spill, disk_array
from atlasvi.store.tasks import Progress, run_tasks

BLOCK_ENTRIES = 1 << 19
DENSE_BLOCK = 1 << 22
MAX_BLOCK_ROWS = 1 << 14
MAX_WORKERS = 4
BYTES_PER_READ_ENTRY = 48
_FULL = (errno.ENOSPC, errno.EDQUOT)

Input: TypeAlias = str | os.PathLike[str] | anndata.AnnData | Source


@dataclass(frozen=True)
class IngestReport:
    """What `ingest` made.

    Args:
        path: of the atlas.
        n_obs: number of cells.
        n_vars: number of genes.
        nnz: number of counts that are not zero.
        max_count: the largest count.
        n_bytes: size on disk.
        seconds: that it took.
        inputs: names of the inputs, as the input column of obs has them.
        left_out: what the inputs hold and the atlas does not, in words.
        warnings: what a person should know about the data.
    """

    path: Path
    n_obs: int
    n_vars: int
    nnz: int
    max_count: int
    n_bytes: int
    seconds: float
    inputs: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def ingest(
    inputs: Input | Sequence[Input] | Mapping[str, Input],
    out: str | os.PathLike[str],
    *,
    layer: str | None = None,
    join: Join = "inner",
    var_key: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
    input_key: str = "input",
    make_unique: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    memory_budget: int = 512 << 20,
    progress: Progress | None = None,
) -> IngestReport:
    """Write one atlas, an AnnData Zarr store, from one or many inputs, whatever their size.

    Args:
        inputs: one or many of: AnnData ``.h5ad`` or ``.zarr``, 10x ``.h5``, a folder with ``matrix.mtx``,
            an AnnData, a `Source`. A mapping names them; else they are named after their files.
        out: folder to write, such as ``atlas.zarr``.
        layer: where the counts are: ``None`` for ``X``, the name of a layer, or ``"raw"`` for ``raw.X``.
        join: keep the genes that all inputs have (``"inner"``) or all genes (``"outer"``, absent is 0).
        var_key: column of var to match genes by; by default their names.
        shuffle: write the cells in a random order, so that reading in sequence is reading at random.
        seed: of the shuffle.
        input_key: column of obs that says which input a cell came from.
        make_unique: append ``-1``, ``-2``, ... to gene names that repeat, and ``-<input>`` to cell names
            where one repeats; by default a repeat is an error.
        overwrite: replace an atlas that is there.
        workers: threads; by default the number of cores, at most 4.
        memory_budget: bytes for shards being written at a time, which may lower the number of workers.
        progress: called with (what is done, cells done, cells in all).

    Returns:
        What was made, with what was left out.

    Raises:
        CountsError: a value is not a count; the error names it, its cell and gene, and where counts are.
        GenesError: gene names repeat, or the inputs share none.
        CellsError: cell names repeat, or there are no cells.
        OptionError: an argument that is wrong, or does not fit the inputs.
        StoreError: an input cannot be read, or ``out`` is there already.
        SpaceError: the disk is full; nothing is left behind.

    Example:
        >>> import atlasvi, anndata, numpy as np
        >>> adata = anndata.AnnData(np.array([[1.0, 0.0], [0.0, 3.0]], dtype=np.float32))
        >>> atlasvi.ingest(adata, "example.zarr", overwrite=True).nnz
        2
    """
    started = time.perf_counter()
    out = Path(out)
    _check_out(out, overwrite, inputs)
    if workers is not None and workers < 1:
        raise OptionError(f"workers={workers} cannot work; pass 1 or more, or leave it out")
    work = out.with_name(f".{out.name}.ingest")
    shutil.rmtree(work, ignore_errors=True)
    job: _Job | None = None
    try:
        with _naming_a_full_disk(out, lambda: 0 if job is None else job.bytes_needed):
            (work / "scratch").mkdir(parents=True)
            sources, names = _open_all(inputs, layer, work / "scratch")
            try:
                options = _Options(join, var_key, shuffle, seed, input_key, make_unique, layer)
                threads = min(MAX_WORKERS, os.cpu_count() or 1) if workers is None else workers
                job = _Job(sources, names, options, work, threads, memory_budget, progress)
                job.check()
                job.write()
            finally:
                for source in sources:
                    source.close()
            _publish(work / "atlas", out, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for message in job.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    return job.report(out, time.perf_counter() - started)


@dataclass(frozen=True)
class _Options:
    join: Join
    var_key: str | None
    shuffle: bool
    seed: int
    input_key: str
    make_unique: bool
    layer: str | None


@dataclass(frozen=True)
class _Part:
    """Rows of the atlas that come from one source, one after the other."""

    source: Source
    first: int
    column_of: NDArray[np.int64]


@dataclass
class _Job:
    sources: list[Source]
    names: list[str]
    options: _Options
    work: Path
    workers: int
    memory_budget: int
    progress: Progress | None
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    max_count: int = 0

    def __post_init__(self) -> None:
        lengths = [source.shape[0] for source in self.sources]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_obs = int(self.offsets[-1])
        if self.n_obs == 0:
            raise CellsError(f"there are no cells in {', '.join(repr(s.name) for s in self.sources)}")
        options = self.options
        self.genes: GeneJoin = join_genes(self.sources, options.join, options.var_key, options.make_unique)
        self.n_vars = len(self.genes.names)
        self.scratch = self.work / "scratch"
        self._lock = threading.Lock()
        self._seen = np.zeros(self.n_vars, bool)
        self._kept = disk_array(self.scratch / "kept.bin", self.n_obs, np.int64)
        self._hashes = disk_array(self.scratch / "hashes.bin", self.n_obs, np.uint64)
        self.order: NDArray[np.int64] | None = None
        self._spill: Spill | None = None
        self._suffixes: dict[int, str] = {}
        if options.shuffle:
            self._plan_shuffle()

    # --- pass 1

    def check(self) -> None:
        """Pass 1: every value, every name; what each cell keeps."""
        blocks = list(self._blocks())
        sizes = [stop - start for _, start, stop in blocks]
        run_tasks(
            self._check_block,
            blocks,
            sizes,
            label="checking counts",
            workers=self.workers,
            progress=self.progress,
        )
        self._check_cells()
        self._indptr = disk_array(self.scratch / "indptr.bin", self.n_obs + 1, np.int64)
        np.cumsum(self._kept, out=self._indptr[1:])
        self.nnz = int(self._indptr[-1])
        self.layout: Layout = choose_layout(self.nnz, self.n_vars, self.max_count)
        self._warn_of_empty()
        if self._spill is not None:
            self._merge_spill(self._spill)

    @property
    def bytes_needed(self) -> int:
        """An upper bound of the space for counts, once it is known."""
        layout = getattr(self, "layout", None)
        if layout is None:
            return 0
        shuffling = 20 if self.options.shuffle else 0
        return int(layout.nnz * (layout.bytes_per_entry + shuffling) + 32 * self.n_obs)

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        for i, source in enumerate(self.sources):
            for start, stop in row_blocks(source, 0, source.shape[0]):
                yield i, start, stop

    def _check_block(self, block: tuple[int, int, int]) -> None:
        i, start, stop = block
        source = self.sources[i]
        rows = slice(int(self.offsets[i]) + start, int(self.offsets[i]) + stop)
        self._hashes[rows] = _hash(source.read_names(start, stop))
        indptr, columns, counts = checked_rows(source, start, stop, self.genes.column_of[i])
        largest = int(counts.max(initial=0))
        kept = np.diff(indptr)
        if self._spill is None:
            self._kept[rows] = kept
        else:
            places = self._places[rows]
            self._kept[places] = kept
            self._spill.add(np.repeat(places, kept), columns, counts)
        with self._lock:
            self.max_count = max(self.max_count, largest)
            self._seen[columns] = True

    def _check_cells(self) -> None:
        """No cell name twice, by 64-bit hashes: a set of a hundred million names would not fit."""
        repeated = _repeated(self._hashes, self.scratch)
        pair = self._a_real_repeat(repeated) if len(repeated) else None
        if pair is None:
            return
        if not self.options.make_unique:
            name, i, j = pair
            where = f"twice in {self.sources[i].name!r}"
            if i != j:
                where = f"in {self.sources[i].name!r} and in {self.sources[j].name!r}"
            raise CellsError(
                f"cell {name!r} is {where}; pass make_unique=True to append the input's name (a number) to cells"
            )
        self._rename(set(repeated.tolist()))

    def _a_real_repeat(self, repeated: NDArray[np.uint64]) -> tuple[str, int, int] | None:
        """A name that stands twice and the inputs it is in; a mere clash of hashes is none."""
        first: dict[str, int] = {}
        for i, name, _ in self._with_hash(set(repeated.tolist())):
            if name in first:
                return name, first[name], i
            first[name] = i
        return None

    def _with_hash(self, wanted: set[int]) -> Iterator[tuple[int, str, int]]:
        """Input, name and row in the atlas (unshuffled) of the cells whose hash is wanted."""
        values = np.array(sorted(wanted), np.uint64)
        for i, start, stop in self._blocks():
            rows = np.asarray(self._hashes[self.offsets[i] + start : self.offsets[i] + stop])
            for b in np.flatnonzero(np.isin(rows, values)).tolist():
                name = str(self.sources[i].read_names(start + b, start + b + 1)[0])
                yield i, name, int(self.offsets[i]) + start + b

    def _rename(self, repeated: set[int]) -> None:
        """Give cells that share a name in one input a number; append the input where there are several."""
        seen: dict[tuple[int, str], int] = {}
        for i, name, row in self._with_hash(repeated):
            n = seen[i, name] = seen.get((i, name), -1) + 1
            if n:
                self._suffixes[row] = f"-{n}"
        self._append_input = len(self.sources) > 1
        for i, start, stop in self._blocks():
            rows = slice(int(self.offsets[i]) + start, int(self.offsets[i]) + stop)
            self._hashes[rows] = _hash(self._cell_names(i, start, stop))
        again = _repeated(self._hashes, self.scratch)
        if len(again):
            raise CellsError(
                "cell names still repeat after make_unique appended to them; rename the cells of the inputs"
            )

    def _cell_names(self, i: int, start: int, stop: int) -> NDArray[Any]:
        """Names as the atlas has them."""
        names = self.sources[i].read_names(start, stop)
        if not self._suffixes and not getattr(self, "_append_input", False):
            return names
        end = f"-{self.names[i]}" if self._append_input else ""
        first = int(self.offsets[i]) + start
        new = [f"{name}{self._suffixes.get(first + k, '')}{end}" for k, name in enumerate(names.tolist())]
        return np.array(new, STRING)

    def _warn_of_empty(self) -> None:
        cells, genes = self.n_obs - int(np.count_nonzero(self._kept)), int((~self._seen).sum())
        if cells:
            self.warnings.append(f"{cells:,} of {self.n_obs:,} cells have no counts; they are kept")
        if genes:
            self.warnings.append(f"{genes:,} of {self.n_vars:,} genes have no counts; they are kept")

    # --- shuffle

    def _plan_shuffle(self) -> None:
        order = disk_array(self.scratch / "order.bin", self.n_obs, np.int64)
        places = disk_array(self.scratch / "places.bin", self.n_obs, np.int64)
        order[:] = np.arange(self.n_obs)
        np.random.default_rng(self.options.seed).shuffle(np.asarray(order))
        places[order] = np.arange(self.n_obs)
        self.order, self._places = order, places
        folder = self.scratch / "spill"
        folder.mkdir()
        self._spill = Spill(folder, self.n_obs, _expected_entries(self.sources), np.uint32)

    def _merge_spill(self, spill: Spill) -> None:
        indices, values = spill.begin_merge(self._indptr)
        buckets = range(spill.n_buckets)
        run_tasks(
            spill.merge, buckets, spill.rows_per_bucket(), label="shuffling", workers=self.workers,
            progress=self.progress,
        )  # fmt: skip
        self._shuffled = _Shuffled(self._indptr, indices, values, self.n_vars)

    # --- pass 2

    def write(self) -> None:
        """Pass 2: the store."""
        atlas = self.work / "atlas"
        group = zarr.open_group(atlas, mode="w", zarr_format=3)
        self._write_counts(group)
        self._write_obs(group)
        self._write_var(group)
        self._write_extras(group)
        for key in ("layers", "obsp", "varm", "varp"):
            group.create_group(key).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        # Last, for without these nothing opens it as an AnnData.
        group.attrs.update(
            {"encoding-type": "anndata", "encoding-version": "0.1.0", "atlasvi": self._about()}
        )

    def _about(self) -> dict[str, Any]:
        options = self.options
        return {
            "format": FORMAT, "version": version("atlasvi"), "inputs": self.names, "layer": options.layer,
            "join": options.join, "var_key": options.var_key, "shuffle": options.shuffle,
            "seed": options.seed if options.shuffle else None, "input_key": options.input_key,
            "nnz": self.nnz, "max_count": self.max_count,
        }  # fmt: skip

    def _write_counts(self, group: Any) -> None:
        x = group.create_group("X")
        x.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [self.n_obs, self.n_vars]}
        )
        frame.write_plain(x, "indptr", self._indptr, 1 << 20)
        layout = self.layout
        self._indices = _count_array(x, "indices", layout, layout.index_dtype)
        self._data = _count_array(x, "data", layout, layout.data_dtype)
        self._parts = self._make_parts()
        shards = range(layout.n_shards)
        run_tasks(
            self._write_shard, shards, [stop - start for start, stop in map(self._shard_rows, shards)],
            label="writing counts", workers=self._shards_in_flight(), progress=self.progress,
        )  # fmt: skip

    def _make_parts(self) -> list[_Part]:
        if self.order is not None:
            return [_Part(self._shuffled, 0, np.arange(self.n_vars))]
        return [
            _Part(source, int(first), columns)
            for source, first, columns in zip(self.sources, self.offsets, self.genes.column_of, strict=False)
        ]

    def _shards_in_flight(self) -> int:
        # The encoder holds a shard's arrays a second time.
        one = 2 * self.layout.shard * self.layout.bytes_per_entry + BLOCK_ENTRIES * BYTES_PER_READ_ENTRY
        return max(1, min(self.workers, self.memory_budget // one))

    def _shard_rows(self, k: int) -> tuple[int, int]:
        """First and one past the last row with entries in shard ``k``."""
        first, last = self.layout.entries(k)
        start = int(np.searchsorted(self._indptr, first, side="right")) - 1
        return start, int(np.searchsorted(self._indptr, last, side="left"))

    def _write_shard(self, k: int) -> None:
        first, last = self.layout.entries(k)
        indices = np.empty(last - first, self.layout.index_dtype)
        data = np.empty(last - first, self.layout.data_dtype)
        start, stop = self._shard_rows(k)
        for part in self._parts:
            n = part.source.shape[0]
            lo, hi = max(start - part.first, 0), min(stop - part.first, n)
            for a, b in row_blocks(part.source, lo, hi):
                _, columns, counts = checked_rows(part.source, a, b, part.column_of)
                at = int(self._indptr[part.first + a])
                if at + len(columns) != self._indptr[part.first + b]:
                    raise StoreError(f"{part.source.name!r} changed while it was read; ingest it again")
                skip, end = max(0, first - at), min(len(columns), last - at)
                indices[at + skip - first : at + end - first] = columns[skip:end]
                data[at + skip - first : at + end - first] = counts[skip:end]
        self._indices[first:last] = indices
        self._data[first:last] = data

    def _write_obs(self, group: Any) -> None:
        obs = frame.write_frame(group, "obs", self.n_obs)
        self._write_names(frame.index(obs))
        keys = list(dict.fromkeys(key for source in self.sources for key in source.obs_keys))
        kept_as_is = self._input_column(obs, keys)
        for key in keys:
            if key == self.options.input_key and not kept_as_is:
                continue
            parts = [source.obs_column(key) if key in source.obs_keys else None for source in self.sources]
            self._write_column(obs, "obs", key, self._merged(parts))

    def _input_column(self, obs: Any, keys: list[str]) -> bool:
        """Write the column of inputs, unless a single input brings its own of that name."""
        key = self.options.input_key
        if key in keys:
            if len(self.sources) == 1:
                return True
            raise OptionError(f"obs of an input has a column {key!r} already; pass another input_key=")
        codes = np.repeat(np.arange(len(self.names)), np.diff(self.offsets))
        column = pd.Categorical.from_codes(codes, self.names)
        frame.write_column(obs, key, column if self.order is None else take(column, self.order))
        return False

    def _write_names(self, array: Any) -> None:
        if self.order is not None:
            parts = [self._cell_names(i, 0, source.shape[0]) for i, source in enumerate(self.sources)]
            names = np.concatenate(parts)
            for start in range(0, self.n_obs, frame.CHUNK):
                array[start : start + frame.CHUNK] = names[self.order[start : start + frame.CHUNK]]
            return
        for start in range(0, self.n_obs, frame.CHUNK):
            stop = min(start + frame.CHUNK, self.n_obs)
            array[start:stop] = np.concatenate([self._cell_names(*r) for r in self._ranges(start, stop)])

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Which rows of which inputs the rows ``start`` to ``stop`` of the atlas are."""
        for i, (first, last) in enumerate(pairwise(self.offsets.tolist())):
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                yield i, lo - first, hi - first

    def _merged(self, parts: list[Any]) -> Any:
        column = merge(parts, np.diff(self.offsets).tolist())
        return column if self.order is None else take(column, self.order)

    def _write_column(self, table: Any, part: str, key: str, values: Any) -> None:
        try:
            frame.write_column(table, key, values)
        except TypeError as error:
            self.left_out.append(f"{part}[{key!r}]: {error}")

    def _write_var(self, group: Any) -> None:
        var = frame.write_frame(group, "var", self.n_vars)
        frame.index(var)[...] = self.genes.names
        rows = self.genes.rows_of_first
        missing = self.n_vars - len(rows)
        for key in self.sources[0].var_keys:
            values = take(self.sources[0].var_column(key), rows)
            self._write_column(
                var, "var", key, merge([values, None], [len(rows), missing]) if missing else values
            )
        for source in self.sources[1:]:
            others = [key for key in source.var_keys if key not in self.sources[0].var_keys]
            self.left_out += [
                f"var[{key!r}] of {source.name!r}: columns are the first input's" for key in others
            ]

    # --- what else the inputs hold

    def _write_extras(self, group: Any) -> None:
        extras = [source.extras() for source in self.sources]
        several = len(self.sources) > 1
        for source, of_one in zip(self.sources, extras, strict=True):
            of = f" of {source.name!r}" if several else ""
            layers = [{"X": "X", "raw": "raw"}.get(key, f"layers[{key!r}]") for key in of_one.elsewhere]
            self.left_out += [what + of for what in (*layers, *of_one.left_out)]
        obsm = group.create_group("obsm")
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for key in dict.fromkeys(key for of_one in extras for key in of_one.obsm):
            self._write_obsm(obsm, key, [of_one.obsm.get(key) for of_one in extras])
        for key in dict.fromkeys(key for of_one in extras for key in of_one.obsm_frames):
            self._write_obsm_frame(obsm, key, [key in of_one.obsm_frames for of_one in extras])
        uns = group.create_group("uns")
        uns.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        self._write_uns(uns, extras)

    def _write_obsm(self, obsm: Any, key: str, arrays: list[Any]) -> None:
        shapes = {() if a is None else tuple(a.shape)[1:] for a in arrays}
        if len(shapes) > 1 or any(a is None or a.dtype.kind not in "biuf" for a in arrays):
            self.left_out.append(f"obsm[{key!r}]: not an array of numbers of one width in every input")
            return
        (shape,) = shapes
        dtype: np.dtype[Any] = np.result_type(*[a.dtype for a in arrays])
        width = int(np.prod(shape))
        # Rows land in their final order in a file first: they may come in any.
        whole = disk_array(self.scratch / "obsm.bin", self.n_obs * width, dtype).reshape(self.n_obs, *shape)
        step = max(1, frame.CHUNK // max(1, width))
        for start in range(0, self.n_obs, step):
            for i, a, b in self._ranges(start, min(start + step, self.n_obs)):
                part, first = arrays[i][a:b], int(self.offsets[i])
                part = part.compute(scheduler="synchronous") if hasattr(part, "dask") else part
                whole[
                    slice(first + a, first + b) if self.order is None else self._places[first + a : first + b]
                ] = part
        frame.write_plain(obsm, key, whole, step, "array")

    def _write_obsm_frame(self, obsm: Any, key: str, present: list[bool]) -> None:
        tables = [
            s.obsm_frame(key) if there else None for s, there in zip(self.sources, present, strict=True)
        ]
        if any(table is None or list(table.columns) != list(tables[0].columns) for table in tables):
            self.left_out.append(f"obsm[{key!r}]: not a table with the same columns in every input")
            return
        out = frame.write_frame(obsm, key, self.n_obs)
        self._write_names(frame.index(out))
        for column in tables[0].columns:
            parts = [frame.plain_column(table[column]) for table in tables]
            self._write_column(out, f"obsm[{key!r}]", str(column), self._merged(parts))

    def _write_uns(self, uns: Any, extras: list[Extras]) -> None:
        if len(self.sources) > 1:
            for source, of_one in zip(self.sources, extras, strict=True):
                self.left_out += (
                    [f"uns of {source.name!r}: kept only from a single input"] if of_one.uns else []
                )
            return
        for key, value in (extras[0].uns() if extras[0].uns else {}).items():
            try:
                with anndata.settings.override(auto_shard_zarr_v3=False):
                    write_elem(uns, key, value)
            except Exception as error:
                if _is_full(error):
                    raise
                if key in uns:
                    del uns[key]
                self.left_out.append(f"uns[{key!r}]: {type(value).__name__} cannot be written")

    def report(self, out: Path, seconds: float) -> IngestReport:
        """What was made."""
        n_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return IngestReport(
            out, self.n_obs, self.n_vars, self.nnz, self.max_count, n_bytes, seconds, tuple(self.names),
            tuple(self.left_out), tuple(self.warnings),
        )  # fmt: skip


class _Shuffled(Source):
    """The entries in their final order, in flat files."""

    def __init__(self, indptr: NDArray[np.int64], indices: FileArray, values: FileArray, n_vars: int) -> None:
        self._indptr, self._indices, self._values, self._n_vars = indptr, indices, values, n_vars

    @property
    def name(self) -> str:
        """For errors."""
        return "the shuffled cells"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return len(self._indptr) - 1, self._n_vars

    @property
    def indptr(self) -> NDArray[np.int64]:
        """Offsets of the rows."""
        return self._indptr

    @property
    def obs_names(self) -> NDArray[Any]:
        """Row numbers: the real names are written from the inputs."""
        return frame.to_strings(np.arange(self.shape[0]))

    @property
    def var_names(self) -> NDArray[Any]:
        """Column numbers."""
        return frame.to_strings(np.arange(self._n_vars))

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        offsets = np.asarray(self._indptr[start : stop + 1]) - first
        return CSR.from_numpy(offsets, self._indices[first:last], self._values[first:last], self._n_vars)


def row_blocks(source: Source, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are read at once: about `BLOCK_ENTRIES` entries, or a slab of a dense matrix."""
    indptr = source.indptr
    while start < stop:
        if indptr is None:
            end = start + max(1, min(MAX_BLOCK_ROWS, DENSE_BLOCK // max(1, source.shape[1])))
        else:
            limit = int(indptr[start]) + BLOCK_ENTRIES
            end = max(start + 1, int(np.searchsorted(indptr, limit, side="right")) - 1)
            end = min(end, start + MAX_BLOCK_ROWS)
        yield start, min(end, stop)
        start = end


def _expected_entries(sources: list[Source]) -> int:
    total = 0
    for source in sources:
        indptr = source.indptr
        # Single-cell counts are seldom denser than a fifth; the guess only sets the number of buckets.
        total += source.shape[0] * source.shape[1] // 5 if indptr is None else int(indptr[-1])
    return total


def _count_array(group: Any, key: str, layout: Layout, dtype: np.dtype[Any]) -> Any:
    # Chunks of zeros are written too: a shard that is missing is then always a fault.
    return with_zarrs(
        lambda: group.create_array(
            key, shape=(layout.nnz,), dtype=dtype, chunks=(layout.chunk,), shards=(layout.shard,),
            compressors=codecs(), config={"write_empty_chunks": True},
        )
    )  # fmt: skip


def _hash(names: NDArray[Any]) -> NDArray[np.uint64]:
    return np.asarray(pd.util.hash_array(names.astype(object), categorize=False), np.uint64)


def _repeated(hashes: NDArray[np.uint64], scratch: Path) -> NDArray[np.uint64]:
    """The values that stand more than once."""
    in_order = disk_array(scratch / "sorted.bin", len(hashes), np.uint64)
    in_order[:] = hashes
    np.asarray(in_order).sort()
    return np.unique(in_order[1:][in_order[1:] == in_order[:-1]])


def _open_all(inputs: Any, layer: str | None, scratch: Path) -> tuple[list[Source], list[str]]:
    if isinstance(inputs, Mapping):
        items, names = list(inputs.values()), [str(name) for name in inputs]
    else:
        single = isinstance(inputs, (str, os.PathLike, anndata.AnnData)) or hasattr(inputs, "read_rows")
        items = [inputs] if single else list(inputs)
        names = _input_names(items)
    if not items:
        raise OptionError("there is nothing to ingest; give at least one input")
    sources: list[Source] = []
    try:
        for item in items:
            what = Path(item) if isinstance(item, os.PathLike) else item
            sources.append(open_source(what, layer, scratch=scratch))
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources, names


def _input_names(items: list[Any]) -> list[str]:
    """Names of files without their endings, made different where they are not."""
    names = []
    for k, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            names.append(Path(os.path.abspath(item)).stem)
        else:
            names.append(str(getattr(item, "name", f"AnnData-{k}")))
    if len(set(names)) == len(names):
        return names
    paths = [
        str(item) if isinstance(item, (str, os.PathLike)) else n for item, n in zip(items, names, strict=True)
    ]
    return paths if len(set(paths)) == len(paths) else [f"{k}-{name}" for k, name in enumerate(names)]


def _check_out(out: Path, overwrite: bool, inputs: Any) -> None:
    if not out.parent.is_dir():
        raise StoreError(f"{str(out.parent)!r} is no folder to write {out.name!r} in; make it first")
    if not out.exists():
        return
    if not overwrite:
        raise StoreError(f"{str(out)!r} is there already; pass overwrite=True to replace it, or another name")
    if not out.is_dir() or (
        any(out.iterdir()) and not any((out / n).exists() for n in ("zarr.json", ".zgroup"))
    ):
        raise StoreError(f"{str(out)!r} is not a Zarr store, so it is not overwritten; give another name")
    items = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    items = [items] if isinstance(items, (str, os.PathLike)) or not isinstance(items, Sequence) else items
    paths = [Path(item) for item in items if isinstance(item, (str, os.PathLike))]
    if any(path.exists() and path.samefile(out) for path in paths):
        raise StoreError(f"{str(out)!r} is one of the inputs; write to another name")


def _publish(atlas: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name, once everything in it is on the disk."""
    for path in [*atlas.rglob("*"), atlas]:
        _sync(path)
    if overwrite and out.exists():
        os.replace(out, atlas.with_name("replaced"))
    os.replace(atlas, out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _naming_a_full_disk(out: Path, needed: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        size = f"about {needed() / 2**20:,.0f} MiB" if needed() else "more"
        free = shutil.disk_usage(out.parent).free / 2**20
        raise SpaceError(
            f"no space left in {str(out.parent.absolute())!r} to write {out.name!r}: {size} is needed, "
            f"{free:,.0f} MiB was free; nothing was left behind, free some space or write elsewhere"
        ) from error


def _is_full(error: BaseException) -> bool:
    """Whether the disk was full, as Python says it or as zarrs does, in words."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    words = ("No space left on device", "os error 28", "Disk quota exceeded")
    if any(word in str(error) for word in words):
        return True
    return error.__cause__ is not None and _is_full(error.__cause__)


__all__ = ["IngestReport", "ingest"]
