"""p(label | x), and how far cells lie from those of each label, a block of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.stats
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


# Of a normal distribution, the share that lies within distance 1.
_WITHIN = 0.99


def label_moments(
    module: torch.nn.Module,
    minibatches: Iterator[Minibatch],
    device: torch.device,
    labels: NDArray[np.integer],
    n_labels: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean ``(K, d)`` and covariance ``(K, d, d)`` of draws of q(z|x) of the cells of each label.

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
    means, covariances = np.zeros((n_labels, n_latent)), np.zeros((n_labels, n_latent, n_latent))
    for k in np.unique(labels):
        of = loc[labels == k]
        means[k] = of.mean(0)
        off = of - means[k]
        covariances[k] = off.T @ off / len(of) + np.diag((scale[labels == k] ** 2).mean(0))
    return means, covariances


def distance_blocks(
    latents: Iterator[NDArray[np.float32]], means: NDArray[np.float64], covariances: NDArray[np.float64]
) -> Iterator[NDArray[np.float64]]:
    """``(B, K)`` Mahalanobis distances from each label's mean, in units of what 99 % of a normal are within.

    Args:
        latents: means of q(z|x), blocks of ``(B, d)``.
        means: of `label_moments`.
        covariances: likewise; a label whose covariance is zero has no cells, and is infinitely far.
    """
    unit = scipy.stats.chi2.ppf(_WITHIN, means.shape[1])
    known = [k for k, covariance in enumerate(covariances) if covariance.any()]
    whitening = {k: np.linalg.inv(np.linalg.cholesky(covariances[k])) for k in known}
    for z in latents:
        far = np.full((len(z), len(means)), np.inf)
        for k in known:
            far[:, k] = np.sqrt((((z - means[k]) @ whitening[k].T) ** 2).sum(1) / unit)
        yield far
