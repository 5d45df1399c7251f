"""Rows of logits to rows of a softmax: a maximum, one pass of exp and one of products, in the cache."""

from __future__ import annotations

import numpy as np

from ..math_cpu import exp32, max32, vector_code
from ..parallel import compiled

# Sums in any order: else they are not vector code.
_FLAGS = {"contract", "nsz", "nnan", "ninf", "reassoc"}
_LOWEST = np.float32(-3.0e38)


@compiled(fastmath=_FLAGS)
def normalise_rows(part, start, stop, logits, log_normaliser):  # type: ignore[no-untyped-def]
    """``log_normaliser[i] = log sum over genes of exp(logits[i])``."""
    vector_code()
    n_vars = logits.shape[1]
    for i in range(start, stop):
        row = logits[i]
        top = _LOWEST
        for g in range(n_vars):
            top = max32(top, row[g])
        total = np.float32(0)
        for g in range(n_vars):
            total += exp32(row[g] - top)
        log_normaliser[i] = top + np.log(total)


@compiled(fastmath=_FLAGS)
def softmax_rows(part, start, stop, logits, factor, out, add):  # type: ignore[no-untyped-def]
    """``out[i] (+)= factor[i] softmax(logits[i])``; ``logits`` is used up."""
    vector_code()
    n_vars = logits.shape[1]
    for i in range(start, stop):
        row, target = logits[i], out[i]
        top = _LOWEST
        for g in range(n_vars):
            top = max32(top, row[g])
        total = np.float32(0)
        for g in range(n_vars):
            e = exp32(row[g] - top)
            row[g] = e
            total += e
        scale = factor[i] / total
        if add:
            for g in range(n_vars):
                target[g] += scale * row[g]
        else:
            for g in range(n_vars):
                target[g] = scale * row[g]


@compiled(fastmath=_FLAGS)
def softmax_rounded_rows(part, start, stop, bits, base, factor, out, add):  # type: ignore[no-untyped-def]
    """``out[i] (+)= factor[i] softmax(bfloat16(bits[i]) + base)``, never leaving the row."""
    vector_code()
    n_vars = bits.shape[1]
    row = np.empty(n_vars, np.float32)
    for i in range(start, stop):
        given, target = bits[i], out[i]
        top = _LOWEST
        for g in range(n_vars):
            logit = np.uint32(np.uint32(given[g]) << np.uint32(16)).view(np.float32) + base[g]
            row[g] = logit
            top = max32(top, logit)
        total = np.float32(0)
        for g in range(n_vars):
            e = exp32(row[g] - top)
            row[g] = e
            total += e
        scale = factor[i] / total
        if add:
            for g in range(n_vars):
                target[g] += scale * row[g]
        else:
            for g in range(n_vars):
                target[g] = scale * row[g]


@compiled(fastmath=_FLAGS)
def exp_rows(part, start, stop, logits, factor, log_normaliser, out, add):  # type: ignore[no-untyped-def]
    """``out[i] (+)= factor[i] exp(logits[i] - log_normaliser[i])``."""
    vector_code()
    n_vars = logits.shape[1]
    for i in range(start, stop):
        row, target = logits[i], out[i]
        shift, scale = log_normaliser[i], factor[i]
        if add:
            for g in range(n_vars):
                target[g] += scale * exp32(row[g] - shift)
        else:
            for g in range(n_vars):
                target[g] = scale * exp32(row[g] - shift)


@compiled(fastmath=_FLAGS)
def widen_rows(part, start, stop, bits, base, out):  # type: ignore[no-untyped-def]
    """``out[i] = bfloat16(bits[i]) + base``, in float32."""
    vector_code()
    n_vars = bits.shape[1]
    for i in range(start, stop):
        row, target = bits[i], out[i]
        for g in range(n_vars):
            target[g] = np.uint32(np.uint32(row[g]) << np.uint32(16)).view(np.float32) + base[g]
