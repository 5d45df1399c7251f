"""The paper's experiments in their quick form, ours alone; and how they judge what they found."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper import page
from benchmarks.paper.__main__ import EXPERIMENTS
from benchmarks.paper.batches import scores
from benchmarks.paper.data import SETS, split
from benchmarks.paper.fits import Job
from benchmarks.paper.margins import MARGINS
from benchmarks.paper.options import Options
from benchmarks.paper.record import RESULTS, Record, paired
from tests.paper.conftest import run


def test_held_out(quick: Options) -> None:
    ours, linear = run("heldout", quick)
    assert (ours["method"], linear["method"]) == ("atlasvi", "atlasvi PPCA")
    assert ours["n_train"] == 480 and ours["n_test"] == 60
    # Bounds in their order: log p(x) above an ELBO, the encoder refitted above the trained one, and the KL.
    assert ours["marginal"] > ours["elbo_refitted"] > ours["elbo"]
    assert ours["reconstruction"] > ours["elbo"]
    # A cell of 200 counts in 100 genes: far from what the likelihood of nothing known would be.
    assert -200 < ours["elbo"] < -100 and -200 < linear["log_likelihood"] < -100


def test_clustering(quick: Options) -> None:
    (row,) = run("clustering", quick)
    assert row["ari_coarse"] != row["ari"]
    assert 0 < row["nmi"] <= 1 and -1 < row["silhouette"] < 1


def test_batches(quick: Options) -> None:
    (row,) = run("batches", quick)
    assert row["mixing"] == pytest.approx(row["entropy"] / row["ceiling"])
    # Three simulated batches that differ in their shares of types, given to the model.
    assert 0.6 < row["mixing"] <= 1.05 and abs(row["batch_silhouette"]) < 0.1
    obs = SETS["little"].load().obs
    apart = np.eye(3)[obs["batch"].cat.codes] + np.random.default_rng(0).normal(0, 0.01, (len(obs), 3))
    assert scores(apart, obs, 1)["mixing"] == 0 and scores(apart, obs, 1)["batch_silhouette"] > 0.9


def test_cost(quick: Options) -> None:
    (row,) = run("cost", quick)
    assert not row["stopped"] and row["peak_mib"] > 50
    assert 0 < row["seconds"] < row["all_seconds"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_pages_are_what_the_records_say(name: str) -> None:
    path = RESULTS / f"{name}.json"
    text = (page.DOCS / f"evidence-{name}.md").read_text()
    tables = import_module(f"benchmarks.paper.{name}").tables(Record(path, {}))
    for key in tables:
        assert f"<!-- {name}: {key} -->" in text
    assert page.filled(text, name, tables) == text


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((1.0, 1.1, 0.9), "better"),
        ((0.02, -0.02, 0.01), "no worse"),
        ((-1.0, 1.0, -0.5), "undecided"),
        ((-1.0, -1.1, -0.9), "worse"),
        ((1.0,), "one seed"),
        # Worse for certain, and by less than matters.
        ((-0.05, -0.051, -0.049), "no worse"),
    ],
)
def test_words(gains: tuple[float, ...], word: str) -> None:
    theirs = dict.fromkeys(range(len(gains)), 5.0)
    ours = {seed: 5.0 + gain for seed, gain in enumerate(gains)}
    assert paired(ours, {**theirs, 99: 0.0}, margin=0.1, higher=True).word == word
    turned = {seed: 5.0 - gain for seed, gain in enumerate(gains)}
    assert paired(turned, theirs, margin=0.1, higher=False).word == word


def test_a_margin_is_a_share_or_a_number() -> None:
    assert MARGINS["elbo"].of(-2_000.0) == pytest.approx(2.0)
    assert MARGINS["ari"].of(0.7) == 0.02


def test_splits_take_each_cell_once() -> None:
    for parts, sizes in (
        (split(1_003, 3), (803, 100, 100)),
        (SETS["simulated_4k"].split(14_500, 1), (4_000, 500, 10_000)),
    ):
        assert tuple(map(len, parts)) == sizes
        together = np.sort(np.concatenate(parts))
        assert np.array_equal(together, np.arange(sum(sizes)))
    assert not np.array_equal(split(1_003, 3)[2], split(1_003, 4)[2])


def test_jobs_have_names_of_their_own() -> None:
    job = Job("atlasvi", "little")
    changes = (
        {}, {"seed": 1}, {"n_genes": 10}, {"n_latent": 11}, {"max_epochs": 12}, {"method": "scvi-tools"},
        {"options": {"prior": "mog"}}, {"data": "demo"},
    )  # fmt: skip
    others = [replace(job, **change) for change in changes]
    assert len({other.name for other in others}) == len(others)


def test_a_record_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "found.json", {"x": "what it is"})
    record.add({"seed": 0, "x": 1.0}, {"seed": 1, "x": None})
    again = Record(tmp_path / "found.json", {})
    assert again.values("x") == {0: 1.0}
    assert again.has(seed=1) and not again.has(seed=2)
    assert [row["seed"] for row in again.only(seed=1).rows] == [1]
