"""What loss against a peer would not matter, by measure. Named before anything was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Margin:
    """Of one measure.

    Args:
        size: in the measure's unit, or, where ``of_value``, a share of the peer's mean.
        higher: whether more is better.
        of_value: whether ``size`` is a share.
    """

    size: float
    higher: bool = True
    of_value: bool = False

    def of(self, peers_mean: float) -> float:
        """In the measure's unit."""
        return self.size * abs(peers_mean) if self.of_value else self.size

    def __str__(self) -> str:
        return f"{self.size:.1%} of the value" if self.of_value else f"{self.size:g}"


MARGINS = {
    # Held-out log-likelihoods, nats a cell.
    "elbo": Margin(0.001, of_value=True),
    "elbo_refitted": Margin(0.001, of_value=True),
    "marginal": Margin(0.001, of_value=True),
    # Clusters and labels.
    "ari": Margin(0.02),
    "nmi": Margin(0.02),
    "ari_coarse": Margin(0.02),
    "nmi_coarse": Margin(0.02),
    "silhouette": Margin(0.02),
    # Batches: entropy as a share of its ceiling; a silhouette of batches is best at 0, so its size counts.
    "mixing": Margin(0.02),
    "batch_silhouette_size": Margin(0.02, higher=False),
    "ilisi": Margin(0.02),
    "kbet": Margin(0.02),
    # Differential expression.
    "auroc": Margin(0.01),
    "idr_rho": Margin(0.02),
    "change_rank": Margin(0.01),
    # Imputation, in counts; over originals of 2 or more.
    "median_l1": Margin(0.02, higher=False, of_value=True),
    "mean_l1": Margin(0.02, higher=False, of_value=True),
    "spearman": Margin(0.01),
    "median_l1_2": Margin(0.02, higher=False, of_value=True),
    "mean_l1_2": Margin(0.02, higher=False, of_value=True),
    "spearman_2": Margin(0.01),
    # What the likelihood learnt.
    "blob": Margin(0.02, higher=False),
    "blob_ari": Margin(0.02, higher=False),
    "time": Margin(0.02),
    "time_near": Margin(0.02),
    "mixtures": Margin(0.02),
    "mixtures_near": Margin(0.02),
    "fold": Margin(0.02, of_value=True),
    "flattened": Margin(0.01),
    "shift_r2": Margin(0.01),
}
