"""The Triton backend: a program takes whole cells, one after the other, and passes over each cell's genes.

Derivation and notation (f, u, dtheta, dp) are in README.md beside this file. A cell's passes are

1. (softmax) the maximum of the logits and the sum of their exponentials;
2. the non-zeros: their values, and a mark at each; derivatives are kept in a list beside the counts;
3. every gene without a mark, as a zero;
4. the derivatives of 2 to their places among those of 3, and the marks away;
5. (softmax) from u to the gradient of the logits, ``u - rho sum(u)``.

The logits come from memory once: later passes find them in the caches, as 5 does u, which lies in a row of
scratch that the program uses again for each of its cells. A gradient may lie where its input lay, since a
program reads an entry for the last time before it writes there.

Cells that share theta share its gradient. A program adds its own cells into a row of its own, and a second
kernel adds the rows of all programs, always in the same order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..csr import CSR
from ..math_gpu import (
    exp32,
    exp_minus_abs,
    log1p_excess,
    log_absolute,
    log_excess,
    one_minus_exp_minus,
    reciprocal,
    stirling,
)

# One program of 16 warps on a multiprocessor: what is read again (logits, u, the sums for theta's gradient)
# is 12 bytes a gene and program, 32 MB at 132 programs and 20,000 genes, which an H200's level 2 cache of
# 50 MB holds; two programs' would not fit. Reasoned, not measured.
_PROGRAMS_EACH = 1
_OPTIONS = {"num_warps": 16}
if torch.version.hip is None:
    # As many as 16 warps can have. Left to itself, ptxas may aim at 64, for a second program, and spill.
    _OPTIONS["maxnreg"] = 128
_BLOCK, _NNZ_BLOCK = 2048, 512
_SUM_ROWS, _SUM_GENES = 32, 64
_PROGRAMS_INTERPRETED = 3  # so that there, too, a program has several cells
_LOWEST = tl.constexpr(-1e30)  # a logit where there is no gene: its exponential is 0
_LARGEST = tl.constexpr(8e37)  # `reciprocal` gives 0 beyond
_LOG2_E = tl.constexpr(1.4426950408889634)


def run(
    counts: CSR,
    logits: torch.Tensor,
    library: torch.Tensor,
    theta: torch.Tensor | None,
    pi_logits: torch.Tensor | None,
    theta_index: torch.Tensor | None,
    likelihood: str,
    mean: str,
    *,
    weights: torch.Tensor | None,
    scale: float,
    with_gradient: bool,
    inplace: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """``(log_p, [d logits, d library, d theta, d pi_logits])``, cell b's gradient times ``scale weights[b]``.

    Args:
        counts: (B x G) `CSR`.
        logits: ``(B, G)`` float32, bfloat16 or float16; all computing is in float32.
        library: ``(B,)`` float.
        theta: ``(G,)``, ``(B, G)``, or ``(T, G)`` with ``theta_index``; float. None without dispersion.
        pi_logits: ``(B, G)`` of a type that logits may have. None without dropout.
        theta_index: ``(B,)`` int64.
        likelihood: not read: theta and pi_logits, given or None, say which it is.
        mean: ``"softmax"`` or ``"exp"``.
        weights: ``(B,)`` float32.
        scale: a factor of all gradients.
        with_gradient: if not, None is returned for the gradients.
        inplace: write the gradients of logits and pi_logits over logits and pi_logits.
    """
    n_obs, n_vars = counts.shape
    device = logits.device
    logits, pi_logits = logits.detach(), None if pi_logits is None else pi_logits.detach()
    # Rows must be whole. A strided tensor's gradient is made beside it and copied to where it belongs.
    logits_, pi_ = logits.contiguous(), None if pi_logits is None else pi_logits.contiguous()
    library_ = library.detach().float().contiguous()
    rows_each = triton.cdiv(max(n_obs, 1), _most_programs(device))
    n_programs = triton.cdiv(n_obs, rows_each)
    dispersion = _Dispersion(theta, theta_index, n_programs, rows_each)
    log_p = torch.zeros_like(library_)
    g_logits = g_library = g_theta = g_pi = u = at_nnz = None
    if with_gradient:
        g_logits = logits_ if inplace else torch.empty_like(logits_)
        g_pi = pi_ if inplace or pi_ is None else torch.empty_like(pi_)
        g_library = torch.zeros_like(library_)
        g_theta = dispersion.sums()
        u = torch.empty(n_programs, n_vars, device=device) if mean == "softmax" else None
        at_nnz = torch.empty(3, counts.nnz, device=device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        if n_obs and n_vars:
            _rows[(n_programs,)](
                counts.indptr, counts.indices, counts.data,
                logits_, library_, dispersion.theta, dispersion.index, dispersion.order, pi_,
                None if weights is None else weights.contiguous(),
                log_p, g_logits, g_library, g_theta, g_pi,
                u, at_nnz, torch.zeros(n_programs, n_vars, dtype=torch.uint8, device=device),
                n_obs, n_vars, counts.nnz, rows_each, float(scale),
                THETA=dispersion.kind, INFLATED=pi_ is not None, SOFTMAX=mean == "softmax",
                GRADIENT=with_gradient, WEIGHTED=weights is not None,
                BLOCK=_BLOCK, NNZ_BLOCK=_NNZ_BLOCK, **_OPTIONS,
            )  # fmt: skip
        if not with_gradient:
            return log_p, None
        g_theta = dispersion.add(g_theta)
    assert g_library is not None
    return log_p, [
        _placed(g_logits, logits, inplace),
        g_library.to(library.dtype),
        g_theta if theta is None or g_theta is None else g_theta.to(theta.dtype),
        _placed(g_pi, pi_logits, inplace),
    ]


class _Dispersion:
    """Which row of theta each cell takes, and the sums in which its gradient is gathered.

    Cells that take one of T rows are put in the order of these rows, and each program takes a stretch of
    that order. It gathers its cells of row t in row (program + t) of the sums. Along the order, program and
    t only grow, so no two pairs of them meet in one row, and those of one t stand side by side.
    """

    def __init__(
        self, theta: torch.Tensor | None, index: torch.Tensor | None, n_programs: int, rows_each: int
    ) -> None:
        self.n_programs, self.rows_each = n_programs, rows_each
        self.theta = None if theta is None else theta.detach().float().contiguous()
        self.index = self.order = self.starts = None
        self.kind = "none" if theta is None else "gene" if theta.dim() == 1 else "cell"
        if theta is not None and index is not None:
            self.kind, self.index = "table", index.contiguous()
            ordered, self.order = torch.sort(index, stable=True)
            self.starts = torch.searchsorted(ordered, torch.arange(len(theta) + 1, device=index.device))

    def sums(self) -> torch.Tensor | None:
        """Where `_rows` leaves theta's gradient; it writes all rows of them that `add` reads."""
        if self.theta is None or self.kind == "cell":
            return None if self.theta is None else torch.empty_like(self.theta)
        n_rows = 1 if self.kind == "gene" else len(self.theta)
        return torch.empty(self.n_programs + n_rows - 1, self.theta.shape[-1], device=self.theta.device)

    def add(self, sums: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient, of theta's shape."""
        if sums is None or self.theta is None or self.kind == "cell":
            return sums
        out = torch.empty_like(self.theta)
        if out.numel():
            n_vars = out.shape[-1]
            grid = (triton.cdiv(n_vars, _SUM_GENES), out.numel() // n_vars)
            _add_sums[grid](
                sums, self.starts, out, n_vars, self.n_programs, self.rows_each,
                TABLE=self.kind == "table", ROWS=_SUM_ROWS, GENES=_SUM_GENES, num_warps=4,
            )  # fmt: skip
        return out


def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


def _placed(made: torch.Tensor | None, given: torch.Tensor | None, inplace: bool) -> torch.Tensor | None:
    if not inplace or made is None or given is None or made.data_ptr() == given.data_ptr():
        return made
    return given.copy_(made)


@triton.jit(do_not_specialize=["n_obs", "nnz", "rows_each"])
def _rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, logits, library, theta, theta_index, order, pi_logits, weights,
    log_p, g_logits, g_library, g_theta, g_pi, u_rows, at_nnz, mark_rows,
    n_obs, n_vars, nnz, rows_each, scale,
    THETA: tl.constexpr, INFLATED: tl.constexpr, SOFTMAX: tl.constexpr, GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, NNZ_BLOCK: tl.constexpr,
):  # fmt: skip
    HAS_THETA: tl.constexpr = THETA != "none"
    program = tl.program_id(0).to(tl.int64)
    nnz = nnz.to(tl.int64)  # three times it may pass 2^31
    marks = mark_rows + program * n_vars
    first = program * rows_each
    t_before = first * 0 - 1
    for i in range(first, tl.minimum(first + rows_each, n_obs)):
        b, t, fresh = i, first * 0, i == first
        if THETA == "table":
            b = tl.load(order + i)
            t = tl.load(theta_index + b)
            fresh = fresh | (t != t_before)
            t_before = t
        if THETA == "cell":
            t, fresh = b, b >= 0
        row = logits + b * n_vars
        th = theta + t * n_vars if HAS_THETA else theta
        p = pi_logits + b * n_vars if INFLATED else pi_logits
        to, u, dth, dp = g_logits, u_rows, g_theta, g_pi
        if GRADIENT:
            to = g_logits + b * n_vars
            u = u_rows + program * n_vars if SOFTMAX else to
            dth = g_theta + (t if THETA == "cell" else program + t) * n_vars if HAS_THETA else g_theta
            dp = g_pi + b * n_vars if INFLATED else g_pi
        weight = scale * tl.load(weights + b) if WEIGHTED else scale
        u_weight = 1.0 if SOFTMAX else weight  # with softmax, pass 5 puts it on

        lib = tl.load(library + b).to(tl.float64)
        shift, total = 0.0, lib * 0.0 + 1.0
        if SOFTMAX:
            shift, total = _normaliser(n_vars, row, BLOCK)
        log_factor = tl.log(lib) - tl.log(total) - shift / _LOG2_E
        start, stop = tl.load(indptr + b), tl.load(indptr + b + 1)
        f_at, u_at = _non_zeros(
            start, stop, nnz, indices, data, row, th, p, at_nnz, marks, log_factor, weight, u_weight,
            HAS_THETA, INFLATED, GRADIENT, NNZ_BLOCK,
        )  # fmt: skip
        tl.debug_barrier()  # other threads read a mark, or u, than wrote it
        f_zero, u_zero = _zeros(
            n_vars, row, th, p, u, dth, dp, marks, fresh,
            shift, (lib / total).to(tl.float32), weight, u_weight,
            HAS_THETA, INFLATED, SOFTMAX, GRADIENT, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        _place(
            start,
            stop,
            nnz,
            indices,
            data,
            u,
            dth,
            dp,
            at_nnz,
            marks,
            HAS_THETA,
            INFLATED,
            GRADIENT,
            NNZ_BLOCK,
        )
        tl.debug_barrier()
        tl.store(log_p + b, (f_at + f_zero).to(tl.float32))
        if GRADIENT:
            sum_u = u_at + u_zero
            tl.store(g_library + b, (weight * (sum_u / lib)).to(tl.float32))
            if SOFTMAX:
                _pull(n_vars, row, u, to, shift, (sum_u / total).to(tl.float32), weight, BLOCK)


@triton.jit
def _normaliser(n_vars, row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pass 1: ``(m, sum of 2^(a log2(e) - m))`` with m of the largest; float64 across lanes."""
    # A lane is four genes side by side, which one thread loads at once: they share what a new maximum costs.
    top = tl.full([BLOCK // 4], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK // 4], tl.float32)
    for start in range(0, n_vars, BLOCK):
        g = start + tl.arange(0, BLOCK)
        a = tl.load(row + g, mask=g < n_vars, other=_LOWEST, eviction_policy="evict_last").to(tl.float32)
        a = tl.reshape(a, [BLOCK // 4, 4])
        higher = tl.maximum(top, tl.max(a, 1) * _LOG2_E)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(a * _LOG2_E - higher[:, None]), 1)
        top = higher
    shift = tl.max(top)
    return shift, tl.sum((total * tl.exp2(top - shift)).to(tl.float64))


@triton.jit
def _non_zeros(  # type: ignore[no-untyped-def]
    start, stop, nnz, indices, data, row, th, p, at_nnz, marks, log_factor, weight, u_weight,
    HAS_THETA: tl.constexpr, INFLATED: tl.constexpr, GRADIENT: tl.constexpr, NNZ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2: ``(sum of f, sum of u)`` over the non-zeros; u, dp and dtheta go to the rows of ``at_nnz``."""
    f_sum = tl.zeros([NNZ_BLOCK], tl.float32)
    u_sum = tl.zeros([NNZ_BLOCK], tl.float32)
    for k in range(start, stop, NNZ_BLOCK):
        e = k + tl.arange(0, NNZ_BLOCK)
        x = tl.load(data + e, mask=e < stop, other=0).to(tl.float64)
        there = x > 0.0  # an explicit zero is a zero like others
        x = tl.where(there, x, 1.0)
        g = tl.load(indices + e, mask=there, other=0).to(tl.int64)
        tl.store(marks + g, tl.full([NNZ_BLOCK], 1, tl.uint8), mask=there)
        # x - mu cancels, and mu may underflow where its logarithm does not: these are taken in float64.
        log_mu = tl.load(row + g, mask=there, other=0.0).to(tl.float64) + log_factor
        mu = tl.exp(tl.minimum(log_mu, 88.0))
        theta = tl.load(th + g, mask=there, other=1.0) if HAS_THETA else 1.0
        f, u, d = _at_count(
            x.to(tl.float32),
            mu.to(tl.float32),
            log_mu.to(tl.float32),
            (x - mu).to(tl.float32),
            theta,
            HAS_THETA,
        )
        if INFLATED:
            logit = tl.load(p + g, mask=there, other=0.0).to(tl.float32)
            q = exp_minus_abs(logit)
            f -= tl.maximum(logit, 0.0) + log_absolute(1.0 + q)
            if GRADIENT:
                pi = tl.where(logit >= 0.0, 1.0, q) * reciprocal(1.0 + q)
                tl.store(at_nnz + nnz + e, -weight * pi, mask=there)
        if GRADIENT:
            tl.store(at_nnz + e, u_weight * u, mask=there)
            if HAS_THETA:
                tl.store(at_nnz + 2 * nnz + e, weight * d, mask=there)
        f_sum += tl.where(there, f, 0.0)
        u_sum += tl.where(there, u, 0.0)
    return tl.sum(f_sum.to(tl.float64)), tl.sum(u_sum.to(tl.float64))


@triton.jit
def _at_count(x, mu, log_mu, difference, theta, HAS_THETA: tl.constexpr):  # type: ignore[no-untyped-def]
    """``(f, u, dtheta)`` of a count x > 0; ``difference`` is x - mu.

    By Loader's saddle point, in which no terms cancel: with N = x + theta and M = mu + theta,
    ``f = log(theta / (2 pi x N)) / 2 + left(N) - left(theta) - left(x) - theta e(-(x - mu)/M) - x e(u/x)``,
    where left is what Stirling's formula leaves of lgamma and ``e(t) = -log(1 - t) - t >= 0``.
    """
    log_x = log_absolute(x)
    rest_x, product_x, _ = stirling(x)
    if HAS_THETA:
        n, m = x + theta, mu + theta
        over_x, over_n, over_m = reciprocal(x), reciprocal(n), difference * reciprocal(m)
        u = theta * over_m
        log_mn = log_absolute(m * over_n)
        e_theta = log_excess(-over_m, log_mn)
        e_x = log_excess(u * over_x, log_x - log_mu + log_mn)
        rest_n, product_n, slope_n = stirling(n)
        rest, product, slope = stirling(theta)
        # The constant 1 / (2 pi) and the products share the logarithm; theta / N and 1 / x cannot overflow.
        f = 0.5 * log_absolute(theta * over_n * over_x * 0.15915494)
        f += rest_n - rest - rest_x - log_absolute(product_n * reciprocal(product * product_x))
        f -= theta * e_theta + x * e_x
        d = 0.5 * x * reciprocal(theta) * over_n - e_theta + (slope - slope_n)
    else:
        u, d = difference, 0.0
        f = -0.5 * log_absolute(x * 6.2831853) - rest_x + log_absolute(product_x)
        f -= x * log_excess(difference * reciprocal(x), log_x - log_mu)
    return f, u, d


@triton.jit
def _zeros(  # type: ignore[no-untyped-def]
    n_vars, row, th, p, u_to, dth_to, dp_to, marks, fresh, shift, factor, weight, u_weight,
    HAS_THETA: tl.constexpr, INFLATED: tl.constexpr, SOFTMAX: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 3: ``(sum of f, sum of u)`` over the genes without a mark; writes u, dtheta, dp of every gene."""
    cost_sum = tl.zeros([BLOCK], tl.float32)
    v_sum = tl.zeros([BLOCK], tl.float32)
    together = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_vars, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there = g < n_vars
        a = tl.load(row + g, mask=there, other=_LOWEST, eviction_policy="evict_last").to(tl.float32)
        mu = tl.exp2(a * _LOG2_E - shift) * factor
        if not SOFTMAX:
            mu = tl.minimum(mu, _LARGEST)
        # At mu = 0 a zero has f = u = dtheta = dp = 0: so those with a mark stay out of all sums, and all
        # loads and stores keep to whole vectors.
        marked = tl.load(marks + g, mask=there, other=1) != 0
        mu = tl.where(marked, 0.0, mu)
        theta = tl.load(th + g, mask=there, other=1.0) if HAS_THETA else 1.0
        logit = 0.0
        if INFLATED:
            logit = tl.load(p + g, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)
        cost, ratio, v, d, dp = _at_zero(mu, theta, logit, HAS_THETA, INFLATED, SOFTMAX)
        cost_sum += cost
        v_sum += v
        if INFLATED:
            # One logarithm for the ratios of four blocks: the product of (1 + ratio), less one.
            together += ratio + together * ratio
            if (start // BLOCK) % 4 == 3:
                cost_sum -= log1p_excess(together)[0]
                together = tl.zeros([BLOCK], tl.float32)
        if GRADIENT:
            tl.store(u_to + g, v * (u_weight * -1.0), mask=there)
            if INFLATED:
                tl.store(dp_to + g, weight * dp, mask=there, eviction_policy="evict_first")
            if HAS_THETA:
                before = tl.load(dth_to + g, mask=there & (fresh == 0), other=0.0)
                tl.store(dth_to + g, before + weight * d, mask=there)
    if INFLATED:
        cost_sum -= log1p_excess(together)[0]
    return -tl.sum(cost_sum.to(tl.float64)), -tl.sum(v_sum.to(tl.float64))


@triton.jit
def _at_zero(  # type: ignore[no-untyped-def]
    mu, theta, logit, HAS_THETA: tl.constexpr, INFLATED: tl.constexpr, SOFTMAX: tl.constexpr
):
    """``(cost, ratio, -u, dtheta, dp)`` of a zero, where ``f = log(1 + ratio) - cost``."""
    # y = -z
    y, v, ratio, d, dp = mu, mu, 0.0, 0.0, 0.0
    if HAS_THETA:
        r = mu * reciprocal(theta)
        if not SOFTMAX:
            r = tl.minimum(r, _LARGEST)
        share = reciprocal(1.0 + r)
        v = mu * share
        share *= r
        log1p_r, excess, small = log1p_excess(r)
        y = theta * log1p_r
        # d = r / (1 + r) - log(1 + r) cancels for small r; less r each, it does not.
        d = tl.where(small, excess - r * share, share - log1p_r)
    cost = y
    if INFLATED:
        kept = reciprocal(1.0 + exp32(logit))  # 1 - pi
        # s, the logistic function of z - p, through the exponential that cannot overflow.
        t = exp_minus_abs(y + logit)
        over_t = reciprocal(1.0 + t)
        seen = y + logit <= 0.0
        s = over_t * tl.where(seen, 1.0, t)
        # Near 0, f is log1p of (pi + (1 - pi) e^z) - 1. Far from it both terms may vanish (and p < 0):
        # the larger comes out of the logarithm.
        missing = kept * one_minus_exp_minus(y)
        near = missing < 0.5
        ratio = tl.where(near, -missing, (1.0 + t) * kept - 1.0)
        cost = tl.where(near, 0.0, tl.minimum(y, -logit))
        dp = over_t * tl.where(seen, t, 1.0) * missing
        v *= s
        d *= s
    return cost, ratio, v, d, dp


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    start, stop, nnz, indices, data, u_to, dth_to, dp_to, at_nnz, marks,
    HAS_THETA: tl.constexpr, INFLATED: tl.constexpr, GRADIENT: tl.constexpr, NNZ_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 4: derivatives at non-zeros to their places, marks away. No column stands twice in a row."""
    for k in range(start, stop, NNZ_BLOCK):
        e = k + tl.arange(0, NNZ_BLOCK)
        there = tl.load(data + e, mask=e < stop, other=0) > 0
        g = tl.load(indices + e, mask=there, other=0).to(tl.int64)
        tl.store(marks + g, tl.full([NNZ_BLOCK], 0, tl.uint8), mask=there)
        if GRADIENT:
            tl.store(u_to + g, tl.load(at_nnz + e, mask=there), mask=there)
            if INFLATED:
                tl.store(dp_to + g, tl.load(at_nnz + nnz + e, mask=there), mask=there)
            if HAS_THETA:
                d = tl.load(at_nnz + 2 * nnz + e, mask=there)
                tl.store(dth_to + g, tl.load(dth_to + g, mask=there) + d, mask=there)


@triton.jit
def _pull(n_vars, row, u, to, shift, pull, weight, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pass 5: from u to the gradient of the logits; ``pull`` is sum(u) over the sum of exponentials."""
    for start in range(0, n_vars, BLOCK):
        g = start + tl.arange(0, BLOCK)
        there = g < n_vars
        a = tl.load(row + g, mask=there, other=_LOWEST).to(tl.float32)
        rho = tl.exp2(a * _LOG2_E - shift)  # times the sum of exponentials, by which pull is divided
        gradient = weight * (tl.load(u + g, mask=there, other=0.0) - rho * pull)
        tl.store(to + g, gradient, mask=there, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_programs", "rows_each"])
def _add_sums(  # type: ignore[no-untyped-def]
    sums, starts, out, n_vars, n_programs, rows_each,
    TABLE: tl.constexpr, ROWS: tl.constexpr, GENES: tl.constexpr,
):  # fmt: skip
    """``out[t]``: the rows of ``sums`` that belong to row t of theta, added in float64."""
    t = tl.program_id(1).to(tl.int64)
    low, high = t * 0, t * 0 + n_programs
    if TABLE:
        first, last = tl.load(starts + t), tl.load(starts + t + 1)
        low = t + first // rows_each
        high = tl.where(last > first, t + tl.cdiv(last, rows_each), low)  # none, if no cell takes row t
    g = tl.program_id(0) * GENES + tl.arange(0, GENES)
    total = tl.zeros([ROWS, GENES], tl.float64)
    for start in range(low, high, ROWS):
        s = start + tl.arange(0, ROWS)
        there = (s < high)[:, None] & (g < n_vars)[None, :]
        total += tl.load(sums + s[:, None] * n_vars + g[None, :], mask=there, other=0.0)
    tl.store(out + t * n_vars + g, tl.sum(total, 0).to(tl.float32), mask=g < n_vars)
