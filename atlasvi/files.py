"""Writing folders so that a reader sees the old one or the new one, and never half of either."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlasvi.errors import SpaceError


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to write into; on success it takes the place of ``path``.

    On any error, Ctrl-C included, it is removed and ``path`` stays what it was.

    Raises:
        SpaceError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SpaceError(
                f"no space left to write {str(path)!r}; nothing was changed: free some and run again"
            ) from error
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
