"""Simulated counts as people have them: several ``.h5ad`` files, gzip, float32 counts, int32 genes.

They are made once in a folder, beside a note of what is in them, by which every reader is checked.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

N_VARS = 10_000
# Median expected counts of a cell: 1,400 of 10,000 genes are then not zero in the mean.
COUNTS = 1_800.0
_FILE_CELLS = 25_000
_BLOCK_CELLS = 2_048


@dataclass(frozen=True, slots=True)
class Content:
    """What all cells together hold, whatever their order. Sums of integers, so they are equal or wrong.

    Args:
        n_obs: cells.
        nnz: counts that are not zero.
        total: sum of the counts.
        squares: sum over cells of the square of their total, which tells cells from one another.
        genes: sum of count times number of gene.
        largest: the largest count.
    """

    n_obs: int = 0
    nnz: int = 0
    total: int = 0
    squares: int = 0
    genes: int = 0
    largest: int = 0

    def __add__(self, other: Content) -> Content:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Content(**{**sums, "largest": max(self.largest, other.largest)})

    @classmethod
    def of(cls, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> Content:
        """Of some cells, compressed by rows."""
        counts = data.astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(counts)])[np.asarray(indptr)]
        return cls(
            len(indptr) - 1, len(counts), int(counts.sum()), int((np.diff(ends) ** 2).sum()),
            int((indices.astype(np.int64) * counts).sum()), int(counts.max(initial=0)),
        )  # fmt: skip


def inputs(folder: Path, n_obs: int) -> tuple[list[Path], Content]:
    """The files in ``folder``, made if they are not there, and what is in them."""
    folder = folder / f"inputs-{n_obs}"
    note = folder / "content.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(asdict(_write(folder, n_obs))))
    return sorted(folder.glob("*.h5ad")), Content(**json.loads(note.read_text()))


def _write(folder: Path, n_obs: int) -> Content:
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    import atlasvi

    simulation = atlasvi.Simulation(n_obs, N_VARS, counts_per_cell=COUNTS, seed=1)
    var = pd.DataFrame(index=pd.Index(simulation.var_names.astype(object)))
    content = Content()
    for k, start in enumerate(range(0, n_obs, _FILE_CELLS)):
        stop = min(start + _FILE_CELLS, n_obs)
        edges = [*range(start, stop, _BLOCK_CELLS), stop]
        with ThreadPoolExecutor() as pool:
            blocks = list(pool.map(simulation.read_rows, edges[:-1], edges[1:]))
        content = sum((Content.of(*block.numpy()) for block in blocks), content)
        obs = pd.DataFrame({key: simulation.obs_column(key)[start:stop] for key in ("cell_type", "batch")})
        obs.index = pd.Index(simulation.read_names(start, stop).astype(object))
        counts = sp.vstack([block.to_scipy().astype(np.float32) for block in blocks], format="csr")
        adata = anndata.AnnData(counts, obs=obs, var=var)
        adata.write_h5ad(folder / f"part-{k:03}.h5ad", compression="gzip")
    return content
