"""Fits that several experiments look at: one a data set, seed and method, kept as a file and made once.

Each library fits in a process of its own, under the Python of its own environment, by a file of
`benchmarks.paper.sides` that is given a `Job` and writes arrays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.data import SETS, SIMULATED

# From a method to the side that fits it. A peer's column holds the peer's own code, never ours.
SIDES = {
    "atlasvi": "atlasvi",
    "atlasvi SCVAE": "atlasvi",
    "atlasvi GMVAE": "atlasvi",
    "atlasvi DCA": "atlasvi",
    "atlasvi FA": "atlasvi",
    "atlasvi PPCA": "atlasvi",
    "scvi-tools": "scvi_tools",
    "PCA": "classic",
    "FA": "classic",
    "scikit-learn FA": "classic",
    "scikit-learn PPCA": "classic",
    "Harmony": "classic",
    "ComBat": "classic",
}


@dataclass(frozen=True)
class Job:
    """What a side is asked for.

    Args:
        method: which of the side's methods.
        data: name of a set of `benchmarks.paper.data`.
        seed: of the split and of training.
        n_genes: the most variable ones, or ``None`` for all.
        n_latent: dimensions.
        max_epochs: most passes over the training cells; ``None`` for what the method does of itself.
        options: of the method's model, such as its constructor takes.
    """

    method: str
    data: str
    seed: int = 0
    n_genes: int | None = None
    n_latent: int = 10
    max_epochs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file."""
        more = [f"{k}={v}" for k, v in sorted(self.options.items())]
        genes = [] if self.n_genes is None else [f"{self.n_genes}genes"]
        latent = [] if self.n_latent == 10 else [f"{self.n_latent}latent"]
        epochs = [] if self.max_epochs is None else [f"{self.max_epochs}epochs"]
        parts = [self.data, self.method, *genes, *latent, *epochs, *more, str(self.seed)]
        return "-".join(parts).replace(" ", "_")


@dataclass(frozen=True)
class Pythons:
    """The interpreter of each side; a side that has none is not run, and said so.

    Args:
        scvi_tools: of an environment made by ``benchmarks/peers/scvi_tools_env.sh``.
        classic: of one made by ``benchmarks/peers/classic_env.sh``.
        here: fit atlasvi's models in this process, as the tests do on little data.
        none: fit nothing, only look at what is there.
    """

    scvi_tools: str | None = None
    classic: str | None = None
    here: bool = False
    none: bool = False

    def of(self, side: str) -> str | None:
        """The interpreter, or ``None``."""
        found: str | None = sys.executable if side == "atlasvi" else getattr(self, side)
        return None if self.none else found


def model_folder(job: Job) -> Path:
    """Where the trained model of a fit lies: in the folder of fits, which `made` names to its sides."""
    return Path(os.environ.get(SIMULATED, ".paper")) / f"{job.name}.model"


def fit(job: Job, work: Path, pythons: Pythons) -> dict[str, np.ndarray] | None:
    """The arrays of a fit: made, if they are not in ``work`` yet; ``None`` if its peer has no environment.

    Returns:
        ``latent`` (n_obs, n_latent) of all cells and, as scalars, what the method can say of the test cells
        in nats a cell: ``elbo``, ``elbo_refitted`` (the encoder fitted anew to the test cells),
        ``reconstruction`` (E log p(x|z)), ``marginal`` (importance sampling from the refitted
        encoder, or, where it cannot be, from the trained one), ``log_likelihood`` (exact);
        ``seconds`` and ``epochs`` of training; ``versions`` as JSON text. A trained model lies beside the
        file, in a folder that ends in ``.model``.
    """
    side = SIDES[job.method]
    if side == "atlasvi" and pythons.here and not (path := work / f"{job.name}.npz").is_file():
        from benchmarks.paper.sides import atlasvi, writing

        SETS[job.data].prepare(work)
        writing.write(atlasvi.fit, job, path, *atlasvi.PACKAGES)
    return made(job, side, pythons.of(side), work)


def made(job: Job, side: str, python: str | None, work: Path) -> dict[str, np.ndarray] | None:
    """The arrays that a side makes of a job; ``None`` if there are none yet and no interpreter."""
    path = work / f"{job.name}.npz"
    if not path.is_file():
        if python is None:
            return None
        SETS[job.data].prepare(work)
        subprocess.run(
            [python, "-W", "ignore", "-m", f"benchmarks.paper.sides.{side}", json.dumps(asdict(job)), path],
            check=True,
            env={**os.environ, SIMULATED: str(work.resolve())},
        )
    with np.load(path) as arrays:
        return dict(arrays)
