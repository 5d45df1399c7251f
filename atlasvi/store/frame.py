"""Names and columns of obs and var in HDF5 and Zarr groups, without a Python object a cell.

Everything is written in AnnData's own encodings (string-array, categorical, array, nullable), in chunks
with checksums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata.io import read_elem
from numpy.typing import NDArray

from atlasvi.store.base import STRING
from atlasvi.store.layout import codecs

CHUNK = 1 << 17
NAMES = 1 << 14


def read_strings(array: Any, rows: slice = slice(None)) -> NDArray[Any]:
    """Strings of an HDF5 dataset or Zarr array, as numpy's ``StringDType`` (16 bytes a short string)."""
    if hasattr(array, "asstr") and array.dtype.kind in "OS":
        return np.asarray(array.astype("T")[rows])
    return to_strings(array[rows])


def to_strings(values: Any) -> NDArray[Any]:
    """Names of any kind, as ``StringDType``."""
    values = np.asarray(values)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return values.astype(STRING)


def keys(group: Any) -> list[str]:
    """Columns of a data frame on disk, in order."""
    return [str(key) for key in group.attrs["column-order"]]


def index(group: Any) -> Any:
    """The array of the names of a data frame on disk."""
    return group[str(group.attrs["_index"])]


def read_column(group: Any, key: str) -> Any:
    """One column of a data frame on disk.

    Returns:
        A ``pd.Categorical``, a numpy array (strings as ``StringDType``) or a nullable pandas array.

    Raises:
        KeyError: no such column.
    """
    if key not in keys(group):
        raise KeyError(key)
    node = group[key]
    encoding = node.attrs.get("encoding-type")
    if encoding == "string-array":
        return read_strings(node)
    return read_elem(node)


def plain_column(values: Any) -> Any:
    """A column of a pandas or xarray-backed frame as `read_column` would return it."""
    if isinstance(values, pd.Series):
        values = values.array
    if hasattr(values, "to_numpy") and hasattr(values, "dims"):  # a lazy AnnData's column (xarray)
        values = values.to_pandas().array
    if isinstance(values, pd.arrays.NumpyExtensionArray):
        values = values.to_numpy()
    if isinstance(values, (pd.arrays.StringArray, pd.arrays.ArrowStringArray)):
        values = values.to_numpy(object)
    if isinstance(values, np.ndarray) and values.dtype == object:
        return _texts(values)
    return values


def _texts(values: NDArray[Any]) -> Any:
    """Objects as strings where all are strings, as categories where some are missing, else as they are."""
    missing = pd.isna(values)
    if not all(isinstance(value, str) for value in values[~missing]):
        return pd.Series(values).infer_objects().to_numpy()
    return pd.Categorical(values) if missing.any() else values.astype(STRING)


def write_frame(parent: Any, key: str, n: int, index_name: str = "_index") -> Any:
    """Start a data frame in ``parent``: the group, with its (empty) array of ``n`` names."""
    group = parent.create_group(key)
    group.attrs.update(
        {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": index_name, "column-order": []}
    )
    _string_array(group, index_name, n)
    return group


def check_column(key: str, values: Any) -> None:
    """Make sure that `write_column` can write a column.

    Raises:
        TypeError: values of a kind that AnnData has no encoding for.
    """
    if isinstance(values, pd.arrays.FloatingArray):
        raise TypeError(f"nullable column of type {values.dtype}")
    is_plain = isinstance(values, np.ndarray) and values.dtype.kind in "biufcTU"
    if not (is_plain or isinstance(values, (pd.Categorical, pd.arrays.IntegerArray, pd.arrays.BooleanArray))):
        raise TypeError(f"column {key!r} of type {getattr(values, 'dtype', type(values).__name__)}")
    if isinstance(values, pd.Categorical) and values.categories.dtype.kind not in "biuf":
        levels = to_strings(np.asarray(values.categories))
        if len(np.unique(levels)) < len(levels):
            raise TypeError(f"column {key!r}, which has categories that read the same (1 and '1')")


def write_column(group: Any, key: str, values: Any) -> None:
    """Add one column to a data frame begun by `write_frame`.

    Raises:
        TypeError: values of a kind that AnnData has no encoding for; nothing is written.
    """
    check_column(key, values)
    if isinstance(values, pd.Categorical):
        _write_categorical(group.create_group(key), values)
    elif not isinstance(values, np.ndarray):
        _write_nullable(group.create_group(key), values)
    elif values.dtype.kind in "TU":
        _string_array(group, key, len(values))[...] = values.astype(STRING)
    else:
        write_plain(group, key, values, CHUNK, "array")
    group.attrs["column-order"] = [*group.attrs["column-order"], key]


def write_plain(group: Any, key: str, values: NDArray[Any], rows: int, encoding: str | None = None) -> None:
    """A numeric array, ``rows`` rows a chunk and a copy, with AnnData's attributes if it is to have them."""
    out = create_array(group, key, values.shape, values.dtype, rows)
    for start in range(0, len(values), rows):
        out[start : start + rows] = np.asarray(values[start : start + rows])
    if encoding is not None:
        out.attrs.update({"encoding-type": encoding, "encoding-version": "0.2.0"})


def create_array(group: Any, key: str, shape: tuple[int, ...], dtype: Any, rows: int) -> Any:
    """An empty array, compressed and checksummed, in chunks of ``rows`` rows, as it may be added to."""
    chunks = (max(1, rows), *(max(1, n) for n in shape[1:]))
    return group.create_array(key, shape=shape, dtype=dtype, chunks=chunks, compressors=codecs())


def _string_array(group: Any, key: str, n: int) -> Any:
    out = create_array(group, key, (n,), STRING, NAMES)
    out.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return out


def _write_categorical(group: Any, values: pd.Categorical) -> None:
    group.attrs.update(
        {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": bool(values.ordered)}
    )
    # One byte a cell would be full at 127 levels, and more may be appended.
    codes = np.asarray(values.codes)
    write_plain(group, "codes", codes.astype(np.int16) if codes.itemsize == 1 else codes, CHUNK, "array")
    categories = np.asarray(values.categories)
    if categories.dtype.kind in "biuf":
        write_plain(group, "categories", categories, CHUNK, "array")
    else:
        _string_array(group, "categories", len(categories))[...] = to_strings(categories)


def _write_nullable(group: Any, values: Any) -> None:
    kind = "boolean" if values.dtype.kind == "b" else "integer"
    group.attrs.update({"encoding-type": f"nullable-{kind}", "encoding-version": "0.1.0"})
    mask = np.asarray(values.isna())
    write_plain(group, "values", values.to_numpy(values.dtype.numpy_dtype, na_value=0), CHUNK, "array")
    write_plain(group, "mask", mask, CHUNK, "array")
