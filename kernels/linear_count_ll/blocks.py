"""A few cells at a time through heads, likelihood and gradients, so that cells x genes never exists.

README.md beside this file counts the passes and says why cells are cut and not genes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..count_ll.op import run as run_count_ll
from ..csr import CSR
from ..parallel import empty
from ..products import as_factor

# Of what the heads make of a block of cells: matrix products want many rows more than a near cache.
_BLOCK_BYTES = 48 << 20
_MIN_ROWS, _MAX_ROWS = 32, 1024
# Products with matrices of few columns take up to five times as long if these fill no whole vectors: so wide
# they are made, with zeros, if they are narrower than so much.
_LANES, _FEW_HIDDEN = 16, 64


@dataclass(frozen=True)
class Heads:
    """Tensors of the linear heads and theta, or their gradients; ``None`` where there is none."""

    weight: Tensor | None
    bias: Tensor | None
    pi_weight: Tensor | None
    pi_bias: Tensor | None
    theta: Tensor | None
    theta_weight: Tensor | None
    theta_bias: Tensor | None

    def named(self) -> dict[str, Tensor | None]:
        """All of them by name, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in order."""
        return tuple(self.named().values())

    @property
    def n_linear(self) -> int:
        """Number of heads that have a weight."""
        return sum(t is not None for t in (self.weight, self.pi_weight, self.theta_weight))

    def with_weights(self, change: Callable[[Tensor], Tensor]) -> Heads:
        """With each weight, not the biases, changed."""
        linear = {name: t for name, t in self.named().items() if name.endswith("weight") and t is not None}
        return replace(self, **{name: change(t) for name, t in linear.items()})

    def sums(self) -> Heads:
        """Like these, to add gradients to: zeros, but for the weights, which the first block writes."""
        return Heads(
            *(
                None if t is None else torch.empty_like(t) if name.endswith("weight") else torch.zeros_like(t)
                for name, t in self.named().items()
            )
        )


def block_rows(n_linear: int, n_vars: int) -> int:
    """Cells of a block."""
    return max(_MIN_ROWS, min(_MAX_ROWS, _BLOCK_BYTES // max(1, 4 * n_linear * n_vars)))


def run(
    backend: str,
    counts: CSR,
    hidden: Tensor,
    library: Tensor,
    heads: Heads,
    theta_index: Tensor | None,
    likelihood: str,
    mean: str,
    *,
    dtype: torch.dtype,
    weights: Tensor | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Heads | None]:
    """``(log_p, d hidden, d library, d heads)``, weighted as by ``count_ll``; products are of ``dtype``."""
    n_obs, n_vars = counts.shape
    log_p = torch.empty_like(library)
    n_hidden = hidden.shape[1]
    if n_hidden % _LANES and n_hidden < _FEW_HIDDEN and not hidden.is_cuda:
        more = (0, -n_hidden % _LANES)
        hidden, heads = F.pad(hidden, more), heads.with_weights(lambda weight: F.pad(weight, more))
    narrow_hidden, narrow = hidden, heads
    if dtype != hidden.dtype:
        narrow_hidden = as_factor(hidden, dtype)
        narrow = heads.with_weights(lambda weight: as_factor(weight, dtype))
    gradients = heads.sums() if with_gradient else None
    g_hidden = torch.empty_like(hidden) if with_gradient else None
    g_library = torch.empty_like(library) if with_gradient else None
    rows = _even(n_obs, block_rows(heads.n_linear, n_vars))
    buffers = _buffers(heads.n_linear, rows, n_vars, hidden)
    # The compiled kernel takes products as they come, and adds biases where a row is at hand.
    fused = backend == "numba"
    biases = (None, None) if fused else (heads.bias, heads.pi_bias)
    for start in range(0, max(n_obs, 1), rows):
        t = slice(start, min(start + rows, n_obs))
        h, free = narrow_hidden[t], [b[: t.stop - start] for b in buffers]
        logits, pi_logits = (
            None if weight is None else _linear(h, weight, bias, free.pop(), narrow=fused)
            for weight, bias in zip((narrow.weight, narrow.pi_weight), biases, strict=True)
        )
        by_cell = heads.theta is not None and heads.theta.dim() == 2 and theta_index is None
        theta = heads.theta[t] if heads.theta is not None and by_cell else heads.theta
        if narrow.theta_weight is not None:
            theta = _linear(h, narrow.theta_weight, heads.theta_bias, free.pop()).exp_()
        log_p[t], made = run_count_ll(
            backend, counts.row_range(t.start, t.stop), logits, library[t], theta, pi_logits,
            None if theta_index is None else theta_index[t], likelihood, mean,
            weights=None if weights is None else weights[t], scale=scale, with_gradient=with_gradient,
            inplace=True, **({"biases": (heads.bias, heads.pi_bias)} if fused else {}),
        )  # fmt: skip
        if made is None:
            continue
        assert gradients is not None and g_hidden is not None and g_library is not None
        g_logits, g_library_t, g_theta, g_pi, *of_biases = made
        assert g_logits is not None and g_library_t is not None
        g_library[t] = g_library_t
        g_h = g_hidden[t].zero_()
        _add(g_logits, h, narrow.weight, g_h, gradients.weight, first=start == 0)
        if g_pi is not None:
            _add(g_pi, h, narrow.pi_weight, g_h, gradients.pi_weight, first=start == 0)
        of_biases = of_biases or [g_logits.sum(0), None if g_pi is None else g_pi.sum(0)]
        for g_bias, of_bias in zip((gradients.bias, gradients.pi_bias), of_biases, strict=True):
            if g_bias is not None and of_bias is not None:
                g_bias += of_bias
        if heads.theta_weight is not None:
            assert theta is not None and g_theta is not None
            # theta = exp(raw): d / d raw = theta d / d theta.
            g_raw = g_theta.mul_(theta)
            _add(g_raw, h, narrow.theta_weight, g_h, gradients.theta_weight, first=start == 0)
            if gradients.theta_bias is not None:
                gradients.theta_bias.add_(g_raw.sum(0))
        elif gradients.theta is not None:
            assert g_theta is not None
            (gradients.theta[t] if by_cell else gradients.theta).add_(g_theta)
    if gradients is not None and g_hidden is not None and hidden.shape[1] > n_hidden:
        g_hidden = g_hidden[:, :n_hidden].contiguous()
        gradients = gradients.with_weights(lambda weight: weight[:, :n_hidden].contiguous())
    return log_p, g_hidden, g_library, gradients


def _even(n_obs: int, most: int) -> int:
    """Rows of a block, so that blocks of at most so many are alike."""
    return -(-n_obs // -(-n_obs // most)) if n_obs else 1


def _buffers(n: int, rows: int, n_vars: int, like: Tensor) -> list[Tensor]:
    if like.is_cuda:
        return [like.new_empty(rows, n_vars) for _ in range(n)]
    # Kept from call to call: fresh pages of memory cost as much as the products that are written to them.
    if getattr(_kept, "memory", None) is None or _kept.memory.numel() < n * rows * n_vars:
        _kept.memory = empty((n * rows * n_vars,))
    return list(_kept.memory[: n * rows * n_vars].view(n, rows, n_vars))


_kept = threading.local()


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, free: Tensor, *, narrow: bool = False
) -> Tensor:
    """``hidden @ weight.T + bias`` in a free buffer, as float32 or, ``narrow``, in the factors' type."""
    if hidden.dtype == free.dtype:
        torch.mm(hidden, weight.T, out=free)
    elif narrow:
        free = free.view(-1).view(hidden.dtype)[: free.numel()].view(free.shape)
        torch.mm(hidden, weight.T, out=free)
    else:
        free.copy_(hidden @ weight.T)
    return free if bias is None else free.add_(bias)


def _add(
    g: Tensor, hidden: Tensor, weight: Tensor | None, g_hidden: Tensor, g_weight: Tensor | None, *,
    first: bool,
) -> None:  # fmt: skip
    """Add what a head's output gradient ``g`` means for its input and weight, which the first writes."""
    assert weight is not None and g_weight is not None
    narrow = g.to(hidden.dtype)
    if g_hidden.dtype == hidden.dtype:
        g_hidden.addmm_(narrow, weight)
        if first:
            torch.mm(narrow.T, hidden, out=g_weight)
        else:
            g_weight.addmm_(narrow.T, hidden)
    else:
        g_hidden += narrow @ weight
        if first:
            g_weight.copy_(narrow.T @ hidden)
        else:
            g_weight += narrow.T @ hidden
