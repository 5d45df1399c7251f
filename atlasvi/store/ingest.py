"""From files of counts to one atlas on disk, out of core.

Two passes. The first reads the inputs, checks every value and counts what each cell keeps; with that the
place of every entry in the store is known, so the second writes one shard a task, in any order. In between
the counts are kept in memory, if they fit, or on disk, if they are shuffled; else they are read again.
Everything is written beside the atlas-to-be, in a hidden folder that takes its name only when whole. Cells
to be appended are ingested in the same way, and then laid behind those of the atlas
(`atlasvi.store.append`).
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata
import zarr

from atlasvi.errors import NotAnAtlasError, OptionError, StoreError
from atlasvi.files import in_truth, is_among, must_be_elsewhere
from atlasvi.memory import as_bytes
from atlasvi.store.append import DEFAULT_INPUT_KEY, Growth
from atlasvi.store.atlas import Atlas
from atlasvi.store.base import Source
from atlasvi.store.carry import Carrier
from atlasvi.store.cells import Cells, input_names
from atlasvi.store.cluster import count_readers
from atlasvi.store.convert import Conversion, Effort
from atlasvi.store.genes import GeneJoin, Join, join_genes
from atlasvi.store.joined import AtlasSource
from atlasvi.store.metadata import consolidate, only_writer, sync
from atlasvi.store.sources import FORMAT, open_source
from atlasvi.store.space import naming_a_full_disk
from atlasvi.store.tasks import Progress

if TYPE_CHECKING:
    import distributed

MAX_WORKERS = 4

Input: TypeAlias = str | os.PathLike[str] | anndata.AnnData | Atlas | Source


@dataclass(frozen=True)
class IngestReport:
    """What `ingest` made: all of the atlas, also where cells were appended to it.

    Args:
        path: of the atlas.
        n_obs: number of cells.
        n_vars: number of genes.
        nnz: number of counts that are not zero.
        max_count: the largest count.
        n_bytes: size on disk.
        seconds: that it took.
        inputs: names of the inputs of this call, as the input column of obs has them.
        left_out: what the inputs hold and the atlas does not, in words.
        warnings: what a person should know about the data.
        n_before: number of cells that were there before.
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
    n_before: int = 0


def ingest(
    inputs: Input | Sequence[Input] | Mapping[str, Input],
    out: str | os.PathLike[str],
    *,
    layer: str | None = None,
    join: Join | None = None,
    var_key: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
    input_key: str = DEFAULT_INPUT_KEY,
    make_unique: bool = False,
    overwrite: bool = False,
    append: bool = False,
    workers: int | None = None,
    memory_budget: int | str = 128 << 20,
    progress: Progress | None = None,
    client: distributed.Client | None = None,
) -> IngestReport:
    """Write one atlas, an AnnData Zarr store, from one or many inputs, whatever their size.

    Args:
        inputs: one or many of: AnnData ``.h5ad`` or ``.zarr``, 10x ``.h5``, a folder with ``matrix.mtx``,
            an AnnData, an `Atlas` (a view of one, such as of cells that pass a filter, or several as one), a
            `Source`. A mapping names them; else they are named after their files.
        out: folder to write, such as ``atlas.zarr``.
        layer: where the counts are: ``None`` for ``X``, the name of a layer, or ``"raw"`` for ``raw.X``.
        join: keep the genes that all inputs have (``"inner"``, the default) or all genes (``"outer"``, absent
            is 0). Where cells are appended, the genes are the atlas's: by default an input must have these
            and no others; ``"inner"`` leaves out others, ``"outer"`` takes those that it lacks for 0.
        var_key: column of var to match genes by; by default their names.
        shuffle: write the cells in a random order, so that reading in sequence is reading at random. Where
            cells are appended, these among themselves: those that are there stay where they are.
        seed: of the shuffle.
        input_key: column of obs that says which input a cell came from.
        make_unique: append ``-1``, ``-2``, ... to gene names that repeat, and ``-<input>`` to cell names
            where one repeats; by default a repeat is an error.
        overwrite: replace an atlas that is there.
        append: lay the cells behind those of the atlas that is there. Who has it open is not disturbed, and
            sees the cells that it had; a run that is killed leaves it as it was. The names of all its cells
            are read, to see that none comes twice. Columns of obs must be the same; they keep their types,
            and categories get the levels that are new. An ``obsm`` of floats that the inputs lack, such as
            the latent of a model, is NaN for the new cells, with a warning; ``var`` and ``uns`` stay as they
            are. Counts must fit the type of the atlas's.
        workers: threads; by default the number of cores, at most 4.
        memory_budget: bytes, or ``"1GB"``, for what is read, kept and written; it may lower the number of
            shards written at a time. Counts that fit, at 3 to 6 bytes each, wait there to be written. If they
            do not, a shuffle puts them on disk, and without one the inputs are read twice.
        progress: called with (what is done, cells done, cells in all).
        client: of a Dask cluster whose workers read and check the inputs, which they must see under the same
            paths; what is kept is put in order and written here. By default threads do all of it.

    Returns:
        What was made, with what was left out.

    Raises:
        CountsError: a value is not a count; the error names it, its cell and gene, and where counts are.
        GenesError: gene names repeat, or the inputs share none, or those of an atlas are not these.
        CellsError: cell names repeat, or there are no cells.
        ObsError: columns that do not fit those of the atlas; the error names each.
        NotAnAtlasError: there is none to append to.
        OptionError: an argument that is wrong, or does not fit the inputs.
        StoreError: an input cannot be read, or ``out`` is there already.
        SpaceError: the disk is full; nothing is left behind.

    Example:
        >>> import atlasvi, anndata, numpy as np
        >>> adata = anndata.AnnData(np.array([[1.0, 0.0], [0.0, 3.0]], dtype=np.float32))
        >>> atlasvi.ingest(adata, "example.zarr", overwrite=True).nnz
        2
        >>> adata.obs_names = ["2", "3"]
        >>> atlasvi.ingest({"more": adata}, "example.zarr", append=True).n_obs
        4
    """
    started = time.perf_counter()
    out = Path(out)
    _check_out(out, overwrite, append, inputs)
    if workers is not None and workers < 1:
        raise OptionError(f"workers={workers} cannot work; pass 1 or more, or leave it out")
    # Of a cluster two tasks for each reader, so that none waits for what is to be done here.
    readers = min(MAX_WORKERS, os.cpu_count() or 1) if client is None else 2 * count_readers(client)
    threads = readers if workers is None else workers
    # Beside the folder itself, not beside a link to it: files are moved in.
    place = in_truth(out)
    kind, suffix = (_Appending, "append") if append else (_Job, "ingest")
    work = place.with_name(f".{place.name}.{suffix}")
    job = kind(
        place, work, layer, join, var_key, int(seed) if shuffle else None, input_key, make_unique,
        Effort(threads, as_bytes(memory_budget), progress, client),
    )  # fmt: skip
    with only_writer(place) if append else nullcontext():
        shutil.rmtree(work, ignore_errors=True)
        try:
            with naming_a_full_disk(place, job.bytes_needed):
                job.run(inputs)
                job.publish(overwrite=overwrite)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    for message in job.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    return job.report(out, time.perf_counter() - started)


@dataclass
class _Job:
    """One call of `ingest`, with the folder it works in."""

    out: Path
    work: Path
    layer: str | None
    join: Join | None
    var_key: str | None
    seed: int | None
    input_key: str
    make_unique: bool
    effort: Effort
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    conversion: Conversion | None = None

    def run(self, inputs: Any) -> None:
        """Write the atlas into the working folder."""
        scratch = self.work / "scratch"
        scratch.mkdir(parents=True)
        sources, self.names = _open_all(inputs, self.layer, scratch)
        try:
            self._convert(sources, scratch)
        finally:
            for source in sources:
                source.close()

    def _convert(self, sources: list[Source], scratch: Path) -> None:
        cells = Cells(sources, self.names, scratch, self.seed)
        genes = join_genes(sources, self.join or "inner", self.var_key, self.make_unique)
        cells.hash_names()
        self.conversion = Conversion(cells, genes, scratch, self.effort)
        self.conversion.check()
        cells.check_names(make_unique=self.make_unique)
        self._write(self.conversion, cells, genes)
        self._warn_of_empty(self.conversion)

    def _write(self, conversion: Conversion, cells: Cells, genes: GeneJoin) -> None:
        group = zarr.open_group(self.work / "atlas", mode="w", zarr_format=3)
        conversion.write(group)
        carrier = Carrier(group, cells, genes, self.input_key, self.work / "scratch")
        carrier.write()
        self.left_out = carrier.left_out
        # Last, for without these nothing opens it as an AnnData.
        group.attrs["atlasvi"] = self._about(conversion)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        consolidate(self.work / "atlas")

    def _about(self, conversion: Conversion) -> dict[str, Any]:
        assert conversion.layout is not None
        return {
            "format": FORMAT, "version": version("atlasvi"), "inputs": self.names, "layer": self.layer,
            "join": self.join or "inner", "var_key": self.var_key, "shuffle": self.seed is not None,
            "seed": self.seed, "input_key": self.input_key, "nnz": conversion.layout.nnz,
            "max_count": conversion.max_count,
        }  # fmt: skip

    def _warn_of_empty(self, conversion: Conversion) -> None:
        for n, total, what in zip(conversion.n_empty, conversion.shape, ("cells", "genes"), strict=True):
            if n:
                self.warnings.append(f"{n:,} of {total:,} {what} have no counts; they are kept")

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished folder its name, once everything in it is on the disk."""
        atlas, out = self.work / "atlas", self.out
        for path in [*atlas.rglob("*"), atlas]:
            sync(path)
        if overwrite and out.exists():
            os.replace(out, atlas.with_name("replaced"))
        os.replace(atlas, out)
        sync(out.parent)

    def bytes_needed(self) -> int:
        """Space the atlas takes, as far as it is known."""
        return 0 if self.conversion is None else self.conversion.bytes_needed

    def report(self, out: Path, seconds: float) -> IngestReport:
        """What was made."""
        assert self.conversion is not None and self.conversion.layout is not None
        return IngestReport(
            out, *self.conversion.shape, self.conversion.layout.nnz, self.conversion.max_count, _size(out),
            seconds, tuple(self.names), tuple(self.left_out), tuple(self.warnings),
        )  # fmt: skip


class _Appending(_Job):
    """One call that appends: the new cells are ingested beside the atlas, then laid behind its own."""

    growth: Growth

    def run(self, inputs: Any) -> None:
        """Prepare all that is to be put into the atlas."""
        self.growth = Growth(self.out, self.work / "grown")
        try:
            super().run(inputs)
        finally:
            self.growth.close()

    def _convert(self, sources: list[Source], scratch: Path) -> None:
        growth = self.growth
        self.names = growth.new_names(self.names)
        cells = Cells(sources, self.names, scratch, self.seed, before=growth.source)
        genes = growth.match_genes(sources, self.join, self.var_key, self.make_unique)
        growth.check_columns(sources, self.input_key)
        cells.hash_names()
        cells.check_names(make_unique=self.make_unique)
        group = zarr.open_group(self.work / "atlas", mode="w", zarr_format=3)
        carrier = Carrier(group, cells, genes, growth.input_key, scratch)
        carrier.write_cells()
        growth.add_annotations(group)
        # What takes long comes last: by now everything but the counts is known to fit.
        self.conversion = Conversion(cells, genes, scratch, self.effort)
        self.conversion.check()
        growth.check_largest(self.conversion.max_count, cells, genes)
        self.conversion.write(group)
        growth.add_counts(group)
        self.left_out = [*growth.left_out, *carrier.left_out, *growth.not_carried(sources)]
        self._warn(self.conversion)

    def _warn(self, conversion: Conversion) -> None:
        self.warnings = list(self.growth.warnings)
        if conversion.n_empty[0]:
            n, total = conversion.n_empty[0], conversion.shape[0]
            self.warnings.append(f"{n:,} of {total:,} new cells have no counts; they are kept")
        if self.seed is not None:
            self.warnings.append(
                "only the new cells were shuffled, among themselves; ingest all inputs anew to mix them with "
                "the others"
            )

    def publish(self, *, overwrite: bool) -> None:
        """Make the new cells known."""
        assert self.conversion is not None
        self.growth.publish(self.names, self.conversion.max_count)

    def bytes_needed(self) -> int:
        """Space the new cells take, which are written twice."""
        return 2 * super().bytes_needed()

    def report(self, out: Path, seconds: float) -> IngestReport:
        """What the atlas is now."""
        assert self.conversion is not None
        growth, n_new = self.growth, self.conversion.shape[0]
        return IngestReport(
            out, *growth.shape, growth.nnz, max(growth.max_count, self.conversion.max_count), _size(out),
            seconds, tuple(self.names), tuple(self.left_out), tuple(self.warnings), growth.shape[0] - n_new,
        )  # fmt: skip


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _open_all(inputs: Any, layer: str | None, scratch: Path) -> tuple[list[Source], list[str]]:
    if isinstance(inputs, Mapping):
        items, names = list(inputs.values()), [str(name) for name in inputs]
    else:
        single = isinstance(inputs, (str, os.PathLike, anndata.AnnData)) or hasattr(inputs, "read_rows")
        items = [inputs] if single else list(inputs)
        names = input_names([(i.path or i) if isinstance(i, Atlas) else i for i in items])
    if not items:
        raise OptionError("there is nothing to ingest; give at least one input")
    sources: list[Source] = []
    try:
        for item in items:
            what = AtlasSource(item) if isinstance(item, Atlas) else item
            what = Path(item) if isinstance(item, os.PathLike) else what
            sources.append(open_source(what, layer, scratch=scratch))
    except BaseException:
        for source in sources:
            source.close()
        raise
    return sources, names


def _check_out(out: Path, overwrite: bool, append: bool, inputs: Any) -> None:
    if append and overwrite:
        raise OptionError("append=True adds to the atlas that overwrite=True would replace; pass one of them")
    if append and not out.is_dir():
        raise NotAnAtlasError(f"there is no atlas {str(out)!r} to append to; leave append out to make it")
    if not out.parent.is_dir():
        raise StoreError(f"{str(out.parent)!r} is no folder to write {out.name!r} in; make it first")
    if not out.exists():
        return
    if overwrite:
        must_be_elsewhere(out)
    if not (overwrite or append):
        raise StoreError(
            f"{str(out)!r} is there already; pass overwrite=True to replace it, append=True to add to it, or "
            "another name"
        )
    is_store = out.is_dir() and any((out / name).exists() for name in ("zarr.json", ".zgroup"))
    if overwrite and not is_store and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{str(out)!r} is not a Zarr store, so it is not overwritten; give another name")
    items = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    items = [items] if isinstance(items, (str, os.PathLike)) or not isinstance(items, Sequence) else items
    paths = [Path(item) for item in items if isinstance(item, (str, os.PathLike))]
    paths += [path for item in items if isinstance(item, Atlas) for path in item.paths]
    if is_among(out, paths):
        raise StoreError(f"{str(out)!r} is one of the inputs; write to another name")


__all__ = ["IngestReport", "ingest"]
