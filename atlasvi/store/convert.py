"""The two passes of an ingest: check and count every entry, then write each shard where it belongs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import StoreError
from atlasvi.store import cluster, frame
from atlasvi.store.base import Source
from atlasvi.store.cells import BLOCK_ENTRIES, Cells, row_blocks
from atlasvi.store.counts import checked_rows, mark
from atlasvi.store.genes import GeneJoin
from atlasvi.store.kept import KeptRows
from atlasvi.store.layout import SHARD_BYTES, Layout, choose_layout, codecs, index_dtype
from atlasvi.store.shard_file import ShardWriter
from atlasvi.store.spill import disk_array
from atlasvi.store.tasks import Progress, run_tasks

if TYPE_CHECKING:
    import distributed

T = TypeVar("T")

_INDPTR_CHUNK = 1 << 18
# Of a task: a block that is read and checked, or a shard, which the encoder holds a second time, and what it
# is made from.
_BYTES_IN_FLIGHT = 2 * SHARD_BYTES + 48 * BLOCK_ENTRIES
# Blocks that a cluster checks in one task: a task there costs about as much as checking one.
_BLOCKS_A_TASK = 8


@dataclass(frozen=True)
class Effort:
    """How an ingest works.

    Args:
        workers: threads.
        memory_budget: bytes for what is read, kept and written.
        progress: told of tasks that ended.
        client: of a cluster that reads and checks the inputs, while the threads wait for it and write.
    """

    workers: int
    memory_budget: int
    progress: Progress | None
    client: distributed.Client | None = None


@dataclass(frozen=True)
class _Part:
    """Rows of the atlas that come from one source, one after the other; a cluster reads what has a place."""

    source: Source
    first: int
    column_of: NDArray[Any]
    place: cluster.Place | None


@dataclass(frozen=True)
class _Look:
    """What is to be known of some rows before anything is written.

    Args:
        indptr: ``(n + 1,)``, offsets of the entries that the cells keep.
        max_count: the largest.
        seen: ``(G,)`` bool, genes of the atlas with counts.
        columns: of the entries; none where they were not asked for.
        counts: of the entries; likewise.
    """

    indptr: NDArray[np.int64]
    max_count: int
    seen: NDArray[np.bool_]
    columns: NDArray[np.uint32]
    counts: NDArray[np.uint32]


class Conversion:
    """Counts of several inputs on their way into one store.

    Args:
        cells: of the atlas.
        genes: of the atlas.
        scratch: folder for temporary files.
        effort: how to work.
    """

    def __init__(self, cells: Cells, genes: GeneJoin, scratch: Path, effort: Effort) -> None:
        self._cells, self._genes, self._scratch, self._effort = cells, genes, scratch, effort
        self.max_count = 0
        self.layout: Layout | None = None
        self._lock = threading.Lock()
        self._seen = np.zeros(len(genes.names), bool)
        self._kept = disk_array(scratch / "kept.bin", cells.n_obs, np.int64)
        parts = zip(cells.sources, cells.offsets[:-1].tolist(), genes.column_of, strict=True)
        self._asked: set[Any] = set()
        self._inputs = [
            _Part(*part, None if effort.client is None else cluster.Place.of(part[0])) for part in parts
        ]
        self._keeping = self._keep()

    def _keep(self) -> KeptRows | None:
        """Where rows wait to be written; none where they come in order and are better read again."""
        expected, most = map(sum, zip(*map(_entries_of, self._cells.sources), strict=True))
        index_bytes = index_dtype(self.shape[1]).itemsize
        n_bytes = self._effort.memory_budget - self._in_flight * _BYTES_IN_FLIGHT
        is_shuffled = self._cells.order is not None
        is_too_much = expected * (1 + index_bytes) > n_bytes
        if is_too_much and not is_shuffled:
            return None
        # More than all rows can take is not asked for.
        n_bytes = max(0, min(n_bytes, 2 * most * (4 + index_bytes)))
        return KeptRows(
            self._scratch, self.shape, n_bytes, self._effort.workers, spills=is_shuffled, ahead=is_too_much
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._cells.n_obs, len(self._genes.names)

    @property
    def _in_flight(self) -> int:
        """Shards that are written at a time."""
        return max(1, min(self._effort.workers, self._effort.memory_budget // (2 * _BYTES_IN_FLIGHT)))

    @property
    def n_empty(self) -> tuple[int, int]:
        """Numbers of cells and of genes without counts, after `check`."""
        return self.shape[0] - int(np.count_nonzero(self._kept)), int((~self._seen).sum())

    @property
    def bytes_needed(self) -> int:
        """An upper bound of the space for counts; 0 until `check` has counted them."""
        if self.layout is None:
            return 0
        shuffling = 0 if self._keeping is None else self._keeping.bytes_on_disk
        return int(self.layout.nnz * self.layout.bytes_per_entry + shuffling + 48 * self.shape[0])

    def check(self) -> Layout:
        """Pass 1: every value, and what each cell keeps.

        Raises:
            CountsError: a value is not a count.
        """
        blocks = list(self._blocks())
        self._run(self._check_block, blocks, [stop - start for _, start, stop in blocks], "checking counts")
        self._indptr = disk_array(self._scratch / "indptr.bin", self.shape[0] + 1, np.int64)
        np.cumsum(self._kept, out=self._indptr[1:])
        self.layout = choose_layout(int(self._indptr[-1]), self.shape[1], self.max_count)
        return self.layout

    def _run(
        self, function: Any, items: Any, sizes: list[int], label: str, workers: int | None = None
    ) -> None:
        workers = self._effort.workers if workers is None else workers
        run_tasks(
            function, items, sizes, label=label, workers=workers, progress=self._effort.progress,
            give_up=self._give_up,
        )  # fmt: skip

    def _check_block(self, block: tuple[int, int, int]) -> None:
        i, start, stop = block
        rows = self._keeping
        found = self._ask(self._inputs[i], _look, start, stop, self.shape[1], rows is not None)
        places = self._cells.places(i, start, stop)
        self._kept[places] = np.diff(found.indptr)
        if rows is not None and not rows.add(places, found.indptr, found.columns, found.counts):
            self._keeping = None  # more than expected: they are read again
        with self._lock:
            self.max_count = max(self.max_count, found.max_count)
            self._seen |= found.seen

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """Input and rows of it that one task checks."""
        if self._effort.client is None:
            yield from self._cells.blocks()
            return
        for i, blocks in groupby(self._cells.blocks(), lambda block: block[0]):
            some = list(blocks)
            for k in range(0, len(some), _BLOCKS_A_TASK):
                yield i, some[k][1], some[k : k + _BLOCKS_A_TASK][-1][2]

    def _ask(self, part: _Part, function: Callable[..., T], *args: Any) -> T:
        """``function(source, column_of, *args)``, on a worker of the cluster where there is one."""
        client = self._effort.client
        if part.place is None or client is None:
            return function(part.source, part.column_of, *args)
        columns = cluster.narrow(part.column_of)
        task = client.submit(cluster.with_source, part.place, function, columns, *args, pure=False)
        self._asked.add(task)
        try:
            return task.result()  # type: ignore[no-any-return]
        finally:
            self._asked.discard(task)
            # An error holds its task by the frames it came through.
            task.release()

    def _give_up(self) -> None:
        """Else threads would wait for a cluster that may have no worker."""
        client = self._effort.client
        if client is not None and self._asked and client.status == "running":
            client.cancel(list(self._asked))

    def write(self, group: Any) -> None:
        """Pass 2: ``X``, one shard a task.

        Args:
            group: the zarr group of the atlas.
        """
        assert self.layout is not None
        layout = self.layout
        x = group.create_group("X")
        x.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(self.shape)}
        )
        frame.write_plain(x, "indptr", self._indptr, _INDPTR_CHUNK)
        self._indices = _shard_writer(
            x, "indices", layout, layout.index_dtype, np.iinfo(layout.index_dtype).max
        )
        self._data = _shard_writer(x, "data", layout, layout.data_dtype, 0)
        # Kept from shard to shard: made anew each time, the heap would grow in pieces.
        self._buffers: SimpleQueue[tuple[NDArray[Any], NDArray[Any]]] = SimpleQueue()
        for _ in range(self._in_flight):
            pair = np.empty(layout.shard, layout.index_dtype), np.empty(layout.shard, layout.data_dtype)
            self._buffers.put(pair)
        shards = range(layout.n_shards)
        starts = [0, *(self._rows_of(*layout.entries(k))[0] for k in shards[1:]), self.shape[0]]
        sizes = np.diff(starts).tolist()[: len(shards)]
        self._run(self._write_shard, shards, sizes, "writing counts", self._in_flight)

    def _rows_of(self, first: int, last: int) -> tuple[int, int]:
        """First and one past the last row with entries in ``first`` to ``last``."""
        start = int(np.searchsorted(self._indptr, first, side="right")) - 1
        return start, int(np.searchsorted(self._indptr, last, side="left"))

    def _write_shard(self, k: int) -> None:
        assert self.layout is not None
        first, last = self.layout.entries(k)
        buffers = self._buffers.get()
        try:
            indices, data = (buffer[: last - first] for buffer in buffers)
            self._fill(first, last, indices, data)
            self._indices.write(k, indices)
            self._data.write(k, data)
        finally:
            self._buffers.put(buffers)

    def _fill(self, first: int, last: int, indices: NDArray[Any], data: NDArray[Any]) -> None:
        """Read the entries ``first`` to ``last``."""
        start, stop = self._rows_of(first, last)
        if self._keeping is not None:
            self._keeping.fill(start, np.asarray(self._indptr[start : stop + 1]), first, indices, data)
            return
        for part in self._inputs:
            lo, hi = max(start - part.first, 0), min(stop - part.first, part.source.shape[0])
            if lo >= hi:
                continue
            offsets = np.asarray(self._indptr[part.first + lo : part.first + hi + 1])
            begin, end = max(first, int(offsets[0])), min(last, int(offsets[-1]))
            here = slice(begin - first, end - first)
            if part.place is None:
                _fill(part.source, part.column_of, lo, offsets, begin, indices[here], data[here])
            else:
                asked = lo, offsets, begin, end, indices.dtype, data.dtype
                indices[here], data[here] = self._ask(part, _entries, *asked)


def _look(
    source: Source, column_of: NDArray[Any], start: int, stop: int, n_vars: int, entries: bool
) -> _Look:
    """Pass 1 over some rows."""
    column_of = np.asarray(column_of, np.int64)
    parts = [checked_rows(source, *rows, column_of) for rows in row_blocks(source, start, stop)]
    seen = np.zeros(n_vars, bool)
    for _, columns, _ in parts:
        mark(columns, seen)
    indptrs, columns, counts = zip(*parts, strict=True)
    max_count = max(int(each.max(initial=0)) for each in counts)
    none = (np.zeros(0, np.uint32),)
    return _Look(
        _offsets(indptrs), max_count, seen,
        _in_one(columns if entries else none), _in_one(counts if entries else none),
    )  # fmt: skip


def _offsets(indptrs: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Offsets of rows of several parts."""
    if len(indptrs) == 1:
        return indptrs[0]
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(indptr) for indptr in indptrs]))])


def _in_one(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _fill(
    source: Source,
    column_of: NDArray[Any],
    start: int,
    offsets: NDArray[np.int64],
    begin: int,
    indices: NDArray[Any],
    data: NDArray[Any],
) -> None:
    """Read entries of rows from ``start`` on, from entry ``begin`` of the store until the arrays are full."""
    column_of, end = np.asarray(column_of, np.int64), begin + len(indices)
    for a, b in row_blocks(source, start, start + len(offsets) - 1):
        _, columns, counts = checked_rows(source, a, b, column_of)
        at, until = int(offsets[a - start]), int(offsets[b - start])
        if at + len(columns) != until:
            raise StoreError(f"{source.name!r} changed while it was read; ingest it again")
        lo, hi = max(at, begin), min(until, end)
        indices[lo - begin : hi - begin] = columns[lo - at : hi - at]
        data[lo - begin : hi - begin] = counts[lo - at : hi - at]
        # Else they stay until the next block is read.
        del columns, counts


def _entries(
    source: Source,
    column_of: NDArray[Any],
    start: int,
    offsets: NDArray[np.int64],
    begin: int,
    end: int,
    *dtypes: np.dtype[Any],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The entries ``begin`` to ``end`` of the store, of rows from ``start`` on, in the types that it has."""
    indices, data = (np.empty(end - begin, dtype) for dtype in dtypes)
    _fill(source, column_of, start, offsets, begin, indices, data)
    return indices, data


def _entries_of(source: Source) -> tuple[int, int]:
    """How many to expect, and how many there may be at most."""
    indptr = source.indptr
    if indptr is not None:
        return int(indptr[-1]), int(indptr[-1])
    size = source.shape[0] * source.shape[1]
    # Single-cell counts are seldom denser than a fifth.
    return size // 5, size


def _shard_writer(group: Any, key: str, layout: Layout, dtype: np.dtype[Any], fill: int) -> ShardWriter:
    """Make an array and what writes its shards."""
    compressors = codecs(counts=dtype if key == "data" else None)
    # What is nothing but the fill value is left out by whoever writes through zarr. No entry has that value,
    # so every chunk and shard is written, and one that is missing is a fault.
    array = group.create_array(
        key, shape=(layout.nnz,), dtype=dtype, chunks=(layout.chunk,), shards=(layout.shard,),
        compressors=compressors, fill_value=fill,
    )  # fmt: skip
    return ShardWriter(Path(group.store.root, array.path), array, compressors[0])
