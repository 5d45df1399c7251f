"""Shares of expression from hidden units: all genes or some, normalisers known or not, against float64."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from atlasvi_kernels import SoftmaxLinear, products
from scipy.special import logsumexp, softmax

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 130, 16), (300, 5000, 128), (0, 4, 2)]
U = 2.0**-9


def make(b, g, h, *, shift=0.0):
    generator = torch.Generator().manual_seed(b + g)
    hidden = torch.randn(b, h, generator=generator).relu()
    return hidden, torch.randn(g, h, generator=generator) * 0.3, torch.randn(g, generator=generator) + shift


def logits_of(hidden, weight, bias):
    return hidden.double().numpy() @ weight.double().numpy().T + bias.double().numpy()


def run(head, hidden, **options):
    out = np.full((len(hidden), head.n_out), np.nan, np.float32)
    head.into(out, hidden, **options)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_softmax(shape):
    hidden, weight, bias = make(*shape)
    logits = logits_of(hidden, weight, bias)
    head = SoftmaxLinear(weight, bias)
    np.testing.assert_allclose(run(head, hidden), softmax(logits, 1), rtol=1e-5)
    np.testing.assert_allclose(head.log_normaliser(hidden), logsumexp(logits, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_some_genes_are_normalised_over_all(known):
    hidden, weight, bias = make(40, 3000, 64)
    genes = torch.tensor([2999, 0, 5, 5])
    head = SoftmaxLinear(weight, bias, genes)
    normaliser = torch.from_numpy(logsumexp(logits_of(hidden, weight, bias), 1)).float() if known else None
    expected = softmax(logits_of(hidden, weight, bias), 1)[:, genes]
    np.testing.assert_allclose(run(head, hidden, log_normaliser=normaliser), expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("genes", [None, torch.tensor([3, 1])])
def test_rows_have_factors_and_are_added_up(genes, precision):
    hidden, weight, bias = make(50, 20, 8)
    head = SoftmaxLinear(weight, bias, genes, precision=precision)
    factor = torch.rand(50) * 100
    once = run(head, hidden, factor=factor)
    out = once.copy()
    head.into(out, hidden, factor=2 * factor, add=True)
    np.testing.assert_allclose(out, 3 * once, rtol=1e-5)
    np.testing.assert_allclose(once, run(head, hidden) * factor.numpy()[:, None], rtol=1e-5)


@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_logits_far_from_zero(shift):
    hidden, weight, bias = make(9, 40, 8, shift=shift)
    expected = softmax(logits_of(hidden, weight, bias), 1)
    # Logits of ten thousand have 10 bits behind the point in float32.
    np.testing.assert_allclose(
        run(SoftmaxLinear(weight, bias), hidden), expected, rtol=5e-3 if abs(shift) > 1e3 else 2e-4
    )


def test_shares_too_small_for_float32_are_not_nan():
    hidden, weight, _ = make(3, 5, 2)
    bias = torch.tensor([0.0, -200.0, 0.0, -1e4, 0.0])
    found = run(SoftmaxLinear(weight, bias), hidden)
    assert np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert (found[:, [1, 3]] < 1e-30).all()


def test_nothing_depends_on_how_rows_are_cut():
    hidden, weight, bias = make(300, 5000, 32)
    whole = run(SoftmaxLinear(weight, bias), hidden)
    for rows in (slice(0, 1), slice(3, 130), slice(299, 300)):
        np.testing.assert_allclose(run(SoftmaxLinear(weight, bias), hidden[rows]), whole[rows], rtol=5e-6)


def test_several_threads_may_ask_at_once():
    hidden, weight, bias = make(256, 3000, 64)
    for precision in ("float32", "bfloat16"):
        head = SoftmaxLinear(weight, bias, precision=precision)
        expected = run(head, hidden)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: run(head, hidden), range(12)):  # noqa: B023
                np.testing.assert_allclose(found, expected, rtol=5e-6)


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 4000, 128)])
def test_what_bfloat16_loses_is_bounded_as_the_readme_says(shape, has_units, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: has_units)
    hidden, weight, bias = make(*shape)
    logits = logits_of(hidden, weight, bias)
    magnitude = hidden.double().abs().numpy() @ weight.double().abs().numpy().T
    inputs = U * (2 + U) * magnitude
    worst = inputs + U * (np.abs(logits - bias.double().numpy()) + inputs)
    bound = worst + worst.max(1, keepdims=True)
    error = np.abs(
        np.log(run(SoftmaxLinear(weight, bias, precision="bfloat16"), hidden)) - np.log(softmax(logits, 1))
    )
    assert (error <= bound + 1e-5).all()
    # It rounds in fact: a float32 product would pass any bound.
    assert error.max() > 1e-4


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda w, b: SoftmaxLinear(w[0], b), r"\(G, H\)"),
        (lambda w, b: SoftmaxLinear(w, b[:-1]), r"\(G,\)"),
        (lambda w, b: SoftmaxLinear(w, b, precision="float16"), "float16.*bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(how, words):
    _, weight, bias = make(2, 5, 3)
    with pytest.raises(ValueError, match=words):
        how(weight, bias)
