"""The check that numbers are counts, and rows with their columns renamed and in order."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from atlasvi.errors import CountsError, OptionError
from atlasvi.store.base import Source
from atlasvi_kernels import CSR

MAX_COUNT = (1 << 32) - 1
_SAMPLE_ROWS = 256


def as_counts(values: NDArray[Any]) -> tuple[NDArray[np.uint32], int]:
    """The values as uint32, and the position of the first that is not a count (-1: all are)."""
    if values.dtype in (np.uint8, np.uint16, np.uint32):
        return values.astype(np.uint32, copy=False), -1
    with np.errstate(invalid="ignore"):
        counts = values.astype(np.uint32)
    # Whatever the machine makes of NaN or a value out of range, it does not compare equal.
    wrong = counts != values
    return counts, int(wrong.argmax()) if wrong.any() else -1


def checked_rows(
    source: Source, start: int, stop: int, column_of: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows of a source as the atlas has them: genes of the atlas, columns in order, no zeros.

    Returns:
        ``(indptr, columns, counts)``.

    Raises:
        CountsError: a value that is not a count, or a gene that stands twice in a cell.
    """
    rows = source.read_rows(start, stop)
    indptr, indices, values = rows.numpy()
    counts, wrong = as_counts(values)
    if wrong >= 0:
        raise CountsError(_not_a_count(source, start, rows, wrong))
    indices = indices.astype(np.int32, copy=False)
    if np.array_equal(column_of, np.arange(source.shape[1])) and _is_ready(indptr, indices, counts):
        return indptr, indices.view(np.uint32), counts
    out = np.zeros(len(indptr), np.int64), np.empty(len(counts), np.uint32), np.empty(len(counts), np.uint32)
    twice = _map_rows(indptr, indices, counts, column_of, *out)
    if twice >= 0:
        cell = source.read_names(start + twice, start + twice + 1)[0]
        raise CountsError(
            f"{source.name!r} {source.place} has a gene twice in cell {str(cell)!r} (row {start + twice}); "
            "sum the duplicates first: adata.X.sum_duplicates()"
        )
    n = int(out[0][-1])
    return out[0], out[1][:n], out[2][:n]


def _not_a_count(source: Source, start: int, rows: CSR, k: int) -> str:
    indptr, indices, values = rows.numpy()
    b = int(np.searchsorted(indptr, k, side="right")) - 1
    cell = source.read_names(start + b, start + b + 1)[0]
    gene = source.var_names[int(indices[k])]
    return (
        f"{source.name!r} {source.place} has {values[k]!s} at cell {str(cell)!r}, gene {str(gene)!r}; counts "
        f"must be integers from 0 to {MAX_COUNT}. {_where_else(source)}"
    )


def _where_else(source: Source) -> str:
    """Which other matrix of the source holds counts, as far as a sample of it tells."""
    for layer in source.extras().elsewhere:
        try:
            other = source.other(None if layer == "X" else layer)
            holds = _looks_like_counts(other)
        except OptionError:  # of a kind that is not known, or not numbers: cannot be offered
            continue
        if holds:
            how = "leave layer out" if layer == "X" else f"pass layer={layer!r}"
            return f"{other.place} holds counts: {how}"
    return "No other matrix of it holds counts: give the file with the raw ones"


def _looks_like_counts(source: Source) -> bool:
    some = False
    for values in source.values(_SAMPLE_ROWS):
        if as_counts(values)[1] >= 0:
            return False
        some = some or bool(values.any())
    return some


def mark(columns: NDArray[np.uint32], seen: NDArray[np.bool_]) -> None:
    """Note in ``seen`` which columns there are."""
    _mark(columns, seen)


@numba.njit(nogil=True, cache=True)
def _mark(columns, seen):  # type: ignore[no-untyped-def]
    for k in range(len(columns)):
        seen[columns[k]] = True


@numba.njit(nogil=True, cache=True)
def _is_ready(indptr, indices, counts):  # type: ignore[no-untyped-def]
    """Whether columns are in order, none twice, and no count is 0."""
    wrong = False
    for k in range(len(counts)):
        wrong |= counts[k] == 0
    for b in range(len(indptr) - 1):
        for k in range(indptr[b] + 1, indptr[b + 1]):
            wrong |= indices[k] <= indices[k - 1]
    return not wrong


@numba.njit(nogil=True, cache=True)
def _map_rows(indptr, indices, counts, column_of, out_indptr, out_columns, out_counts):  # type: ignore[no-untyped-def]
    """Fill the outputs; the first row in which a column stands twice, or -1."""
    n = 0
    for b in range(len(indptr) - 1):
        first, last, in_order = n, np.int64(-1), True
        for k in range(indptr[b], indptr[b + 1]):
            column = column_of[indices[k]]
            if column < 0 or counts[k] == 0:
                continue
            in_order = in_order and column > last
            last = column
            out_columns[n] = column
            out_counts[n] = counts[k]
            n += 1
        out_indptr[b + 1] = n
        if not in_order:
            order = np.argsort(out_columns[first:n])
            columns, values = out_columns[first:n][order], out_counts[first:n][order]
            for k in range(n - first):
                if k > 0 and columns[k] == columns[k - 1]:
                    return b
                out_columns[first + k] = columns[k]
                out_counts[first + k] = values[k]
    return -1
