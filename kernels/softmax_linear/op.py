"""`SoftmaxLinear`: shares of expression from hidden units, a few rows at a time."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F

from ..parallel import empty, in_parallel, n_threads
from ..products import as_factor
from . import cpu

# Logits that are in flight at a time: they stay in the caches between the product and what follows.
_PIECE_BYTES = 5 << 20
_FEWEST_ROWS = 32
PRECISIONS = ("float32", "bfloat16")


class SoftmaxLinear:
    """``softmax(h W' + b)`` over all genes, for all of them or for some; inference only, no gradients.

    Weights are laid out for the product once. On the CPU a row is turned from logits into shares while it
    is in the cache, and no array but ``out`` is as large as cells x genes. Several threads may call it.

    Args:
        weight: ``(G, H)`` float32.
        bias: ``(G,)`` float32.
        genes: ``(k,)`` int64, the genes wanted; all when ``None``. The softmax is over all genes.
        precision: of the product: ``"float32"``, or ``"bfloat16"``, which takes half the time where the CPU
            or GPU multiplies bfloat16, and elsewhere as long. ``README.md`` bounds what is lost.

    Raises:
        ValueError: shapes that do not fit, an unknown precision.

    Example:
        >>> import numpy as np
        >>> head, out = SoftmaxLinear(torch.zeros(4, 2), torch.zeros(4)), np.empty((1, 4), np.float32)
        >>> head.into(out, torch.ones(1, 2))
        >>> out.tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        genes: torch.Tensor | None = None,
        *,
        precision: str = "float32",
    ) -> None:
        if weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be (G, H) and (G,)"
            )
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        weight, bias = weight.detach(), bias.detach()
        self._all = _Product(weight, bias, precision)
        self._some = None if genes is None else _Product(weight[genes], bias[genes], precision)
        self.n_out = len(weight) if genes is None else len(genes)

    def log_normaliser(self, h: torch.Tensor) -> torch.Tensor:
        """``(B,)`` float32, the log of the softmax's denominator, from the logits of all genes."""
        found = h.new_empty(len(h))
        for rows in _pieces(h, self._all.n_out):
            logits = self._all(h[rows])
            if h.device.type == "cpu":
                _by_rows(cpu.normalise_rows, logits.numpy(), found[rows].numpy())
            else:
                found[rows] = logits.logsumexp(-1)
        return found

    def into(
        self,
        out: Any,
        h: torch.Tensor,
        *,
        factor: torch.Tensor | None = None,
        log_normaliser: torch.Tensor | None = None,
        add: bool = False,
    ) -> None:
        """``out = factor * share``, or ``out += factor * share``.

        Args:
            out: ``(B, k)`` float32 numpy array, written or added to; rows contiguous.
            h: ``(B, H)`` float32, hidden units.
            factor: ``(B,)`` float32 of each row; 1 when ``None``.
            log_normaliser: ``(B,)`` float32, if it is known: then only the genes wanted are computed. It must
                be of the same ``h`` and precision.
            add: to what is in ``out``.
        """
        if factor is None:
            factor = h.new_ones(len(h))
        if log_normaliser is None and self._some is not None:
            log_normaliser = self.log_normaliser(h)
        product = self._some or self._all
        for rows in _pieces(h, product.n_out):
            if log_normaliser is None and product.is_rounded and h.device.type == "cpu":
                given = product.rounded(h[rows]).numpy(), product.bias.numpy()
                _by_rows(cpu.softmax_rounded_rows, *given, factor[rows].numpy(), out[rows], add)
                continue
            logits = product(h[rows])
            if h.device.type != "cpu":
                shift = logits.logsumexp(-1) if log_normaliser is None else log_normaliser[rows]
                share = (logits - shift.unsqueeze(1)).exp_().mul_(factor[rows].unsqueeze(1)).cpu().numpy()
                out[rows] = out[rows] + share if add else share
            elif log_normaliser is None:
                _by_rows(cpu.softmax_rows, logits.numpy(), factor[rows].numpy(), out[rows], add)
            else:
                known = log_normaliser[rows].numpy()
                _by_rows(cpu.exp_rows, logits.numpy(), factor[rows].numpy(), known, out[rows], add)


def _pieces(h: torch.Tensor, n_out: int) -> list[slice]:
    # A GPU has no cache to stay in, and many threads to keep busy.
    step = _rows(n_out) * (1 if h.device.type == "cpu" else 64)
    return [slice(start, min(start + step, len(h))) for start in range(0, len(h), step)]


_own = threading.local()


def _rows(n_out: int) -> int:
    return max(_FEWEST_ROWS, _PIECE_BYTES // (4 * n_out))


def _by_rows(loop: Any, first: Any, *rest: Any) -> None:
    in_parallel(loop, len(first), first, *rest, parts=n_threads(max(1, first.size >> 16)))


class _Product:
    """``h W' + b`` in float32, or rounded on the way."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, precision: str) -> None:
        self.n_out = len(weight)
        self._factors = torch.bfloat16 if precision == "bfloat16" else weight.dtype
        weight = as_factor(weight, self._factors)
        self.is_rounded = weight.dtype == torch.bfloat16
        self.bias = bias.contiguous()
        # Two to three times as fast as torch's own choice for float32 on some CPUs, with weights that are
        # laid out beforehand.
        has_library = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._packed = has_library and weight.device.type == "cpu" and not self.is_rounded
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 128) if self._packed else weight
        )

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        if self.is_rounded:
            if h.device.type != "cpu":
                return (h.bfloat16() @ self._weight.T).float() + self.bias
            logits = empty((len(h), self.n_out))
            _by_rows(cpu.widen_rows, self.rounded(h).numpy(), self.bias.numpy(), logits.numpy())
            return logits
        h = as_factor(h, self._factors)
        if self._packed:
            found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                h, self._weight, self.bias, "none", [], ""
            )
            return found
        return F.linear(h, self._weight, self.bias)

    def rounded(self, h: torch.Tensor) -> torch.Tensor:
        """``(B, G)`` uint16, the bits of ``h W'`` in bfloat16, until this thread asks again."""
        # Fresh memory for each piece would cost as much as the product.
        rows = max(_rows(self.n_out), len(h))
        product = getattr(_own, "product", None)
        if product is None or product.shape[1] != self.n_out or len(product) < len(h):
            product = _own.product = torch.empty((rows, self.n_out), dtype=torch.bfloat16)
        torch.mm(h.bfloat16(), self._weight.T, out=product[: len(h)])
        return product[: len(h)].view(torch.uint16)
