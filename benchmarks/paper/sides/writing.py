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


def main(fit: Callable[[Job], Mapping[str, Any]], *packages: str) -> None:
    """Run ``fit`` on the job of the command line; the file is whole or is not there."""
    job, out = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    versions = json.dumps({name: metadata.version(name) for name in packages})
    part = out.with_name(out.name + ".part.npz")
    np.savez(part, versions=versions, **fit(job))
    os.replace(part, out)
