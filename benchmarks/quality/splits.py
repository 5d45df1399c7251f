"""What every library is given: which cells, which labels, which split, which seeds, which recipe.

Pure numpy, so that the environment of atlasvi and that of a peer import the same file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# One split for all seeds: with a split a seed, which cells fell into the test set would be most of the
# spread of the held-out terms, and a difference between libraries would drown in it.
SPLIT_SEED = 0
# Draws of z over which the held-out terms are averaged: one draw is noisy by a nat or so a cell.
ELBO_DRAWS = 10


@dataclass(frozen=True)
class DataSet:
    """Real counts with published labels; all genes are used.

    Args:
        name: the file without ``.h5ad``.
        label_key: column of obs against which the latent is scored.
        max_epochs: of training; chosen so that each set makes about 550 steps of 128 cells, a minute and a
            half of scvi-tools on one thread.
        batch_key: column of obs given to the model as the batch, or ``None``.
        keep: ``(column, value)`` of the cells that are used, or ``None`` for all.
        n_seeds: runs, with seeds 0, 1, 2, ...
    """

    name: str
    label_key: str
    max_epochs: int
    batch_key: str | None = None
    keep: tuple[str, str] | None = None
    n_seeds: int = 5

    def path(self) -> Path:
        """Where the file is: in ``ATLASVI_TEST_DATA``, by default ``shared/data`` beside the repository."""
        default = Path(__file__).resolve().parents[3] / "shared" / "data"
        return Path(os.environ.get("ATLASVI_TEST_DATA", default)) / f"{self.name}.h5ad"

    def kept(self, obs: Mapping[str, Any]) -> np.ndarray:
        """Row numbers, in the file, of the cells that are used; the split counts in these."""
        column = np.asarray(obs[self.label_key])
        if self.keep is None:
            return np.arange(len(column))
        key, value = self.keep
        return np.flatnonzero(np.asarray(obs[key]).astype(str) == value)


DATASETS = (
    # Ten seeds: after five, a difference of one standard deviation between libraries was undecided.
    DataSet("pbmc_sorted_reference", "cell_type", 40, n_seeds=10),
    DataSet("worm_neuron", "cell_type", 20),
    DataSet("scmixology_celllines", "cell_type", 80, "batch", ("demuxlet_cls", "SNG")),
)


@dataclass(frozen=True)
class Recipe:
    """Model and training, the same for every library: scvi-tools' defaults but for the number of epochs.

    Left alone, scvi-tools trains these small sets for 400 epochs and warms the KL up over all of them; here
    `DataSet.max_epochs` is less, and the warm-up ends half-way, so that training ends on the full ELBO.
    """

    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    gene_likelihood: str = "zinb"
    dispersion: str = "gene"
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 0.01

    def n_epochs_kl_warmup(self, data_set: DataSet) -> int:
        """Epochs over which the weight of the KL grows from 0 to 1."""
        return data_set.max_epochs // 2

    def as_dict(self) -> dict[str, Any]:
        """For the head of a results file."""
        epochs = {data_set.name: data_set.max_epochs for data_set in DATASETS}
        warmup = {data_set.name: self.n_epochs_kl_warmup(data_set) for data_set in DATASETS}
        return {**asdict(self), "max_epochs": epochs, "n_epochs_kl_warmup": warmup}


RECIPE = Recipe()


def split(n_obs: int, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted numbers of the train (80 %), validation (10 %) and test (10 %) cells; all cells, each once."""
    order = np.random.default_rng(seed).permutation(n_obs)
    n_held = n_obs // 10
    test, validation, train = np.split(order, [n_held, 2 * n_held])
    return np.sort(train), np.sort(validation), np.sort(test)
