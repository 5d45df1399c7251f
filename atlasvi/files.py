"""Writing folders so that a reader sees the old one or the new one, and never half of either."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atlasvi.errors import SpaceError


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to write into; on success it takes the place of ``path``.

    On any error, Ctrl-C included, it is removed and ``path`` stays what it was. A process that was
    killed between the two renames leaves the old folder aside, from where `settle` takes it back.

    Raises:
        SpaceError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    new, old = _beside(path)
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except Exception as error:
        if _is_out_of_space(error):
            raise SpaceError(
                f"no space left to write {str(path)!r}; nothing was changed: free some and run again"
            ) from error
        raise
    finally:
        settle(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def plain_number(value: Any) -> Any:
    """For ``json.dumps(default=)``: a number of numpy's, which options may be, as Python's.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, np.number | np.bool_):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def is_among(out: Path, paths: Iterable[Path]) -> bool:
    """Whether a place is one of some that are there, by whatever name."""
    return out.exists() and any(path.exists() and path.samefile(out) for path in paths)


def settle(path: Path) -> None:
    """Take back the folder that stood at ``path``, if its replacing was cut off between the two renames."""
    _, old = _beside(path)
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _is_out_of_space(error: Exception) -> bool:
    # safetensors reports what the system said in words only.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error)
