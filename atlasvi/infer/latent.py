"""q(z | x), a block of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.types import Encodes, Minibatch


@torch.no_grad()
def latent_blocks(
    module: torch.nn.Module, minibatches: Iterator[Minibatch], device: torch.device
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Means and standard deviations of z, ``(B, n_latent)`` float32 each, in the order of the cells."""
    assert isinstance(module, Encodes)
    module.eval()
    for minibatch in minibatches:
        qz = module.encode(minibatch.to(device))
        yield qz.loc.cpu().numpy(), qz.scale.cpu().numpy()
