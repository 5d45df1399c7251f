"""iLISI and kBET of scib-metrics: ``python -m benchmarks.paper.sides.scib LATENTS.npz OUT.json``.

The file has ``batch`` (n_obs,) as numbers, and any number of latents besides. Neighbours are exact.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from scib_metrics import ilisi_knn, kbet
from scib_metrics.nearest_neighbors import NeighborsResults
from sklearn.neighbors import NearestNeighbors

# As scib's benchmark does, and fewer where there are few cells.
NEIGHBORS = 90


def main() -> None:
    """Both scores of each latent: 1 is full mixing."""
    with np.load(sys.argv[1]) as arrays:
        given = dict(arrays)
    batch, found = given.pop("batch"), {}
    n = min(NEIGHBORS, len(batch) // 3)
    for name, latent in given.items():
        distances, indices = NearestNeighbors(n_neighbors=n).fit(latent).kneighbors(latent)
        neighbors = NeighborsResults(indices=indices, distances=distances)
        found[name] = {
            "ilisi": float(ilisi_knn(neighbors, batch)),
            "kbet": float(kbet(neighbors, batch)[0]),
        }
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
