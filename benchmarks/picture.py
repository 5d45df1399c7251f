"""The picture of the README, from a real run of the demo: ``python -m benchmarks.picture docs/demo.svg``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from atlasvi import demo
from atlasvi.report import readme_picture

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.picture OUT.svg")
    with tempfile.TemporaryDirectory() as folder:
        report = demo.make(Path(folder), n_obs=50_000, n_vars=2_000, max_epochs=15, seed=0)
    readme_picture(report, sys.argv[1])
