"""Writing folders so that a reader sees the old one or the new one, and never half of either."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlasvi.errors import SpaceError, StoreError

if TYPE_CHECKING:
    import torch


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to write into; on success it takes the place of ``path``.

    On any error, Ctrl-C included, it is removed and ``path`` stays what it was. A process that was
    killed between the two renames leaves the old folder aside, from where `settle` takes it back.

    A link stays: the folder that it names is replaced.

    Raises:
        SpaceError: the disk is full.
        StoreError: it holds the folder that the process is in.
    """
    path = in_truth(path)
    must_be_elsewhere(path)
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


def in_truth(path: str | Path) -> Path:
    """Where a place is, links followed: beside a link, or ``.``, nothing can be moved."""
    return Path(os.path.realpath(path))


def must_be_elsewhere(path: Path) -> None:
    """A folder that is to be replaced must not hold the one that the process is in.

    Raises:
        StoreError: it does.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        return
    if path.exists() and here.is_relative_to(in_truth(path)):
        raise StoreError(
            f"{str(path)!r} is the folder that you are in, or holds it, and would be replaced under you; "
            "name another one, or go elsewhere"
        )


def save_tensors(values: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write safetensors that whoever may read the folder may read: by itself its library lets nobody else."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous().cpu() for name, value in values.items()}, file)
    with suppress(OSError):  # there are file systems without modes
        file.chmod(file.parent.stat().st_mode & 0o666)


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
    path = in_truth(path)
    if not path.name:
        return
    _, old = _beside(path)
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _is_out_of_space(error: Exception) -> bool:
    # safetensors reports what the system said in words only.
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error)
