"""What each epoch came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from atlasvi.types import LossTerms


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch; losses are means over cells in nats, named as scvi-tools' history names them.

    ``elbo_*`` is the *negative* ELBO at full KL weight (lower is better); ``train_loss_epoch`` is what
    was minimised, at the epoch's ``kl_weight``. Training terms are taken while the weights change and
    with dropout; validation terms after the epoch, without.
    """

    epoch: int
    train_loss_epoch: float
    elbo_train: float
    reconstruction_loss_train: float
    kl_local_train: float
    elbo_validation: float | None
    reconstruction_loss_validation: float | None
    kl_local_validation: float | None
    kl_weight: float
    lr: float
    seconds: float
    cells_per_second: float


class TermSums:
    """Running sums of `LossTerms` over cells."""

    def __init__(self) -> None:
        self.n = 0
        self.loss = self.elbo = self.reconstruction = self.kl = 0.0

    def add(self, terms: LossTerms) -> None:
        """Add a minibatch."""
        n = len(terms.reconstruction)
        self.n += n
        self.loss += float(terms.total.detach()) * n
        self.elbo += float(terms.elbo.double().sum())
        self.reconstruction += float(terms.reconstruction.double().sum())
        self.kl += float((terms.kl_z + terms.kl_library).double().sum())

    def means(self) -> tuple[float, float, float, float]:
        """``(loss, elbo, reconstruction, kl)`` a cell."""
        n = max(self.n, 1)
        return self.loss / n, self.elbo / n, self.reconstruction / n, self.kl / n


def to_frames(records: Sequence[EpochRecord]) -> dict[str, pd.DataFrame]:
    """A data frame for each quantity, indexed by epoch, as ``model.history`` of scvi-tools."""
    names = [field.name for field in fields(EpochRecord) if field.name != "epoch"]
    index = pd.Index([record.epoch for record in records], name="epoch")
    frames = {
        name: pd.DataFrame({name: [getattr(record, name) for record in records]}, index=index)
        for name in names
    }
    return {name: frame for name, frame in frames.items() if frame[name].notna().any()}


class CsvLog:
    """Writes each epoch as a line of CSV, so that a run can be watched and read after it was stopped.

    Args:
        path: the file.
        append: keep the epochs that are there, up to the first one that comes again.
    """

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        self.header = ",".join(field.name for field in fields(EpochRecord))
        self.lines: list[str] = []
        if append and path.is_file():
            self.lines = path.read_text().splitlines()[1:]

    def __call__(self, record: EpochRecord) -> None:
        """Write the file with this epoch as its last."""
        values = [getattr(record, field.name) for field in fields(EpochRecord)]
        kept = [line for line in self.lines if int(line.split(",", 1)[0]) < record.epoch]
        self.lines = [*kept, ",".join("" if value is None else f"{value:.8g}" for value in values)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.new")
        partial.write_text("\n".join([self.header, *self.lines, ""]))
        partial.replace(self.path)
