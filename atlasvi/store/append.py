"""Appending: new cells laid behind those of an atlas, of which nobody who is reading it takes notice.

An atlas is many arrays, each with a length of its own, and readers have it open or come at any time. Three
rules keep them undisturbed, and an atlas whole when the writer is killed:

*What is there stays.* No file is changed in place, and one is replaced (by a rename) only by a file that
says the same of the cells that were there. Of a plain array that is the last chunk, if it was not full. The
entries of new cells begin in the middle of a shard of ``X``, if the last one was not full: its new file is
the old one to the last byte, then the chunks that are new or were not full, then a new index. So whatever
index a reader has taken from an earlier file, the chunks lie where it says; of each append the chunk that
was not full, of a hundred kilobytes or so, is thereby left to nobody. All other chunks and shards are files
that no one knows of yet.

*One rename makes the new cells known.* The root's ``zarr.json`` holds a copy of the metadata of all arrays.
Who opened the atlas before keeps the old lengths with every array, also with those that are opened later;
who opens it after has the new ones. Until then a kill leaves the old atlas, with some bytes behind its ends
that the next append replaces. After it only the arrays' own files remain to be brought up to date, for
those who open one by itself: the root says so, and the next append does it if this one cannot.

*Whoever writes is alone.* The folder is locked against a second append, and against `write_obsm`.

The new cells are ingested first, beside the atlas, in the two passes of `ingest`: so all that is wrong with
them is found before anything of the atlas is touched, and shuffle, joins of several inputs and the bounds
of memory are the same. Then array after array is laid behind the old one, which costs the new cells'
compressed size twice while it lasts. Not done: filling the last shard up, so that old files could stay as
they are (a CSR matrix has no place for entries that are none); a store of parts (only atlasvi could read
it); a new store in place of the old one (readers that open files by name would find other cells).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlasvi.errors import (
    CorruptError,
    CountsError,
    GenesError,
    NotAnAtlasError,
    ObsError,
    OptionError,
    StoreError,
)
from atlasvi.store import frame
from atlasvi.store.base import Source
from atlasvi.store.cells import Cells
from atlasvi.store.counts import checked_rows
from atlasvi.store.fit import Misfit, fit_column
from atlasvi.store.genes import GeneJoin, Join, gene_keys
from atlasvi.store.metadata import Metadata, consolidate, sync
from atlasvi.store.rows import reading, with_zarrs
from atlasvi.store.shards import checksum, index_bytes, read_index
from atlasvi.store.sources import FORMAT, GroupSource, open_source

DEFAULT_INPUT_KEY = "input"
_UNSETTLED = "unsettled"
_MAX_NAMED = 3
_PIECE_ROWS = 1 << 14

Read = Callable[[slice], Any]


class Growth:
    """An atlas to which cells are being appended. To be used by the only writer.

    Args:
        path: of the atlas.
        staging: folder to prepare files in, on the same disk.

    Raises:
        NotAnAtlasError: there is no atlas that `ingest` made.
        StoreError: something else wrote to it and left its metadata at odds.
    """

    def __init__(self, path: Path, staging: Path) -> None:
        self.path, self._staging = path, staging
        _settle(path)
        source = open_source(path)
        assert isinstance(source, GroupSource) and source.attributes is not None
        self.source, self._about = source, source.attributes
        self._group: Any = zarr.open_group(path, mode="r")
        self._now = Metadata.read(path)
        self._then = deepcopy(self._now)
        self._refuse_what_cannot_grow()
        self.left_out: list[str] = []
        self.warnings: list[str] = []

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``, with the cells laid behind so far."""
        n_obs, n_vars = self._then.nodes["X"]["attributes"]["shape"]
        return int(n_obs), int(n_vars)

    @property
    def nnz(self) -> int:
        """Number of entries, with those laid behind so far."""
        return int(self._then.nodes["X/data"]["shape"][0])

    @property
    def max_count(self) -> int:
        """The largest count that was there."""
        return int(self._about["max_count"])

    @property
    def input_key(self) -> str | None:
        """The column of obs that says which input a cell came from, if `ingest` wrote one."""
        key = str(self._about["input_key"])
        if key not in self.source.obs_keys:
            return None
        levels = getattr(self.source.obs_column(key), "categories", ())
        return key if list(levels) == list(self._about["inputs"]) else None

    def _refuse_what_cannot_grow(self) -> None:
        parts = ("layers/", "obsp/", "raw")
        found = sorted({"/".join(key.split("/")[:2]) for key in self._now.nodes if key.startswith(parts)})
        if found:
            raise StoreError(
                f"{str(self.path)!r} has {_some(found)}, to which nothing can be appended; remove that from "
                "it, or ingest the new cells into an atlas of their own and open both: atlasvi.open([...])"
            )

    # --- what does not fit ----------------------------------------------------------------------

    def new_names(self, names: list[str]) -> list[str]:
        """The names of inputs, with a number where the atlas or another input has one of that name."""
        taken, out = set(self._about["inputs"]), []
        for name in names:
            new, n = name, 1
            while new in taken:
                n += 1
                new = f"{name}-{n}"
            taken.add(new)
            out.append(new)
        return out

    def match_genes(
        self, sources: list[Source], join: Join | None, var_key: str | None, make_unique: bool
    ) -> GeneJoin:
        """Which gene of the atlas each column of the inputs is.

        Args:
            sources: the inputs.
            join: ``"inner"`` leaves out genes that the atlas lacks, ``"outer"`` takes those of the atlas that
                an input lacks for 0; ``None`` does neither.
            var_key: column of var to match by; by default as the atlas was made.
            make_unique: append to names that repeat in an input.

        Raises:
            GenesError: genes that do not fit, with their names.
        """
        key = self._about["var_key"] if var_key is None else var_key
        own, *others = (gene_keys(s, key, make_unique, several=True) for s in (self.source, *sources))
        position = {name: g for g, name in enumerate(own)}
        columns = []
        for source, keys in zip(sources, others, strict=True):
            column_of = np.array([position.get(name, -1) for name in keys], np.int64)
            missing: Any = np.setdiff1d(np.arange(len(own)), column_of) if join != "outer" else []
            extra: Any = np.flatnonzero(column_of < 0) if join != "inner" else []
            wrong = _genes_wrong("lacks", [own[g] for g in missing], "join='outer' takes them for 0")
            wrong += _genes_wrong("has besides", [keys[g] for g in extra], "join='inner' leaves them out")
            if wrong:
                raise GenesError(
                    f"the genes of {source.name!r} are not those of {str(self.path)!r}: it "
                    f"{' and '.join(wrong)}"
                )
            if join == "inner" and (column_of < 0).any():
                n = int((column_of < 0).sum())
                self.left_out.append(f"{n:,} genes of {source.name!r} that the atlas does not have")
            columns.append(column_of)
        return GeneJoin(self.source.var_names, tuple(columns), np.zeros(0, np.int64))

    def check_columns(self, sources: list[Source], input_key: str) -> None:
        """See that obs of each input has the columns that the atlas has, before anything is read.

        Raises:
            ObsError: it does not; the error names them all.
            OptionError: the column for the input of a cell has another name in the atlas.
        """
        mine = self.input_key
        if input_key not in (DEFAULT_INPUT_KEY, self._about["input_key"]):
            raise OptionError(
                f"input_key={input_key!r} is not the column of {str(self.path)!r} for the input of a cell, "
                f"which is {self._about['input_key']!r}; leave it out"
            )
        known = [key for key in self.source.obs_keys if key != mine]
        for source in sources:
            lacking = [key for key in known if key not in source.obs_keys]
            besides = [key for key in source.obs_keys if key not in known]
            wrong = [
                f"{what} {_some(keys)}"
                for what, keys in (("lacks", lacking), ("has besides", besides))
                if keys
            ]
            if wrong:
                raise ObsError(
                    f"the columns of obs of {source.name!r} are not those of {str(self.path)!r}: it "
                    f"{' and '.join(wrong)}; add or remove them in the input"
                )

    def check_largest(self, largest: int, cells: Cells, genes: GeneJoin) -> None:
        """See that the counts fit the type that the atlas has them in.

        Args:
            largest: of the new counts.
            cells: the new cells.
            genes: of the atlas.

        Raises:
            CountsError: one does not; the error names it, its cell and gene.
        """
        dtype = self._group["X/data"].dtype
        limit = int(np.iinfo(dtype).max)
        if largest <= limit:
            return
        for i, start, stop in cells.blocks():
            source = cells.sources[i]
            indptr, columns, counts = checked_rows(source, start, stop, genes.column_of[i])
            wide = np.flatnonzero(counts > limit)
            if len(wide):
                row = start + int(np.searchsorted(indptr, wide[0], side="right")) - 1
                cell = str(source.read_names(row, row + 1)[0])
                raise CountsError(
                    f"{source.name!r} {source.place} has {counts[wide[0]]} at cell {cell!r}, gene "
                    f"{str(genes.names[columns[wide[0]]])!r}; {str(self.path)!r} holds counts up to {limit} "
                    f"({dtype}): ingest all inputs into a new atlas, or these into their own and open both: "
                    "atlasvi.open([...])"
                )
        raise StoreError("an input changed while it was read; append it again")

    # --- laying new cells behind the old --------------------------------------------------------

    def add_annotations(self, new: Any) -> None:
        """Prepare names, obs and obsm.

        Args:
            new: the new cells, as `ingest` wrote them.

        Raises:
            ObsError: columns that do not fit, with what is wrong with each.
        """
        misfits: list[str] = []
        self._add_frame("obs", new["obs"], misfits)
        keys = sorted(key for key in new["obsm"] if f"obsm/{key}" not in self._now.nodes)
        self.left_out += [f"obsm[{key!r}]: the atlas has none of that name" for key in keys]
        for key in self._group["obsm"]:
            self._add_obsm(str(key), new, misfits)
        if misfits:
            raise ObsError(
                f"the new cells do not fit {str(self.path)!r}: {'; '.join(misfits)}; change that in the "
                "inputs, or ingest all inputs into a new atlas"
            )

    def _add_frame(self, path: str, new: Any, misfits: list[str]) -> None:
        names = frame.index(new)
        index = f"{path}/{self._group[path].attrs['_index']}"
        self._lay_behind(index, lambda rows: frame.read_strings(names, rows), int(names.shape[0]))
        of_new = frame.keys(new)
        for key in frame.keys(self._group[path]):
            try:
                if key not in of_new:
                    raise Misfit("is not in the new cells, or not of a type that can be stored")
                parts = fit_column(self._group[f"{path}/{key}"], frame.read_column(new, key))
            except Misfit as misfit:
                misfits.append(f"{path}[{key!r}] {misfit}")
                continue
            for part, values in parts.items():
                self._lay_behind(f"{path}/{key}/{part}".rstrip("/"), values.__getitem__, len(values))

    def _add_obsm(self, key: str, new: Any, misfits: list[str]) -> None:
        old, path = self._group["obsm"][key], f"obsm/{key}"
        n_new = int(frame.index(new["obs"]).shape[0])
        of_new = new["obsm"][key] if key in new["obsm"] else None
        if isinstance(old, zarr.Group):
            if _is_table(old) and _is_table(of_new) and frame.keys(of_new) == frame.keys(old):
                self._add_frame(path, of_new, misfits)
            else:
                misfits.append(f"{path} is not a table with the same columns in the new cells")
        elif isinstance(of_new, zarr.Array) and of_new.shape[1:] == old.shape[1:] and old.dtype.kind in "f":
            self._lay_behind(path, of_new.__getitem__, n_new)
        elif isinstance(of_new, zarr.Array) and (of_new.shape[1:], of_new.dtype) == (
            old.shape[1:],
            old.dtype,
        ):
            self._lay_behind(path, of_new.__getitem__, n_new)
        elif old.dtype.kind == "f":
            self._lay_behind(
                path, lambda rows: np.full((rows.stop - rows.start, *old.shape[1:]), np.nan), n_new
            )
            self.warnings.append(f"obsm[{key!r}] is NaN for the {n_new:,} new cells, which have none like it")
        else:
            misfits.append(f"{path} is not {old.dtype} of the same width in the new cells")

    def add_counts(self, new: Any) -> None:
        """Prepare ``X``."""
        n_new, nnz = int(new["X/indptr"].shape[0]) - 1, self.nnz
        offsets = new["X/indptr"]
        self._lay_behind(
            "X/indptr", lambda rows: nnz + np.asarray(offsets[rows.start + 1 : rows.stop + 1]), n_new
        )
        for key in ("X/indices", "X/data"):
            self._lay_shards_behind(key, with_zarrs(partial(new.__getitem__, key)))
        self._then.nodes["X"]["attributes"]["shape"] = [self.shape[0] + n_new, self.shape[1]]

    def _lay_behind(self, key: str, read: Read, n_new: int) -> None:
        """Prepare the chunks of a plain array that have new rows; the first may have old ones too."""
        old = self._group[key]
        if old.shards is not None:
            raise StoreError(
                f"{key} of {str(self.path)!r} is in shards, as ingest does not write it; write it without "
                "shards, or remove it"
            )
        n_old, chunk = int(old.shape[0]), int(old.chunks[0])
        n = n_old + n_new
        # Also chunks of nothing but the fill value: an append that was killed may have left others there.
        grown: Any = zarr.open_array(self._stage(key, n), mode="r+", config={"write_empty_chunks": True})
        step = chunk * max(1, _PIECE_ROWS // chunk)
        for first in range(n_old - n_old % chunk, n if n_new else 0, step):
            last = min(first + step, n)
            parts = [np.asarray(old[first : min(n_old, last)])] if first < n_old else []
            parts += [np.asarray(read(slice(max(first - n_old, 0), last - n_old)))] if last > n_old else []
            grown[first:last] = np.concatenate([part.astype(old.dtype, copy=False) for part in parts])

    def _lay_shards_behind(self, key: str, new: Any) -> None:
        """Prepare the shards of a vector that have new entries; the first may have old ones too."""
        # Through zarr's own codecs, which check every checksum: a damaged chunk must not get a new one.
        old = self._group[key]
        n_old, shard, chunk = int(old.shape[0]), int(old.shards[0]), int(old.chunks[0])
        n = n_old + int(new.shape[0])
        folder = self._stage(key, n)
        grown = with_zarrs(lambda: zarr.open_array(folder, mode="r+"))
        begin = n_old - n_old % shard
        for first in range(begin, n if n > n_old else 0, shard):
            last = min(first + shard, n)
            values = np.empty(last - first, old.dtype)
            kept = max(n_old - first, 0)
            with reading(f"{str(self.path)!r} {key}, shard {first // shard}", 0, self.source.shape[0]):
                values[:kept] = old[first : first + kept]
            values[kept:] = new[first + kept - n_old : last - n_old]
            grown[first:last] = values
        if begin < n_old < n:
            name = f"c/{begin // shard}"
            with reading(f"{str(self.path)!r} {key}, shard {begin // shard}", 0, self.source.shape[0]):
                _splice(self.path / key / name, folder / name, shard // chunk, (n_old - begin) // chunk)

    def _stage(self, key: str, n: int) -> Path:
        """A folder for the new files of an array, which will have ``n`` rows."""
        node = self._then.nodes[key]
        node["shape"][0] = n
        folder = self._staging / key
        folder.mkdir(parents=True)
        (folder / "zarr.json").write_text(json.dumps(node))
        return folder

    # --- making them known ----------------------------------------------------------------------

    def publish(self, inputs: list[str], max_count: int) -> None:
        """Put the prepared files into the atlas, and make the new cells known.

        Args:
            inputs: names of the inputs.
            max_count: the largest of the new counts.
        """
        files = [file for file in self._staging.rglob("*") if file.is_file() and file.name != "zarr.json"]
        for file in files:
            sync(file)
        folders = set()
        for file in files:
            place = self.path / file.relative_to(self._staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
            folders |= {place.parent, place.parent.parent}
        for folder in folders:
            sync(folder)
        self._then.attributes["atlasvi"] = {
            **self._about, "version": version("atlasvi"), "inputs": [*self._about["inputs"], *inputs],
            "nnz": self.nnz, "max_count": max(self.max_count, max_count), "shuffle": False, _UNSETTLED: True,
        }  # fmt: skip
        self._then.write()
        _settle(self.path)

    def not_carried(self, sources: list[Source]) -> list[str]:
        """What of the inputs is not of cells, and so is not appended, in words."""
        known, out = self.source.var_keys, []
        for source in sources:
            of = f" of {source.name!r}: that of the atlas is kept"
            out += [f"var[{key!r}]{of}" for key in source.var_keys if key not in known]
            out += [f"uns{of}"] if source.extras().uns is not None else []
        return out

    def close(self) -> None:
        """Let go of the atlas."""
        self.source.close()


def _settle(path: Path) -> None:
    """Bring the metadata of the arrays themselves up to date, if an append was killed before it could.

    Raises:
        NotAnAtlasError: this is no atlas that `ingest` made.
        StoreError: something else wrote to it.
    """
    said = Metadata.read(path) if (path / "zarr.json").is_file() else None
    if said is None or "atlasvi" not in said.attributes:
        raise NotAnAtlasError(
            f"{str(path)!r} is no atlas that atlasvi made, so nothing is appended to it; make one: atlasvi "
            "ingest INPUT -o atlas.zarr"
        )
    about = said.attributes["atlasvi"]
    if about["format"] > FORMAT:  # which opening it says
        return
    if not said.is_consolidated:
        consolidate(path)
    elif about.get(_UNSETTLED):
        said.write_nodes()
        del about[_UNSETTLED]
        said.write()
    elif differing := said.differing():
        raise StoreError(
            f"{str(path)!r}: the metadata of {_some(differing)} was changed by something else, and readers "
            f"do not see that; if it is right, say so to all: zarr.consolidate_metadata({str(path)!r})"
        )


def _splice(old: Path, new: Path, n_chunks: int, n_kept: int) -> None:
    """Make ``new`` the old shard, byte by byte, with chunks from ``n_kept`` on of the new one behind it.

    Raises:
        CorruptError: the index of the old shard has a wrong checksum.
    """
    before, after = old.read_bytes(), new.read_bytes()
    index, coming = _index(old, before, n_chunks), _index(new, after, n_chunks)
    pieces, at = [before], len(before)
    for c in range(n_kept, n_chunks):
        offset, length = (int(v) for v in coming[c])
        index[c] = coming[c]
        # A chunk that is not there has the largest numbers for both.
        if offset < len(after):
            pieces.append(after[offset : offset + length])
            index[c] = at, length
            at += length
    tail = index.tobytes()
    new.write_bytes(b"".join([*pieces, tail, checksum(tail)]))


def _index(file: Path, shard: bytes, n_chunks: int) -> NDArray[np.uint64]:
    """Offset and length of each chunk of a shard."""
    index = read_index(shard[-index_bytes(n_chunks) :], n_chunks)
    if index is None:
        raise CorruptError(
            f"shard {file} has a wrong checksum in its index; copy the atlas again or ingest it again"
        )
    return index.copy()


def _is_table(node: Any) -> bool:
    return isinstance(node, zarr.Group) and node.attrs.get("encoding-type") == "dataframe"


def _genes_wrong(verb: str, names: list[str], remedy: str) -> list[str]:
    return [f"{verb} {_some(names)} ({remedy})"] if names else []


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMED])
    more = len(names) - _MAX_NAMED
    return shown if more <= 0 else f"{shown} and {more:,} more"


__all__ = ["Growth"]
