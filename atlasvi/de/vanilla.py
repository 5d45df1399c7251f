"""Bayes factors of Lopez et al. 2018: how often a gene is higher in a cell of one group than of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlasvi.de.compare import count_and_add, over_genes
from atlasvi.de.decoding import Decoding


@dataclass(frozen=True, slots=True, eq=False)
class Vanilla:
    """What the pairs say of each comparison.

    Args:
        p: ``(K, G)`` float64, probability that the first side is higher, over pairs and draws.
        k: ``(K, G)`` float64, Bayes factor, natural log.
        scale1: ``(K, G)`` float64, mean rho of the first side.
        scale2: ``(K, G)`` float64, of the second.
    """

    p: NDArray[np.float64]
    k: NDArray[np.float64]
    scale1: NDArray[np.float64]
    scale2: NDArray[np.float64]


def bayes_factor(p: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """``log((p + bound) / (1 - p + bound))``: finite, and never beyond ``log((1 + bound) / bound)``."""
    return np.log(p + bound) - np.log(1 - p + bound)


def compare_vanilla(decoding: Decoding, bound: float) -> Vanilla:
    """Count, over the rows of a design, where the first side is higher.

    Where the design has pairs of cells (`paper_design`), probabilities are of a pair, summed over batches
    by their weights, and Bayes factors are averaged over the pairs; else all rows are one.

    Args:
        decoding: of the design.
        bound: added to p and to 1 - p.
    """
    design, n_vars = decoding.design, decoding.n_vars
    counts = np.zeros((len(design.ones), n_vars), np.int32)
    p, total_p, total_k = (np.zeros((len(design.ones), n_vars)) for _ in range(3))
    rho, scale = np.zeros((len(design.cells), n_vars)), np.zeros((len(design.cells), n_vars))
    n_pairs = 0
    for piece in decoding.pieces():
        over_genes(count_and_add, n_vars, piece.rho, piece.one, piece.two, piece.pools, counts, rho)
        if not piece.last:
            continue
        share = piece.segment.weight / (piece.segment.stop - piece.segment.start)
        p += share * counts
        scale += share * rho
        counts[:], rho[:] = 0, 0
        if piece.segment.ends:
            total_p += p
            total_k += bayes_factor(p, bound)
            p[:] = 0
            n_pairs += 1
    scale /= n_pairs
    return Vanilla(total_p / n_pairs, total_k / n_pairs, scale[design.ones], design.shares @ scale)
