"""Log-likelihood of sparse counts from the decoder's last hidden layer, its linear heads fused in."""

from .op import linear_count_log_likelihood

__all__ = ["linear_count_log_likelihood"]
