"""Who is compared with whom: a group for each cell, and pairs of groups."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import CellsError, ObsError, OptionError
from atlasvi.store.fields import as_level, level_codes

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas

Cells: TypeAlias = "str | NDArray[np.int64]"

REST = "Rest"
"""What a comparison with all other cells calls them, as scvi-tools does."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """A group for each cell, and which are compared.

    Args:
        codes: ``(n_obs,)`` integer, the group of each cell; -1 for cells that take no part.
        names: of the groups.
        comparisons: pairs of groups; the second is ``None`` for the cells of all other groups.
        by_label: whether the groups are levels of a column, which the results then name.
    """

    codes: NDArray[Any]
    names: tuple[str, ...]
    comparisons: tuple[tuple[int, int | None], ...]
    by_label: bool

    @property
    def sizes(self) -> NDArray[np.int64]:
        """``(n_groups,)`` cells of each."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))

    def name(self, comparison: tuple[int, int | None]) -> tuple[str, str]:
        """Names of the two sides."""
        one, two = comparison
        return self.names[one], REST if two is None else self.names[two]


def groups_of(
    atlas: Atlas,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: Cells | None,
    idx2: Cells | None,
) -> Groups:
    """Groups from a column of obs, or from two sets of cells; see `groups_by_label`, `groups_by_cells`.

    Raises:
        OptionError: neither, or both.
    """
    if idx1 is not None:
        if groupby is not None or group1 is not None or group2 is not None:
            raise OptionError("idx1 and groupby both say who is compared; give one of them")
        return groups_by_cells(atlas, idx1, idx2)
    if idx2 is not None:
        raise OptionError("idx2 was given without idx1, the cells to compare with it; give both")
    if groupby is None:
        raise OptionError("nobody is compared: name a column of obs with groupby=, or give cells with idx1=")
    return groups_by_label(atlas, groupby, group1, group2)


def groups_by_label(
    atlas: Atlas, groupby: str, group1: str | Sequence[str] | None, group2: str | None
) -> Groups:
    """Levels of a column: each of ``group1`` (all when ``None``) against ``group2``, or against the rest.

    Raises:
        ObsError: no such column, gaps in it, or no such level.
        CellsError: one level only, or a level against itself.
    """
    codes, levels = level_codes(atlas, groupby)
    if len(levels) < 2:
        has = f"one level, {levels[0]!r}: there is nothing to compare it with" if levels else "no cells"
        raise CellsError(f"obs column {groupby!r} of {atlas.name} has {has}; choose another column")
    known = list(levels)
    ones = known if group1 is None else [as_level(name) for name in np.atleast_1d(_objects(group1))]
    if not ones:
        raise OptionError(f"group1 is empty; name levels of {groupby!r}, or leave it out for all")
    ones = list(dict.fromkeys(ones))
    two = None if group2 is None else as_level(group2)
    for name in [*ones, *([] if two is None else [two])]:
        check_level(atlas, groupby, name, known)
    if two is not None and group1 is None:
        ones.remove(two)
    if two in ones:
        raise CellsError(f"group1 and group2 are both {two!r}: a group would overlap with itself; name two")
    # Groups nobody asks for stay apart from nothing: they are one, or take no part.
    names = [*ones, *([] if two is None else [two])]
    others = [level for level in known if level not in names]
    table = np.full(len(known), -1, np.int32)
    for code, name in enumerate(names):
        table[known.index(name)] = code
    if two is None and others:
        for name in others:
            table[known.index(name)] = len(names)
        names.append(f"not {' or '.join(ones)}" if len(ones) < 4 else "others")
    pairs = tuple((code, None if two is None else len(ones)) for code in range(len(ones)))
    narrow = np.int8 if len(names) < 128 else np.int32
    return Groups(table.astype(narrow)[codes], tuple(names), pairs, by_label=True)


def groups_by_cells(atlas: Atlas, idx1: Cells, idx2: Cells | None) -> Groups:
    """Two sets of cells, as positions or as a query of obs; the second is all others when ``None``.

    Raises:
        CellsError: a set is empty, or the two overlap.
        ObsError: a query that cannot be asked of obs.
    """
    codes = np.full(atlas.n_obs, -1 if idx2 is not None else 1, np.int8)
    codes[_cells(atlas, idx1, "idx1")] = 0
    if idx2 is not None:
        second = _cells(atlas, idx2, "idx2")
        both = second[codes[second] == 0]
        if len(both):
            raise CellsError(
                f"idx1 and idx2 overlap: {len(both)} cells are in both, the first at position {both[0]}; "
                "take them out of one"
            )
        codes[second] = 1
    elif not (codes == 1).any():
        raise CellsError("idx1 is all cells, so that no cell is left to compare with; choose fewer")
    return Groups(codes, ("one", "two"), ((0, 1),), by_label=False)


def cells_of(atlas: Atlas, groupby: str | None, group: str | None, idx: Cells | None) -> NDArray[np.int64]:
    """Positions of the cells of one group: a level of a column, or cells as they are named otherwise.

    Raises:
        OptionError: neither, or both, or a column without a level.
    """
    if idx is not None and groupby is None and group is None:
        return _cells(atlas, idx, "idx")
    if idx is not None or groupby is None or group is None:
        raise OptionError("name one group of cells: groupby= and group=, a level of it, or idx= alone")
    codes, levels = level_codes(atlas, groupby)
    name = as_level(group)
    check_level(atlas, groupby, name, levels)
    return np.flatnonzero(codes == levels.index(name))


def _objects(values: Any) -> NDArray[Any]:
    return np.asarray(values, dtype=object)


def check_level(atlas: Atlas, groupby: str, name: str, known: Sequence[str]) -> None:
    """Make sure that a column has a level.

    Raises:
        ObsError: it has not; with near names.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(known[:10])}"
        raise ObsError(f"obs column {groupby!r} of {atlas.name} has no level {name!r}; {hint}")


def _cells(atlas: Atlas, cells: Cells, name: str) -> NDArray[np.int64]:
    if not isinstance(cells, str):
        return cells
    # Only the columns that the query names are read: obs may be larger than memory.
    asked = [key for key in atlas.obs_keys if key in cells]
    columns = {key: atlas.obs_column(key) for key in asked}
    frame = pd.DataFrame(
        {key: c.astype(object) if c.dtype.kind == "T" else c for key, c in columns.items()},  # type: ignore[union-attr]
        index=pd.RangeIndex(atlas.n_obs),
    )
    try:
        found: NDArray[np.int64] = frame.query(cells).index.to_numpy(np.int64)
    except Exception as error:  # pandas raises what the query's own code raises
        raise ObsError(
            f"{name}={cells!r} cannot be asked of obs of {atlas.name} ({' '.join(str(error).split())}); "
            f"it has {', '.join(atlas.obs_keys)}"
        ) from error
    if not len(found):
        raise CellsError(f"no cell of {atlas.name} fits {name}={cells!r}; widen the query")
    return found
