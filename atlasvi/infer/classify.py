"""p(label | x), and how far cells lie from those of each label, a block of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.infer.latent import latent_blocks
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


# The share of a label's cells that lie within distance 1 of it.
_WITHIN = 0.99
# Fewer cells do not tell their covariance.
_FEW = 20


def label_regions(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    labels: NDArray[np.integer],
    n_labels: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the cells of each label lie: means ``(K, d)`` and matrices ``(K, d, d)`` for `distance_blocks`.

    The matrix of a label is the covariance of the means of q(z|x) of its cells and their mean posterior
    variance, times a number: 99 % of its cells lie within distance 1. A label of fewer than 20 cells takes
    the covariance within all labels, and their number.

    Args:
        module: satisfies `types.Encodes`.
        minibatches: cells with labels.
        device: where to compute.
        labels: ``(n,)`` their codes, in their order.
        n_labels: K; a label without cells has zeros.
    """
    blocks = list(latent_blocks(module, minibatches, device))
    loc, scale = (np.concatenate(part).astype(np.float64) for part in zip(*blocks, strict=True))
    n_latent = loc.shape[1]
    means, matrices = np.zeros((n_labels, n_latent)), np.zeros((n_labels, n_latent, n_latent))
    there = np.unique(labels)
    for k in there:
        means[k] = loc[labels == k].mean(0)
    off = loc - means[labels]
    within = off.T @ off / len(off)
    own = np.empty(len(off))
    for k in there:
        of = off[labels == k]
        covariance = within if len(of) < _FEW else of.T @ of / len(of)
        matrices[k] = covariance + np.diag((scale[labels == k] ** 2).mean(0))
        own[labels == k] = ((of @ _whitening(matrices[k])) ** 2).sum(1)
    for k in there:
        of = own[labels == k]
        unit = float(np.quantile(own if len(of) < _FEW else of, _WITHIN))
        matrices[k] *= unit or 1.0  # 0 where no label has two cells
    return means, matrices


def distance_blocks(
    latents: Iterator[NDArray[np.float32]], means: NDArray[np.float64], matrices: NDArray[np.float64]
) -> Iterator[NDArray[np.float64]]:
    """``(B, K)`` Mahalanobis distances of cells from labels.

    Args:
        latents: means of q(z|x), blocks of ``(B, d)``.
        means: of `label_regions`.
        matrices: likewise; a label whose matrix is zero has no cells, and is infinitely far.
    """
    whitening = {k: _whitening(matrix) for k, matrix in enumerate(matrices) if matrix.any()}
    for z in latents:
        far = np.full((len(z), len(means)), np.inf)
        for k, factor in whitening.items():
            far[:, k] = np.sqrt((((z - means[k]) @ factor) ** 2).sum(1))
        yield far


def _whitening(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """W with W W' the inverse."""
    inverse: NDArray[np.float64] = np.linalg.inv(np.linalg.cholesky(matrix))
    return inverse.T
