"""Files of `torch.save`, read without running what is in them: tensors, arrays, plain containers."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from atlasvi.errors import ModelError

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_FAULTS = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError,
    IndexError, RuntimeError, OSError, OverflowError, MemoryError, NotImplementedError,
)  # fmt: skip


class Ignored:
    """Stands for a table of pandas, such as a history of training: nothing is made of it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    # as_strided refuses what lies outside the storage.
    return storage.as_strided(size, stride, offset).clone()


def _latin1(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into a pickle of protocol 2.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_reconstruct = np.empty(0, object).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _latin1,
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, slice, bytes)},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the few names of `_ALLOWED`; whatever else a file asks for is refused before it is looked up."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file, encoding="latin1")
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 calls it
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "pandas" or module.startswith("pandas."):
            return Ignored
        raise ModelError(f"it asks for {module}.{name}, which is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _, n = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an unknown kind of data, {kind!r}")
        raw = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
        return torch.frombuffer(raw, dtype=dtype, count=n) if n else torch.empty(0, dtype=dtype)


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors, arrays and plain values; no code of the file is run.

    Args:
        path: the file.

    Raises:
        ModelError: it is no such file, is damaged, or asks for anything else, by name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(inside) != 1:
                raise ModelError("it was not written by torch.save of torch 1.6 or later")
            with archive.open(inside[0]) as file:
                return _Unpickler(file, archive, inside[0].removesuffix("/data.pkl")).load()
    except ModelError as error:
        raise ModelError(f"{str(path)!r} is refused: {error}; nothing of it was run") from None
    except _FAULTS as error:
        raise ModelError(
            f"{str(path)!r} is damaged or not a model of scvi-tools ({error}); copy it again"
        ) from error


__all__ = ["read_pickled"]
