"""Which genes an atlas made of several inputs has, and which column of each input each one is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import GenesError, OptionError
from atlasvi.store import frame
from atlasvi.store.base import STRING, Source
from atlasvi.store.merge import merge, take

Join = Literal["inner", "outer"]
_VERSIONED = re.compile(r"ENS[A-Z]*\d{11}\.\d+(_PAR_Y)?")


@dataclass(frozen=True)
class GeneJoin:
    """Genes in the order of the atlas.

    Args:
        names: ``(G,)`` ``StringDType``.
        column_of: for each input ``(n_vars,)`` int64, the gene each column becomes, or -1 (left out).
        rows_of_first: rows of the first input's var, in order; genes that it lacks come after these.
    """

    names: NDArray[Any]
    column_of: tuple[NDArray[np.int64], ...]
    rows_of_first: NDArray[np.int64]

    def of_first(self, column: Any) -> Any:
        """A column of the first input's var in the order of the atlas; missing where it lacks the gene."""
        column, n_more = take(column, self.rows_of_first), len(self.names) - len(self.rows_of_first)
        if n_more == 0:
            return column
        return merge([column, None], [len(self.rows_of_first), n_more])


def join_genes(sources: list[Source], join: Join, var_key: str | None, make_unique: bool) -> GeneJoin:
    """Match the genes of the inputs by name, or by the column ``var_key`` of var.

    The order is that of the first input; an outer join appends what the others have besides. Where several
    inputs are joined and all keys of one look like Ensembl ids with a version (``ENSG00000141510.16``), its
    versions do not count in the match.

    Raises:
        GenesError: a key stands twice in an input (and ``make_unique`` is off), or no gene is in all.
        OptionError: no such column, or no such way to join.
    """
    if join not in ("inner", "outer"):
        raise OptionError(f"join={join!r} is not a way to join genes; pass 'inner' or 'outer'")
    keys = [gene_keys(source, var_key, make_unique, several=len(sources) > 1) for source in sources]
    chosen = _chosen(keys, join)
    if not chosen:
        raise GenesError(_nothing_shared(sources, keys))
    position = {key: g for g, key in enumerate(chosen)}
    column_of = tuple(np.array([position.get(key, -1) for key in of_one], np.int64) for of_one in keys)
    rows = np.flatnonzero(column_of[0] >= 0)
    return GeneJoin(_names(sources, column_of, len(chosen), make_unique), column_of, rows)


def gene_keys(source: Source, var_key: str | None, make_unique: bool, *, several: bool) -> list[str]:
    """What the genes of an input are matched by, each once; for the rest see `join_genes`."""
    if var_key is None:
        keys = source.var_names.tolist()
    elif var_key in source.var_keys:
        keys = frame.to_strings(source.var_column(var_key)).tolist()
    else:
        known = ", ".join(repr(key) for key in source.var_keys) or "none"
        raise OptionError(f"{source.name!r} has no column {var_key!r} in var; its columns are: {known}")
    keys = _unique(keys, make_unique, f"{source.name!r} has", "")
    if several and keys and all(_VERSIONED.fullmatch(key) for key in keys):
        stripped = [key.partition(".")[0] + ("_PAR_Y" if key.endswith("_PAR_Y") else "") for key in keys]
        return _unique(stripped, make_unique, f"{source.name!r} has", " without their versions")
    return keys


def _unique(keys: list[str], make_unique: bool, who: str, how: str) -> list[str]:
    """The keys, or an error that names those that stand twice; ``make_unique`` appends -1, -2 to these."""
    counts = Counter(keys)
    twice = [key for key, n in counts.items() if n > 1]
    if not twice:
        return keys
    if not make_unique:
        some = ", ".join(repr(key) for key in twice[:3])
        raise GenesError(
            f"{who} {len(twice)} genes more than once{how}, such as {some}; pass make_unique=True to append "
            "-1, -2, ... to the repeats, or var_key= a column of unique ids"
        )
    out, used, taken = [], Counter[str](), set(keys)
    for key in keys:
        name = key
        if used[key]:
            n = used[key]
            while (name := f"{key}-{n}") in taken:
                n += 1
            taken.add(name)
        used[key] += 1
        out.append(name)
    return out


def _chosen(keys: list[list[str]], join: Join) -> list[str]:
    if join == "outer":
        return list(dict.fromkeys(key for of_one in keys for key in of_one))
    shared = set(keys[0]).intersection(*keys[1:])
    return [key for key in keys[0] if key in shared]


def _nothing_shared(sources: list[Source], keys: list[list[str]]) -> str:
    empty = [s.name for s, of_one in zip(sources, keys, strict=True) if not of_one]
    if empty:
        return f"{empty[0]!r} has no genes"
    examples = "; ".join(f"{s.name!r} has {k[0]!r}" for s, k in zip(sources[:2], keys[:2], strict=True))
    return (
        f"no gene is in all {len(sources)} inputs ({examples}); join by another column: var_key=..., or keep "
        "every gene: join='outer'"
    )


def _names(
    sources: list[Source], column_of: tuple[NDArray[np.int64], ...], n: int, make_unique: bool
) -> NDArray[Any]:
    """Each gene's name in the first input that has it."""
    names: list[str | None] = [None] * n
    for source, columns in zip(sources, column_of, strict=True):
        for name, g in zip(source.var_names.tolist(), columns.tolist(), strict=True):
            if g >= 0 and names[g] is None:
                names[g] = name
    return np.array(_unique([str(name) for name in names], make_unique, "the atlas would have", ""), STRING)
