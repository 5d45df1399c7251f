"""From files of counts to one atlas on disk, out of core.

Two passes over the inputs. The first checks every value and counts what each cell keeps; with that the
place of every entry in the store is known, so the second writes one shard a task, in any order. A shuffle
spills the entries to disk in between. Everything is written beside the atlas-to-be, in a hidden folder
that takes its name only when whole.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata
import zarr

from atlasvi.errors import OptionError, StoreError
from atlasvi.store.base import Source
from atlasvi.store.carry import Carrier
from atlasvi.store.cells import Cells, input_names
from atlasvi.store.cluster import count_readers
from atlasvi.store.convert import Conversion, Effort
from atlasvi.store.genes import GeneJoin, Join, join_genes
from atlasvi.store.sources import FORMAT, open_source
from atlasvi.store.space import naming_a_full_disk
from atlasvi.store.tasks import Progress

if TYPE_CHECKING:
    import distributed

MAX_WORKERS = 4

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
    memory_budget: int = 128 << 20,
    progress: Progress | None = None,
    client: distributed.Client | None = None,
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
        client: of a Dask cluster whose workers read and check the inputs, which they must see under the same
            paths; what is kept is put in order and written here. By default threads do all of it.

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
    # Of a cluster two tasks for each reader, so that none waits for what is to be done here.
    readers = min(MAX_WORKERS, os.cpu_count() or 1) if client is None else 2 * count_readers(client)
    threads = readers if workers is None else workers
    job = _Job(
        out.with_name(f".{out.name}.ingest"), layer, join, var_key, seed if shuffle else None, input_key,
        make_unique, Effort(threads, memory_budget, progress, client),
    )  # fmt: skip
    shutil.rmtree(job.work, ignore_errors=True)
    try:
        with naming_a_full_disk(out, job.bytes_needed):
            job.run(inputs)
            _publish(job.work / "atlas", out, overwrite)
    finally:
        shutil.rmtree(job.work, ignore_errors=True)
    for message in job.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    return job.report(out, time.perf_counter() - started)


@dataclass
class _Job:
    """One call of `ingest`, with the folder it works in."""

    work: Path
    layer: str | None
    join: Join
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
            cells = Cells(sources, self.names, scratch, self.seed)
            genes = join_genes(sources, self.join, self.var_key, self.make_unique)
            self.conversion = Conversion(cells, genes, scratch, self.effort)
            self.conversion.check()
            cells.check_names(make_unique=self.make_unique)
            self._write(self.conversion, cells, genes)
        finally:
            for source in sources:
                source.close()
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

    def _about(self, conversion: Conversion) -> dict[str, Any]:
        assert conversion.layout is not None
        return {
            "format": FORMAT, "version": version("atlasvi"), "inputs": self.names, "layer": self.layer,
            "join": self.join, "var_key": self.var_key, "shuffle": self.seed is not None, "seed": self.seed,
            "input_key": self.input_key, "nnz": conversion.layout.nnz, "max_count": conversion.max_count,
        }  # fmt: skip

    def _warn_of_empty(self, conversion: Conversion) -> None:
        for n, total, what in zip(conversion.n_empty, conversion.shape, ("cells", "genes"), strict=True):
            if n:
                self.warnings.append(f"{n:,} of {total:,} {what} have no counts; they are kept")

    def bytes_needed(self) -> int:
        """Space the atlas takes, as far as it is known."""
        return 0 if self.conversion is None else self.conversion.bytes_needed

    def report(self, out: Path, seconds: float) -> IngestReport:
        """What was made."""
        assert self.conversion is not None and self.conversion.layout is not None
        n_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return IngestReport(
            out, *self.conversion.shape, self.conversion.layout.nnz, self.conversion.max_count, n_bytes,
            seconds, tuple(self.names), tuple(self.left_out), tuple(self.warnings),
        )  # fmt: skip


def _open_all(inputs: Any, layer: str | None, scratch: Path) -> tuple[list[Source], list[str]]:
    if isinstance(inputs, Mapping):
        items, names = list(inputs.values()), [str(name) for name in inputs]
    else:
        single = isinstance(inputs, (str, os.PathLike, anndata.AnnData)) or hasattr(inputs, "read_rows")
        items = [inputs] if single else list(inputs)
        names = input_names(items)
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


__all__ = ["IngestReport", "ingest"]
