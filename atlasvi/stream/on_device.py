"""Counts that stay on a device once they were read, so that minibatches are made there.

The host knows of each row where its entries begin and how many there are, 12 bytes a cell, so it knows the
size of every minibatch without asking the device. Indices and counts keep their narrow types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.stream.plan import Unit

Positions: TypeAlias = NDArray[np.int64]

# torch moves these and does little else with them: rows are taken from the same bytes under another name.
_ALIAS = {torch.uint16: torch.int16, torch.uint32: torch.int32}


@dataclass
class Room:
    """Bytes of a device that counts may take, shared by all epochs that are given it.

    As parts are put together in one piece, up to as many again are taken for a moment.

    Args:
        device: where.
        n_bytes: left.

    Example:
        >>> room = Room(torch.device("cpu"), 100)
        >>> room.reserve(80), room.reserve(30), room.n_bytes
        (True, False, 20)
    """

    device: torch.device
    n_bytes: int

    def reserve(self, n_bytes: int) -> bool:
        """Take so many of them, or none if there are fewer."""
        fits = n_bytes <= self.n_bytes
        self.n_bytes -= n_bytes * fits
        return fits


class OnDevice:
    """Rows on a device, copied there as units are read; then a pool of all of them, as `gather` wants one.

    Args:
        room: where, and what is left beside those reserved.
        reserved: bytes of it that these rows should take.
        n_rows: positions in all.
        n_vars: number of genes.
        pin_memory: copy by way of page-locked memory, for which nobody has to wait.
    """

    def __init__(self, room: Room, reserved: int, n_rows: int, n_vars: int, *, pin_memory: bool) -> None:
        self._room, self._reserved, self._n_vars, self._pin = room, reserved, n_vars, pin_memory
        self._offset, self._length = np.zeros(n_rows, np.int64), np.full(n_rows, -1, np.int32)
        self._n_entries = 0
        self._indices: list[torch.Tensor] = []
        self._data: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._room.device

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(part.nbytes for part in self._indices + self._data)

    def put(self, start: int, counts: CSR) -> bool:
        """Hold the rows from ``start`` on that are not yet; ``False`` if there is no room: then all go."""
        new = np.flatnonzero(self._length[start : start + counts.n_obs] < 0)
        if len(new) < counts.n_obs:
            counts = counts.take_rows(new)
        more = self.nbytes + counts.indices.nbytes + counts.data.nbytes - self._reserved
        if more > 0:
            if not self._room.reserve(more):
                self._indices, self._data = [], []
                self._room.n_bytes += self._reserved
                return False
            self._reserved += more
        if len(new):
            self._indices.append(self._send(counts.indices))
            self._data.append(self._send(counts.data))
            indptr = counts.indptr.numpy()
            self._offset[start + new] = self._n_entries + indptr[:-1]
            self._length[start + new] = np.diff(indptr)
            self._n_entries += counts.nnz
        return True

    def holds(self, units: list[Unit]) -> bool:
        """Whether all rows of these units are here: then they can be taken."""
        return bool(units) and all((self._length[unit.start : unit.stop] >= 0).all() for unit in units)

    def add(self, unit: Unit) -> int:
        """The number by which `take` knows a unit: where it starts."""
        return unit.start

    def drop(self, start: int) -> None:
        """Nothing: the rows of a unit stay."""

    def take(self, starts: Positions, rows: Positions, *, alone: bool = True) -> CSR:
        """Row ``rows[i]`` of the unit that starts at ``starts[i]``, for all i, whoever reads beside."""
        # One after the other: the parts of the first are let go before the second is put together.
        self._indices = _joined(self._indices)
        self._data = _joined(self._data)
        (indices,), (data,) = self._indices, self._data
        length, offset = self._length[starts + rows], self._offset[starts + rows]
        # Where each row begins among those taken, and how far from there it lies among all.
        where = np.zeros((2, len(rows) + 1), np.int64)
        np.cumsum(length, out=where[0, 1:])
        where[1, :-1] = offset - where[0, :-1]
        n = int(where[0, -1])
        indptr, shift = self._send(torch.from_numpy(where))
        at = torch.arange(n, device=self.device)
        at += torch.repeat_interleave(shift[:-1], indptr.diff(), output_size=n)
        return CSR(indptr, _take(indices, at), _take(data, at), self._n_vars)

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        values = values.pin_memory() if self._pin else values
        return values.to(self.device, non_blocking=True, copy=True)


def _alias(values: torch.Tensor) -> torch.Tensor:
    return values.view(_ALIAS.get(values.dtype, values.dtype))


def _take(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return _alias(values).index_select(0, at).view(values.dtype)


def _joined(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parts as one, of a type that has room for each: stores that are opened as one may differ."""
    if len(parts) == 1:
        return parts
    kinds = {torch.empty(0, dtype=part.dtype).numpy().dtype for part in parts}
    wide = torch.from_numpy(np.empty(0, np.result_type(*kinds))).dtype
    return [torch.cat([_alias(part.to(wide)) for part in parts]).view(wide)]
