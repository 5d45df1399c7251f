"""The metadata of a whole Zarr v3 store in one file, which is replaced at once; and one writer at a time.

Each array of a store says its own length in its own ``zarr.json``. The root's ``zarr.json`` may hold a copy
of all of them (consolidated metadata), and what opens the store by its root goes by that copy, to the end:
so one rename of one file changes the store for those who open it later, and for nobody who has it open.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from atlasvi.errors import StoreError

ROOT = "zarr.json"
_COPY = "consolidated_metadata"


@dataclass
class Metadata:
    """What the root's ``zarr.json`` says.

    Args:
        path: of the store.
        root: the file, as JSON.
    """

    path: Path
    root: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """What stands there now."""
        return cls(path, json.loads((path / ROOT).read_text()))

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root."""
        attributes: dict[str, Any] = self.root["attributes"]
        return attributes

    @property
    def is_consolidated(self) -> bool:
        """Whether it has the copy of all metadata."""
        return self.root.get(_COPY) is not None

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """The metadata of each group and array below the root, by its path."""
        nodes: dict[str, dict[str, Any]] = self.root[_COPY]["metadata"]
        return nodes

    def write(self) -> None:
        """Replace the root's file: who opens the store from now on sees it as this says."""
        # zarr loses members of a group that do not stand together.
        nodes = dict(sorted(self.nodes.items(), key=lambda item: (item[0].count("/"), item[0])))
        _replace(self.path / ROOT, {**self.root, _COPY: {**self.root[_COPY], "metadata": nodes}})

    def write_nodes(self) -> None:
        """Replace those files of groups and arrays that say otherwise."""
        for file, said in self._by_themselves():
            if said != _read(file):
                _replace(file, said)

    def differing(self) -> list[str]:
        """Groups and arrays whose own file says otherwise."""
        return [
            str(file.parent.relative_to(self.path))
            for file, said in self._by_themselves()
            if said != _read(file)
        ]

    def _by_themselves(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for key, node in self.nodes.items():
            # In the copy, groups have a copy of their own, which is empty.
            yield self.path / key / ROOT, {name: value for name, value in node.items() if name != _COPY}


def consolidate(path: Path) -> None:
    """Put a copy of all metadata into the root's file."""
    with warnings.catch_warnings():
        # zarr warns that other implementations may not know it; these then read the files of each array.
        warnings.simplefilter("ignore", category=UserWarning)
        zarr.consolidate_metadata(str(path), zarr_format=3)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Nobody else who asks for this writes to the store inside the block; a killed process lets go of it.

    Raises:
        StoreError: somebody else does.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{str(path)!r} is being written to by another process; wait for it and run again"
            ) from None
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """See a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    found.pop(_COPY, None)
    return found


def _replace(file: Path, said: dict[str, Any]) -> None:
    beside = file.with_name(file.name + ".partial")
    beside.write_text(json.dumps(said, indent=2))
    sync(beside)
    os.replace(beside, file)
    sync(file.parent)


__all__ = ["ROOT", "Metadata", "consolidate", "only_writer", "sync"]
