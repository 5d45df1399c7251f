"""What an experiment found: rows kept as JSON at once, tables, and differences that are paired by seed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Record:
    """Rows of one experiment in a JSON file, each written as soon as it is there.

    A row has a key (say data, method and seed), what was measured, and the versions that made it. An
    experiment that was stopped goes on: it asks with `has` before it makes a row.

    Args:
        path: of the file, which is read if it is there.
        definitions: what each measure is, for the head of the file.
    """

    def __init__(self, path: Path, definitions: Mapping[str, str]) -> None:
        self.path = path
        self.definitions = dict(definitions)
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return bool(self.where(**key))

    def where(self, **key: Any) -> list[Row]:
        """Rows with these values, in the order in which they were made."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def only(self, **key: Any) -> Record:
        """A view of the rows with these values."""
        found = copy.copy(self)
        found.rows = self.where(**key)
        return found

    def add(self, *rows: Row) -> None:
        """Keep rows, on disk too: all of them or none."""
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps(self.definitions, indent=1)
        part.write_text(f'{{"definitions": {head},\n "rows": [\n  {lines}\n ]}}\n')
        os.replace(part, self.path)

    def values(self, measure: str, seeds: list[int] | None = None, **key: Any) -> dict[int, float]:
        """From seed to what was measured."""
        found = {row["seed"]: row[measure] for row in self.where(**key) if row.get(measure) is not None}
        return found if seeds is None else {seed: found[seed] for seed in seeds}


@dataclass(frozen=True)
class Difference:
    """Ours less theirs, paired by seed.

    Args:
        gain: mean over the seeds, positive where ours is better.
        low: of the 95 % interval (paired t).
        high: of it.
        margin: a loss smaller than this does not matter; named before measuring.
        n: seeds.
    """

    gain: float
    low: float
    high: float
    margin: float
    n: int

    @property
    def word(self) -> str:
        """What the interval says."""
        if not np.isfinite(self.low):
            return "one seed"
        if self.low > 0:
            return "better"
        if self.low > -self.margin:
            return "no worse"
        return "worse" if self.high < 0 else "undecided"


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, margin: float, higher: bool
) -> Difference:
    """Compare two methods over the seeds that both have."""
    seeds = sorted(set(ours) & set(theirs))
    gains = np.array([ours[s] - theirs[s] for s in seeds]) * (1 if higher else -1)
    if len(gains) < 2:
        return Difference(float(gains.mean()) if len(gains) else np.nan, np.nan, np.nan, margin, len(gains))
    half = scipy.stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    mean = float(gains.mean())
    return Difference(mean, mean - float(half), mean + float(half), margin, len(gains))
