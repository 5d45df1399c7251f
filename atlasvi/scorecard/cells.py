"""Which cells a scorecard is made on, and the one pass over all counts that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from atlasvi_kernels import CSR
from numpy.typing import NDArray

from atlasvi.infer.elbo import elbo_blocks
from atlasvi.models.base import CountModel
from atlasvi.progress import Advance
from atlasvi.store.identity import Checksum
from atlasvi.stream import pack
from atlasvi.types import Minibatch

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes

CELLS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Column:
    """A column of obs, as codes.

    Args:
        key: its name.
        codes: ``(n_obs,)``; -1 for cells that have no label.
        levels: what the codes stand for.
    """

    key: str
    codes: NDArray[Any]
    levels: tuple[str, ...]

    def at(self, positions: NDArray[np.int64]) -> pd.Categorical:
        """Of some cells, with the levels that they have."""
        found = pd.Categorical.from_codes(self.codes[positions], categories=list(self.levels))
        return found.remove_unused_categories()


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells whose counts are kept, and what a model needs of them.

    Args:
        positions: ``(n,)`` int64, in increasing order.
        counts: of the model's genes.
        codes: of all cells.
        rows: ``(n,)`` int64, their numbers in the store.
    """

    positions: NDArray[np.int64]
    counts: CSR
    codes: Codes
    rows: NDArray[np.int64]

    def minibatches(self, size: int) -> Iterator[Minibatch]:
        """The cells in their order."""
        for a in range(0, len(self.positions), size):
            b = min(a + size, len(self.positions))
            yield pack(self.counts.row_range(a, b), self.positions[a:b], self.codes, self.rows[a:b])


def kept_apart(model: CountModel, atlas: Atlas) -> tuple[NDArray[np.int64] | None, str]:
    """Positions of the cells kept apart from training, ``None`` where all are taken; why, in a sentence."""
    known = model.was_trained_on(atlas)
    if known is None:
        return (
            None,
            "All cells: the model does not say which cells it was trained on, so these may be among them.",
        )
    if not known:
        return (
            None,
            "All cells: the atlas is not the one that the model was trained on, or not in that order.",
        )
    apart = model.validation_indices
    if not len(apart):
        return None, "All cells, and the model was trained on them: none were kept apart from training."
    return apart, (
        "The cells kept apart from training: nothing was fitted to them, though training may have been "
        "stopped by them."
    )


@dataclass
class Terms:
    """Sums over cells of the terms of the ELBO, and of its squares from the first value on."""

    n: int = 0
    elbo: float = 0.0
    squares: float = 0.0
    reconstruction: float = 0.0
    kl: float = 0.0
    first: float = 0.0

    def add(self, elbo: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Add ``(B,)`` cells."""
        elbo, reconstruction = elbo.double().cpu(), reconstruction.double().cpu()
        if not self.n:
            self.first = float(elbo[0])
        self.n += len(elbo)
        self.elbo += float((elbo - self.first).sum())
        self.squares += float((elbo - self.first).square().sum())
        self.reconstruction += float(reconstruction.sum())
        self.kl += float((-elbo - reconstruction).sum())

    @property
    def mean(self) -> float:
        """Of the ELBO."""
        return self.first + self.elbo / self.n

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        if self.n < 2:
            return None
        variance = max(self.squares - self.elbo**2 / self.n, 0.0) / (self.n - 1)
        return math.sqrt(variance / self.n)


class OnePass:
    """All cells once: a checksum, the zeros and the ELBO of the held-out ones, and the counts of some.

    Args:
        model: of whose genes the minibatches are.
        minibatches: of all cells, in order.
        held_out: ``(n,)`` increasing positions.
        wanted: increasing positions of the cells whose counts are kept, set by set.
        advance: told the number of cells so far.
    """

    def __init__(
        self,
        model: CountModel,
        minibatches: Iterator[Minibatch],
        held_out: NDArray[Any],
        wanted: tuple[NDArray[np.int64], ...],
        advance: Advance,
    ) -> None:
        self.checksum = Checksum(model.fields.var_names)
        self.nonzeros = 0
        self._model, self._minibatches, self._held_out = model, minibatches, held_out
        self._wanted, self._advance = wanted, advance
        self._parts: list[list[CSR]] = [[] for _ in wanted]

    def run(self) -> None:
        """Go through all cells, where the model has no ELBO."""
        for _ in self._of_held_out():
            pass

    def elbo(self, seed: int) -> Terms:
        """Go through all cells, and sum up the terms of the ELBO of those that are held out."""
        terms = Terms()
        for found in elbo_blocks(self._model.module, self._of_held_out(), self._model._device, seed=seed):
            terms.add(-found.elbo, found.reconstruction)
        return terms

    def kept(self) -> tuple[CSR, ...]:
        """Counts of the cells wanted, set by set; after the pass."""
        return tuple(CSR.concatenate(parts) for parts in self._parts)

    def _of_held_out(self) -> Iterator[Minibatch]:
        start = 0
        for minibatch in self._minibatches:
            stop = start + len(minibatch)
            self.checksum.add(minibatch.counts)
            for parts, positions in zip(self._parts, self._wanted, strict=True):
                some = _within(positions, start, stop)
                if len(some):
                    parts.append(minibatch.counts.take_rows(some))
            mine = _within(self._held_out, start, stop)
            if len(mine):
                cells = minibatch if len(mine) == len(minibatch) else minibatch.take(mine)
                self.nonzeros += int((cells.counts.data != 0).sum())
                yield cells
            self._advance(stop, "")
            start = stop


def _within(positions: NDArray[Any], start: int, stop: int) -> NDArray[np.int64]:
    """Of increasing positions those from ``start`` to ``stop``, counted from ``start``."""
    a, b = np.searchsorted(positions, [start, stop])
    found: NDArray[np.int64] = positions[a:b].astype(np.int64) - start
    return found
