"""What an atlas has besides counts: obs, var, obsm and uns, carried from the inputs or named as left out."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
from anndata.io import write_elem

from atlasvi.errors import OptionError
from atlasvi.store import frame
from atlasvi.store.base import Extras
from atlasvi.store.cells import Cells
from atlasvi.store.genes import GeneJoin
from atlasvi.store.merge import merge
from atlasvi.store.space import is_full
from atlasvi.store.spill import disk_array

_DICT = {"encoding-type": "dict", "encoding-version": "0.1.0"}


class Carrier:
    """Writes the annotations of an atlas.

    Args:
        group: the zarr group of the atlas.
        cells: of the atlas.
        genes: of the atlas.
        input_key: column of obs for the input of each cell, or ``None`` for none.
        scratch: folder for temporary files.
    """

    def __init__(
        self, group: Any, cells: Cells, genes: GeneJoin, input_key: str | None, scratch: Any
    ) -> None:
        self._group, self._cells, self._genes, self._scratch = group, cells, genes, scratch
        self._input_key = input_key
        self._sources = cells.sources
        self.left_out: list[str] = []

    def write(self) -> None:
        """Write all of it; `left_out` then names what could not be."""
        self._write_var()
        self.write_cells()
        self._write_uns([source.extras() for source in self._sources])
        for key in ("layers", "obsp", "varm", "varp"):
            self._group.create_group(key).attrs.update(_DICT)

    def write_cells(self) -> None:
        """Write what there is one of for each cell: obs and obsm."""
        self._write_obs()
        extras = [source.extras() for source in self._sources]
        self._name_the_rest(extras)
        self._write_obsm(extras)

    def _write_obs(self) -> None:
        obs = frame.write_frame(self._group, "obs", self._cells.n_obs)
        self._cells.write_names(frame.index(obs), frame.NAMES)
        keys = list(dict.fromkeys(key for source in self._sources for key in source.obs_keys))
        if self._input_key is not None and not (self._input_key in keys and len(self._sources) == 1):
            self._write_input_column(obs, self._input_key, keys)
        for key in keys:
            parts = [source.obs_column(key) if key in source.obs_keys else None for source in self._sources]
            self._write_merged(obs, "obs", key, parts)

    def _write_input_column(self, obs: Any, input_key: str, keys: list[str]) -> None:
        if input_key in keys:
            raise OptionError(f"obs of an input has a column {input_key!r} already; pass another input_key=")
        frame.write_column(obs, input_key, self._cells.in_order(self._cells.input_column()))

    def _write_merged(self, table: Any, part: str, key: str, parts: list[Any]) -> None:
        column = self._cells.in_order(merge(parts, self._cells.lengths))
        self._write_column(table, part, key, column)

    def _write_column(self, table: Any, part: str, key: str, column: Any) -> None:
        try:
            frame.write_column(table, key, column)
        except TypeError as error:
            self.left_out.append(f"{part}[{key!r}]: {error}")

    def _write_var(self) -> None:
        var = frame.write_frame(self._group, "var", len(self._genes.names))
        frame.index(var)[...] = self._genes.names
        first, *others = self._sources
        for key in first.var_keys:
            self._write_column(var, "var", key, self._genes.of_first(first.var_column(key)))
        for source in others:
            more = [key for key in source.var_keys if key not in first.var_keys]
            self.left_out += [
                f"var[{key!r}] of {source.name!r}: only the first input's var is kept" for key in more
            ]

    def _name_the_rest(self, extras: list[Extras]) -> None:
        for source, of_one in zip(self._sources, extras, strict=True):
            of = f" of {source.name!r}" if len(self._sources) > 1 else ""
            matrices = [key if key in ("X", "raw") else f"layers[{key!r}]" for key in of_one.elsewhere]
            self.left_out += [what + of for what in (*matrices, *of_one.left_out)]

    def _write_obsm(self, extras: list[Extras]) -> None:
        obsm = self._group.create_group("obsm")
        obsm.attrs.update(_DICT)
        for key in dict.fromkeys(key for of_one in extras for key in of_one.obsm):
            self._write_array(obsm, key, [of_one.obsm.get(key) for of_one in extras])
        for key in dict.fromkeys(key for of_one in extras for key in of_one.obsm_frames):
            self._write_table(obsm, key, [key in of_one.obsm_frames for of_one in extras])

    def _write_array(self, obsm: Any, key: str, arrays: list[Any]) -> None:
        shapes = {() if array is None else tuple(array.shape)[1:] for array in arrays}
        if len(shapes) > 1 or any(array is None or array.dtype.kind not in "biuf" for array in arrays):
            self.left_out.append(f"obsm[{key!r}]: not an array of numbers of one width in every input")
            return
        shape, n = shapes.pop(), self._cells.n_obs
        width = max(1, int(np.prod(shape)))
        dtype: np.dtype[Any] = np.result_type(*[array.dtype for array in arrays])
        # Rows land in their order in a file first: they may come in any.
        whole = disk_array(self._scratch / "obsm.bin", n * width, dtype).reshape(n, *shape)
        step = max(1, frame.CHUNK // width)
        for start in range(0, n, step):
            for i, a, b in self._cells.ranges(start, min(start + step, n)):
                part = arrays[i][a:b]
                part = part.compute(scheduler="synchronous") if hasattr(part, "dask") else part
                whole[self._cells.places(i, a, b)] = part
        frame.write_plain(obsm, key, whole, step, "array")

    def _write_table(self, obsm: Any, key: str, present: list[bool]) -> None:
        tables = [source.obsm_frame(key) for source in self._sources] if all(present) else []
        if not tables or any(list(table.columns) != list(tables[0].columns) for table in tables):
            self.left_out.append(f"obsm[{key!r}]: not a table with the same columns in every input")
            return
        out = frame.write_frame(obsm, key, self._cells.n_obs)
        self._cells.write_names(frame.index(out), frame.NAMES)
        for column in tables[0].columns:
            parts = [frame.plain_column(table[column]) for table in tables]
            self._write_merged(out, f"obsm[{key!r}]", str(column), parts)

    def _write_uns(self, extras: list[Extras]) -> None:
        uns = self._group.create_group("uns")
        uns.attrs.update(_DICT)
        if len(self._sources) > 1:
            named = [
                s.name for s, of_one in zip(self._sources, extras, strict=True) if of_one.uns is not None
            ]
            self.left_out += [f"uns of {name!r}: kept only from a single input" for name in named]
            return
        for key, value in (extras[0].uns() if extras[0].uns is not None else {}).items():
            try:
                with anndata.settings.override(auto_shard_zarr_v3=False):
                    write_elem(uns, key, value)
            except Exception as error:
                # A person's uns may hold anything; what AnnData cannot write is named, not fatal.
                if is_full(error):
                    raise
                if key in uns:
                    del uns[key]
                self.left_out.append(f"uns[{key!r}]: {type(value).__name__} cannot be written")
