"""A model on disk: a folder with safetensors for the weights and JSON for the rest, nothing pickled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import atlasvi
from atlasvi.errors import ModelError, VersionError
from atlasvi.files import must_be_elsewhere, plain_number, replacing_folder, save_tensors, settle

FORMAT = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
CHECKPOINT, LOG, NEW_LOG = "checkpoint", "history.csv", "history.new.csv"


def write_folder(
    path: Path, description: dict[str, Any], module: torch.nn.Module, *, overwrite: bool
) -> None:
    """Put a model in place of what was there; a checkpoint and a log that training wrote there stay.

    Args:
        path: the folder.
        description: as JSON; the format and the versions are added.
        module: whose weights are written.
        overwrite: replace a model that is there.

    Raises:
        ModelError: there is a model already, or something that is not a model's; or weights are not finite.
        SpaceError: the disk is full; the folder stays what it was.
    """
    check_destination(path)
    if (path / DESCRIPTION).exists() and not overwrite:
        raise ModelError(f"there is a model in {str(path)!r}; pass overwrite=True to replace it")
    if bad := not_finite(module):
        raise ModelError(f"the weights {bad!r} hold NaN or infinite numbers: make it anew and train it")
    whole = {"format": FORMAT, **description, "versions": versions()}
    with replacing_folder(path) as new:
        save_tensors(module.state_dict(), new / WEIGHTS)
        (new / DESCRIPTION).write_text(json.dumps(whole, indent=1, default=plain_number))
        if (path / CHECKPOINT).is_dir():
            shutil.copytree(path / CHECKPOINT, new / CHECKPOINT)
        # The log of the run that made these weights, else the one that is there.
        for log in (path / NEW_LOG, path / LOG):
            if log.is_file():
                shutil.copy2(log, new / LOG)
                break


def not_finite(module: torch.nn.Module) -> str | None:
    """The first weight that holds NaN or an infinite number; ``None`` where all are finite."""
    weights = module.state_dict().items()
    return next((name for name, value in weights if not torch.isfinite(value).all()), None)


def versions() -> dict[str, str]:
    """What wrote the folder."""
    return {"atlasvi": atlasvi.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def read_weights(path: Path, module: torch.nn.Module) -> None:
    """Fill a module with the weights of a model folder.

    Raises:
        ModelError: they are truncated, or of another module.
    """
    try:
        module.load_state_dict(load_file(path / WEIGHTS))
    except Exception as error:
        raise ModelError(
            f"the weights in {str(path / WEIGHTS)!r} cannot be read ({str(error).splitlines()[0]}); "
            "copy the folder again"
        ) from error


def check_destination(path: Path) -> None:
    """Make sure that a model may be written to a folder: it holds nothing but what is a model's.

    Raises:
        ModelError: it is a file, or holds something else.
    """
    settle(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ModelError(f"{str(path)!r} is a file; name a folder for the model")
    must_be_elsewhere(path)
    known = {WEIGHTS, DESCRIPTION, CHECKPOINT, LOG, NEW_LOG}
    # What a run that was killed left half-written has a name of ours.
    known |= {f".{name}.{state}" for name in (CHECKPOINT, LOG, NEW_LOG) for state in ("new", "old")}
    strangers = sorted(p.name for p in path.iterdir() if p.name not in known)
    if strangers:
        raise ModelError(f"{str(path)!r} holds {strangers[0]!r}, which is not a model's; name another folder")


def read_description(path: Path) -> dict[str, Any]:
    """The JSON of a model folder.

    Raises:
        ModelError: it is not a model, or training never finished.
        VersionError: it was written by a newer atlasvi.
    """
    settle(path)
    if not (path / DESCRIPTION).is_file():
        if (path / CHECKPOINT).is_dir():
            raise ModelError(
                f"training into {str(path)!r} has not finished; go on with: atlasvi train --resume"
            )
        raise ModelError(f"{str(path)!r} is not a model folder: it has no {DESCRIPTION}")
    try:
        description: dict[str, Any] = json.loads((path / DESCRIPTION).read_text())
        written = int(description["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{str(path / DESCRIPTION)!r} is damaged ({error}); copy the folder again"
        ) from error
    if written > FORMAT:
        version = description.get("versions", {}).get("atlasvi", "a newer version")
        raise VersionError(
            f"{str(path)!r} has format {written}, this atlasvi reads up to {FORMAT}; "
            f"it was written by atlasvi {version}: pip install --upgrade atlasvi"
        )
    return description
