"""What each epoch came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
import torch

from atlasvi.nn import ranks
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
    step: int = 0
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A look at the cells kept for validation: means in nats, of the averaged weights if there are any.

    Args:
        step: training steps before it.
        seconds: of training before it, looks included.
        elbo_validation: negative ELBO at full KL weight.
        reconstruction_loss_validation: its first term.
        kl_local_validation: its second.
        validation_loss: what training minimises, at full KL weight: where the model classifies, with the
            cross-entropy of the cells among these that have a label.
    """

    step: int
    seconds: float
    elbo_validation: float
    reconstruction_loss_validation: float
    kl_local_validation: float
    validation_loss: float | None = None  # not in the folders of earlier versions


# What of a look can be watched.
LOOKED_AT = tuple(field.name for field in fields(Check) if field.name not in ("step", "seconds"))


class TermSums:
    """Running sums of `LossTerms` over cells, and over labelled ones; the same however the cells are cut.

    Args:
        values: of cells, loss but for the classification, negative ELBO, reconstruction, KL, labelled cells
            and their classification so far.
    """

    def __init__(self, values: Sequence[float] = (0.0,) * 7) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)

    def add(self, terms: LossTerms) -> None:
        """Add a minibatch. Nothing waits for its device."""
        n = len(terms.reconstruction)
        kl = terms.kl_z + terms.kl_library
        if n == 0:  # the part of a process that has none of a minibatch
            return
        reconstruction = terms.reconstruction.sum(dtype=torch.float64)
        kl_sum = kl.sum(dtype=torch.float64)
        loss = terms.total.detach().double() * n
        labelled = loss.new_zeros(0) if terms.classification is None else terms.classification
        classification = labelled.sum(dtype=torch.float64)
        loss = loss - n * classification / max(len(labelled), 1)
        cells, n_labelled = torch.full_like(loss, n), torch.full_like(loss, len(labelled))
        added = torch.stack(
            [cells, loss, reconstruction + kl_sum, reconstruction, kl_sum, n_labelled, classification]
        )
        self.values = self.values.to(added.device) + added

    def over_all_ranks(self) -> TermSums:
        """The sums of all processes together."""
        self.values = self.values.clone()
        ranks.sum_in_place([self.values])
        return self

    @property
    def n(self) -> int:
        """Cells."""
        return int(self.values[0])

    def means(self) -> tuple[float, float, float, float]:
        """``(loss, elbo, reconstruction, kl)`` a cell."""
        n, *sums, n_labelled, classification = self.values.tolist()
        loss, elbo, reconstruction, kl = (value / max(n, 1.0) for value in sums)
        return loss + classification / max(n_labelled, 1.0), elbo, reconstruction, kl


def to_frame(checks: Sequence[Check]) -> pd.DataFrame:
    """A row for each look at the cells kept for validation, indexed by step."""
    columns = [field.name for field in fields(Check)]
    return pd.DataFrame([asdict(check) for check in checks], columns=columns).set_index("step")


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
        after: a log whose epochs are kept, up to the first one that comes again.
    """

    def __init__(self, path: Path, *, after: Path | None = None) -> None:
        self.path = path
        self.header = ",".join(field.name for field in fields(EpochRecord))
        self.lines: list[str] = []
        if after is not None and after.is_file():
            self.lines = after.read_text().splitlines()[1:]

    def __call__(self, record: EpochRecord) -> None:
        """Write the file with this epoch as its last."""
        values = [getattr(record, field.name) for field in fields(EpochRecord)]
        kept = [line for line in self.lines if int(line.split(",", 1)[0]) < record.epoch]
        self.lines = [*kept, ",".join("" if value is None else f"{value:.8g}" for value in values)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.new")
        partial.write_text("\n".join([self.header, *self.lines, ""]))
        partial.replace(self.path)
