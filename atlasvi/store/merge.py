"""Columns of several inputs, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from atlasvi.store import frame


def merge(parts: list[Any], lengths: list[int]) -> Any:
    """One column out of one part an input; an input without the column (``None``) has missing values.

    Texts and categories become one categorical with the levels of all; numbers are widened to a type that
    holds them all (missing: NaN); booleans with gaps become nullable booleans.

    Args:
        parts: a ``pd.Categorical``, a numpy array or a nullable pandas array an input, or ``None``.
        lengths: number of rows of each.
    """
    if len(parts) == 1:
        return parts[0]
    present = [part for part in parts if part is not None]
    if all(_is_text(part) for part in present):
        if len(present) == len(parts) and not any(isinstance(part, pd.Categorical) for part in present):
            return np.concatenate(present)
        return _merge_categories(parts, lengths)
    if all(isinstance(part, np.ndarray) and part.dtype.kind in "biuf" for part in present):
        return _merge_numbers(parts, present, lengths)
    series = [
        pd.Series([pd.NA] * n, dtype=present[0].dtype) if part is None else pd.Series(part)
        for part, n in zip(parts, lengths, strict=True)
    ]
    return frame.plain_column(pd.concat(series, ignore_index=True))


def take(values: Any, rows: Any) -> Any:
    """Rows of a column of any kind."""
    return values[rows] if isinstance(values, np.ndarray) else values.take(np.asarray(rows))


def _is_text(part: Any) -> bool:
    return isinstance(part, pd.Categorical) or part.dtype.kind in "TU"


def _merge_numbers(parts: list[Any], present: list[Any], lengths: list[int]) -> Any:
    if len(present) == len(parts):
        return np.concatenate(parts)
    if all(part.dtype == bool for part in present):
        filled = [np.zeros(n, bool) if p is None else p for p, n in zip(parts, lengths, strict=True)]
        gaps = [np.full(n, p is None) for p, n in zip(parts, lengths, strict=True)]
        return pd.arrays.BooleanArray(np.concatenate(filled), np.concatenate(gaps))
    return np.concatenate(
        [np.full(n, np.nan) if p is None else p for p, n in zip(parts, lengths, strict=True)]
    )


def _merge_categories(parts: list[Any], lengths: list[int]) -> pd.Categorical:
    whole = [None if p is None or isinstance(p, pd.Categorical) else _categorical(p) for p in parts]
    parts = [p if made is None else made for p, made in zip(parts, whole, strict=True)]
    first, *others = [part for part in parts if part is not None]
    same = all(part.dtype == first.dtype for part in others)
    levels: dict[Any, int] = {}
    codes = []
    for part, n in zip(parts, lengths, strict=True):
        if part is None:
            codes.append(np.full(n, -1, np.int32))
            continue
        new = [levels.setdefault(level, len(levels)) for level in part.categories]
        codes.append(np.array([*new, -1], np.int32)[part.codes])
    names = list(levels) if len({type(level) for level in levels}) == 1 else [str(level) for level in levels]
    return pd.Categorical.from_codes(np.concatenate(codes), names, ordered=bool(same and first.ordered))


def _categorical(strings: Any) -> pd.Categorical:
    levels, codes = np.unique(strings, return_inverse=True)
    return pd.Categorical.from_codes(codes, levels.astype(object))
