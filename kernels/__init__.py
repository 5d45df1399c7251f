"""Fused operations on sparse counts and of hidden layers, usable on their own: nothing here imports atlasvi.

Example:
    >>> import torch, atlasvi_kernels as ak
    >>> counts = ak.CSR.from_torch(torch.tensor([[0.0, 3.0, 1.0]]))
    >>> ak.count_log_likelihood(counts, torch.zeros(1, 3), torch.tensor([4.0]), torch.ones(3),
    ...                         likelihood="nb").shape
    torch.Size([1])
"""

import os
import sys

if __name__ != "atlasvi_kernels":
    # From the repository root `import kernels` would find this folder too, as a second copy.
    raise ImportError("this folder is imported as atlasvi_kernels; install the project: pip install -e .")

if "torch" not in sys.modules:
    # OpenMP's threads spin for milliseconds while they wait. A tenth of that spans the time between two loops
    # of a step; not to spin at all makes small minibatches 1.4 times slower, and more takes readers' time.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from .count_ll import Entries, count_log_likelihood, count_log_likelihood_entries
from .csr import CSR
from .csr_linear import csr_linear
from .draws import binomial_quantile, counter_counts, counter_gamma, counter_pairs
from .linear_count_ll import linear_count_log_likelihood
from .noise import counter_normal, counter_reached, counter_uniform
from .norm_relu_dropout import norm_relu_dropout
from .pool import RowPool
from .softmax_linear import SoftmaxLinear

__all__ = [
    "CSR",
    "Entries",
    "RowPool",
    "SoftmaxLinear",
    "binomial_quantile",
    "count_log_likelihood",
    "count_log_likelihood_entries",
    "counter_counts",
    "counter_gamma",
    "counter_normal",
    "counter_pairs",
    "counter_reached",
    "counter_uniform",
    "csr_linear",
    "linear_count_log_likelihood",
    "norm_relu_dropout",
]
