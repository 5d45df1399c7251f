"""Whether a column of new cells fits the column that a store has, and what is to be laid behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.store import frame
from atlasvi.store.base import STRING


class Misfit(Exception):
    """Why a column does not fit, in words that follow its name."""


def fit_column(node: Any, values: Any) -> dict[str, NDArray[Any]]:
    """What to lay behind each array of a column on disk, so that new values follow the old.

    The column keeps its kind and its type on disk. Whole numbers fit where the type holds them; floats are
    rounded to the width of the column. Categories may be texts or categories, and levels that are new come
    after those that are there.

    Args:
        node: the column: a zarr array or group in one of AnnData's encodings.
        values: new values, as `frame.read_column` gives them.

    Returns:
        By the path of the array in the column (``""`` where the column is one array), what to add to it.

    Raises:
        Misfit: they do not fit.
    """
    encoding = str(node.attrs.get("encoding-type"))
    if encoding == "string-array":
        return {"": _texts(values)}
    if encoding == "array":
        return {"": _numbers(_without_gaps(values, node.dtype), node.dtype)}
    if encoding == "categorical":
        return _levels(node, values)
    if encoding in ("nullable-integer", "nullable-boolean"):
        plain, mask = _with_gaps(values)
        return {"values": _numbers(plain, node["values"].dtype), "mask": mask}
    raise Misfit(f"is stored as {encoding}, which cannot be added to")


def _texts(values: Any) -> NDArray[Any]:
    if isinstance(values, pd.Categorical):
        if (values.codes < 0).any():
            raise Misfit("has missing values, where the atlas has a text for each cell")
        levels = np.array([str(level) for level in values.categories] or [""], STRING)
        return np.asarray(levels[values.codes])
    if not _is_text(values):
        raise Misfit(f"has values of type {values.dtype}, where the atlas has texts")
    return np.asarray(values.astype(STRING))


def _is_text(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind in "TU"


def _without_gaps(values: Any, dtype: np.dtype[Any]) -> Any:
    """Nullable values as plain ones; gaps become NaN in a column of floats."""
    if isinstance(values, pd.arrays.IntegerArray | pd.arrays.FloatingArray | pd.arrays.BooleanArray):
        if not values.isna().any():
            return values.to_numpy(values.dtype.numpy_dtype)
        if dtype.kind == "f":
            return values.to_numpy(np.float64, na_value=np.nan)
        raise Misfit(f"has missing values, where the atlas has {dtype} for each cell")
    return values


def _with_gaps(values: Any) -> tuple[Any, NDArray[np.bool_]]:
    if isinstance(values, pd.arrays.IntegerArray | pd.arrays.BooleanArray):
        return values.to_numpy(values.dtype.numpy_dtype, na_value=0), np.asarray(values.isna())
    return values, np.zeros(len(values), bool)


def _numbers(values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values in the type of the column, none of them changed but for the rounding of floats."""
    is_number = isinstance(values, np.ndarray) and values.dtype.kind in "biufc"
    if not is_number or (values.dtype.kind == "b") != (dtype.kind == "b"):
        kind = getattr(values, "dtype", type(values).__name__)
        raise Misfit(f"has values of type {kind}, where the atlas has {dtype}")
    with np.errstate(all="ignore"):
        out = values.astype(dtype)
        if values.dtype.kind == dtype.kind == "f":
            wrong = np.isfinite(values) & ~np.isfinite(out)
        else:
            wrong = out.astype(values.dtype) != values
    if wrong.any():
        raise Misfit(f"has {values[wrong.argmax()]!s}, which is no {dtype}, the type in the atlas")
    return np.asarray(out)


def _levels(node: Any, values: Any) -> dict[str, NDArray[Any]]:
    """Codes by the levels of the atlas, and the levels that it does not have yet."""
    if _is_text(values):
        levels, codes = np.unique(values, return_inverse=True)
        values = pd.Categorical.from_codes(codes, levels.astype(object))
    if not isinstance(values, pd.Categorical):
        raise Misfit(f"has values of type {values.dtype}, where the atlas has categories")
    is_text = node["categories"].dtype.kind not in "biuf"
    if is_text:
        known, coming = frame.read_strings(node["categories"]).tolist(), [str(v) for v in values.categories]
    else:
        known = node["categories"][...].tolist()
        coming = values.categories.tolist()
        if not all(isinstance(level, int | float) for level in coming):
            raise Misfit(f"has categories such as {coming[0]!r}, where the atlas has numbers")
    place = {level: k for k, level in enumerate(known)}
    new = [level for level in coming if level not in place]
    if new and node.attrs.get("ordered"):
        raise Misfit(f"has {new[0]!r}, which has no place in the order of the atlas's categories")
    place.update({level: len(known) + k for k, level in enumerate(new)})
    dtype = node["codes"].dtype
    if len(place) - 1 > np.iinfo(dtype).max:
        raise Misfit(
            f"would have {len(place):,} categories, more than its codes in the atlas ({dtype}) can tell"
        )
    codes = np.array([*(place[level] for level in coming), -1], np.int64)[values.codes]
    added = (
        np.array(new, STRING)
        if is_text
        else _numbers(np.asarray(new or np.zeros(0)), node["categories"].dtype)
    )
    return {"codes": codes.astype(dtype), "categories": added}


__all__ = ["Misfit", "fit_column"]
