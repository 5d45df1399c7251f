"""An atlas: counts with names, read a block at a time, from a store on disk or an AnnData alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.errors import CellsError, GenesError, NotAnAtlasError, ObsError, OptionError
from atlasvi.store import cluster
from atlasvi.store.base import Source
from atlasvi.store.cells import input_names
from atlasvi.store.counts import as_counts, checked_rows
from atlasvi.store.fields import match_genes
from atlasvi.store.genes import Join
from atlasvi.store.joined import JoinedSource
from atlasvi.store.obsm import write_obsm
from atlasvi.store.remote import is_url
from atlasvi.store.sources import GroupSource, open_source
from atlasvi.types import FieldMap

if TYPE_CHECKING:
    import anndata
    import distributed

    from atlasvi.store.stats import GeneSet, Statistics

Rows: TypeAlias = "slice | NDArray[Any] | Sequence[int]"
One: TypeAlias = "str | os.PathLike[str] | Atlas"
Genes: TypeAlias = "slice | NDArray[Any] | Sequence[int] | Sequence[str] | str"

# Rows this near each other are read together and those between thrown away: a read costs about as much
# as decoding a hundred rows, and a chunk is decoded whole anyway.
_MAX_GAP = 128
# ... but a read that throws rows away is no longer than this, which bounds what is held meanwhile.
_MAX_SPARSE_READ = 1024
_ROOTS = ("zarr.json", ".zgroup")


def open(
    path: One | Sequence[One] | Mapping[str, One],
    *,
    layer: str | None = None,
    join: Join = "inner",
    var_key: str | None = None,
    input_key: str = "input",
    make_unique: bool = False,
) -> Atlas:
    """Open an atlas: metadata only, whatever its size. Or several as one, without a copy.

    Of several, the cells stand side by side in the order given, genes are matched by name, and a column of
    obs that all have is one column, categories with the levels of all. A column that one of them lacks is
    left out, which is logged. The names of the cells are read once, to see that none stands twice; var is
    that of the first.

    Args:
        path: an AnnData Zarr store with counts by cells (what `ingest` writes, or any other), its URL
            (``https://``, ``s3://``, ``gs://``, ``az://``: ``pip install 'atlasvi[remote]'``), or an
            ``.h5ad``, which reads far slower; or several of these, or of atlases that are open. A mapping
            names them; else they are named after their files.
        layer: where the counts are: ``None`` for ``X``, a layer's name, or ``"raw"``. Atlases that are open
            already keep their own.
        join: of several, keep the genes that all have (``"inner"``) or all genes (``"outer"``, absent is 0).
        var_key: of several, column of var to match genes by; by default their names.
        input_key: of several, the column of obs that says which one a cell is of; it takes the place of
            a column of that name in them, which is logged.
        make_unique: of several, append ``-<name>`` to the names of cells where one repeats, and ``-1``,
            ``-2``, ... to genes that repeat; by default a repeat is an error.

    Raises:
        NotAnAtlasError: there is no AnnData there, or an ingest never finished.
        CorruptError: a file is truncated or damaged.
        OptionError: the layer is not there, the counts are stored by genes, or a URL needs a package that
            is not installed.
        StoreError: a server that does not answer, after a few tries.
        GenesError: several share no gene, or a gene stands twice in one.
        CellsError: a cell's name stands twice in several.

    Example:
        >>> with open(atlas.path) as opened:
        ...     opened.n_obs > 0
        True
    """
    if isinstance(path, Atlas):
        return path
    if isinstance(path, str | os.PathLike):
        return _open_one(path, layer)
    if not isinstance(path, Sequence | Mapping):
        raise OptionError(f"a {type(path).__name__} cannot be opened; pass a path, or a list of paths")
    items = list(path.values()) if isinstance(path, Mapping) else list(path)
    if not items:
        raise OptionError("there is nothing to open; give at least one path")
    if isinstance(path, Mapping):
        names = [str(name) for name in path]
    else:
        names = input_names([(i.path or i) if isinstance(i, Atlas) else i for i in items])
    opened: list[Atlas] = []
    try:
        parts = []
        for item in items:
            parts.append(as_atlas(item, layer=layer))
            if not isinstance(item, Atlas):
                opened.append(parts[-1])
        return Atlas(JoinedSource(parts, names, opened, join, var_key, input_key, make_unique=make_unique))
    except BaseException:
        for one in opened:
            one.close()
        raise


def _open_one(path: str | os.PathLike[str], layer: str | None) -> Atlas:
    if isinstance(path, str) and is_url(path):
        return Atlas(_by_cells(open_source(path, layer)))
    path, remedy = Path(path), "make one: atlasvi ingest INPUT -o atlas.zarr"
    if not path.exists():
        raise NotAnAtlasError(f"{str(path)!r} is not an atlas: nothing is there; {remedy}")
    if path.is_dir() and not any((path / name).exists() for name in _ROOTS):
        raise NotAnAtlasError(f"{str(path)!r} is not an atlas: no AnnData group there; {remedy}")
    source = open_source(path, layer)
    if not isinstance(source, GroupSource):
        source.close()
        raise NotAnAtlasError(f"{str(path)!r} is not an atlas but an input for one; {remedy}")
    return Atlas(_by_cells(source), path=path)


def _by_cells(source: Source) -> Source:
    if source.by_genes:
        source.close()
        raise OptionError(
            f"{source.name!r} {source.place} is stored as csc_matrix, by genes, and cannot be read by cells; "
            "make an atlas of it: atlasvi.ingest(..., 'atlas.zarr'), or convert it: adata.X = adata.X.tocsr()"
        )
    return source


def as_atlas(data: Atlas | anndata.AnnData | str | os.PathLike[str], *, layer: str | None = None) -> Atlas:
    """An atlas from whatever a method of a model is given.

    Args:
        data: an `Atlas`, returned as it is; an AnnData; or the path or URL of a store.
        layer: where the counts are, for the latter two.

    Raises:
        OptionError: none of these.
    """
    if isinstance(data, Atlas):
        return data
    if isinstance(data, str | os.PathLike):
        return open(data, layer=layer)
    if hasattr(data, "obs_names") and hasattr(data, "uns"):
        return Atlas.from_anndata(data, layer=layer)
    raise OptionError(f"a {type(data).__name__} holds no counts; pass an AnnData, an Atlas or a path")


class Atlas:
    """Cells x genes of counts with their names and annotations, none of it in memory until asked for.

    Made by `open` and `Atlas.from_anndata`. Indexing gives a lazy view: ``atlas[cells]`` or
    ``atlas[cells, genes]``, with slices, integers, boolean masks and gene names; views compose. What is on
    disk or behind a URL can be pickled, by where it is: another process opens it anew.

    Args:
        source: what reads the counts.
        path: of the store on disk, or ``None``.

    Example:
        >>> import anndata, numpy as np, scipy.sparse as sp
        >>> atlas = Atlas.from_anndata(anndata.AnnData(sp.csr_matrix(np.eye(4, dtype=np.float32))))
        >>> atlas[1:, ["3"]].read_rows(slice(None)).to_dense().tolist()
        [[0.0], [0.0], [1.0]]
    """

    def __init__(self, source: Source, *, path: Path | None = None) -> None:
        self._source = source
        self._path = path
        self._rows: NDArray[np.int64] | None = None
        self._columns: NDArray[np.int64] | None = None
        self._column_of: NDArray[np.int64] | None = None
        self._per_row: tuple[float, float] | None = None
        self.registration: FieldMap | None = None
        """What ``setup_anndata`` was told about this atlas; kept here, a store on disk is not written to."""

    @classmethod
    def from_anndata(cls, adata: anndata.AnnData, layer: str | None = None) -> Atlas:
        """The counts of an AnnData: in memory, backed by a file, or lazy.

        Args:
            adata: the data; it is read where it is, not copied and not changed.
            layer: a layer's name, ``"raw"``, or ``None`` for ``X``.
        """
        return cls(_by_cells(open_source(adata, layer)))

    # --- what it is -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """How a person would call it: a path, or ``AnnData``."""
        return self._source.name

    @property
    def path(self) -> Path | None:
        """The folder of the store, or ``None`` where there is none on disk."""
        return self._path

    @property
    def paths(self) -> list[Path]:
        """The stores on disk that it reads: one, those opened as one, or none."""
        if isinstance(self._source, JoinedSource):
            return [path for part, _, _ in self._source.parts for path in part.paths]
        return [] if self._path is None else [self._path]

    @property
    def layer(self) -> str | None:
        """Where the counts are: a layer's name, ``"raw"``, or ``None`` for ``X``."""
        return self._source.layer

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self._source.shape[0]) if self._rows is None else len(self._rows)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return int(self._source.shape[1]) if self._columns is None else len(self._columns)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self.n_obs, self.n_vars

    @property
    def is_several(self) -> bool:
        """Whether these are several stores opened as one, or a view of that."""
        return isinstance(self._source, JoinedSource)

    def __len__(self) -> int:
        return self.n_obs

    def __repr__(self) -> str:
        view = "" if self.is_whole else "view of "
        return f"Atlas({view}{self.name!r}: {self.n_obs:,} cells x {self.n_vars:,} genes)"

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole store, not a view of some cells or genes."""
        return self._rows is None and self._columns is None

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """``(n_obs,)`` int64, the position of each cell in the underlying store."""
        return np.arange(self.n_obs, dtype=np.int64) if self._rows is None else self._rows

    @property
    def obs_names(self) -> NDArray[Any]:
        """``(n_obs,)`` names of the cells, numpy ``StringDType``."""
        return _take_names(self._source.obs_names, self._rows)

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of the cells ``start`` to ``stop``; all at once they may be gigabytes."""
        if self._rows is None:
            return self._source.read_names(start, stop)
        rows = self._rows[start:stop]
        first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return self._source.read_names(first, last)[rows - first]

    def numbers_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """`row_numbers` of some cells, without making those of all."""
        return positions if self._rows is None else self._rows[positions]

    @property
    def var_names(self) -> NDArray[Any]:
        """``(n_vars,)`` names of the genes, numpy ``StringDType``."""
        return _take_names(self._source.var_names, self._columns)

    @property
    def obs_keys(self) -> list[str]:
        """Names of the columns of obs."""
        return list(self._source.obs_keys)

    @property
    def var_keys(self) -> list[str]:
        """Names of the columns of var."""
        return list(self._source.var_keys)

    def obs_column(self, key: str) -> pd.Categorical | NDArray[Any]:
        """One column of obs, ``(n_obs,)``, without reading the others."""
        return _take(self._source.obs_column(key), self._rows)

    def var_column(self, key: str) -> pd.Categorical | NDArray[Any]:
        """One column of var, ``(n_vars,)``."""
        return _take(self._source.var_column(key), self._columns)

    @property
    def obsm_keys(self) -> list[str]:
        """Names of the arrays in obsm; of several stores as one, of those that all have in one width."""
        return list(self._source.extras().obsm)

    def read_obsm(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of an array in obsm, ``(stop - start, width)``.

        Raises:
            KeyError: there is no such array.
        """
        array = self._source.extras().obsm[key]
        if self._rows is None:
            return np.asarray(array[start:stop])
        rows = self._rows[start:stop]
        first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return np.asarray(array[first:last])[rows - first]

    @property
    def obs(self) -> pd.DataFrame:
        """All columns of obs, read when asked for."""
        columns = {key: _for_pandas(self.obs_column(key)) for key in self.obs_keys}
        return pd.DataFrame(columns, index=pd.Index(self.obs_names.astype(object)))

    @property
    def var(self) -> pd.DataFrame:
        """All columns of var, read when asked for."""
        columns = {key: _for_pandas(self.var_column(key)) for key in self.var_keys}
        return pd.DataFrame(columns, index=pd.Index(self.var_names.astype(object)))

    @property
    def bytes_per_row(self) -> float:
        """Mean size of a decoded cell, estimated from a few hundred of them."""
        return self._estimated_per_row()[0]

    @property
    def nonzeros_per_row(self) -> float:
        """Mean number of non-zeros of a cell, estimated from the same."""
        return self._estimated_per_row()[1]

    def _estimated_per_row(self) -> tuple[float, float]:
        if self._per_row is None:
            # A few neighbours from eight places: depth differs between the inputs of an atlas.
            starts = np.linspace(0, max(self.n_obs - 32, 0), 8).astype(np.int64)
            parts = [self.read_rows(slice(a, min(a + 32, self.n_obs))) for a in np.unique(starts)]
            n_read = max(sum(part.n_obs for part in parts), 1)
            self._per_row = sum(p.nbytes for p in parts) / n_read, sum(p.nnz for p in parts) / n_read
        return self._per_row

    @property
    def in_memory(self) -> bool:
        """Whether the counts are in the memory of this process already."""
        return self._source.in_memory

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()

    def __enter__(self) -> Atlas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __copy__(self) -> Atlas:
        """With a registration of its own; what reads the counts never changes and is shared, as by views."""
        again = Atlas.__new__(Atlas)
        again.__dict__.update(self.__dict__)
        return again

    def __deepcopy__(self, memo: dict[int, Any]) -> Atlas:
        """The same: counts in memory are not copied, and a store is not opened anew."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """By where it is: another process opens the store anew, and counts are never pickled."""
        is_joined = isinstance(self._source, JoinedSource)
        where = self._source if is_joined else cluster.Place.of(self._source)
        return _open_again, (where, self._rows, self._columns, self.registration)

    # --- views ----------------------------------------------------------------------------------

    def __getitem__(self, index: Rows | tuple[Rows, Genes]) -> Atlas:
        if isinstance(index, tuple) and len(index) != 2:
            raise OptionError(f"an atlas is cells x genes: atlas[cells, genes], not {len(index)} indices")
        rows, genes = index if isinstance(index, tuple) else (index, slice(None))
        view = Atlas(self._source, path=self._path)
        view.registration = self.registration
        view._rows = _compose(self._rows, self._find_cells(rows), self.n_obs)
        view._columns = _compose(self._columns, self._find_genes(genes), self.n_vars)
        if view._columns is not None:
            view._column_of = np.full(self._source.shape[1], -1, np.int64)
            view._column_of[view._columns] = np.arange(len(view._columns))
        return view

    def _find_cells(self, rows: Rows) -> NDArray[np.int64] | slice:
        return _positions(rows, self.n_obs, "cells", CellsError)

    def _find_genes(self, genes: Genes) -> NDArray[np.int64] | slice:
        names = np.asarray([genes] if isinstance(genes, str) else genes)
        if names.dtype.kind in "UTO" and names.size and not isinstance(genes, slice):
            found: NDArray[np.int64] | slice = match_genes([str(name) for name in names], self)
        else:
            found = _positions(genes, self.n_vars, "genes", GenesError)
        if not isinstance(found, slice) and len(np.unique(found)) < len(found):
            raise GenesError(f"a view of {self.name} was asked for a gene twice; name each once")
        return found

    # --- reading --------------------------------------------------------------------------------

    def read_rows(self, rows: Rows) -> CSR:
        """Counts of some cells of this view, in the order asked, of its genes in its order.

        Neighbours are read together; cells may repeat.

        Args:
            rows: a slice, integers in ``[0, n_obs)``, or a boolean mask.

        Raises:
            CellsError: cells that are not there.
            CountsError: an entry that is not a count, in data that was not ingested.
            CorruptError: a checksum failed or a file is truncated; it names file, shard and rows.
        """
        found = self._find_cells(rows)
        if isinstance(found, slice):
            start, stop, step = found.indices(self.n_obs)
            if self._rows is None and step == 1:
                return self._select_genes(self._read(start, max(start, stop)))
            found = np.arange(start, stop, step, dtype=np.int64)
        wanted = found if self._rows is None else self._rows[found]
        if not len(wanted):
            return self._select_genes(self._read(0, 0))
        is_sorted = bool((np.diff(wanted) >= 0).all())
        order = None if is_sorted else np.argsort(wanted, kind="stable")
        counts = CSR.concatenate(
            [self._read_run(run) for run in _runs(wanted if order is None else wanted[order])]
        )
        if order is None:
            return counts
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return counts.take_rows(back)

    def _read_run(self, run: NDArray[np.int64]) -> CSR:
        """Rows that lie near each other, in increasing order."""
        start, stop = int(run[0]), int(run[-1]) + 1
        counts = self._read(start, stop)
        if len(run) != stop - start or (np.diff(run) != 1).any():
            counts = counts.take_rows(run - start)
        return self._select_genes(counts)

    def _select_genes(self, counts: CSR) -> CSR:
        if self._column_of is None:
            return counts
        return counts.take_columns(self._column_of, self.n_vars)

    def _read(self, start: int, stop: int) -> CSR:
        counts = self._source.read_rows(start, stop)
        if not self.is_checked and as_counts(counts.data.numpy())[1] >= 0:
            # Which reads them once more and raises, naming cell, gene and where counts may be.
            checked_rows(self._source, start, stop, np.arange(self._source.shape[1]))
        return counts

    @property
    def is_checked(self) -> bool:
        """Whether `ingest` has made sure that these are counts; what nobody did is checked when read."""
        return self._source.is_checked

    def lies_at_random(self, positions: NDArray[np.int64] | None = None) -> bool:
        """Whether cells lie in a random order: the store was ingested so, and nothing has sorted them since.

        Args:
            positions: ``(n,)``, of the cells in question; all of this view when ``None``.
        """
        if not self._source.is_shuffled:
            return False
        rows = self._rows if positions is None else self.numbers_of(positions)
        return rows is None or bool((rows[1:] > rows[:-1]).all())

    def check_counts(self, at_most: int = 100_000) -> None:
        """Look at the entries of some cells before they are needed; the rest is checked as it is read.

        Args:
            at_most: cells to look at, from eight places if there are more. None of an ingested store,
                where all were looked at then.

        Raises:
            CountsError: an entry that is negative, fractional, NaN, infinite or too large.
        """
        if self.is_checked or self.n_obs == 0:
            return
        n_places = 1 if self.n_obs <= at_most else 8
        length = min(self.n_obs, max(1, at_most // n_places))
        for start in np.linspace(0, self.n_obs - length, n_places).astype(int):
            # In pieces, since nothing of them is kept.
            for piece in range(start, start + length, _MAX_SPARSE_READ):
                self.read_rows(slice(piece, min(piece + _MAX_SPARSE_READ, start + length)))

    def stream(
        self,
        batch_size: int = 128,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        positions: NDArray[np.int64] | None = None,
        weights: NDArray[np.floating] | None = None,
        balance: str | None = None,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        pin_memory: bool | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        client: distributed.Client | None = None,
    ) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
        """One epoch of minibatches: sparse counts, and the number in the store of each cell.

        Blocks of neighbours come in random order, and the cells of several blocks are mixed. Same seed
        and epoch, same minibatches, whoever reads. For many epochs see `atlasvi.stream.Epochs`, which keeps
        counts that fit in memory.

        Args:
            batch_size: cells a minibatch; a tail of fewer than 3 cells joins the minibatch before.
            seed: of the run.
            epoch: number of the epoch, from 0.
            shuffle: ``False`` visits the cells in order.
            positions: ``(n,)`` int64, cells of this view to visit; all when ``None``.
            weights: ``(n,)`` >= 0, how often each of these cells comes, relative to the others: its expected
                number, rounded up or down at random. Once each when ``None``.
            balance: instead of weights, a column of obs whose levels are to come equally often; cells
                without a level do not come.
            num_workers: threads that read; 0 reads in the calling thread; ``None``: cores less one, up to 4.
            memory_budget: bytes, or ``"500MB"``, that blocks and minibatches may take; 256 MiB when ``None``.
            pin_memory: lay minibatches into page-locked memory; ``None`` where there is a CUDA device.
            start: minibatch to begin with; those before are neither read nor made.
            rank: number of this reader among ``world_size``, from 0.
            world_size: readers that share the epoch. Each has some of the lanes, reads their part of the
                store alone, and gives its part of every minibatch.
            client: of a Dask cluster whose workers read, instead of threads of this process; they must
                see the store under the same path.

        Raises:
            OptionError: an argument outside its range, weights beside balance, or a client that is not one.
            CellsError: positions that are not there.
            ObsError: no such column to balance.
            CorruptError: while reading, where a checksum fails.
        """
        # The one import upwards (DESIGN): people look for the stream here.
        from atlasvi import stream

        if balance is not None:
            if weights is not None:
                raise OptionError(f"balance={balance!r} makes weights, and weights were given; leave one out")
            codes = pd.Categorical(_column(self, balance)).codes
            weights = stream.balance_weights(codes if positions is None else codes[positions])
        epochs = stream.Epochs(
            self, batch_size=batch_size, seed=seed, shuffle=shuffle, positions=positions, weights=weights,
            num_workers=num_workers, memory_budget=memory_budget, keep=False, pin_memory=pin_memory,
            rank=rank, world_size=world_size, client=client,
        )  # fmt: skip
        return epochs.counts(epoch, start)

    def iter_blocks(
        self,
        positions: NDArray[np.int64] | None = None,
        columns: Genes | None = None,
        *,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        client: distributed.Client | None = None,
    ) -> Iterator[tuple[CSR, NDArray[np.int64]]]:
        """All cells in order, in blocks read ahead, with their positions in this view.

        For passes over everything, such as moments; training takes `stream`.

        Args:
            positions: ``(n,)`` int64, cells of this view to visit; all when ``None``.
            columns: genes; all when ``None``.
            num_workers: threads that read; 0 reads in the calling thread; ``None``: cores less one, up to 4.
            memory_budget: bytes, or ``"500MB"``, that the blocks may take; no more than 8 MiB are used.
            client: of a Dask cluster whose workers read; see `stream`.
        """
        from atlasvi import stream

        return stream.stream_blocks(
            self if columns is None else self[:, columns], positions=positions, num_workers=num_workers,
            memory_budget=memory_budget, client=client,
        )  # fmt: skip

    # --- statistics -----------------------------------------------------------------------------

    def statistics(
        self,
        *,
        batch_key: str | None = None,
        gene_sets: Mapping[str, GeneSet] | None = None,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        client: distributed.Client | None = None,
    ) -> Statistics:
        """Moments and detection of genes, totals of cells and shares of gene sets, in one pass.

        Sums are exact, so that the result is the same to the last bit however the cells are read. Beside
        the decoded blocks it takes 32 bytes a gene, 12 bytes a cell and 8 more for each gene set.

        Args:
            batch_key: column of obs with the batches whose library sizes are to be told apart.
            gene_sets: by name, each a prefix of gene names (``"MT-"``), names, a boolean mask, or
                ``"mt"``: what starts with ``MT-``, ``Mt-`` or ``mt-``.
            num_workers: threads that read; 0 reads in the calling thread; ``None``: cores less one, up to 4.
            memory_budget: as for `iter_blocks`. Not of a cluster.
            client: of a Dask cluster whose workers add up what they read; see `stream`.

        Raises:
            OptionError: a client with which this cannot be.
            CellsError: there are no cells.
            ObsError: the batch column is missing or has gaps.
            GenesError: a gene set without a gene, or that does not fit the atlas.

        Example:
            >>> found = atlas.statistics(batch_key="batch", gene_sets={"first": "G000"})
            >>> found.batches, len(found.shares["first"]) == atlas.n_obs
            (('b0', 'b1'), True)
        """
        from atlasvi.store.stats import statistics

        return statistics(
            self, batch_key=batch_key, gene_sets=gene_sets, num_workers=num_workers,
            memory_budget=memory_budget, client=client,
        )  # fmt: skip

    def highly_variable_genes(
        self,
        n_top_genes: int = 2000,
        *,
        batch_key: str | None = None,
        flavor: str = "seurat_v3",
        span: float = 0.3,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        client: distributed.Client | None = None,
    ) -> pd.DataFrame:
        """The genes that vary most for their mean, as ``scanpy.pp.highly_variable_genes``, in two passes.

        Standardised variance of clipped counts, Stuart et al. 2019. Needs scikit-misc:
        ``pip install 'atlasvi[hvg]'``. Takes 88 bytes a gene and batch beside the decoded blocks.

        Args:
            n_top_genes: genes to choose.
            batch_key: column of obs; genes are ranked in each batch and chosen by their median rank.
            flavor: ``"seurat_v3"``, or ``"seurat_v3_paper"``, which looks first at the number of batches.
            span: share of the genes that loess fits together.
            num_workers: as for `statistics`.
            memory_budget: as for `statistics`.
            client: of a Dask cluster whose workers read; see `stream`.

        Returns:
            By gene name: ``means``, ``variances``, ``variances_norm``, ``highly_variable_rank``,
            ``highly_variable`` and with a batch key ``highly_variable_nbatches``. Genes that tie are taken
            in their order.

        Raises:
            OptionError: an argument outside its range, too few genes to fit, or no scikit-misc.
            CellsError: no cells, or a batch of one.
            ObsError: the batch column is missing or has gaps.

        Example:
            >>> found = atlas.highly_variable_genes(10, batch_key="batch", span=1.0)
            >>> chosen = atlas[:, found.index[found["highly_variable"]]]
            >>> chosen.n_vars
            10
        """
        from atlasvi.store.variable import highly_variable_genes

        return highly_variable_genes(
            self, n_top_genes, batch_key=batch_key, flavor=flavor, span=span, num_workers=num_workers,
            memory_budget=memory_budget, client=client,
        )  # fmt: skip

    def filter(
        self,
        *,
        min_counts: int | None = None,
        max_counts: int | None = None,
        min_genes: int | None = None,
        max_genes: int | None = None,
        max_share: Mapping[str, float] | None = None,
        gene_sets: Mapping[str, GeneSet] | None = None,
        num_workers: int | None = None,
        memory_budget: int | str | None = None,
        client: distributed.Client | None = None,
    ) -> Atlas:
        """A view of the cells that pass all that is asked; one pass over the counts, and no copy of them.

        Logs how many cells fail each criterion. The view takes 8 bytes for each cell that it has.

        Args:
            min_counts: fewest counts of a cell.
            max_counts: most counts of a cell.
            min_genes: fewest genes detected in a cell.
            max_genes: most genes detected in a cell.
            max_share: largest share of a gene set in a cell's counts, as ``{"mt": 0.2}``.
            gene_sets: which genes the sets have, as for `statistics`; ``"mt"`` needs none.
            num_workers: as for `statistics`.
            memory_budget: as for `statistics`.
            client: as for `statistics`.

        Raises:
            OptionError: nothing to filter by, limits that cannot be, or a gene set that is not known.
            GenesError: a gene set without a gene, or that does not fit the atlas.
            CellsError: no cell passes.

        Example:
            >>> passed = atlas.filter(min_genes=5, max_share={"first": 0.9}, gene_sets={"first": "G000"})
            >>> 0 < passed.n_obs <= atlas.n_obs
            True
        """
        from atlasvi.store.stats import filter_cells

        return filter_cells(
            self, min_counts=min_counts, max_counts=max_counts, min_genes=min_genes, max_genes=max_genes,
            max_share=max_share, gene_sets=gene_sets, num_workers=num_workers, memory_budget=memory_budget,
            client=client,
        )  # fmt: skip

    def to_anndata(self) -> anndata.AnnData:
        """The cells and genes of this view as an AnnData in memory, for scanpy: for parts that fit.

        ``anndata.read_zarr`` gives the same counts in the narrow types of the store, with which a few
        functions of scipy and scanpy (``calculate_qc_metrics``) cannot work; here counts are float32 and
        indices int32.

        Example:
            >>> atlas[:50].to_anndata().shape == (50, atlas.n_vars)
            True
        """
        import anndata

        counts = self.read_rows(slice(None)).to_scipy()
        adata = anndata.AnnData(counts.astype(np.float32), obs=self.obs, var=self.var)
        for key in self.obsm_keys:
            adata.obsm[key] = self.read_obsm(key, 0, self.n_obs)
        return adata

    # --- writing --------------------------------------------------------------------------------

    def write_obsm(self, key: str, blocks: Iterable[Any], width: int) -> None:
        """Write a float32 array into ``obsm[key]`` of the store (or h5ad) on disk, block by block.

        It is written beside and moved in when whole, so that a run that was killed leaves what was
        there before, or nothing. ``anndata`` reads it as it is. Of several stores opened as one, each gets
        the rows of its cells, and none is touched before all are written.

        Args:
            key: such as ``"X_scVI"``; what stands there is replaced.
            blocks: arrays or tensors ``(rows, width)``, in the order of the cells, one row each in all.
                They may be made while reading this atlas.
            width: number of columns.

        Raises:
            OptionError: this is a view, or has no store on disk, or the blocks do not fit.
            SpaceError: the disk is full.
            StoreError: it cannot be written there.
        """
        if is_url(self.name):
            raise OptionError(
                f"obsm[{key!r}] cannot be written to {self.name!r}: what a URL names is only read; write it "
                "to a store or an .h5ad on disk that has these cells"
            )
        parts = self._source.parts if isinstance(self._source, JoinedSource) else []
        whole = [atlas for atlas, _, _ in parts] or [self]
        stores = [(atlas.path, atlas.n_obs) for atlas in whole if atlas.path is not None and atlas.is_whole]
        if len({path.resolve() for path, _ in stores}) < len(whole) or not self.is_whole:
            raise OptionError(
                f"obsm[{key!r}] can be written to a whole store on disk, or to several as one, not to "
                f"{self!r}; open the store with atlasvi.open(path)"
            )
        if not key or "/" in key or "\\" in key or key.startswith("."):
            raise OptionError(f"obsm key {key!r} cannot be the name of a folder; take one such as 'X_scVI'")
        write_obsm(stores, key, blocks, width)


def _open_again(
    where: JoinedSource | cluster.Place,
    rows: NDArray[np.int64] | None,
    columns: NDArray[np.int64] | None,
    registration: FieldMap | None,
) -> Atlas:
    atlas = Atlas(where) if isinstance(where, JoinedSource) else open(where.path, layer=where.layer)
    view = atlas[slice(None) if rows is None else rows, slice(None) if columns is None else columns]
    view.registration = registration
    return view


def _column(atlas: Atlas, key: str) -> Any:
    if key not in atlas.obs_keys:
        known = ", ".join(atlas.obs_keys) or "none"
        raise ObsError(f"obs of {atlas.name} has no column {key!r} to balance; it has {known}")
    return atlas.obs_column(key)


def _runs(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cut increasing rows where they lie far apart, and long stretches with holes into pieces."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > _MAX_GAP) + 1):
        has_holes = run[-1] - run[0] + 1 > len(run)
        if not has_holes:
            yield run
            continue
        piece = (run - run[0]) // _MAX_SPARSE_READ
        yield from np.split(run, np.flatnonzero(np.diff(piece)) + 1)


def _positions(index: Any, n: int, what: str, error: Callable[[str], Exception]) -> NDArray[np.int64] | slice:
    """An index of one axis as a slice or as int64 positions in ``[0, n)``."""
    if isinstance(index, slice):
        return index
    if isinstance(index, int | np.integer):
        index = [index]
    array = np.asarray(index)
    if array.ndim != 1 or (array.dtype.kind not in "biu" and len(array)):
        raise error(f"{what} are chosen by a slice, integers or a mask, not by {array.dtype} {array.shape}")
    if array.dtype == bool:
        if len(array) != n:
            raise error(f"a mask of {len(array)} {what} was given for {n}; it must have one entry each")
        return np.flatnonzero(array)
    array = array.astype(np.int64)
    if len(array) and not -n <= array.min() <= array.max() < n:
        worst = array.min() if array.min() < -n else array.max()
        raise error(f"{what} {worst} was asked for but there are {n}; they count from 0 to {n - 1}")
    return np.where(array < 0, array + n, array)


def _compose(
    outer: NDArray[np.int64] | None, inner: NDArray[np.int64] | slice, n: int
) -> NDArray[np.int64] | None:
    if isinstance(inner, slice):
        start, stop, step = inner.indices(n)
        if (start, stop, step) == (0, n, 1):
            return outer
        inner = np.arange(start, stop, step, dtype=np.int64)
    return inner if outer is None else outer[inner]


def _take(values: Any, at: NDArray[np.int64] | None) -> Any:
    return values if at is None else values[at]


def _take_names(names: NDArray[Any], at: NDArray[np.int64] | None) -> NDArray[Any]:
    return names if at is None else names[at]


def _for_pandas(column: Any) -> Any:
    # pandas 2 does not know numpy's StringDType.
    return column.astype(object) if isinstance(column, np.ndarray) and column.dtype.kind == "T" else column
