"""What training tells, written where TensorBoard reads it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from atlasvi.errors import OptionError
from atlasvi.train.history import Check, EpochRecord


class TensorBoard:
    """Writes each epoch, and each look at validation, as scalars by training step.

    An epoch's are ``epoch/elbo_train`` and so on, by the names of `EpochRecord`; those of a look are
    ``look/elbo_validation`` and so on, by the names of `Check`. Of a resumed run, what was written of steps
    after its checkpoint no longer shows. Needs the package tensorboard; docs/training.md has an example.

    Args:
        folder: of the run, which ``tensorboard --logdir`` is given, or is in what it is given.

    Raises:
        OptionError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                f"TensorBoard({str(folder)!r}) needs tensorboard: pip install 'atlasvi[tensorboard]', or use "
                "model.history or train.history.CsvLog"
            ) from error
        self.folder = Path(folder)
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def __call__(self, record: EpochRecord | Check) -> None:
        """Write an epoch, or a look."""
        if self._writer is None:  # now, since only one of several processes is told
            self._writer = self._make(str(self.folder), purge_step=record.step)
        part = "epoch" if isinstance(record, EpochRecord) else "look"
        for field in fields(record):
            value = getattr(record, field.name)
            if field.name != "step" and value is not None:
                self._writer.add_scalar(f"{part}/{field.name}", value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; a further record opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


__all__ = ["TensorBoard"]
