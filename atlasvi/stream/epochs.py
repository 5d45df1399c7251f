"""Epochs of minibatches over the same cells: what training goes through."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from atlasvi_kernels import CSR, RowPool
from numpy.typing import NDArray

from atlasvi.errors import CellsError, GenesError, OptionError
from atlasvi.store.fields import Codes
from atlasvi.stream.blocks import check_positions, each, in_atlas, reader
from atlasvi.stream.minibatch import gather, pack
from atlasvi.stream.on_device import OnDevice, Room
from atlasvi.stream.plan import (
    EpochPlan,
    Unit,
    as_budget,
    blocks_ahead,
    default_sizes,
    minibatches_together,
    ordered_rows,
    plan_epoch,
)
from atlasvi.stream.read import ReadBlock, count_workers, read_units, read_units_on, units_a_task
from atlasvi.types import Minibatch

if TYPE_CHECKING:
    import distributed

    from atlasvi.store.atlas import Atlas

logger = logging.getLogger("atlasvi")

Positions: TypeAlias = NDArray[np.int64]


class Epochs:
    """Epochs over some cells of an atlas, each in an order of its own that anyone can work out again.

    The order depends on (number of cells, sizes, seed, epoch, weights): not on ``num_workers``, ``client`` or
    ``world_size``. Where the decoded counts of all these cells fit into half of ``memory_budget``, they stay
    in memory as they are read, in their narrow types, and later epochs are gathered from there. Where they
    fit into ``room`` they stay on its device instead, and later epochs are made there; with a ``world_size``
    those of this reader, whose lanes have the same blocks in all epochs.

    Args:
        atlas: where the cells are.
        codes: of its cells and genes, from `resolve`; only `counts` does without.
        batch_size: cells a minibatch; a tail of fewer than 3 cells joins the minibatch before.
        seed: of the run.
        shuffle: ``False`` visits the cells in order.
        positions: ``(n,)`` int64, the cells to visit (a training split), as positions in ``atlas``;
            in increasing order they are read fastest. All when ``None``.
        weights: ``(n,)`` >= 0, how often each of these comes, relative to the others; see `plan_epoch`.
        num_workers: threads that read; 0 reads in the calling thread; ``None``: cores less one, up to 4.
        memory_budget: bytes, or ``"500MB"``, that blocks and minibatches may take; 256 MiB when ``None``.
        keep: whether counts that fit stay in memory.
        pin_memory: lay minibatches into page-locked memory; ``None`` where there is a CUDA device.
        rank: number of this reader among ``world_size``, from 0.
        world_size: readers that share the epoch. Each has some of the lanes, reads their part of the store
            alone, and gives its part of every minibatch.
        client: of a Dask cluster whose workers read, instead of threads of this process.
        room: of the device that trains, for counts to stay there.

    Raises:
        OptionError: an argument outside its range.
        CellsError: positions or codes that do not fit the atlas.
        GenesError: genes that the atlas does not have.

    Example:
        >>> import numpy as np, anndata, scipy.sparse as sp
        >>> from atlasvi.store.atlas import Atlas
        >>> adata = anndata.AnnData(sp.csr_matrix(np.arange(20.0).reshape(10, 2)))
        >>> epochs = Epochs(Atlas.from_anndata(adata), batch_size=4, seed=1)
        >>> [len(rows) for _, rows in epochs.counts(epoch=0)]
        [4, 6]
    """

    def __init__(
        self,
        atlas: Atlas,
        codes: Codes | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        shuffle: bool = True,
        positions: Positions | None = None,
        weights: NDArray[np.floating] | None = None,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        keep: bool = True,
        pin_memory: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        client: distributed.Client | None = None,
        room: Room | None = None,
    ) -> None:
        if codes is not None:
            atlas = _as_model_sees(atlas, codes)
        if not 0 <= rank < world_size:
            raise OptionError(f"rank={rank} of world_size={world_size}; ranks count from 0")
        self._atlas, self._codes, self._client = atlas, codes, client
        self._at = check_positions(atlas, positions)
        self._batch_size, self._seed, self._shuffle, self._weights = batch_size, seed, shuffle, weights
        self._rank, self._world_size = rank, world_size
        self._pin = _decide_pinning(pin_memory)
        self._workers = count_workers(num_workers, client)
        budget, bytes_per_row = as_budget(memory_budget), atlas.bytes_per_row
        if shuffle:
            self._block_rows, self._n_lanes = default_sizes(
                bytes_per_row, budget, self.n_obs, is_shuffled=atlas.lies_at_random(self._at)
            )
            # A task of a cluster is some blocks.
            at_once = 1 if client is None else units_a_task(self._block_rows)
            self._ahead = blocks_ahead(bytes_per_row, self._block_rows, at_once * self._workers, budget)
        else:
            self._block_rows, self._n_lanes = ordered_rows(bytes_per_row, self._workers, budget), 1
            self._ahead = max(1, 2 * self._workers)
        self._read = reader(atlas, self._at)
        self._kept: KeptBlocks | None = None
        n_bytes = int(bytes_per_row * self.n_obs)
        self._on_device = None if room is None else self._held_in(room, n_bytes // world_size)
        keep = keep and shuffle and client is None and not atlas.in_memory and self._on_device is None
        if keep and n_bytes <= budget // 2:
            self._read = self._kept = KeptBlocks(self._read, self._block_rows, self.n_obs)
            logger.info(
                "the counts of %s cells (about %.0f MB) fit into half of memory_budget and stay in memory "
                "once they are read", f"{self.n_obs:,}", n_bytes / 1e6,
            )  # fmt: skip
        self.plan(0)  # which says what is wrong with the numbers
        self._together = minibatches_together(bytes_per_row, batch_size, budget, is_ordered=not shuffle)

    @property
    def n_obs(self) -> int:
        """Number of cells to visit."""
        return self._atlas.n_obs if self._at is None else len(self._at)

    @property
    def kept(self) -> str:
        """Where counts stay as they are read: ``"in memory"``, ``"on cuda"``, or nowhere: ``""``."""
        if self._on_device is not None:
            return f"on {self._on_device.device}"
        return "" if self._kept is None else "in memory"

    @property
    def is_kept(self) -> bool:
        """Whether all counts are in memory by now."""
        return self._atlas.in_memory or (self._kept is not None and self._kept.is_complete)

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch, in positions among the cells to visit."""
        return plan_epoch(
            self.n_obs, batch_size=self._batch_size, block_rows=self._block_rows, n_lanes=self._n_lanes,
            seed=self._seed, epoch=epoch, shuffle=self._shuffle, weights=self._weights,
        )  # fmt: skip

    def __call__(self, epoch: int = 0, start: int = 0) -> Iterator[Minibatch]:
        """The minibatches of an epoch, ready for a model: its genes in its order, and codes.

        Args:
            epoch: from 0.
            start: minibatch to begin with; those before are neither read nor made.

        Raises:
            OptionError: there is no such minibatch.
            CorruptError: while reading, where a checksum fails.
        """
        if self._codes is None:
            raise OptionError("minibatches need codes; give them, or take counts(), which does without")
        codes, atlas = self._codes, self._atlas
        return each(
            self._pieces(epoch, start),
            lambda counts, at: pack(counts, at, codes, atlas.numbers_of(at), pin_memory=self._pin),
        )

    def counts(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
        """The same, as counts with the cells' numbers in the store."""
        atlas = self._atlas
        return each(
            self._pieces(epoch, start),
            lambda counts, at: (counts.pin_memory() if self._pin else counts, atlas.numbers_of(at)),
        )

    def _pieces(self, epoch: int, start: int) -> Generator[tuple[CSR, Positions]]:
        plan = self.plan(epoch)
        if not 0 <= start <= plan.n_minibatches:
            raise OptionError(f"start={start} of an epoch of {plan.n_minibatches} minibatches")
        lanes = range(self._rank, plan.n_lanes, self._world_size)
        units = plan.schedule(lanes, start)
        if self._on_device is not None and self._on_device.holds(units):
            nothing_read = (unit for unit in units)
            return in_atlas(gather(nothing_read, units, self._on_device, plan, lanes, start), self._at)
        # What is in memory is had at once: no thread is worth its while.
        workers = 0 if self._kept is not None and self.is_kept else self._workers
        if self._client is None:
            read = read_units(self._read, units, num_workers=workers, ahead=self._ahead)
        else:
            read = read_units_on(self._client, self._atlas, self._at, units, ahead=self._ahead)
        if self._on_device is not None:
            read = self._copied(read, units, self._on_device)
        pool = RowPool(self._atlas.n_vars)
        pieces = gather(read, units, pool, plan, lanes, start, self._together, alone=not workers)
        return in_atlas(pieces, self._at)

    def _held_in(self, room: Room, n_bytes: int) -> OnDevice | None:
        there_is, fits = room.n_bytes, room.reserve(n_bytes)
        logger.info(
            "the counts of %s cells (about %.0f MB) %s the %.0f MB that are free for them on %s%s",
            f"{self.n_obs // self._world_size:,}", n_bytes / 1e6, "fit into" if fits else "do not fit into",
            there_is / 1e6, room.device, " and stay there once they are read" if fits else "",
        )  # fmt: skip
        return OnDevice(room, n_bytes, self.n_obs, self._atlas.n_vars, pin_memory=self._pin) if fits else None

    def _copied(self, read: Generator[CSR], units: list[Unit], to: OnDevice) -> Generator[CSR]:
        """What is read, and copied to the device on the way."""
        with closing(read):
            for unit in units:
                counts = next(read)
                if self._on_device is to and not to.put(unit.start, counts):
                    logger.warning(
                        "the counts are larger than was estimated and do not fit on %s: "
                        "they are read in every epoch", to.device,
                    )  # fmt: skip
                    self._on_device = None
                yield counts
                # Else it is kept alive while the next one is waited for.
                del counts


class KeptBlocks:
    """Reads blocks, and has them from then on.

    Args:
        read: reads positions ``start`` to ``stop``.
        block_rows: positions a block; what is asked for never crosses from one to the next.
        n_rows: positions in all.
    """

    def __init__(self, read: ReadBlock, block_rows: int, n_rows: int) -> None:
        self._read, self._block_rows, self._n_rows = read, block_rows, n_rows
        self._blocks: dict[int, CSR] = {}
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        """Whether every block was read."""
        return len(self._blocks) == -(-self._n_rows // self._block_rows)

    def __call__(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``, as a view of their block."""
        first = start // self._block_rows * self._block_rows
        with self._lock:
            block = self._blocks.get(first)
        if block is None:
            block = self._read(first, min(first + self._block_rows, self._n_rows))
            with self._lock:
                block = self._blocks.setdefault(first, block)
        return block.row_range(start - first, stop - first)


def _as_model_sees(atlas: Atlas, codes: Codes) -> Atlas:
    """The atlas with the genes of a model in its order: sorted as blocks are read, once, in the readers."""
    if len(codes.batch_index) != atlas.n_obs:
        raise CellsError(
            f"codes are for {len(codes.batch_index)} cells but the atlas has {atlas.n_obs}; "
            "make them with resolve(field_map, atlas)"
        )
    columns = np.asarray(codes.gene_columns, np.int64)
    if len(columns) and not 0 <= columns.min() <= columns.max() < atlas.n_vars:
        raise GenesError(
            f"codes name gene {columns.max()} but the atlas has {atlas.n_vars}; "
            "make them with resolve(field_map, atlas)"
        )
    return atlas if np.array_equal(columns, np.arange(atlas.n_vars)) else atlas[:, columns]


def _decide_pinning(pin_memory: bool | None) -> bool:
    if pin_memory and not torch.cuda.is_available():
        raise OptionError("pin_memory=True needs a CUDA device and there is none; leave it out or pass False")
    return torch.cuda.is_available() if pin_memory is None else pin_memory
