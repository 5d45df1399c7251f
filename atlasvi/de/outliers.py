"""Cells far from their group in the latent space."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from atlasvi.errors import CellsError
from atlasvi.infer.latent import latent_blocks
from atlasvi.stream import Epochs

if TYPE_CHECKING:
    from atlasvi.de.groups import Groups
    from atlasvi.infer.encoded import Encoded as StoredLatents
    from atlasvi.store.atlas import Atlas
    from atlasvi.store.fields import Codes


def without_outliers(
    atlas: Atlas,
    codes: Codes,
    module: torch.nn.Module,
    groups: Groups,
    seed: int,
    latents: StoredLatents | None = None,
) -> Groups:
    """The groups without the tenth of their cells that is farthest from the rest (Rousseeuw 1984).

    A robust ellipse is fitted to the means of q(z|x) of each group, with scikit-learn's defaults, as in
    scvi-tools; but of the rest of the cells, group by group.

    Raises:
        CellsError: a group has too few cells for it.
    """
    from sklearn.covariance import EllipticEnvelope

    device = next(module.parameters()).device
    kept = groups.codes.copy()
    for g, name in enumerate(groups.names):
        cells = np.flatnonzero(groups.codes == g)
        if latents is not None:
            latent = latents.loc[cells].astype(np.float32)
        else:
            minibatches = Epochs(atlas, codes, shuffle=False, batch_size=1024, positions=cells)()
            latent = np.concatenate([loc for loc, _ in latent_blocks(module, minibatches, device)])
        if len(cells) <= 2 * latent.shape[1]:
            raise CellsError(
                f"group {name!r} has {len(cells)} cells, too few to find outliers among in {latent.shape[1]} "
                "dimensions; leave out filter_outlier_cells"
            )
        inlier = EllipticEnvelope(random_state=seed % (1 << 32)).fit_predict(latent) == 1
        kept[cells[~inlier]] = -1
    return replace(groups, codes=kept)
