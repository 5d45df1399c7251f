"""One self-contained page on a trained model: how it trained, what it found, how well, and at what cost.

`Report` holds the parts, which can come from the demo or from any model; `write_report` sets them as
HTML with inline SVG: no script, no outside resource, and the same bytes for the same parts.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from . import plots
from .errors import CellsError, OptionError, StoreError
from .memory import Watch
from .metrics import DecodeCheck, LatentScores, subsample

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step took.

    Args:
        name: such as ``train``.
        seconds: of wall time.
        peak_bytes: highest memory of the process during the step, or ``None`` if not measured.
        note: what was done, in a few words.
    """

    name: str
    seconds: float
    peak_bytes: int | None = None
    note: str = ""


class Stopwatch:
    """Times steps and takes their peak memory (anonymous, of the whole process), for a report's table.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.step("train", "3 epochs"):
        ...     pass
        >>> watch.steps[0].name
        'train'
    """

    def __init__(self) -> None:
        self._steps: list[StepCost] = []

    @property
    def steps(self) -> tuple[StepCost, ...]:
        """The steps that have ended, in order."""
        return tuple(self._steps)

    @contextmanager
    def step(self, name: str, note: str = "") -> Iterator[None]:
        """Time what is done within; a step that fails is not kept."""
        with Watch() as watch:
            yield
        self._steps.append(StepCost(name, watch.seconds, watch.peak_bytes, note))


@dataclass(frozen=True, slots=True)
class ElboCurve:
    """The negative ELBO, in nats per cell, epoch by epoch.

    Args:
        epochs: their numbers.
        train: one value an epoch.
        validation: one value an epoch, NaN where it was not measured; empty without validation.
    """

    epochs: tuple[int, ...]
    train: tuple[float, ...]
    validation: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A 2-D picture of a latent.

    Args:
        xy: ``(n, 2)``.
        types: ``(n,)`` categorical, or ``None`` where no types are known.
        batches: ``(n,)`` categorical.
        n_total: number of cells of which these are a sample.
        method: how it was made, for the caption.
    """

    xy: NDArray[Any]
    types: pd.Categorical | None
    batches: pd.Categorical
    n_total: int
    method: str


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoded beside true expression.

    Args:
        check: the comparison.
        genes: names of its genes.
        shown: positions among them of those in the heat map, in its order.
    """

    check: DecodeCheck
    genes: tuple[str, ...]
    shown: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All that a report shows. Parts that are empty or ``None`` are left out.

    Args:
        title: of the page.
        summary: one sentence, after which a reader may stop.
        n_obs: number of cells.
        n_vars: number of genes.
        n_batches: number of batches.
        steps: in the order they were done.
        elbo: of the training.
        embedding: of the model's latent.
        scores: the model first, then what it is compared with.
        scored: on which cells and against what the scores were taken, in a sentence.
        decoding: against known truth.
        seed: of everything.
        versions: ``(package, version)`` pairs.
        command: the line that made this.
        snippet: lines of Python with which to go on.
    """

    title: str
    summary: str
    n_obs: int
    n_vars: int
    n_batches: int
    steps: tuple[StepCost, ...]
    elbo: ElboCurve | None = None
    embedding: Embedding | None = None
    scores: tuple[LatentScores, ...] = ()
    scored: str = ""
    decoding: Decoding | None = None
    seed: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    command: str = ""
    snippet: str = ""

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def peak_bytes(self) -> int | None:
        """Highest memory in any step, or ``None`` if none was measured."""
        measured = [step.peak_bytes for step in self.steps if step.peak_bytes is not None]
        return max(measured, default=None)


def embed(
    latent: NDArray[Any],
    batches: Any,
    types: Any = None,
    *,
    seed: int,
    max_cells: int = 4_000,
    perplexity: float = 30.0,
) -> Embedding:
    """A t-SNE of a seeded subsample of the cells (van der Maaten 2008), started from the first components.

    Args:
        latent: ``(n, k)``.
        batches: ``(n,)``.
        types: ``(n,)``, or ``None``.
        seed: of the subsample.
        max_cells: time grows somewhat faster than this: 4,000 cells take about ten seconds.
        perplexity: about the number of neighbours that count.

    Raises:
        CellsError: lengths that differ, or fewer than five cells.
    """
    from sklearn.manifold import TSNE

    latent = np.asarray(latent, np.float32)
    batches = pd.Categorical(batches)
    types = None if types is None else pd.Categorical(types)
    if len(latent) < 5 or len(batches) != len(latent) or (types is not None and len(types) != len(latent)):
        n_types = "no" if types is None else len(types)
        raise CellsError(
            f"latent of {len(latent)} cells, {len(batches)} batches and {n_types} types given to embed; "
            "give one batch and type for each of at least five cells"
        )
    rows = subsample(len(latent), max_cells, seed=seed)
    perplexity = min(perplexity, (len(rows) - 1) / 3)
    # The number of threads is fixed because the order of their sums is part of the result.
    tsne = TSNE(2, init="pca", perplexity=perplexity, max_iter=750, random_state=seed % (1 << 32), n_jobs=2)
    return Embedding(
        xy=tsne.fit_transform(latent[rows]),
        types=None if types is None else types[rows],
        batches=batches[rows],
        n_total=len(latent),
        method=f"t-SNE, perplexity {perplexity:.0f}, started from the first two components",
    )


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write a report as one HTML file, whole or not at all.

    Args:
        path: of the file; an existing one is replaced.
        report: what to show.

    Returns:
        The path.

    Raises:
        StoreError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> report = Report("A model", "It was trained.", 10, 5, 1, (StepCost("train", 2.0),))
        >>> write_report(tempfile.mkdtemp() + "/report.html", report).name
        'report.html'
    """
    return write_text(Path(path), report_html(report))


def report_html(report: Report) -> str:
    """The page as text."""
    sections = (
        _training(report),
        latent_section(report.embedding),
        _scores(report),
        _decoding(report),
        _costs(report),
        _making(report),
    )
    return page(report.title, f"{_head(report)}\n{''.join(sections)}")


def page(title: str, body: str, *, style: str = "") -> str:
    """A page that stands alone: no script, no outside resource, light and dark as the reader has it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{plots.STYLE}{_STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def readme_picture(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the 2-D views by type and by batch and the ELBO curve as one SVG file.

    Raises:
        OptionError: a path that does not end in ``.svg``, or a report without these parts.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".svg":
        raise OptionError(f"the picture is an SVG and would be named {path.name!r}; end the path in .svg")
    if report.embedding is None or report.embedding.types is None or report.elbo is None:
        raise OptionError("the picture needs a report with an embedding, its types and an ELBO curve")
    side, gap, top = 372, 24, 52
    by_type, by_batch = _views(report.embedding, side)
    curve = _curve(report.elbo, width=side + 10, height=side)
    lefts = [gap, 2 * gap + side, 3 * gap + 2 * side - 6]
    n_batches = len(report.embedding.batches.remove_unused_categories().categories)
    heads = ("Latent space, by cell type", f"The same, by batch ({n_batches})", "Training")
    body = "".join(
        f'<text x="{left + 2}" y="35" class="strong" style="font-size:16px">{head}</text>'
        + plots.place(svg, left, top)
        for left, head, svg in zip(lefts, heads, (by_type, by_batch, curve), strict=True)
    )
    width = 4 * gap + 3 * side
    alt = (
        f"Left and middle: 2-D view of the latent space of {report.n_obs:,} cells, coloured by type and "
        "by batch. Right: negative ELBO by epoch."
    )
    return write_text(path, plots.standalone(body, width, top + side + gap, alt))


def format_seconds(seconds: float) -> str:
    """A duration as a person would say it: ``0.4 s``, ``12 s``, ``3 min 07 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(n_bytes: int) -> str:
    """A size in decimal units: ``14 MB``, ``1.32 GB``."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    if n_bytes < 999.5e6:
        return f"{n_bytes / 1e6:.0f} MB"
    return f"{n_bytes / 1e9:.2f} GB"


def package_versions(*names: str) -> tuple[tuple[str, str], ...]:
    """``(name, version)`` of Python and of installed packages; by default those that decide results."""
    names = names or ("atlasvi", "torch", "numba", "numpy", "scikit-learn", "zarr", "anndata")
    # torch says which build it is, such as 2.13.0+cu130, and its metadata need not.
    found = {name: torch.__version__ if name == "torch" else version(name) for name in names}
    return ("Python", platform.python_version()), *found.items()


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all; the path.

    Raises:
        StoreError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write {path}: {error.strerror}; give a path in a folder that exists and has space"
        ) from error
    return path


def _head(report: Report) -> str:
    figures = [
        (f"{report.n_obs:,}", "cells"),
        (f"{report.n_vars:,}", "genes"),
        (f"{report.n_batches:,}", "batch" if report.n_batches == 1 else "batches"),
        (format_seconds(report.seconds), "in all"),
    ]
    if report.peak_bytes is not None:
        figures.append((format_bytes(report.peak_bytes), "peak memory"))
    return header(report.title, report.summary, figures)


def header(title: str, lead: str, figures: Sequence[tuple[str, str]]) -> str:
    """The head of a page: title, a sentence after which a reader may stop, ``(value, name)`` figures."""
    tiles = "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for value, name in figures)
    return (
        f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>"
        f'<dl class="figures">{tiles}</dl></header>'
    )


def section(title: str, body: str) -> str:
    """A part of a page, under its heading."""
    return f"<section><h2>{title}</h2>\n{body}</section>\n"


def figure(body: str, caption: str) -> str:
    """A chart with what is to be said of it, both HTML."""
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def _curve(elbo: ElboCurve, *, width: int = 560, height: int = 330) -> str:
    lines = [plots.Line("training", elbo.epochs, elbo.train, "var(--accent)")]
    if elbo.validation:
        lines.append(plots.Line("validation", elbo.epochs, elbo.validation, "var(--accent-2)"))
    alt = f"Negative ELBO over {len(elbo.epochs)} epochs, ending at {elbo.train[-1]:,.1f} nats per cell"
    label = "negative ELBO, nats per cell"
    return plots.line_chart(lines, x_label="epoch", y_label=label, alt=alt, width=width, height=height)


def _training(report: Report) -> str:
    if report.elbo is None:
        return ""
    elbo = report.elbo
    facts = [("Epochs", f"{len(elbo.epochs):,}"), ("Training, last epoch", f"{elbo.train[-1]:,.1f} nats")]
    measured = [value for value in elbo.validation if math.isfinite(value)]
    if measured:
        facts.append(("Validation, last", f"{measured[-1]:,.1f} nats"))
        facts.append(("Validation, best", f"{min(measured):,.1f} nats"))
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts)
    caption = (
        "Lower is better. The vertical axis is fitted to what follows the first tenth of the epochs; "
        "the first values may lie above it."
    )
    table = (
        '<div><table class="facts"><caption class="hidden">Training in numbers</caption>'
        f"<tbody>{rows}</tbody></table>"
        "<p class=note>The negative ELBO bounds from above how many nats the model needs to describe a "
        "cell. Where training keeps falling and validation does not, it learns these cells by heart.</p>"
        "</div>"
    )
    return section("Training", f'<div class="wide-left">{figure(_curve(elbo), caption)}{table}</div>')


def _views(embedding: Embedding, size: int = 500) -> tuple[str, str]:
    """The scatter by type (empty without types) and by batch."""
    n, diameter = len(embedding.xy), 3.6 if size >= 500 else 2.9
    by_type = ""
    if embedding.types is not None:
        types, names, colours = _classes(embedding.types)
        alt = f"2-D view of {n:,} cells coloured by cell type: {', '.join(names)}"
        labels = plots.marks(names, size)
        by_type = plots.scatter(
            embedding.xy, types, colours, labels=labels, alt=alt, size=size, diameter=diameter
        )
    batches, names, colours = _classes(embedding.batches, second=True)
    alt = f"2-D view of the same {n:,} cells coloured by batch: {', '.join(names)}"
    return by_type, plots.scatter(embedding.xy, batches, colours, alt=alt, size=size, diameter=diameter)


def _classes(column: pd.Categorical, *, second: bool = False) -> tuple[NDArray[Any], list[str], list[str]]:
    column = column.remove_unused_categories()
    names = [str(level) for level in column.categories]
    return np.asarray(column.codes), names, plots.palette(names, grey=("empty", "unknown"), second=second)


def latent_section(
    embedding: Embedding | None, type_name: str = "cell type", batch_name: str = "batch"
) -> str:
    """The latent in two dimensions, by type and by batch if there is more than one; "" without one."""
    if embedding is None:
        return ""
    by_type, by_batch = _views(embedding)
    parts = []
    if embedding.types is not None:
        _, names, colours = _classes(embedding.types)
        key = plots.legend(names, colours, plots.marks(names, 500))
        parts.append(f"<div><h3>By {escape(type_name)}</h3>{by_type}{key}</div>")
    _, names, colours = _classes(embedding.batches, second=True)
    if len(names) > 1 or not parts:
        parts.append(f"<div><h3>By {escape(batch_name)}</h3>{by_batch}{plots.legend(names, colours)}</div>")
    n = len(embedding.xy)
    cells = f"All {n:,} cells" if n == embedding.n_total else f"{n:,} of {embedding.n_total:,} cells"
    caption = (
        f"{cells}; {escape(embedding.method)}. <strong>This picture is for looking and not for measuring"
        "</strong>: sizes and distances in it mean little. The scores below are taken on the latent itself."
    )
    return section("The latent space", figure(f'<div class="pair">{"".join(parts)}</div>', caption))


def _scores(report: Report) -> str:
    if not report.scores:
        return ""
    ceiling = report.scores[0].mixing.ceiling
    columns: list[tuple[str, Callable[[LatentScores], float], float]] = [
        ("ARI", lambda s: s.clustering.ari, 1.0),
        ("NMI", lambda s: s.clustering.nmi, 1.0),
        (f"Batch mixing <small>of {ceiling:.2f} nats</small>", lambda s: s.mixing.entropy, ceiling),
        ("Silhouette", lambda s: s.silhouette, 1.0),
    ]
    best = [max(round(value(scores), 3) for scores in report.scores) for _, value, _ in columns]
    rows = []
    for scores in report.scores:
        cells = []
        for (_, value, full), top in zip(columns, best, strict=True):
            number = round(value(scores), 3)
            cells.append(bar_cell(f"{number:.3f}", number / full if full else 0.0, strong=number == top))
        rows.append(f'<tr><th scope="row">{escape(scores.name)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name, *_ in columns)
    first = report.scores[0]
    note = (
        f"{escape(report.scored)} ARI and NMI: k-means with {first.clustering.n_clusters} clusters on "
        f"{first.clustering.n_used:,} cells against the types. Batch mixing: entropy of the batches among "
        f"the {first.mixing.n_neighbors} nearest neighbours of random cells, at most {ceiling:.2f}, which "
        f"batches of the same composition reach when mixed. Silhouette: of the types, on "
        f"{first.n_silhouette:,} cells. Higher is better in each; the best is in bold."
    )
    table = (
        '<div class="scroll"><table class="scores"><caption class="hidden">Scores of each latent</caption>'
        f'<thead><tr><th scope="col">Latent</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )
    return section("Scores", f"{table}<p class=note>{note}</p>")


def bar_cell(text: str, share: float, *, strong: bool = False, kind: str = "") -> str:
    """A cell of a table: a number, and a bar of its share of the full width under it."""
    share = min(1.0, max(0.0, share))
    number = f"<b>{text}</b>" if strong else text
    return (
        f'<td class="bar {kind}"><span>{number}</span>'
        f'<i aria-hidden="true"><u style="width:{100 * share:.1f}%"></u></i></td>'
    )


def _decoding(report: Report) -> str:
    if report.decoding is None:
        return ""
    check, shown = report.decoding.check, np.asarray(report.decoding.shown, np.int64)
    # Where there are no other genes, the shown ones need no colour of their own.
    among = 0 < len(shown) < len(report.decoding.genes)
    figures = [figure(_identity(report.decoding, among), _identity_caption(check, among))]
    if len(shown):
        highest = np.maximum(check.true_mean[:, shown].max(0), 1e-30)
        panels = [
            ("True", (check.true_mean[:, shown] / highest).T),
            ("Decoded", (check.decoded_mean[:, shown] / highest).T),
        ]
        genes = [report.decoding.genes[k] for k in shown]
        alt = f"Heat maps of {len(genes)} genes in {len(check.types)} types, true and decoded"
        caption = (
            "Mean frequency of marker genes in each type; full colour is a gene's highest true mean. "
            "Rest the pointer on a tile for its value."
        )
        figures.append(figure(plots.heat_maps(panels, genes, check.types, alt=alt), caption))
    return section("Decoded against true expression", f'<div class="pair">{"".join(figures)}</div>')


def _identity(decoding: Decoding, among: bool) -> str:
    check = decoding.check
    is_shown = np.zeros(check.true_mean.shape, bool)
    is_shown[:, list(decoding.shown)] = True
    keep = subsample(check.true_mean.size, 5_000, seed=0)
    # The shown genes are few, and are all drawn.
    keep = np.union1d(keep, np.flatnonzero(is_shown.ravel()))
    true = np.maximum(check.true_mean.ravel()[keep], 1e-9)
    decoded = np.maximum(check.decoded_mean.ravel()[keep], 1e-9)
    alt = f"Decoded against true mean frequency of {len(decoding.genes)} genes in {len(check.types)} types"
    return plots.identity_scatter(
        true,
        decoded,
        is_shown.ravel()[keep].astype(int),
        ["var(--cloud)", "var(--accent-2)"] if among else ["var(--accent)", "var(--accent)"],
        x_label="true frequency (mean of a type)",
        y_label="decoded frequency",
        alt=alt,
    )


def _identity_caption(check: DecodeCheck, among: bool) -> str:
    orange = "; orange are the genes shown beside" if among else ""
    return (
        f"A point is a gene in a type{orange}. Over {check.n_cells:,} single cells the "
        f"correlation of log frequencies is <strong>{check.pearson_log:.3f}</strong> and half the entries "
        f"are within a factor of {2**check.median_log_ratio:.2f}; over the types, the median gene's rank "
        f"correlation is <strong>{check.spearman_median:.3f}</strong>."
    )


def _costs(report: Report) -> str:
    if not report.steps:
        return ""
    longest = max(step.seconds for step in report.steps) or 1.0
    rows = []
    for step in report.steps:
        peak = '<td class="bar">not measured</td>'
        if step.peak_bytes is not None:
            share = step.peak_bytes / (report.peak_bytes or 1)
            peak = bar_cell(format_bytes(step.peak_bytes), share, kind="b")
        time = bar_cell(format_seconds(step.seconds), step.seconds / longest)
        note = f'<td class="text">{escape(step.note)}</td>'
        rows.append(f'<tr><th scope="row">{escape(step.name)}</th>{time}{peak}{note}</tr>')
    total_peak = "" if report.peak_bytes is None else format_bytes(report.peak_bytes)
    foot = (
        f'<tr><th scope="row">All</th><td class="bar"><b>{format_seconds(report.seconds)}</b></td>'
        f'<td class="bar"><b>{total_peak}</b></td><td></td></tr>'
    )
    names = ("Step", "Time", "Peak memory", "What was done")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = (
        '<div class="scroll"><table class="costs"><caption class="hidden">Time and memory of each step'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot>"
        "</table></div>"
    )
    return section("Time and memory", table)


def _making(report: Report) -> str:
    parts = []
    if report.command:
        parts.append(f"<h3>Made by</h3><pre>{escape(report.command)}</pre>")
    if report.snippet:
        parts.append(f"<h3>To go on</h3><pre>{escape(report.snippet)}</pre>")
    facts = [*report.versions] if report.seed is None else [("seed", str(report.seed)), *report.versions]
    if facts:
        items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        parts.append(f'<h3>With</h3><dl class="versions">{items}</dl>')
    return section("How this was made", "".join(parts)) if parts else ""


_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:56px 28px 96px}
h1{font-size:clamp(1.8rem,4.4vw,2.6rem);line-height:1.12;letter-spacing:-.022em;margin:0 0 .5em;
font-weight:700;text-wrap:balance}
.lead{font-size:clamp(1.05rem,2.2vw,1.25rem);line-height:1.5;max-width:46em;margin:0;color:var(--ink-2);
text-wrap:pretty}
h2{font-size:1.4rem;letter-spacing:-.012em;line-height:1.25;margin:0 0 1.1rem;font-weight:680}
h3{font-size:1rem;margin:0 0 .6rem;font-weight:640}
section{margin-top:72px}
.figures{display:flex;flex-wrap:wrap;gap:20px 52px;margin:36px 0 0;padding:24px 0;
border-block:1px solid var(--grid)}
.figures dd{margin:0;font-size:clamp(1.5rem,3.4vw,2rem);line-height:1.15;font-weight:660;
letter-spacing:-.02em;font-variant-numeric:tabular-nums;white-space:nowrap}
.figures dt{color:var(--ink-2);font-size:.95rem}
.figures div{display:flex;flex-direction:column}
figure{margin:0;min-width:0}
figcaption,.note{color:var(--ink-2);font-size:.92rem;line-height:1.5;margin:14px 0 0;max-width:62em;
text-wrap:pretty}
figcaption strong{color:var(--ink);font-weight:640}
figure>svg,.pair svg{display:block;width:100%;height:auto;overflow:visible}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:32px}
.wide-left{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,1fr);gap:44px;align-items:start}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 0;padding:0;font-size:.92rem;
color:var(--ink-2)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:7px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:11px 22px 11px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--ink-2);font-weight:500;font-size:.92rem;white-space:nowrap;padding-top:0}
thead small{font-size:.85em}
tbody th{font-weight:600;white-space:nowrap}
tfoot th,tfoot td{border-bottom:0}
.facts td{text-align:right;white-space:nowrap}
.facts th{font-weight:500;color:var(--ink-2);white-space:normal}
.bar{white-space:nowrap;min-width:132px}
.bar i{display:block;height:6px;border-radius:3px;background:var(--panel);margin-top:5px;overflow:hidden}
.bar u{display:block;height:100%;border-radius:3px;background:var(--accent)}
.bar.b u{background:var(--accent-2)}
.scores .bar b,.costs .bar b{font-weight:680}
.text{color:var(--ink-2);min-width:15em;width:40%}
.scroll{overflow-x:auto}
pre{margin:0 0 24px;padding:16px 18px;background:var(--panel);border-radius:10px;overflow-x:auto;
font:.88rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.versions{display:flex;flex-wrap:wrap;gap:8px 36px;margin:0}
.versions dt{color:var(--ink-2);font-size:.88rem}
.versions dd{margin:0;font-variant-numeric:tabular-nums}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media (max-width:760px){main{padding:32px 18px 64px}section{margin-top:52px}
.wide-left{grid-template-columns:minmax(0,1fr);gap:24px}.figures{gap:18px 34px}
th,td{padding-right:12px}.bar{min-width:76px}thead th{white-space:normal;vertical-align:bottom}
thead small{display:block}.costs thead th:last-child{display:none}
.costs tr{display:grid;grid-template-columns:1.1fr 1fr 1fr;border-bottom:1px solid var(--grid);padding:10px 0}
.costs th,.costs td{border:0;padding-block:0;white-space:normal}.costs .text{grid-column:1/-1;width:auto;
padding-top:6px;font-size:.92rem}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
