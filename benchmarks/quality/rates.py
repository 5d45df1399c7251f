"""What the learning rate does besides to the bound: ``python -m benchmarks.quality.rates``.

The default schedule at some rates, on splits of the experiments in `benchmarks.paper`: negative ELBO of the
test cells, mixing of batches as a share of its ceiling, adjusted Rand index of k-means against the labels,
and steps taken. Means over the seeds, each of which is another split and another initialisation.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from atlasvi.metrics import clustering_scores, entropy_of_batch_mixing
from benchmarks.common import table
from benchmarks.paper.data import SETS
from benchmarks.paper.fits import Job
from benchmarks.paper.sides.atlasvi import trained

DATA = ("kang_pbmc_ifnb", "scmixology_celllines", "pbmc_3chemistries", "worm_neuron")
RATES = (0.03, 0.01, 0.005)
N_GENES, DRAWS = 720, 3
HEADS = ("data", "rate", "-ELBO of test cells", "mixing", "ARI", "steps", "seeds")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.rates", description=__doc__)
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.data:
        for rate in options.rates:
            found = np.array([scores(name, rate, seed) for seed in range(options.seeds)])
            elbo, mixing, ari, steps = found.mean(0)
            shown = [f"{elbo:,.1f}", f"{mixing:.3f}", f"{ari:.3f}", f"{steps:,.0f}"]
            rows.append([name, f"{rate:g}", *shown, str(len(found))])
            print("\t".join(rows[-1]), flush=True)
    print(table(HEADS, rows, markdown=True))


def scores(name: str, rate: float, seed: int) -> tuple[float, float, float, int]:
    """Of one fit; NaN where there are no batches or no labels."""
    with trained(Job("atlasvi", name, seed, N_GENES), plan_kwargs={"lr": rate}) as (model, atlas, test, _):
        elbo = -float(np.mean([model.get_elbo(atlas[test], seed=draw) for draw in range(DRAWS)]))
        latent, obs = model.get_latent_representation(atlas), SETS[name].load().obs
    mixing = ari = float("nan")
    if "batch" in obs:
        mixed = entropy_of_batch_mixing(latent, obs["batch"], seed=0)
        mixing = mixed.entropy / mixed.ceiling
    if "label" in obs:
        ari = clustering_scores(latent, np.asarray(obs["label"].astype(str)), seed=0).ari
    return elbo, mixing, ari, int(model.checks[-1].step)


if __name__ == "__main__":
    main()
