"""p(label | x), a block of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.types import Classifies, Minibatch, Noise


@torch.no_grad()
def probability_blocks(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    *,
    seed: int | None = None,
) -> Iterator[NDArray[np.float32]]:
    """``(B, n_labels)`` float32 probabilities that sum to one, in the order of the cells.

    Args:
        module: satisfies `types.Classifies`.
        minibatches: the cells.
        device: where to compute.
        seed: of draws of the latent; ``None`` takes its mean.
    """
    assert isinstance(module, Classifies)
    module.eval()
    for minibatch in minibatches:
        minibatch = minibatch.to(device)
        noise = None if seed is None else Noise(seed, 0, minibatch.rows)
        yield module.class_logits(minibatch, noise).softmax(-1).cpu().numpy()
