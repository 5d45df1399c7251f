"""A run of training on disk: weights and optimiser as safetensors, the rest as JSON, nothing pickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from atlasvi.errors import ModelError
from atlasvi.files import replacing_folder
from atlasvi.train.history import EpochRecord

FORMAT = 1


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
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, new / "weights.safetensors")
        save_file(moments, new / "optimizer.safetensors")
        (new / "state.json").write_text(json.dumps(rest))


def load_checkpoint(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None,
    run: dict[str, Any],
) -> tuple[list[EpochRecord], int]:
    """Restore what `save_checkpoint` wrote; returns the epochs so far and the number of steps.

    Raises:
        ModelError: there is no checkpoint, or its run had other options.
    """
    if not (path / "state.json").is_file():
        raise ModelError(f"no checkpoint in {str(path)!r}; train without resume to start afresh")
    rest = json.loads((path / "state.json").read_text())
    differing = [k for k in run if json.loads(json.dumps(run[k])) != rest["run"].get(k)]
    if differing:
        key = differing[0]
        raise ModelError(
            f"the checkpoint in {str(path)!r} was made with {key}={rest['run'].get(key)!r}, "
            f"now {run[key]!r}; resume with the same options, or train without resume"
        )
    module.load_state_dict(load_file(path / "weights.safetensors"))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": rest["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(rest["scheduler"])
    return [EpochRecord(**record) for record in rest["records"]], int(rest["step"])
