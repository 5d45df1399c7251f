"""Log-likelihood of sparse counts under Poisson, ZIP, NB and ZINB. The derivation is in README.md here."""

from .op import count_log_likelihood

__all__ = ["count_log_likelihood"]
