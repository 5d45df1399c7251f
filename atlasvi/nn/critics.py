"""Penalties on a latent that tells batches apart: a critic to play against, a distance of distributions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Widths of the kernels, as shares of the mean squared distance between cells.
_WIDTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


class BatchCritic(nn.Module):
    """Guesses the batch of a cell from z, while z is moved until it cannot (Tzeng et al. 2015, ICCV, 4068).

    The critic minimises the cross-entropy of its guess at a z that is held; z minimises the cross-entropy
    of the uniform distribution and a held critic's guess. One optimiser does for both.

    Args:
        n_latent: dimensions of z.
        n_hidden: width of the hidden layer.
        n_batch: number of batches.
    """

    def __init__(self, n_latent: int, n_hidden: int, n_batch: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_latent, n_hidden)
        self.out = nn.Linear(n_hidden, n_batch)

    def forward(self, z: torch.Tensor, batch_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropies in nats: of the guess, for the critic; of confusion, for z."""
        guess = F.cross_entropy(self.out(F.relu(self.hidden(z.detach()))), batch_index)
        held = {name: value.detach() for name, value in self.named_parameters()}
        h = F.relu(F.linear(z, held["hidden.weight"], held["hidden.bias"]))
        logits = F.linear(h, held["out.weight"], held["out.bias"])
        return guess, -logits.log_softmax(-1).mean()


def mmd(z: torch.Tensor, batch_index: torch.Tensor, n_batch: int) -> torch.Tensor:
    """Squared maximum mean discrepancy of z between batches, mean over pairs (Gretton et al. 2012, JMLR 13).

    ``MMD^2(s, t) = mean k(a, a') + mean k(b, b') - 2 mean k(a, b)`` over cells a, a' of s and b, b' of t,
    with ``k`` the mean of Gaussian kernels ``exp(-|a - b|^2 / (2 w d))``, d the mean squared distance.

    Args:
        z: ``(B, n_latent)``.
        batch_index: ``(B,)`` int64.
        n_batch: number of batches; those that no cell is of do not count.

    Returns:
        A scalar >= 0; 0 where all cells are of one batch.
    """
    squares = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
    # The widths follow the spread of z and are not themselves trained.
    scale = squares.detach().mean().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-squares / (2 * w * scale)) for w in _WIDTHS]).mean(0)
    members = F.one_hot(batch_index, n_batch).to(z.dtype)
    n_cells = members.sum(0)
    present = n_cells > 0
    means = (members / n_cells.clamp(min=1))[:, present]
    between = means.T @ kernel @ means
    own = between.diagonal()
    n = len(own)
    if n < 2:
        return z.new_zeros(())
    # Each pair stands twice, and a batch is at no distance from itself.
    return (own.unsqueeze(0) + own.unsqueeze(1) - 2 * between).sum() / (n * (n - 1))
