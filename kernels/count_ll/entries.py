"""The likelihood entry by entry, for those who need it, in chunks of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..csr import CSR
from . import reference
from .op import check_arguments


@dataclass(frozen=True)
class Entries:
    """What a chunk of cells has entry by entry.

    Args:
        rows: of the minibatch, which these are.
        log_prob: ``(b, G)`` log-probability of each count, nats.
        dropout: ``(b, G)`` posterior probability that a zero was inflated, 0 at counts; ``None`` without pi.

    Example:
        >>> import torch
        >>> Entries(slice(0, 1), torch.zeros(1, 2), None).log_prob.shape
        torch.Size([1, 2])
    """

    rows: slice
    log_prob: Tensor
    dropout: Tensor | None


def count_log_likelihood_entries(
    counts: CSR,
    logits: Tensor,
    library: Tensor,
    theta: Tensor | None = None,
    *,
    pi_logits: Tensor | None = None,
    theta_index: Tensor | None = None,
    likelihood: str = "zinb",
    mean: str = "softmax",
    rows: int = 256,
) -> Iterator[Entries]:
    """What `count_log_likelihood` sums, gene by gene: plain torch, dense for a few cells at a time.

    The posterior probability that a zero is a dropout is ``pi / (pi + (1 - pi) NB(0))``.

    Args:
        counts: as `count_log_likelihood` takes them, like all arguments not named here.
        logits: ``(B, G)``.
        library: ``(B,)``.
        theta: ``(G,)``, ``(B, G)``, or ``(T, G)`` with ``theta_index``.
        pi_logits: ``(B, G)``.
        theta_index: ``(B,)`` int64.
        likelihood: ``"poisson"``, ``"zip"``, ``"nb"`` or ``"zinb"``.
        mean: ``"softmax"`` or ``"exp"``.
        rows: cells at a time, >= 1.

    Yields:
        `Entries` of consecutive cells.

    Example:
        >>> import torch
        >>> counts = CSR.from_torch(torch.tensor([[0.0, 2.0]]))
        >>> (e,) = count_log_likelihood_entries(counts, torch.zeros(1, 2), torch.tensor([2.0]),
        ...                                     pi_logits=torch.zeros(1, 2), likelihood="zip")
        >>> [round(p, 3) for p in e.dropout[0].tolist()]  # 1 / (1 + e^-1), and none at a count
        [0.731, 0.0]
    """
    check_arguments(counts, logits, library, theta, pi_logits, theta_index, likelihood, mean)
    if rows < 1:
        raise ValueError(f"rows must be at least 1, is {rows}")
    for start in range(0, counts.n_obs, rows):
        t = slice(start, min(start + rows, counts.n_obs))
        of_rows = theta
        if theta is not None and theta_index is not None:
            of_rows = theta[theta_index[t]]
        elif theta is not None and theta.dim() == 2:
            of_rows = theta[t]
        x = counts.row_range(t.start, t.stop).to_dense(logits.dtype)
        pi = None if pi_logits is None else pi_logits[t]
        yield Entries(
            t, *reference.entries(x, logits[t], library[t], of_rows, pi, likelihood=likelihood, mean=mean)
        )
