"""How a side reads its job and leaves its arrays."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.fits import Job

# Draws of z a cell over which an ELBO is averaged, and of importance sampling: the same for all.
ELBO_DRAWS = 10
MARGINAL_DRAWS = 100


def main(fit: Callable[[Job], Mapping[str, Any]], *packages: str) -> None:
    """Run ``fit`` on the job of the command line."""
    write(fit, Job(**json.loads(sys.argv[1])), Path(sys.argv[2]), *packages)


def write(fit: Callable[[Job], Mapping[str, Any]], job: Job, out: Path, *packages: str) -> None:
    """The arrays of ``fit``, and its ``model``, if it has one, in a folder beside them.

    The model is there so that what was not asked for needs no new fit. The file is whole or is not there.
    """
    found = dict(fit(job))
    model = found.pop("model", None)
    if model is not None:
        model.save(str(out.with_suffix(".model")), overwrite=True)
    versions = json.dumps({name: metadata.version(name) for name in packages})
    part = out.with_name(out.name + ".part.npz")
    np.savez(part, versions=versions, **found)
    os.replace(part, out)
