"""Tables and pictures of a page from the record, so that no figure there was typed.

A page holds ``<!-- NAME: KEY -->`` before each table and ``<!-- end -->`` behind it.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from benchmarks.paper.options import Options
from benchmarks.paper.record import Record

DOCS = Path(__file__).resolve().parents[2] / "docs"


def write(name: str, options: Options) -> None:
    """Fill in ``docs/evidence-NAME.md``, and draw its pictures."""
    experiment, record = (
        import_module(f"benchmarks.paper.{name}"),
        Record(options.results / f"{name}.json", {}),
    )
    for picture, svg in experiment.pictures(record).items():
        (DOCS / picture).write_text(svg)
    page = DOCS / f"evidence-{name}.md"
    page.write_text(filled(page.read_text(), name, experiment.tables(record)))


def filled(text: str, name: str, tables: dict[str, str]) -> str:
    """The page with these tables."""
    for key, made in tables.items():
        between = re.compile(rf"(<!-- {name}: {re.escape(key)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    return text
