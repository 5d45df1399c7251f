"""How many genes are called where there is nothing to find: a group against itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from atlasvi.de.ask import Question, differential_expression
from atlasvi.de.groups import Groups
from atlasvi.errors import CellsError
from atlasvi.progress import Advance

if TYPE_CHECKING:
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes


def calibration(
    module: torch.nn.Module,
    atlas: Atlas,
    codes: Codes,
    var_names: Sequence[str],
    cells: NDArray[np.int64],
    question: Question,
    *,
    n_splits: int,
    n_cells: int,
    advance: Advance,
) -> pd.DataFrame:
    """The body of `CountModel.calibration`, which says what the arguments are; ``cells`` are the group's."""
    if len(cells) < 2 * n_cells:
        raise CellsError(
            f"{len(cells)} cells are too few to compare {n_cells} of them with {n_cells} others; choose a "
            f"larger group, or n_cells of at most {len(cells) // 2}"
        )
    rows = []
    for split in range(n_splits):
        rng = np.random.Generator(np.random.Philox(key=np.array([question.seed, split], np.uint64)))
        drawn = rng.choice(cells, 2 * n_cells, replace=False)
        groups = np.full(atlas.n_obs, -1, np.int8)
        groups[drawn[:n_cells]], groups[drawn[n_cells:]] = 0, 1
        found = differential_expression(
            module, atlas, codes, var_names, Groups(groups, ("one", "two"), ((0, 1),), by_label=False),
            replace(question, all_stats=False, seed=question.seed + split), lambda *_: None,
        )  # fmt: skip
        called = found[next(column for column in found if column.startswith("is_de_"))]
        evidence = found["bayes_factor"].abs() if question.mode == "vanilla" else found["proba_de"]
        rows.append((int(called.sum()), float(called.mean()), float(evidence.max()), evidence.idxmax()))
        advance(split + 1, "")
    columns = ["n_called", "share_called", "largest", "gene"]
    return pd.DataFrame(rows, columns=columns, index=pd.RangeIndex(n_splits, name="split"))
