"""Log-likelihood of sparse counts, with its gradient."""

from .entries import Entries, count_log_likelihood_entries
from .op import count_log_likelihood

__all__ = ["Entries", "count_log_likelihood", "count_log_likelihood_entries"]
