"""A run of training on disk: weights and optimiser as safetensors, the rest as JSON, nothing pickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from atlasvi.errors import ModelError, VersionError
from atlasvi.files import in_truth, must_be_elsewhere, plain_number, replacing_folder, save_tensors, settle
from atlasvi.train.history import LOOKED_AT, Check, EpochRecord, TermSums
from atlasvi.train.schedule import TrainingPlan

FORMAT = 5
STATE, TENSORS = "state.json", ".safetensors"
# Its files of tensors: of training by minibatches the first four, of a fit by passes `weights` and `fit`.
PARTS = ("weights", "optimizer", "average", "best", "fit")
Tensors = dict[str, torch.Tensor]
# Of a run's options, checksums of the data, and what another one means.
_DATA = {
    "cells": "other cells, or of the same in another order",
    "codes": "cells with other batches, labels, covariates or size factors, or in another order",
}


@dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: the one under way, from 0.
        minibatch: of it, the next.
        step: training steps so far; the noise counters follow from it.
        seconds: that training took in this epoch so far.
        sums: of the loss terms in this epoch so far.
        records: of the epochs before.
        checks: looks at the cells kept for validation.
        earlier: seconds of all that was done before the run was resumed.
        kept_step: step of the look whose weights are kept, where those of the best are.
    """

    epoch: int = 0
    minibatch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: TermSums = field(default_factory=TermSums)
    records: list[EpochRecord] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    earlier: float = 0.0
    kept_step: int | None = None

    @property
    def has_looked(self) -> bool:
        """Whether there was a look since the last step."""
        return bool(self.checks) and self.checks[-1].step == self.step

    def monitored(self, name: str, *, in_steps: bool = True) -> tuple[list[float], list[int]]:
        """A column of the history, of looks if of validation, and after how many steps each; or of epochs."""
        if in_steps and name in LOOKED_AT:
            return [getattr(check, name) for check in self.checks], [check.step for check in self.checks]
        there = [record for record in self.records if getattr(record, name) is not None]
        after = [record.step if in_steps else record.epoch + 1 for record in there]
        return [getattr(record, name) for record in there], after

    def close_epoch(self, plan: TrainingPlan, lr: float) -> EpochRecord:
        """Make the record of the epoch under way, and begin the next."""
        look = self.checks[-1] if self.checks and self.checks[-1].step > self.step - self.minibatch else None
        record = EpochRecord(
            self.epoch, *self.sums.means(),
            None if look is None else look.elbo_validation,
            None if look is None else look.reconstruction_loss_validation,
            None if look is None else look.kl_local_validation,
            plan.kl_weight(self.epoch, max(self.step - 1, 0)), lr, self.seconds,
            self.sums.n / max(self.seconds, 1e-9), self.step, None if look is None else look.validation_loss,
        )  # fmt: skip
        self.records.append(record)
        self.epoch, self.minibatch, self.seconds, self.sums = self.epoch + 1, 0, 0.0, TermSums()
        return record

    def to_json(self) -> dict[str, Any]:
        """All of it, in what JSON has."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        return whole | {
            "sums": self.sums.values.tolist(),
            "records": [asdict(record) for record in self.records],
            "checks": [asdict(check) for check in self.checks],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """What `to_json` made."""
        return cls(
            **values
            | {
                "sums": TermSums(values["sums"]),
                "records": [EpochRecord(**record) for record in values["records"]],
                "checks": [Check(**check) for check in values["checks"]],
            }
        )


def claim(path: Path, *, resume: bool) -> None:
    """Make sure that a folder may be replaced by checkpoints, and holds none of an earlier run.

    Args:
        path: the folder; it need not exist.
        resume: keep the checkpoint that is there.

    Raises:
        ModelError: it is a file, or holds something else.
    """
    settle(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ModelError(f"{str(path)!r} is a file; name a folder for the checkpoint")
    must_be_elsewhere(path)
    ours = (STATE, *(part + TENSORS for part in PARTS))
    strangers = sorted(p.name for p in path.iterdir() if p.name not in ours)
    if strangers:
        raise ModelError(
            f"{str(path)!r} holds {strangers[0]!r}, which is not a checkpoint's; a checkpoint replaces its "
            "folder: name another one"
        )
    if not resume:
        # Else a run that is killed before its first checkpoint could be resumed from another's.
        shutil.rmtree(in_truth(path))


def write_checkpoint(
    path: Path, tensors: dict[str, Tensors], rest: dict[str, Any], run: dict[str, Any]
) -> None:
    """Write where a run stands, in place of what was there.

    Args:
        path: the folder.
        tensors: of each of `PARTS` that there is, by name.
        rest: what JSON has.
        run: the options that a resumed run must share.
    """
    with replacing_folder(path) as new:
        for part, values in tensors.items():
            save_tensors(values, new / (part + TENSORS))
        state = {"format": FORMAT, "run": run, **rest}
        (new / STATE).write_text(json.dumps(state, default=plain_number))


def read_checkpoint(
    path: Path, run: dict[str, Any], needed: tuple[str, ...]
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """What `write_checkpoint` wrote: tensors of each part, and the rest.

    Args:
        path: the folder.
        run: the options of this run.
        needed: the parts that must be there; others are empty where they are not.

    Raises:
        ModelError: there is no checkpoint, it is damaged, or its run had other options.
        VersionError: it was written by another version of the format.
    """
    settle(path)
    if not (path / STATE).is_file():
        raise ModelError(f"no checkpoint in {str(path)!r}; train without resume to start afresh")
    with naming_damage(path):
        rest = json.loads((path / STATE).read_text())
        if rest["format"] < FORMAT:
            raise VersionError(
                f"the checkpoint in {str(path)!r} has format {rest['format']}, this atlasvi writes and reads "
                f"{FORMAT}: finish the run with the version that began it, or train without resume"
            )
        if rest["format"] > FORMAT:
            raise VersionError(
                f"the checkpoint in {str(path)!r} has format {rest['format']}, this atlasvi reads up to "
                f"{FORMAT}: pip install --upgrade atlasvi"
            )
        _refuse_other_run(path, rest["run"], json.loads(json.dumps(run, default=plain_number)))
        files = {part: path / (part + TENSORS) for part in PARTS}
        there = {part: file for part, file in files.items() if part in needed or file.is_file()}
        return {part: load_file(there[part]) if part in there else {} for part in PARTS}, rest


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """What a checkpoint lacks, or cannot be read, becomes a `ModelError` that says so."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the checkpoint in {str(path)!r} is damaged ({error}); train without resume to start afresh"
        ) from error


def save_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None,
    progress: Progress,
    average: Tensors,
    best: Tensors,
    run: dict[str, Any],
) -> None:
    """Write all that a run needs to go on to the same weights, in place of what was there.

    Args:
        path: the folder.
        module: its weights and batch-norm statistics are written.
        optimizer: its moments and rates are written.
        scheduler: its state is written if there is one.
        progress: how far it has come.
        average: averaged weights, if there are any.
        best: the best weights so far, if they are looked for.
        run: the options that a resumed run must share.
    """
    state = optimizer.state_dict()
    moments = {
        f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()
    }
    tensors = {"weights": module.state_dict(), "optimizer": moments}
    tensors |= {part: values for part, values in (("average", average), ("best", best)) if values}
    rest = {
        "progress": progress.to_json(),
        "param_groups": state["param_groups"],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }
    write_checkpoint(path, tensors, rest, run)


def batch_size_of(path: Path) -> int | None:
    """The minibatch of the run that wrote a checkpoint; ``None`` where none can be read."""
    settle(path)
    try:
        return int(json.loads((path / STATE).read_text())["run"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever loads it says what is wrong


def load_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None,
    run: dict[str, Any],
) -> tuple[Progress, Tensors, Tensors]:
    """Restore what `save_checkpoint` wrote; returns progress, averaged and best weights.

    Raises:
        ModelError: there is no checkpoint, it is damaged, or its run had other options.
        VersionError: it was written by another version of the format.
    """
    tensors, rest = read_checkpoint(path, run, ("weights", "optimizer"))
    with naming_damage(path):
        progress = Progress.from_json(rest["progress"])
        moments: dict[int, Tensors] = {}
        for name, value in tensors["optimizer"].items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
    module.load_state_dict(tensors["weights"])
    optimizer.load_state_dict({"state": moments, "param_groups": rest["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(rest["scheduler"])
    return progress, tensors["average"], tensors["best"]


def _refuse_other_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    then, now = _flat(then), _flat(now)
    for key in sorted(then.keys() | now.keys(), key=lambda key: (key != "model", key in _DATA, key)):
        was, given = then.get(key), now.get(key)
        if was != given and key in _DATA:
            raise ModelError(
                f"the checkpoint in {str(path)!r} is of {_DATA[key]}; resume with the data that the run "
                "began with, or train without resume"
            )
        if was != given:
            raise ModelError(
                f"the checkpoint in {str(path)!r} was made with {key}={_short(was)}, now {_short(given)}; "
                "resume with the same options, or train without resume"
            )


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options of options by their own names, since that is what a person passed."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat.update({key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()})
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
