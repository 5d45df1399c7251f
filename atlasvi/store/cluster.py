"""Blocks read on a ``dask.distributed`` cluster: what a task is told, and results taken in order.

A task is told where its cells are, never handed counts: path, layer, the rows of its block, and which
genes are wanted. Each worker process opens a store once. What a task makes does not depend on the worker, so
Dask makes anew what a worker that was killed had made, or was making.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.errors import OptionError, StoreError
from atlasvi.store.base import Source
from atlasvi.store.joined import JoinedSource
from atlasvi.store.remote import is_url
from atlasvi.store.sources import GroupSource, TenxSource, open_source

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

T = TypeVar("T")
# A CSR block as it travels: row pointers, columns, counts and the number of genes.
Arrays: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]

_MAX_OPEN = 64
_opened: dict[Place, tuple[object, Source]] = {}
_opening = threading.Lock()


# --- where cells are --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where counts are: what another process needs to open them.

    Args:
        path: of the file or folder, absolute, or a URL.
        layer: where the counts are in it.
    """

    path: str
    layer: str | None

    @classmethod
    def of(cls, source: Source) -> Place:
        """Where a source is.

        Raises:
            OptionError: in the memory of this process, or in a file that it must put into rows first.
        """
        if isinstance(source, (GroupSource, TenxSource)) and not source.by_genes:
            path = source.name if source.path is None else os.path.abspath(source.path)
            return cls(path, source.layer)
        raise OptionError(
            f"{source.name!r} {source.place} is in the memory of this process, or chosen or put into rows by "
            "it: no other can read it, on a cluster or from a pickle; make a store of it, without a client: "
            "atlasvi.ingest(..., 'atlas.zarr'), and keep a model by its save()"
        )

    def open(self) -> Source:
        """The source, kept open in this process until its metadata change: it was replaced, or has grown."""
        with _opening:
            stamp, (seen, source) = self._stamp(), _opened.get(self, (None, None))
            if source is None or seen != stamp:
                source = open_source(self.path, self.layer)
                # Whoever still reads the one that is replaced keeps it alive.
                _opened.pop(self, None)
                while len(_opened) >= _MAX_OPEN:
                    del _opened[next(iter(_opened))]
                _opened[self] = stamp, source
            return source

    def _stamp(self) -> object:
        if is_url(self.path):
            return None  # to ask for each block would cost a request
        for file in (Path(self.path, "zarr.json"), Path(self.path, ".zgroup"), Path(self.path)):
            if file.exists():
                found = file.stat()
                return found.st_ino, found.st_mtime_ns, found.st_size
        raise StoreError(
            f"{self.path!r} is not there on {socket.gethostname()}, where a worker of the cluster runs; put "
            "it where all workers see it under this path"
        )


@dataclass(frozen=True)
class Piece:
    """Cells of one store.

    Args:
        place: of the store.
        rows: of the store, in any order.
        columns: ``(G_store,)``, which gene each column becomes, or -1 (left out); ``None`` as they are.
        n_vars: number of genes.
    """

    place: Place
    rows: slice | NDArray[Any]
    columns: NDArray[Any] | None
    n_vars: int

    def read(self) -> CSR:
        """The counts, from a store that is opened once in this process."""
        from atlasvi.store.atlas import Atlas

        counts = Atlas(self.place.open()).read_rows(self.rows)
        return counts if self.columns is None else counts.take_columns(self.columns, self.n_vars)


@dataclass(frozen=True)
class Block:
    """Cells of an atlas, which may be several stores as one.

    Args:
        pieces: where they are, at least one.
        order: ``(n,)``, which row of the pieces each row is; ``None`` where they come one after the other.
    """

    pieces: tuple[Piece, ...]
    order: NDArray[Any] | None

    def read(self) -> CSR:
        """The counts."""
        counts = CSR.concatenate([piece.read() for piece in self.pieces])
        return counts if self.order is None else counts.take_rows(self.order)


def locate(atlas: Atlas, positions: NDArray[np.int64]) -> Block:
    """Where some cells of an atlas, or of a view, are: all that another process needs to read them.

    Args:
        atlas: of stores on disk.
        positions: ``(n,)`` int64, at least one, in any order.

    Raises:
        OptionError: cells of an AnnData in memory.

    Example:
        >>> block = locate(atlas, np.array([7, 8, 9]))
        >>> block.pieces[0].rows
        slice(7, 10, None)
        >>> block.read().shape == (3, atlas.n_vars)
        True
    """
    found = list(_pieces(atlas, positions, np.arange(len(positions)), None, atlas.n_vars))
    order = np.concatenate([at for _, at in found])
    is_straight = bool((np.diff(order) == 1).all())
    return Block(tuple(piece for piece, _ in found), None if is_straight else narrow(np.argsort(order)))


def _pieces(
    atlas: Atlas,
    positions: NDArray[np.int64],
    at: NDArray[np.int64],
    outer: NDArray[np.int64] | None,
    n_vars: int,
) -> Iterable[tuple[Piece, NDArray[np.int64]]]:
    """Pieces, and where among all the cells theirs are; ``outer`` renames the genes of the atlas."""
    rows, columns = atlas.numbers_of(positions), _composed(atlas._column_of, outer)
    if not isinstance(atlas._source, JoinedSource):
        sent = None if columns is None else narrow(columns)
        yield Piece(Place.of(atlas._source), _shortest(rows), sent, n_vars), at
        return
    for part, first, column_of in atlas._source.parts:
        here = np.flatnonzero((rows >= first) & (rows < first + part.n_obs))
        if len(here):
            yield from _pieces(part, rows[here] - first, at[here], _composed(column_of, columns), n_vars)


def _composed(inner: NDArray[np.int64] | None, outer: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    if inner is None or outer is None:
        return outer if inner is None else inner
    return np.where(inner < 0, -1, outer[inner])


def _shortest(rows: NDArray[np.int64]) -> slice | NDArray[Any]:
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return narrow(rows)


def narrow(values: NDArray[np.int64]) -> NDArray[Any]:
    """The same numbers, at least -1, in as few bytes as they take."""
    largest = int(values.max(initial=0))
    is_signed = bool((values < 0).any())
    return values.astype(np.min_scalar_type(-largest - 1 if is_signed else largest))


# --- on a worker ------------------------------------------------------------------------------------


def read_blocks(blocks: Sequence[Block]) -> list[Arrays]:
    """The task of a stream: of each block arrays, which Dask sends as they lie in memory."""
    found = [block.read() for block in blocks]
    return [(*counts.numpy(), counts.n_vars) for counts in found]


def with_source(place: Place, function: Callable[..., T], *args: Any) -> T:
    """The task of an ingest: ``function(source, *args)``."""
    return function(place.open(), *args)


# --- in the process that asks -----------------------------------------------------------------------


def count_readers(client: Any, num_workers: int | None = None) -> int:
    """Tasks that a cluster has at work at a time: as many as asked for, or as all its workers have threads.

    Raises:
        OptionError: distributed is not installed, ``client`` is no client of it that is connected and waits
            for answers, or no reader was asked for.
    """
    try:
        import distributed
    except ImportError as error:
        raise OptionError(
            "client= needs the package distributed, which is not installed; pip install 'atlasvi[cluster]'"
        ) from error
    remedy = "pass distributed.Client(address), or leave client out"
    if not isinstance(client, distributed.Client):
        raise OptionError(f"client={client!r} is a {type(client).__name__}; {remedy}")
    if client.asynchronous or client.status != "running":
        state = "asynchronous" if client.asynchronous else client.status
        raise OptionError(f"client={client!r} is {state} and cannot be waited for; {remedy}")
    if num_workers is None:
        # None yet where workers are still to come.
        return max(1, int(sum(client.nthreads().values())))
    if num_workers < 1:
        raise OptionError(
            f"num_workers={num_workers} of a cluster cannot be; give at least 1, or leave it out"
        )
    return num_workers


def check_places(atlas: Atlas) -> None:
    """See that other processes can open an atlas, before they are asked to.

    Raises:
        OptionError: it, or a part of it, is not a store on disk.
    """
    if isinstance(atlas._source, JoinedSource):
        for part, _, _ in atlas._source.parts:
            check_places(part)
    else:
        Place.of(atlas._source)


def send_to_all(client: distributed.Client, value: T) -> distributed.Future[T]:
    """A value that is sent to each worker once, to be an argument of any number of calls of `in_order`.

    Of workers that come later each takes it from another; where all that had it die, the calls fail.
    """
    sent: distributed.Future[T] = client.scatter(value, broadcast=True, hash=False)
    return sent


def in_order(
    client: distributed.Client, function: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, ahead: int
) -> Generator[T]:
    """``function(*call)`` for each call, on the cluster, in the order of the calls.

    At most ``ahead`` are submitted that the consumer has not taken, and a result is let go on the cluster
    once it is here. When the consumer stops, what is under way is given up.

    Args:
        client: of the cluster.
        function: its result must not depend on the worker, and is made anew where a worker dies.
        calls: arguments, drawn as they are submitted.
        ahead: >= 1.

    Raises:
        Exception: what ``function`` raised, as it raised it.
    """
    todo, loop = iter(calls), client.loop.asyncio_loop  # type: ignore[union-attr]
    under_way: deque[tuple[distributed.Future[T], Future[T]]] = deque()

    def submit() -> None:
        for call in islice(todo, ahead - len(under_way)):
            task = client.submit(function, *call, pure=False)
            # Begun here and not when it is wanted: results travel while the consumer works.
            fetched = asyncio.run_coroutine_threadsafe(_fetch(client, task), loop)
            under_way.append((task, fetched))

    try:
        submit()
        while under_way:
            result = under_way[0][1].result()
            under_way.popleft()
            submit()
            yield result
            # Else it is kept alive while the next one is waited for.
            del result
    finally:
        if under_way and client.status == "running":
            client.cancel([task for task, _ in under_way])


async def _fetch(client: distributed.Client, task: distributed.Future[T]) -> T:
    """A result as soon as it is there; the cluster then forgets it."""
    try:
        return await client.gather(task, asynchronous=True)  # type: ignore[no-any-return]
    finally:
        task.release()


__all__ = [
    "Arrays",
    "Block",
    "Piece",
    "Place",
    "check_places",
    "count_readers",
    "in_order",
    "locate",
    "narrow",
    "read_blocks",
    "send_to_all",
    "with_source",
]
