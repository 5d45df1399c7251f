"""The cells of several inputs in one atlas: their order, and names of which none stands twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from atlasvi.errors import CellsError
from atlasvi.store import frame
from atlasvi.store.base import STRING, Source
from atlasvi.store.merge import take
from atlasvi.store.spill import disk_array

BLOCK_ENTRIES = 1 << 18
DENSE_BLOCK = 1 << 21
MAX_BLOCK_ROWS = 1 << 14


class Cells:
    """Which row of which input each cell of the atlas is.

    What there is one of for each cell (hashes, permutation) lives in files of ``scratch``.

    Args:
        sources: the inputs.
        names: of the inputs.
        scratch: folder for temporary files.
        seed: of a random order, or ``None`` for the order of the inputs.
        before: an atlas whose cells stand before these and keep their names, none of which may come again.

    Raises:
        CellsError: there are none.
    """

    def __init__(
        self,
        sources: list[Source],
        names: list[str],
        scratch: Path,
        seed: int | None,
        before: Source | None = None,
    ) -> None:
        self.sources, self.names, self._scratch = sources, names, scratch
        self.lengths = [source.shape[0] for source in sources]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.n_obs = int(self.offsets[-1])
        if self.n_obs == 0:
            raise CellsError(f"there are no cells in {', '.join(repr(s.name) for s in sources)}")
        # The atlas comes last, so that rows of the inputs count from 0.
        self._named = sources if before is None else [*sources, before]
        n_names = self.n_obs + (0 if before is None else before.shape[0])
        self._hashes = disk_array(scratch / "hashes.bin", n_names, np.uint64)
        self._numbers: dict[int, str] = {}
        self._append_input = False
        self._width, self._lock = 1, threading.Lock()
        self.order: NDArray[np.int64] | None = None
        if seed is not None:
            self._shuffle(seed)

    def _shuffle(self, seed: int) -> None:
        order = disk_array(self._scratch / "order.bin", self.n_obs, np.int64)
        places = disk_array(self._scratch / "places.bin", self.n_obs, np.int64)
        order[:] = np.arange(self.n_obs)
        np.random.default_rng(seed).shuffle(np.asarray(order))
        places[order] = np.arange(self.n_obs)
        self.order, self._places = order, places

    def rows(self, i: int, start: int, stop: int) -> slice:
        """Rows ``start`` to ``stop`` of input ``i``, counted through all inputs."""
        first = int(self.offsets[i])
        return slice(first + start, first + stop)

    def places(self, i: int, start: int, stop: int) -> slice | NDArray[np.int64]:
        """Where rows ``start`` to ``stop`` of input ``i`` stand in the atlas."""
        rows = self.rows(i, start, stop)
        return rows if self.order is None else self._places[rows]

    def in_order(self, values: Any) -> Any:
        """A column that runs through all inputs, in the order of the atlas."""
        return values if self.order is None else take(values, self.order)

    def input_column(self) -> pd.Categorical:
        """The name of the input of each cell, through all inputs."""
        dtype = np.min_scalar_type(len(self.names))
        codes = np.repeat(np.arange(len(self.names), dtype=dtype), self.lengths)
        return pd.Categorical.from_codes(codes, self.names)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Input and rows of it that are ``start`` to ``stop``, counted through all inputs."""
        for i, (first, last) in enumerate(pairwise(self.offsets.tolist())):
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                yield i, lo - first, hi - first

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Input and rows of it that are read at once."""
        for i, source in enumerate(self.sources):
            for start, stop in row_blocks(source, 0, source.shape[0]):
                yield i, start, stop

    def name_blocks(self) -> Iterator[tuple[int, int, int]]:
        """Input and rows of it whose names are read at once: the chunks that an atlas has them in."""
        for i, source in enumerate(self._named):
            for start in range(0, source.shape[0], frame.NAMES):
                yield i, start, min(start + frame.NAMES, source.shape[0])

    def read_names(self, i: int, start: int, stop: int) -> NDArray[Any]:
        """Names of rows of input ``i`` as the atlas has them."""
        names = self._named[i].read_names(start, stop)
        if i == len(self.sources) or not (self._numbers or self._append_input):
            return names
        end = f"-{self.names[i]}" if self._append_input else ""
        first = int(self.offsets[i]) + start
        new = [f"{name}{self._numbers.get(first + k, '')}{end}" for k, name in enumerate(names.tolist())]
        return np.array(new, STRING)

    def write_names(self, array: Any, step: int) -> None:
        """Write all names into ``array``, in the order of the atlas, ``step`` at a time."""
        shuffled = None if self.order is None else self._shuffled_names(step)
        for start in range(0, self.n_obs, step):
            stop = min(start + step, self.n_obs)
            if shuffled is None:
                names = np.concatenate([self.read_names(*part) for part in self.ranges(start, stop)])
            else:
                names = frame.to_strings(np.asarray(shuffled[start:stop]))
            array[start:stop] = names

    def _shuffled_names(self, step: int) -> NDArray[np.bytes_]:
        """The names as bytes of one width in a file, in the order of the atlas."""
        file = disk_array(self._scratch / "names.bin", self.n_obs * self._width, np.uint8)
        names = file.view(f"S{self._width}")
        for start in range(0, self.n_obs, step):
            for part in self.ranges(start, min(start + step, self.n_obs)):
                names[self.places(*part)] = [name.encode() for name in self.read_names(*part).tolist()]
        return names

    def hash_block(self, i: int, start: int, stop: int) -> None:
        """Note the hashes of some names; every block must come before `check_names`."""
        names = self.read_names(i, start, stop).astype(object)
        self._hashes[self.rows(i, start, stop)] = pd.util.hash_array(names, categorize=False)
        if self.order is not None:
            width = max(len(name.encode()) for name in names)
            with self._lock:
                self._width = max(self._width, width)

    def hash_names(self) -> None:
        """Note the hashes of all names."""
        for block in self.name_blocks():
            self.hash_block(*block)

    def forget_hashes(self) -> None:
        """Let go of the files in scratch; names can still be read."""
        self._hashes = np.zeros(0, np.uint64)

    def check_names(self, *, make_unique: bool) -> None:
        """See that no name stands twice: by 64-bit hashes, as a set of a hundred million names would not fit.

        Raises:
            CellsError: one does, and ``make_unique`` is off, or did not help.
        """
        repeated = self._repeated()
        pair = self._a_real_repeat(repeated) if len(repeated) else None
        if pair is None:
            return
        if not make_unique:
            name, i, j = pair
            where = f"twice in {self._named[i].name!r}"
            if i != j:
                where = f"in {self._named[i].name!r} and in {self._named[j].name!r}"
            raise CellsError(
                f"cell {name!r} is {where}; pass make_unique=True to append the input's name, or a number"
            )
        self._rename(repeated)

    def _repeated(self) -> NDArray[np.uint64]:
        """The hashes that stand more than once."""
        in_order = disk_array(self._scratch / "sorted.bin", len(self._hashes), np.uint64)
        in_order[:] = self._hashes
        np.asarray(in_order).sort()
        return np.unique(in_order[1:][in_order[1:] == in_order[:-1]])

    def _a_real_repeat(self, repeated: NDArray[np.uint64]) -> tuple[str, int, int] | None:
        """A name that stands twice and the inputs it is in; a mere clash of hashes is none."""
        first: dict[str, int] = {}
        for i, name, _ in self._with_hash(repeated):
            if name in first:
                return name, first[name], i
            first[name] = i
        return None

    def _with_hash(self, wanted: NDArray[np.uint64]) -> Iterator[tuple[int, str, int]]:
        """Input, name and row (through all inputs) of the cells whose hash is wanted."""
        for i, start, stop in self.name_blocks():
            hashes = np.asarray(self._hashes[self.rows(i, start, stop)])
            found = np.flatnonzero(np.isin(hashes, wanted))
            names = self._named[i].read_names(start, stop) if len(found) else np.zeros(0, STRING)
            for b in found.tolist():
                yield i, str(names[b]), int(self.offsets[i]) + start + b

    def _rename(self, repeated: NDArray[np.uint64]) -> None:
        """Number the cells that share a name in one input; append the input where there are several."""
        seen: dict[tuple[int, str], int] = {}
        for i, name, row in self._with_hash(repeated):
            if i == len(self.sources):
                continue
            n = seen[i, name] = seen.get((i, name), -1) + 1
            if n:
                self._numbers[row] = f"-{n}"
        self._append_input = len(self._named) > 1
        self.hash_names()
        if len(self._repeated()):
            raise CellsError(
                "cell names still repeat after make_unique appended to them; rename the cells of the inputs"
            )


def input_names(items: list[Any]) -> list[str]:
    """Names of files without their endings, made different where they are not."""
    names = []
    for k, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            names.append(Path(os.path.abspath(item)).stem)
        else:
            names.append(str(getattr(item, "name", f"AnnData-{k}")))
    if len(set(names)) == len(names):
        return names
    paths = [
        str(item) if isinstance(item, (str, os.PathLike)) else n for item, n in zip(items, names, strict=True)
    ]
    return paths if len(set(paths)) == len(paths) else [f"{k}-{name}" for k, name in enumerate(names)]


def row_blocks(source: Source, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are read at once: about `BLOCK_ENTRIES` entries, or a slab of a dense matrix."""
    indptr = source.indptr
    while start < stop:
        if indptr is None:
            end = start + max(1, min(MAX_BLOCK_ROWS, DENSE_BLOCK // max(1, source.shape[1])))
        else:
            limit = int(indptr[start]) + BLOCK_ENTRIES
            end = max(start + 1, int(np.searchsorted(indptr, limit, side="right")) - 1)
            end = min(end, start + MAX_BLOCK_ROWS)
        yield start, min(end, stop)
        start = end
