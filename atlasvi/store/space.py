"""A full disk, in whatever words it is reported."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atlasvi.errors import SpaceError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded")


def is_full(error: BaseException) -> bool:
    """Whether the disk was full, as Python says it (a number) or as zarrs does (in words)."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(words in str(error) for words in _WORDS):
        return True
    return error.__cause__ is not None and is_full(error.__cause__)


@contextmanager
def naming_a_full_disk(out: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn what a full disk raises inside the block into a `SpaceError`.

    Args:
        out: what was being written.
        needed: bytes it takes, as far as that is known then (0: not known).

    Raises:
        SpaceError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        size = f"about {needed() / 2**20:,.0f} MiB" if needed() else "more"
        free = shutil.disk_usage(out.parent).free / 2**20
        raise SpaceError(
            f"no space left in {str(out.parent.absolute())!r} to write {out.name!r}: {size} is needed, "
            f"{free:,.0f} MiB was free; nothing was left behind, free some space or write elsewhere"
        ) from error
