"""rho from stored latents, beside scvi-tools: `python -m benchmarks.scale.decoding [--peer DIR/bin/python]`.

- all genes of every cell, 10,000 genes: cells a second, ours in float32 and in bfloat16 and the peer's, in
  turn; ours from stored latents, the peer's from counts in memory and from latents that it stored. Chunks are
  summed up and let go; the peer returns one array.
- the mean of each gene in each of 20 labels over 500,000 cells x 8,000 genes, and a checksum of every number;
- 50 genes of a million cells, with normalisers kept.

That rho is the same with copied weights is `tests/oracle`; that it is the same from counts, `tests/infer`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

import atlasvi
from atlasvi.infer.compact import fill_normalisers
from atlasvi.infer.decode import chunk_of
from atlasvi.infer.encoded import Encoded
from atlasvi.memory import Watch
from atlasvi.store.fields import Codes

N_LABELS = 20


def counts_of(n_obs: int, n_vars: int) -> sp.csr_matrix:
    """One cell in ten is new: decoding does not ask."""
    rng = np.random.default_rng(0)
    some = sp.random(n_obs // 10, n_vars, 0.1, "csr", np.float32, rng, lambda n: 1.0 + rng.poisson(1, n))
    return sp.csr_matrix(sp.vstack([some] * 10), dtype=np.float32)


def trained(counts: sp.csr_matrix) -> Any:
    adata = anndata.AnnData(counts)
    atlasvi.SCVI.setup_anndata(adata, gene_mask=None)
    model = atlasvi.SCVI(adata)
    model.train(1, batch_size=512, train_size=0.5, validation_size=0.1, enable_progress_bar=False)
    return model


def enlarged(cells: Encoded, n: int) -> Encoded:
    """So many cells, the same over and over under numbers of their own."""
    at = np.arange(n) % len(cells)
    codes = cells.codes
    return Encoded(
        cells.loc[at], cells.scale[at], cells.library[at], None,
        Codes(codes.batch_index[at], codes.labels[at], codes.cat_covs[at], codes.cont_covs[at], None,
              codes.gene_columns),
        np.arange(n), lambda start, stop: np.arange(start, stop).astype("T"), cells.weights,
    )  # fmt: skip


def all_genes(model: Any, cells: Encoded, precision: str) -> float:
    begun = time.perf_counter()
    rho = model.expression(cells, precision=precision)
    total = sum(float(chunk_of(rho, i).sum()) for i in range(rho.npartitions))
    seconds = time.perf_counter() - begun
    assert abs(total / len(cells) - 1) < 1e-3
    return len(cells) / seconds


def by_label(model: Any, cells: Encoded, precision: str) -> tuple[float, NDArray[np.float64], int]:
    labels = np.arange(len(cells)) % N_LABELS
    total, checksum = np.zeros((N_LABELS, model.fields.n_vars)), np.uint64(0)
    begun, start = time.perf_counter(), 0
    lazy = model.expression(cells, precision=precision)
    for i in range(lazy.npartitions):
        rho = chunk_of(lazy, i)
        mine = np.eye(N_LABELS, dtype=np.float32)[labels[start : start + len(rho)]]
        total += mine.T @ rho
        checksum += rho.view(np.uint32).sum(dtype=np.uint64)
        start += len(rho)
    return time.perf_counter() - begun, total, int(checksum)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("atlasvi").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="Python of an environment with scvi-tools")
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--headline-cells", type=int, default=500_000)
    given = parser.parse_args()

    counts = counts_of(given.cells, 10_000)
    model = trained(counts)
    cells = enlarged(model.encode(), 4 * given.cells)
    rates: dict[str, list[float]] = {"atlasvi float32": [], "atlasvi bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if given.peer is not None:
            x = Path(folder) / "counts.npz"
            np.savez(x, data=counts.data, indices=counts.indices, indptr=counts.indptr, shape=counts.shape)
            script = Path(__file__).parents[1] / "peers" / "scvi_tools_decoding.py"
            peer = subprocess.Popen(
                [given.peer, script, x], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            rates |= {"scvi-tools from counts": [], "scvi-tools from stored latents": []}
        for repeat in range(given.repeats + 1):
            found = {f"atlasvi {p}": all_genes(model, cells, p) for p in ("float32", "bfloat16")}
            if peer is not None:
                assert peer.stdin is not None and peer.stdout is not None
                peer.stdin.write("go\n")
                peer.stdin.flush()
                of_counts, of_latents = map(float, peer.stdout.readline().split())
                found["scvi-tools from counts"] = given.cells / of_counts
                found["scvi-tools from stored latents"] = given.cells / of_latents
            if repeat:  # the first is to warm up
                for name, rate in found.items():
                    rates[name].append(rate)
        if peer is not None:
            peer.communicate()
    for name, each in rates.items():
        print(f"all of 10,000 genes, {name}: {statistics.median(each):,.0f} cells/s", flush=True)

    model = trained(counts_of(4000, 8000))
    small = model.encode()
    for precision in ("float32", "bfloat16"):
        with Watch() as watch:
            seconds, _, checksum = by_label(model, enlarged(small, given.headline_cells), precision)
        peak = (watch.peak_bytes - watch.before_bytes) / 2**20
        print(f"means of {given.headline_cells:,} cells x 8,000 genes in {N_LABELS} labels, {precision}: "
              f"{seconds:.1f} s, {peak:.0f} MiB more, checksum {checksum:x}", flush=True)  # fmt: skip

    million = enlarged(small, 1_000_000)
    begun = time.perf_counter()
    fill_normalisers(model.module, million, 8000, (None,), 1)
    print(f"normalisers of a million cells x 8,000 genes: {time.perf_counter() - begun:.1f} s", flush=True)
    genes = list(model.fields.var_names[:50])
    times = []
    for _ in range(given.repeats):
        begun = time.perf_counter()
        rho = model.expression(million, genes=genes).compute()
        times.append(time.perf_counter() - begun)
    assert rho.shape == (1_000_000, 50)
    print(f"50 genes of a million cells: {statistics.median(times):.2f} s", flush=True)


if __name__ == "__main__":
    main()
