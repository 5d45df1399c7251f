"""A scorecard as a short table on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from atlasvi.scorecard.card import Latents, Likelihood, Scorecard

if TYPE_CHECKING:
    from rich.table import Table


def table(card: Scorecard) -> Table:
    """What was measured, its value, and what to hold it against."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
        title_justify="left",
        title=f"{card.model} on {escape(card.atlas)}",
    )
    shown.add_column("", style="dim")
    shown.add_column("", justify="right")
    shown.add_column("")
    for name, value, beside in rows(card):
        shown.add_row(escape(name), escape(value), escape(beside))
    return shown


def rows(card: Scorecard) -> Iterator[tuple[str, str, str]]:
    """The rows of that table."""
    if card.likelihood is not None:
        yield from _likelihood(card.likelihood)
    if card.predictive is not None:
        check = card.predictive.all_cells
        yield (
            "zeros drawn",
            f"{check.zeros_replicated:.1%}",
            f"observed {check.zeros:.1%} on {check.n_cells:,} cells",
        )
        for name, ratio in (("mean", check.mean_ratio), ("variance", check.variance_ratio)):
            if ratio is not None:
                yield f"{name}, drawn / observed", f"{ratio:.2f}", "ideal 1, median gene"
    if card.calibration is not None:
        found = card.calibration
        whose = "cells of any kind" if found.group is None else found.group
        yield (
            "genes called where none differ", f"{found.share_called:.2%}",
            f"{found.n_each} against {found.n_each} of {whose}, {len(found.splits)} times; largest |K| "
            f"{found.largest:.2f}",
        )  # fmt: skip
    if card.latents is not None:
        yield from _latents(card.latents)
    for missing in card.not_applicable:
        yield missing.part, "–", f"not applicable: {missing.reason}"


def _likelihood(found: Likelihood) -> Iterator[tuple[str, str, str]]:
    error = "" if found.elbo_error is None else f"± {found.elbo_error:,.1f}, "
    yield found.name, f"{found.elbo:,.1f}", f"{error}nats a cell, {found.n_cells:,} cells"
    yield "", "", found.which
    yield "reconstruction error", f"{found.reconstruction:,.1f}", "nats a cell, lower is better"
    if found.marginal is not None:
        n = f"{found.marginal_cells:,} cells, {found.marginal_draws:,} draws"
        yield "log p(x)", f"{found.marginal:,.1f}", f"{n}; their ELBO {found.marginal_elbo:,.1f}"
    yield "zeros", f"{found.zero_share:.1%}", found.zero_word


def _latents(found: Latents) -> Iterator[tuple[str, str, str]]:
    own, pca = found.scores
    columns = (
        (
            "batch mixing",
            own.entropy,
            pca.entropy,
            "" if found.ceiling is None else f"ceiling {found.ceiling:.3f} nats",
        ),
        ("batch silhouette", own.batch_silhouette, pca.batch_silhouette, "ideal 0"),
        ("ARI", own.ari, pca.ari, f"of 1, {found.label_key}"),
        ("NMI", own.nmi, pca.nmi, "of 1"),
        ("label silhouette", own.label_silhouette, pca.label_silhouette, "ideal 1"),
    )
    for name, value, beside, ideal in columns:
        if value is not None and beside is not None:
            yield name, f"{value:.3f}", f"PCA {beside:.3f}; {ideal}, {found.n_cells:,} cells"


__all__ = ["rows", "table"]
