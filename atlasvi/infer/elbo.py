"""The terms of the ELBO, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atlasvi.types import LossTerms, Minibatch, Noise, Trains


@torch.no_grad()
def elbo_blocks(
    module: torch.nn.Module, minibatches: Iterator[Minibatch], device: torch.device, *, seed: int
) -> Iterator[LossTerms]:
    """Loss terms of each minibatch from one draw of z a cell, which depends on (seed, cell) alone."""
    assert isinstance(module, Trains)
    module.eval()
    for minibatch in minibatches:
        minibatch = minibatch.to(device)
        yield module.loss(minibatch, Noise(seed, 0, minibatch.rows))
