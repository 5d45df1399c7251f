"""Markdown tables of what is in a record, and differences of ours to the peer's, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.paper.data import SETS
from benchmarks.paper.margins import MARGINS
from benchmarks.paper.methods import OURS, PEER
from benchmarks.paper.record import Difference, Record, paired

# How many there are to be; a table says how many there are.
SEEDS = 5


@dataclass(frozen=True)
class Compared:
    """A difference, and of what.

    Args:
        data: name of the set.
        genes: how many, or ``"all"``.
        measure: its name in the record.
        ours: mean over the seeds that both have.
        theirs: likewise.
        difference: paired by seed.
    """

    data: str
    genes: int | str
    measure: str
    ours: float
    theirs: float
    difference: Difference


def differences(
    record: Record,
    sets: Iterable[tuple[str, int | str]],
    measures: Sequence[str],
    ours: str = OURS,
    theirs: str = PEER,
) -> list[Compared]:
    """Of each set and measure that both have a value of."""
    found = []
    for data, genes in sets:
        for measure in measures:
            a = record.values(measure, data=data, genes=genes, method=ours)
            b = record.values(measure, data=data, genes=genes, method=theirs)
            shared = sorted(set(a) & set(b))
            if not shared:
                continue
            means = [float(np.mean([side[s] for s in shared])) for side in (a, b)]
            margin = MARGINS[measure]
            gain = paired(a, b, margin=margin.of(means[1]), higher=margin.higher)
            found.append(Compared(data, genes, measure, *means, gain))
    return found


def beside_peer(
    record: Record, sets: Iterable[tuple[str, int | str]], measures: Sequence[str], ours: str = OURS
) -> str:
    """The table of a method of ours less the peer."""
    return difference_table(differences(record, sets, measures, ours=ours), ours=ours)


def difference_table(found: Sequence[Compared], ours: str = OURS, theirs: str = PEER) -> str:
    """A line for each."""
    lines = []
    for c in found:
        d, digits = c.difference, _digits(c.theirs)
        ends = [number(end, sign=True, digits=digits) for end in (d.low, d.high)]
        lines.append(
            [
                c.data, genes_shown(c.genes), NAMES.get(c.measure, c.measure),
                number(c.ours), number(c.theirs), number(d.gain, sign=True, digits=digits),
                " to ".join(ends) if d.n > 1 else "",
                number(d.margin, digits=max(digits, 2)), f"{d.n} of {SEEDS}", d.word,
            ]
        )  # fmt: skip
    heads = ("data", "genes", "measure", ours, theirs, "gain", "95 % interval", "margin", "seeds", "")
    return table(heads, lines)


NAMES = {
    "elbo": "ELBO",
    "elbo_refitted": "ELBO, refitted",
    "marginal": "importance sampling",
    "ari": "ARI",
    "nmi": "NMI",
    "ari_coarse": "ARI, coarse",
    "nmi_coarse": "NMI, coarse",
    "silhouette": "silhouette",
    "mixing": "mixing, share of ceiling",
    "batch_silhouette_size": "silhouette of batches, size",
    "ilisi": "iLISI",
    "kbet": "kBET",
    "auroc": "AUROC",
    "idr_rho": "IDR's correlation",
    "change_rank": "changes, rank r",
    "median_l1": "median L1",
    "mean_l1": "mean L1",
    "spearman": "rank r",
    "median_l1_2": "median L1, 2 or more",
    "mean_l1_2": "mean L1, 2 or more",
    "spearman_2": "rank r, 2 or more",
    "blob": "clusters in noise",
    "blob_ari": "types in noise",
    "time": "embryo time",
    "time_near": "time of neighbours",
    "mixtures": "RNA mixtures",
    "mixtures_near": "mixtures of neighbours",
    "fold": "neighbours shared, fold",
    "flattened": "neighbours, rank r",
    "shift_r2": "R² of means",
}


def sets_of(record: Record) -> list[tuple[str, int | str]]:
    """Each set and number of genes that there are rows of."""
    return list(dict.fromkeys((row["data"], row["genes"]) for row in record.rows))


def method_lines(record: Record, methods: Sequence[str], measures: Sequence[str]) -> list[list[str]]:
    """A line of a table for each set and method: their names, means of the measures, and seeds."""
    lines = []
    for data, genes in sets_of(record):
        for method in methods:
            key = {"data": data, "genes": genes, "method": method}
            if record.has(**key):
                values = [mean_of(record, m, **key) for m in measures]
                lines.append([data, genes_shown(genes), method, *values, n_seeds(record, **key)])
    return lines


def panels(record: Record, methods: Sequence[str], measure: str) -> dict[str, dict[str, list[float]]]:
    """For a picture: from set to method to values, of the genes that all methods are run with."""
    found = {}
    for data, genes in sets_of(record):
        if genes == (SETS[data].gene_sets[0] or "all"):
            of = {m: record.values(measure, data=data, genes=genes, method=m) for m in methods}
            found[data] = {m: list(values.values()) for m, values in of.items() if values}
    return found


def mean_of(record: Record, measure: str, **key: Any) -> str:
    """Mean over seeds, with the standard deviation where there are several; empty without a value."""
    values = list(record.values(measure, **key).values())
    if not values:
        return ""
    mean, digits = float(np.mean(values)), _digits(float(np.mean(values)))
    spread = f" ± {number(float(np.std(values, ddof=1)), digits=digits)}" if len(values) > 1 else ""
    return number(mean, digits=digits) + spread


def n_seeds(record: Record, **key: Any) -> str:
    """How many."""
    return f"{len({row['seed'] for row in record.where(**key)})} of {SEEDS}"


def number(value: float, *, sign: bool = False, digits: int | None = None) -> str:
    """As many digits as tell something."""
    if digits is None:
        digits = _digits(value)
    return f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"


def _digits(value: float) -> int:
    return 1 if abs(value) >= 100 else 3


def genes_shown(genes: int | str) -> str:
    """How many, as tables say it."""
    return genes if isinstance(genes, str) else f"{genes:,}"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int = 2) -> str:
    """Markdown; the first columns are words."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
