"""What every experiment is told on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.paper.fits import Pythons
from benchmarks.paper.record import RESULTS


@dataclass(frozen=True)
class Options:
    """Of one call.

    Args:
        seeds: how many, from 0.
        data: names of sets, or none for the experiment's own.
        methods: names, or none for the experiment's own.
        quick: atlasvi alone, on little data, into a folder of its own: what the tests run.
        variable: of `differential` and `imputation`, the most variable genes only.
        work: folder of fits, which are made once.
        results: folder of the JSON files.
        pythons: interpreters of the peers.
        limit: of `cost`, seconds after which a method counts as stopped.
        largest: of `cost`, the largest size, as cells of 2,000 genes.
    """

    seeds: int = 5
    data: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    quick: bool = False
    variable: bool = False
    work: Path = Path(".paper")
    results: Path = RESULTS
    pythons: Pythons = field(default_factory=Pythons)
    limit: float = 3_600.0
    largest: int = 1_000_000
