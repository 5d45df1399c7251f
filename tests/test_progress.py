"""What bars say, on a terminal and off one."""

import re

import pytest

from atlasvi import progress


def test_work_that_may_end_before_says_so(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    for at_most, said in ((True, ", at most 90 to go"), (False, ", 90 to go")):
        with progress.bar("train", 100, "cells", at_most=at_most) as advance:
            advance(10, "epoch 1")
        first, last = capsys.readouterr().err.splitlines()
        assert first.endswith(f"epoch 1{said}")
        assert last.endswith("epoch 1")


@pytest.mark.parametrize(("at_most", "shown"), [(True, "100%"), (False, " 10%")])
def test_on_a_terminal_it_is_whole_where_it_ended_by_itself(at_most, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.bar("train", 100, "cells", at_most=at_most) as advance:
        advance(10, "epoch 1")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()[-1]
    last = last.split("\r")[-1]
    assert shown in last
    assert "at most" not in last
