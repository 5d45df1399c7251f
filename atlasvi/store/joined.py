"""Several atlases as one: genes renamed as they are read, cells side by side, nothing copied."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.errors import ObsError, OptionError
from atlasvi.store.base import STRING, Extras, Source
from atlasvi.store.cells import Cells
from atlasvi.store.genes import Join, join_genes
from atlasvi.store.merge import merge
from atlasvi.store.space import naming_a_full_disk

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas

logger = logging.getLogger(__name__)

_MAX_NAMED = 3


class JoinedSource(Source):
    """Several atlases, or views of them, as one matrix.

    Each part checks its own entries and checksums, and errors name the part. What is held beyond the parts
    does not grow with the cells.

    Args:
        parts: the atlases.
        names: of the parts.
        owned: those of them that `close` closes.
        join: keep the genes that all have, or all genes.
        var_key: column of var to match genes by; by default their names.
        input_key: column of obs for the part of each cell.
        make_unique: append to names that repeat.

    Raises:
        GenesError: the parts share no gene, or one has a gene twice.
        CellsError: a cell's name stands twice, or there are no cells.
    """

    def __init__(
        self,
        parts: list[Atlas],
        names: list[str],
        owned: list[Atlas],
        join: Join,
        var_key: str | None,
        input_key: str,
        *,
        make_unique: bool,
    ) -> None:
        self._atlases = parts
        self._how = names, join, var_key, input_key, make_unique
        self._sources: list[Source] = [AtlasSource(part) for part in parts]
        self._owned, self._input_key = owned, input_key
        self._genes = join_genes(self._sources, join, var_key, make_unique)
        self._cells = _cells(self._sources, names, make_unique=make_unique)
        layers = {part.layer for part in parts}
        self.layer = layers.pop() if len(layers) == 1 else None
        self.is_checked = all(part.is_checked for part in parts)
        # Genes that stand where they are to stand need not be renamed.
        straight = np.arange(len(self._genes.names))
        self._is_straight = [np.array_equal(columns, straight) for columns in self._genes.column_of]
        self._choose_columns(names)

    def __reduce__(self) -> tuple[Any, ...]:
        """By its parts, which another process opens anew and joins again."""
        names, join, var_key, input_key, make_unique = self._how
        again = partial(JoinedSource, make_unique=make_unique)
        return again, (self._atlases, names, self._atlases, join, var_key, input_key)

    def _choose_columns(self, names: list[str]) -> None:
        of_each = [source.obs_keys for source in self._sources]
        keys = dict.fromkeys(key for of_one in of_each for key in of_one if key != self._input_key)
        lacking = {
            key: [name for name, of_one in zip(names, of_each, strict=True) if key not in of_one]
            for key in keys
        }
        self._keys = [key for key in keys if not lacking[key]]
        self._lacking = {key: which for key, which in lacking.items() if which}
        if self._lacking:
            some = "; ".join(f"{key!r} is not in {_some(which)}" for key, which in self._lacking.items())
            logger.warning("open: columns of obs that not every store has are left out: %s", some)
        if any(self._input_key in of_one for of_one in of_each):
            logger.info(
                "open: obs[%r] says which store a cell is of, in place of the stores' own column; pass "
                "another input_key= to keep theirs",
                self._input_key,
            )

    @property
    def name(self) -> str:
        """The names of the parts."""
        return _some(self._cells.names)

    @property
    def parts(self) -> list[tuple[Atlas, int, NDArray[np.int64] | None]]:
        """Each part, its first row here, and the gene here of each of its columns (``None``: the same)."""
        columns = [
            None if straight else column_of
            for straight, column_of in zip(self._is_straight, self._genes.column_of, strict=True)
        ]
        return list(zip(self._atlases, self._cells.offsets[:-1].tolist(), columns, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._cells.n_obs, len(self._genes.names)

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of all cells."""
        return self.read_names(0, self._cells.n_obs)

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of some cells."""
        names = [self._cells.read_names(*rows) for rows in self._cells.ranges(start, stop)]
        return np.concatenate(names) if names else np.zeros(0, STRING)

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return self._genes.names

    @property
    def obs_keys(self) -> list[str]:
        """The column that names the part, and the columns that all parts have."""
        return [self._input_key, *self._keys]

    def obs_column(self, key: str) -> Any:
        """One column of obs.

        Raises:
            ObsError: a part lacks it.
        """
        if key == self._input_key:
            return self._cells.input_column()
        if key in self._lacking:
            raise ObsError(
                f"obs column {key!r} is not in {_some(self._lacking[key])}; add it there, or open the stores "
                "that have it"
            )
        return merge([source.obs_column(key) for source in self._sources], self._cells.lengths)

    @property
    def var_keys(self) -> list[str]:
        """Columns of the first part's var."""
        return self._sources[0].var_keys

    def var_column(self, key: str) -> Any:
        """One column of the first part's var; missing for genes that it lacks."""
        return self._genes.of_first(self._sources[0].var_column(key))

    def extras(self) -> Extras:
        """The arrays of obsm that all parts have in one width."""
        keys = self._atlases[0].obsm_keys
        found = {key: _Stacked(key, self._atlases, self._cells) for key in keys if self._all_have(key)}
        return Extras(obsm={key: stacked for key, stacked in found.items() if stacked.shape is not None})

    def _all_have(self, key: str) -> bool:
        return all(key in atlas.obsm_keys for atlas in self._atlases)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``, which may be of several parts."""
        if start >= stop:
            return self._read(0, 0, 0)
        return CSR.concatenate([self._read(*rows) for rows in self._cells.ranges(start, stop)])

    def _read(self, i: int, start: int, stop: int) -> CSR:
        counts = self._sources[i].read_rows(start, stop)
        if self._is_straight[i]:
            return counts
        return counts.take_columns(self._genes.column_of[i], len(self._genes.names))

    def close(self) -> None:
        """Close the parts that were opened for this."""
        for part in self._owned:
            part.close()


class _Stacked:
    """An array of obsm through all parts; ``shape`` is ``None`` where they differ in width."""

    def __init__(self, key: str, parts: list[Atlas], cells: Cells) -> None:
        self._key, self._parts, self._cells = key, parts, cells
        none = [part.read_obsm(key, 0, 0) for part in parts]
        self.dtype = np.result_type(*none)
        widths = {array.shape[1:] for array in none}
        self.shape = (cells.n_obs, *widths.pop()) if len(widths) == 1 else None

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        assert self.shape is not None
        start, stop, _ = rows.indices(self.shape[0])
        out: NDArray[Any] = np.empty((stop - start, *self.shape[1:]), self.dtype)
        at = 0
        for i, first, last in self._cells.ranges(start, stop):
            out[at : at + last - first] = self._parts[i].read_obsm(self._key, first, last)
            at += last - first
        return out


class _Rows:
    """An array of obsm, of the cells of a view."""

    def __init__(self, atlas: Atlas, key: str) -> None:
        self._atlas, self._key = atlas, key
        none = atlas.read_obsm(key, 0, 0)
        self.dtype, self.shape = none.dtype, (atlas.n_obs, *none.shape[1:])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(self.shape[0])
        return self._atlas.read_obsm(self._key, start, stop)


class AtlasSource(Source):
    """An atlas, or a view of one: its cells and genes in its order. It stays open when this is closed."""

    def __init__(self, atlas: Atlas) -> None:
        self._atlas, self.layer = atlas, atlas.layer

    @property
    def name(self) -> str:
        """The atlas's."""
        return self._atlas.name

    @property
    def place(self) -> str:
        """Which matrix."""
        return self._atlas._source.place

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_obs, n_vars)``."""
        return self._atlas.shape

    @property
    def obs_names(self) -> NDArray[Any]:
        """Names of the cells."""
        return self._atlas.obs_names

    def read_names(self, start: int, stop: int) -> NDArray[Any]:
        """Names of some cells."""
        return self._atlas.read_names(start, stop)

    @property
    def var_names(self) -> NDArray[Any]:
        """Names of the genes."""
        return self._atlas.var_names

    @property
    def obs_keys(self) -> list[str]:
        """Columns of obs."""
        return self._atlas.obs_keys

    def obs_column(self, key: str) -> Any:
        """One column of obs."""
        return self._atlas.obs_column(key)

    @property
    def var_keys(self) -> list[str]:
        """Columns of var."""
        return self._atlas.var_keys

    def var_column(self, key: str) -> Any:
        """One column of var."""
        return self._atlas.var_column(key)

    def read_rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``."""
        return self._atlas.read_rows(slice(start, stop))

    @cached_property
    def indptr(self) -> NDArray[np.int64] | None:
        """Offsets of the rows, where all genes of a store are taken."""
        offsets, rows = self._atlas._source.indptr, self._atlas._rows
        if offsets is None or self._atlas._columns is not None:
            return None
        return offsets if rows is None else np.append(0, np.cumsum(np.diff(offsets)[rows]))

    def extras(self) -> Extras:
        """What the store has besides."""
        found = self._atlas._source.extras()
        return replace(found, obsm={key: _Rows(self._atlas, key) for key in found.obsm})

    def obsm_frame(self, key: str) -> Any:
        """One table of obsm."""
        table, rows = self._atlas._source.obsm_frame(key), self._atlas._rows
        return table if rows is None else table.iloc[rows]

    def other(self, layer: str | None) -> Source:
        """None: an atlas was opened with the counts that it has.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            f"the atlas {self.name!r} has its counts from {self.place}, and layer={layer!r} was asked for; "
            "open it with that layer, and leave layer out here"
        )


def _cells(sources: list[Source], names: list[str], *, make_unique: bool) -> Cells:
    """The cells of the parts, after a look at their names, whose hashes lie in files meanwhile."""
    with tempfile.TemporaryDirectory(prefix="atlasvi-names-") as folder:
        n_bytes = 16 * sum(source.shape[0] for source in sources)
        with naming_a_full_disk(Path(folder), lambda: n_bytes):
            cells = Cells(sources, names, Path(folder), None)
            cells.hash_names()
            cells.check_names(make_unique=make_unique)
        cells.forget_hashes()
    return cells


def _some(names: list[str]) -> str:
    shown = " + ".join(names[:_MAX_NAMED])
    return shown if len(names) <= _MAX_NAMED else f"{shown} + {len(names) - _MAX_NAMED} more"


__all__ = ["AtlasSource", "JoinedSource"]
