"""A run of training on disk: weights and optimiser as safetensors, the rest as JSON, nothing pickled."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlasvi.errors import ModelError, VersionError
from atlasvi.files import replacing_folder, settle
from atlasvi.train.history import EpochRecord

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


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
    strangers = sorted(p.name for p in path.iterdir() if p.name not in (WEIGHTS, OPTIMIZER, STATE))
    if strangers:
        raise ModelError(
            f"{str(path)!r} holds {strangers[0]!r}, which is not a checkpoint's; a checkpoint replaces its "
            "folder: name another one"
        )
    if not resume:
        # Else a run that is killed before its first checkpoint could be resumed from another's.
        shutil.rmtree(path)


def save_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None,
    records: list[EpochRecord],
    step: int,
    run: dict[str, Any],
) -> None:
    """Write all that a run needs to go on to the same weights, in place of what was there.

    Args:
        path: the folder.
        module: its weights and batch-norm statistics are written.
        optimizer: its moments and rates are written.
        scheduler: its state is written if there is one.
        records: the epochs so far.
        step: training steps so far; the noise counters follow from it.
        run: the options that a resumed run must share.
    """
    state = optimizer.state_dict()
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    rest = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "param_groups": state["param_groups"],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "records": [asdict(record) for record in records],
    }
    with replacing_folder(path) as new:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, new / WEIGHTS)
        save_file(moments, new / OPTIMIZER)
        (new / STATE).write_text(json.dumps(rest))


def load_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None,
    run: dict[str, Any],
) -> tuple[list[EpochRecord], int]:
    """Restore what `save_checkpoint` wrote; returns the epochs so far and the number of steps.

    Raises:
        ModelError: there is no checkpoint, it is damaged, or its run had other options.
        VersionError: it was written by a newer atlasvi.
    """
    settle(path)
    if not (path / STATE).is_file():
        raise ModelError(f"no checkpoint in {str(path)!r}; train without resume to start afresh")
    try:
        rest = json.loads((path / STATE).read_text())
        if rest["format"] > FORMAT:
            raise VersionError(
                f"the checkpoint in {str(path)!r} has format {rest['format']}, this atlasvi reads up to "
                f"{FORMAT}: pip install --upgrade atlasvi"
            )
        _refuse_other_run(path, rest["run"], json.loads(json.dumps(run)))
        weights, flat = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"the checkpoint in {str(path)!r} is damaged ({error}); train without resume to start afresh"
        ) from error
    module.load_state_dict(weights)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": rest["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(rest["scheduler"])
    return [EpochRecord(**record) for record in rest["records"]], int(rest["step"])


def _refuse_other_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    then, now = _flat(then), _flat(now)
    for key in sorted(then.keys() | now.keys()):
        was, given = then.get(key), now.get(key)
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
