"""What the paper's experiments ask of models, in their quick form; and the measures by which they judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats

from benchmarks.paper import learnt
from benchmarks.paper.comparisons import COMPARISONS, Comparison
from benchmarks.paper.idr import idr
from benchmarks.paper.imputation import correlations, permuted_within
from benchmarks.paper.options import Options
from benchmarks.paper.record import RESULTS
from benchmarks.paper.sides.comparing import of_p_values
from tests.paper.conftest import run


def test_differential(quick: Options) -> None:
    rows = run("differential", quick)
    asked = [row for row in rows if row["reference"] == "truth"]
    null = [row for row in rows if row["reference"] == "none"]
    assert len(asked) == len(null) == 3
    for row in asked:
        # Types that differ in a quarter of the genes, 100 cells a side: found, and in the right direction.
        assert row["auroc"] > 0.9 and row["change_rank"] > 0.2
        assert row["power"] > row["called_else"]
    # Of cells of one type nothing is called.
    assert all(row["called"] < 0.02 for row in null)


def test_imputation(quick: Options) -> None:
    rows = run("imputation", quick)
    found = {(row["corruption"], row["method"]): row for row in rows}
    for what in ("zeroed 9%", "zeroed 1%", "binomial"):
        constant, mean, ours = (found[what, m] for m in ("constant 1", "gene's mean", "atlasvi"))
        assert max(ours["mean_l1_2"], mean["mean_l1_2"]) < constant["mean_l1_2"]
        assert constant["spearman"] is None and 0.2 < ours["spearman"] < 1
        # The same entries for all.
        assert ours["n"] == mean["n"] == constant["n"] > 100
    # In permuted counts next to nothing correlates, and more does in what is imputed.
    assert found["permuted", "counts as they are"]["mean_r"] < 0.1
    assert found["permuted", "counts as they are"]["mean_r"] < found["permuted", "atlasvi"]["mean_r"]


def test_learnt(quick: Options) -> None:
    found = {row["part"]: row for row in run("learnt", quick)}
    assert set(found) == set(learnt.QUICK_PARTS)
    assert found["library"]["with_totals"] > 0.9
    # A gamma spreads counts, so fewer cells have one than a binomial of the mean has it.
    assert found["detection"]["binomial"] < 0.12
    assert found["zeros"]["nb_genes"] < -0.5
    assert abs(found["noise"]["blob"]) < 0.1


def test_idr_finds_what_was_put_in() -> None:
    """Simulated as in Li et al. (2011): a fifth ranked alike with a correlation of 0.8."""
    rng = np.random.default_rng(0)
    n, p = 20_000, 0.2
    alike = rng.random(n) < p
    shared = rng.multivariate_normal([2.5, 2.5], [[1, 0.8], [0.8, 1]], n)
    z = np.where(alike[:, None], shared, rng.normal(size=(n, 2)))
    # Any increasing function of the scores leaves the ranks as they are.
    found = idr(np.exp(z[:, 0]), z[:, 1] ** 3, p)
    assert found.rho == pytest.approx(0.8, abs=0.05) and found.mu == pytest.approx(2.5, abs=0.15)
    assert found.sigma == pytest.approx(1.0, abs=0.1)
    kept = found.rate <= 0.05
    assert np.mean(~alike[kept]) == pytest.approx(0.05, abs=0.02)
    assert 0.6 < kept[alike].mean() <= 1
    with pytest.raises(ValueError, match="between 0 and 1"):
        idr(z[:, 0], z[:, 1], 1.0)


def test_idr_of_chance_is_high() -> None:
    rng = np.random.default_rng(1)
    found = idr(rng.normal(size=5000), rng.normal(size=5000), 0.1)
    assert (found.rate <= 0.05).mean() < 0.01


def test_adjusted_p_values() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(900), rng.random(100) * 1e-4])
    p[3] = np.nan
    adjusted = scipy.stats.false_discovery_control(np.where(np.isnan(p), 1.0, p))
    assert np.array_equal(of_p_values(p, p).called, adjusted < 0.05)


def test_cells_are_drawn_apart() -> None:
    obs = pd.DataFrame({"label": ["a"] * 300 + ["b"] * 150, "group": ["x", "y"] * 225})
    for comparison in (
        Comparison("a - b", ("a",), ("b",)),
        Comparison("a - a", ("a",), ("a",)),
        Comparison("x - y", ("x",), ("y",), "group", ("label", ("a",))),
    ):
        one, two = comparison.drawn(obs, 0, 0)
        assert len(set(one)) == len(set(two)) == 100 and not set(one) & set(two)
        assert not np.array_equal(one, comparison.drawn(obs, 0, 1)[0])
        assert not np.array_equal(one, comparison.drawn(obs, 1, 0)[0])
    assert set(obs["group"][one]) == {"x"} and set(obs["label"][two]) == {"a"}
    with pytest.raises(ValueError, match="150 cells, 200"):
        Comparison("a - b", ("a",), ("b",), n_cells=200).drawn(obs, 0, 0)
    assert all(len({c.name for c in some}) == len(some) for some in COMPARISONS.values())


def test_permuted_within_types() -> None:
    rng = np.random.default_rng(0)
    level = rng.gamma(2, 2, (400, 1)) * np.ones(30)
    types = np.repeat(["a", "b"], 200)
    x = sp.csr_matrix(rng.poisson(level))
    y = permuted_within(x, types, 0)
    for cells in (slice(0, 200), slice(200, 400)):
        assert np.array_equal(np.sort(x[cells].toarray(), 0), np.sort(y[cells].toarray(), 0))
    assert correlations(x.toarray())["mean_r"] > 0.3 > 0.1 > correlations(y.toarray())["mean_r"]


def test_one_blob_or_three() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(600, 4))
    three = one + 12 * np.repeat(np.eye(3, 4), 200, axis=0)
    assert abs(learnt.blob(one, 0)[0]) < 0.05 < 0.3 < learnt.blob(three, 0)[0]


def test_along_the_graph() -> None:
    """A spiral: its ends are near each other, but not along it."""
    age = np.linspace(0, 1, 500)
    angle = 5 * age
    spiral = np.stack([np.cos(angle), np.sin(angle)], 1) * (1 + 0.5 * age[:, None])
    assert learnt.along_graph(spiral, age) > 0.99
    far_apart = np.concatenate([spiral, spiral[-50:] + 100])
    assert learnt.along_graph(far_apart, np.linspace(0, 1, 550)) > 0.9


def test_two_graphs() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(80, 3))
    two = one + rng.normal(size=(80, 3))
    fold, flattened = learnt.of_graphs(one, two, 10)
    from sklearn.neighbors import kneighbors_graph

    a, b = (kneighbors_graph(x, 10).toarray()[~np.eye(80, dtype=bool)] for x in (one, two))
    assert flattened == pytest.approx(scipy.stats.spearmanr(a, b)[0])
    assert fold == pytest.approx((a * b).mean() / (a.mean() * b.mean()))
    assert learnt.of_graphs(one, one, 10)[1] == pytest.approx(1)


def test_drawn_without_replacement() -> None:
    found = np.exp(learnt._log_unseen(np.array([20.0]), np.array([200.0]), np.array([7.0])))
    assert found == pytest.approx(scipy.stats.hypergeom.pmf(0, 200, 7, 20))


def test_r_squared() -> None:
    truth = np.array([1.0, 2.0, 4.0])
    assert learnt._r2(truth, truth) == 1 and learnt._r2(np.full(3, truth.mean()), truth) == 0


def test_results_have_no_paths_of_a_machine() -> None:
    for path in Path(RESULTS).glob("*.json"):
        assert '"/' not in path.read_text()
