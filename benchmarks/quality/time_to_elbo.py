"""Seconds until a held-out ELBO, atlasvi beside scvi-tools: ``python -m benchmarks.quality.time_to_elbo``.

    benchmarks/peers/scvi_tools_env.sh .peers/scvi-tools
    python -m benchmarks.quality.time_to_elbo --peer-python .peers/scvi-tools/bin/python --out curves

scvi-tools is given its default learning rate, minibatch and architecture, and a KL warm-up that ends (20
epochs, since with its default of 400 the weight is never full), or ours with ``--peer-lr 0.01 --warmup 4``.
Its negative ELBO at full KL weight on the cells kept apart is taken after each epoch, and the time of
its training alone, without those looks. atlasvi has its defaults, on the same cells kept apart; its time
runs from the call of ``train`` and includes looks. The table shows when each first reaches the best that
scvi-tools' curve reaches, and where each ends: ELBO and adjusted Rand index of k-means on the latent
against the published labels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paper.data import SETS, DataSet

DATA = ("pbmc_sorted_reference", "worm_neuron", "scmixology_celllines")

HEADS = (
    "data", "scvi-tools' best", "its seconds, epoch", "ours, until then", "ratio", "our best", "our seconds",
    "ARI, scvi-tools", "ARI, ours",
)  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.time_to_elbo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer-python", required=True, help="Python of an environment with scvi-tools")
    parser.add_argument("--out", type=Path, required=True, help="folder for the curves")
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--seeds", type=int, default=3, help="of ours")
    parser.add_argument("--peer-seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=70, help="of scvi-tools")
    parser.add_argument("--warmup", type=int, default=20, help="epochs of its KL warm-up")
    parser.add_argument("--peer-lr", type=float, default=1e-3, help="learning rate of scvi-tools")
    parser.add_argument("--side", choices=["atlasvi", "scvi-tools"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        (name,) = options.data
        data_set = SETS[name]
        found = _theirs(data_set, options) if options.side == "scvi-tools" else _ours(data_set, options.seed)
        _curve(options, options.side, name, options.seed).write_text(json.dumps(found))
        return
    from benchmarks.common import machine, table

    options.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    sides = {
        "atlasvi": (sys.executable, options.seeds),
        "scvi-tools": (options.peer_python, options.peer_seeds),
    }
    for name in options.data:
        SETS[name].prepare(options.out)
        for seed in range(max(options.seeds, options.peer_seeds)):
            for side, (python, n_seeds) in sides.items():
                if seed < n_seeds and not _curve(options, side, name, seed).exists():
                    subprocess.run(
                        [python, "-W", "ignore", "-m", "benchmarks.quality.time_to_elbo", *sys.argv[1:],
                         "--data", name, "--side", side, "--seed", str(seed)], check=True,
                    )  # fmt: skip
        print(*_row(options, name), sep=" | ", flush=True)
    print(table(HEADS, [_row(options, name) for name in options.data], markdown=True))


def _curve(options: argparse.Namespace, side: str, name: str, seed: int) -> Path:
    return Path(options.out) / f"{side}-{name}-{seed}.json"


def _row(options: argparse.Namespace, name: str) -> list[str]:
    def curves(side: str, n: int) -> list[dict[str, Any]]:
        return [json.loads(_curve(options, side, name, seed).read_text()) for seed in range(n)]

    ours, theirs = curves("atlasvi", options.seeds), curves("scvi-tools", options.peer_seeds)
    target = median(min(curve["elbo"]) for curve in theirs)
    when = median(curve["seconds"][int(np.argmin(curve["elbo"]))] for curve in theirs)
    epoch = median(int(np.argmin(curve["elbo"])) + 1 for curve in theirs)
    until = median(
        next((s for s, e in zip(c["seconds"], c["elbo"], strict=True) if e <= target), float("inf"))
        for c in ours
    )
    return [
        name, f"{target:,.1f}", f"{when:.0f}, {epoch:.0f}", f"{until:.1f}", f"{when / until:.0f}",
        f"{median(min(c['elbo']) for c in ours):,.1f}", f"{median(c['seconds'][-1] for c in ours):.0f}",
        f"{median(c['ari'] for c in theirs):.3f}", f"{median(c['ari'] for c in ours):.3f}",
    ]  # fmt: skip


def _cells(data_set: DataSet) -> tuple[Any, np.ndarray, np.ndarray]:
    adata = data_set.load()
    # The cells that atlasvi's `train` keeps apart by default.
    order = np.random.Generator(np.random.Philox(key=0)).permutation(adata.n_obs)
    n_train = int(np.ceil(0.9 * adata.n_obs))
    n_held_out = min(int(np.floor((1 - 0.9) * adata.n_obs + 1e-9)), adata.n_obs - n_train)
    return adata, np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_held_out])


def _ari(latent: np.ndarray, labels: Any) -> float:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    labels = np.asarray(labels).astype(str)
    found = KMeans(len(set(labels)), n_init=20, random_state=0).fit_predict(latent)
    return float(adjusted_rand_score(labels, found))


def _ours(data_set: DataSet, seed: int) -> dict[str, Any]:
    import atlasvi
    from atlasvi.models import base

    adata, _, held_out = _cells(data_set)
    # Looks are at all of them, as on the other side: means over some of them are other means.
    base.MOST_LOOKED_AT = len(held_out)
    # Kernels are compiled, or read from their cache, before time is taken.
    for n in (1, 2):
        atlasvi.SCVI.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None, gene_mask=None)
        model = atlasvi.SCVI(adata, seed=seed)
        model.train(None if n == 2 else 1, enable_progress_bar=False)
    assert np.array_equal(model.validation_indices, held_out)
    looks = model.validation_history
    assert np.isclose(looks["elbo_validation"].min(), -model.get_elbo(indices=held_out), rtol=2e-3)
    return {
        "elbo": looks["elbo_validation"].tolist(), "seconds": looks["seconds"].tolist(),
        "ari": _ari(model.get_latent_representation(), adata.obs["label"]),
    }  # fmt: skip


def _theirs(data_set: DataSet, options: argparse.Namespace) -> dict[str, Any]:
    import logging

    import lightning.pytorch as pl
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = options.seed
    adata, training, held_out = _cells(data_set)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
    model = scvi.model.SCVI(adata)

    class Clock(pl.Callback):
        """Time of the epochs alone."""

        seconds: list[float] = []  # noqa: RUF012

        def on_train_epoch_start(self, *_: Any) -> None:
            self.started, self.looking = time.perf_counter(), 0.0

        def on_validation_start(self, *_: Any) -> None:
            self.look = time.perf_counter()

        def on_validation_end(self, *_: Any) -> None:
            self.looking = time.perf_counter() - self.look

        def on_train_epoch_end(self, *_: Any) -> None:
            spent = time.perf_counter() - self.started - self.looking
            self.seconds.append(spent + (self.seconds[-1] if self.seconds else 0.0))

    clock = Clock()
    model.train(
        max_epochs=options.epochs, accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=1,
        callbacks=[clock], plan_kwargs={"n_epochs_kl_warmup": options.warmup, "lr": options.peer_lr},
        datasplitter_kwargs={"external_indexing": [training, held_out, np.array([], int)]},
    )  # fmt: skip
    return {
        "elbo": model.history["elbo_validation"]["elbo_validation"].tolist(), "seconds": clock.seconds,
        "ari": _ari(model.get_latent_representation(), adata.obs["label"]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
