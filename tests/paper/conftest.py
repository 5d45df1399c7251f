"""What tests of the paper's experiments share: their quick form, and that it goes on where it was."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from benchmarks.paper.fits import Pythons
from benchmarks.paper.options import Options
from benchmarks.paper.record import Record


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Into folders that the tests share, so that a fit is made once."""
    work = tmp_path_factory.mktemp("paper")
    return Options(seeds=1, quick=True, work=work, results=work / "results", pythons=Pythons(here=True))


def run(name: str, quick: Options) -> list[dict[str, object]]:
    """Rows of an experiment, which goes on where it was, with nothing left to do."""
    experiment = import_module(f"benchmarks.paper.{name}")
    experiment.run(quick)
    path = quick.results / f"{name}.json"
    before = path.read_bytes()
    experiment.run(quick)
    assert path.read_bytes() == before
    for made in experiment.tables(Record(path, {})).values():
        assert "nan" not in made
    for svg in experiment.pictures(Record(path, {})).values():
        assert svg.startswith("<svg ") and "nan" not in svg
    return json.loads(before)["rows"]
