"""Small charts as inline SVG, written by hand so that a report needs neither matplotlib nor a browser script.

Each function returns one ``<svg>`` with an alternative text. Colours of ink, grid and paper are CSS
variables of the page (`STYLE`), so that a chart follows a light or a dark page; `standalone` makes a
file of one. Text is at least 12 px at the width a chart is drawn for.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from atlasvi.errors import OptionError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_LIGHT = (
    "--paper:#ffffff;--panel:#f5f6f8;--ink:#1b1f24;--ink-2:#57606a;--grid:#dfe3e8;"
    "--accent:#0b63b0;--accent-2:#c2570c;--cloud:#7d8894"
)
_DARK = (
    "--paper:#14171b;--panel:#1d2126;--ink:#e8eaed;--ink-2:#a4adb8;--grid:#343a42;"
    "--accent:#6cb2f5;--accent-2:#f2a05c;--cloud:#8993a0"
)
_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
svg text{{font-family:{_FONT};font-size:13px;fill:var(--ink-2);font-variant-numeric:tabular-nums}}
svg .name{{font-weight:650;fill:var(--ink);paint-order:stroke;stroke:var(--panel);stroke-width:4px;
stroke-linejoin:round}}
svg .strong{{font-weight:600;fill:var(--ink)}}
svg .grid{{stroke:var(--grid);stroke-width:1}}
svg .axis{{stroke:var(--ink-2);stroke-width:1}}
svg .dots{{fill:none;stroke-linecap:round}}
svg .panel{{fill:var(--panel)}}
svg .line{{fill:none;stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}}
svg .hit{{fill:transparent}}
@media (max-width:760px){{figure svg text{{font-size:16px}}}}
"""
"""CSS of charts and the colours of the page around them."""

# Okabe and Ito (2008) without black and with a darker yellow, then hues between them.
_PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a63b8", "#b3a100",
    "#7a5238", "#2fb3a6", "#a8325e", "#7c8f2a", "#4a66c8", "#e58c7c", "#5f7f8c", "#b05bb8",
)  # fmt: skip
# For a second colouring beside the first, so that no batch wears the colour of a type.
_SECOND = (
    "#6a4fa3", "#1fa89a", "#f0a04b", "#c0487a", "#6b8fd6", "#86902a", "#8f5a3c", "#444c57",
    "#d98fc4", "#3f8f4f", "#c9b458", "#4fb3d9",
)  # fmt: skip
GREY = "#9aa3ad"
"""The colour of what is in no class."""


def escape(text: str) -> str:
    """Text as XML has it, which has no control characters."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\N{REPLACEMENT CHARACTER}", text))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Args:
        name: as it is written at its end.
        x: ``(n,)``.
        y: ``(n,)``; NaN where there is no value.
        colour: a CSS colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to pixels.

    Args:
        low: value at the start.
        high: value at the end.
        start: pixel at the start.
        stop: pixel at the end.
        log: of base 10.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """About ``n`` round values within the axis."""
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            return [10.0**power for power in range(first, math.floor(math.log10(self.high) + 1e-9) + 1)]
        rough = (self.high - self.low) / n
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def palette(names: Sequence[str], *, grey: Iterable[str] = (), second: bool = False) -> list[str]:
    """A colour for each name, grey for ``grey``; ``second`` takes other colours, for a picture beside."""
    grey, hues = set(grey), _SECOND if second else _PALETTE
    colours, k = [], 0
    for name in names:
        colours.append(GREY if name in grey else hues[k % len(hues)])
        k += name not in grey
    return colours


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, alt: str, width: int = 560, height: int = 340
) -> str:
    """Lines over a common axis, named at their ends.

    The vertical axis is fitted to what follows the first tenth of the lines, lest their fall from the
    start flatten the rest; what is above it is cut off at the frame.

    Raises:
        OptionError: no line with a finite value.
    """
    pairs = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not pairs:
        raise OptionError(f"no finite value to draw in {alt!r}; give lines with at least one")
    names = max(len(line.name) for line in lines)
    frame = (64, 34, width - 16 - 8.2 * names, height - 46)
    xs = [x for x, _ in pairs]
    x_axis = _linear(min(xs), max(xs), frame[0], frame[2], margin=0.0)
    late = [y for x, y in pairs if x >= x_axis.low + 0.1 * (x_axis.high - x_axis.low)]
    y_axis = _linear(min(late), max(late), frame[3], frame[1], margin=0.06)
    parts, drawn, ends = [_grid(x_axis, y_axis, frame, x_label, y_label)], [], []
    for line in lines:
        points = [(x_axis(x), y_axis(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline class="line" points="{path}" stroke="{line.colour}"/>')
        if len(points) == 1:
            x, y = points[0]
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}"/>')
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(y) and y_axis(y) >= frame[1]:
                parts.append(_hit(x_axis(x), y_axis(y), f"{line.name}, {x_label} {x:g}: {y:,.1f}"))
        ends.append((max(points[-1][1], frame[1]), line))
    parts.insert(1, _clipped("".join(drawn), frame))
    for y, (_, line) in zip(_spread([y for y, _ in ends], 17.0), ends, strict=True):
        text = f'<text class="strong" x="{frame[2] + 9:.1f}" y="{y + 4.5:.1f}" style="fill:{line.colour}">'
        parts.append(f"{text}{escape(line.name)}</text>")
    return _svg(width, height, "".join(parts), alt)


def scatter(
    xy: NDArray[Any],
    codes: NDArray[Any],
    colours: Sequence[str],
    *,
    alt: str,
    labels: Sequence[str] | None = None,
    size: int = 500,
    diameter: float = 3.6,
    seed: int = 0,
) -> str:
    """Points of a plane without axes, coloured by class; classes named where they are densest.

    Args:
        xy: ``(n, 2)``.
        codes: ``(n,)`` class of each point.
        colours: of the classes.
        alt: alternative text.
        labels: names of the classes; by default not written.
        size: of the square, in pixels.
        diameter: of a point.
        seed: of the order of drawing, so that no class lies over the others.
    """
    points = _fit(xy, size, pad=18)
    layers = _layers(points, codes, colours, diameter, np.random.default_rng(seed))
    parts = [f'<rect class="panel" width="{size}" height="{size}" rx="10"/>', layers]
    if labels is not None:
        parts += _class_names(points, codes, labels, size)
    return _svg(size, size, "".join(parts), alt)


def identity_scatter(
    x: NDArray[Any],
    y: NDArray[Any],
    codes: NDArray[Any],
    colours: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    size: int = 500,
    log: bool = True,
) -> str:
    """Values against values on equal axes, with the line of equality.

    Args:
        x: ``(n,)``, > 0 on logarithmic axes.
        y: ``(n,)``, likewise.
        codes: ``(n,)`` class of each point; later classes lie above earlier ones.
        colours: of the classes.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        alt: alternative text.
        size: of the square, in pixels.
        log: whether the axes are logarithmic.
    """
    # Between the extremes but for one in a thousand, which are drawn at the edge.
    low, high = (float(value) for value in np.quantile(np.concatenate([x, y]), [0.001, 1.0]))
    margin = 0.03 * (high - low) or 0.01
    low, high = (low / 1.2, high * 1.3) if log else (low - margin, high + margin)
    frame = (66, 14, size - 14, size - 50)
    x_axis, y_axis = Axis(low, high, frame[0], frame[2], log), Axis(low, high, frame[3], frame[1], log)
    parts = [_grid(x_axis, y_axis, frame, x_label, y_label, upright=True)]
    parts.append(
        f'<line class="axis" stroke-dasharray="5 4" x1="{frame[0]}" y1="{frame[3]}" x2="{frame[2]}" '
        f'y2="{frame[1]}"><title>equal</title></line>'
    )
    inside = [np.clip(values, low, high).tolist() for values in (x, y)]
    points = np.stack([[x_axis(value) for value in inside[0]], [y_axis(value) for value in inside[1]]], 1)
    for code, colour in enumerate(colours):
        few = np.count_nonzero(codes == code) < 500
        parts.append(
            _dots(points[codes == code], colour, 5.0 if few else 3.4, opacity=0.8 if code or few else 0.45)
        )
    return _svg(size, size, "".join(parts), alt)


def predictive_check(found: pd.DataFrame, *, group: str | None = None, size: int = 360) -> str:
    """Mean, variance and share of zeros of each gene, observed against replicated by the model.

    Genes whose observed value is beyond that of every replicate are counted, and in colour.

    Args:
        found: from ``model.posterior_predictive_check``.
        group: which one, where there are several.
        size: of each of the three squares, in pixels.

    Raises:
        OptionError: no such group, or none named of several.

    Example:
        >>> predictive_check(model.posterior_predictive_check(n_samples=2)).startswith("<svg")
        True
    """
    if "group" in found:
        levels = [str(level) for level in found["group"].unique()]
        if group is None and len(levels) > 1:
            raise OptionError(
                f"the check is of {len(levels)} groups; name one with group=, such as {levels[0]!r}"
            )
        if group is not None and group not in levels:
            raise OptionError(f"there is no group {group!r}; the check has {', '.join(levels[:10])}")
        found = found[found["group"].astype(str) == (group or levels[0])]
    panels = []
    for i, (name, said, panel) in enumerate(predictive_panels(found, size=size)):
        panels.append(place(panel, i * (size + 12), 24))
        title = f"{name}: {said}"
        panels.append(f'<text class="strong" x="{i * (size + 12) + 4}" y="15">{escape(title)}</text>')
    alt = "Posterior predictive check" + ("" if group is None else f" of {group}")
    return _svg(3 * size + 24, size + 24, "".join(panels), alt)


def predictive_panels(
    found: pd.DataFrame, *, size: int = 360, max_genes: int | None = None, seed: int = 0
) -> list[tuple[str, str, str]]:
    """The three squares of `predictive_check`, for pages that lay them out: name, genes beyond, and chart.

    Args:
        found: of one group.
        size: of each, in pixels.
        max_genes: of more, so many are drawn, at random; all are counted.
        seed: of that choice.
    """
    names = {"mean": "mean", "variance": "variance", "zero_share": "share of zeros"}
    panels = []
    for statistic, name in names.items():
        rows = found[(found["statistic"] == statistic) & found["observed"].notna()]
        beyond = rows["p"].isin([0, 1]).to_numpy()
        said = f"{int(beyond.sum()):,} of {len(rows):,} genes beyond"
        if max_genes is not None and len(rows) > max_genes:
            drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_genes])
            rows, beyond = rows.iloc[drawn], beyond[drawn]
        observed, replicated = rows["observed"].to_numpy(), rows["replicated"].to_numpy()
        is_log = statistic != "zero_share"
        if is_log:
            # Genes without counts on one side are drawn at the edge.
            both = np.concatenate([observed, replicated])
            least = both[both > 0].min() if (both > 0).any() else 1.0
            observed, replicated = np.maximum(observed, least), np.maximum(replicated, least)
        panels.append((name, said, identity_scatter(
            observed, replicated, beyond.astype(int), [GREY, "var(--accent-2)"],
            x_label=f"{name}, observed", y_label="replicated", alt=name, size=size, log=is_log,
        )))  # fmt: skip
    return panels


def threshold_strip(
    values: Sequence[float],
    threshold: float,
    *,
    titles: Sequence[str],
    x_label: str,
    threshold_label: str,
    alt: str,
    width: int = 560,
    height: int = 190,
) -> str:
    """Values along one axis, as points that do not cover each other, and a threshold not to pass.

    Args:
        values: ``(n,)`` >= 0.
        threshold: > 0; what is beyond it is in colour.
        titles: of the points, shown under the pointer.
        x_label: of the axis.
        threshold_label: written at the threshold.
        alt: alternative text.
        width: in pixels.
        height: in pixels.
    """
    left, top, right, bottom = frame = (16, 34, width - 16, height - 46)
    axis = Axis(0.0, 1.12 * max([threshold, *values]), left, right)
    # An axis of heights without ticks: points are stacked where they would touch.
    parts = [_grid(axis, Axis(0.0, 1e-9, bottom, top), frame, x_label, "", y_ticks=False)]
    x = axis(threshold)
    side, anchor = (6, "start") if x < 0.6 * width else (-6, "end")
    parts.append(
        f'<line class="axis" stroke-dasharray="5 4" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 10}" y2="{bottom}"/>'
        f'<text x="{x + side:.1f}" y="{top - 2}" text-anchor="{anchor}">{escape(threshold_label)}</text>'
    )
    placed: list[tuple[float, int]] = []
    for value, title in sorted(zip(values, titles, strict=True)):
        at = axis(value)
        taken = {level for other, level in placed if abs(other - at) < 12}
        level = next(level for level in range(len(placed) + 1) if level not in taken)
        placed.append((at, level))
        y = max(top + 6.0, bottom - 9 - 12 * level)
        colour = "var(--accent-2)" if value > threshold else "var(--accent)"
        parts.append(f'<circle cx="{at:.1f}" cy="{y:.1f}" r="5" fill="{colour}" fill-opacity="0.85"/>')
        parts.append(_hit(at, y, title))
    return _svg(width, height, "".join(parts), alt)


def heat_maps(
    panels: Sequence[tuple[str, NDArray[Any]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    alt: str,
    titles: str = "{row} in {column}, {panel}: {value:.0%} of its highest true mean",
) -> str:
    """Tables of shares from 0 to 1 side by side, as tiles from pale to full.

    Args:
        panels: ``(name, (rows, columns) values)``; what is above 1 is drawn as 1.
        rows: names of the rows, written once.
        columns: names of the columns, written over each panel.
        alt: alternative text.
        titles: of a tile, shown under the pointer.
    """
    tile_w, tile_h = max(13, min(30, 224 // len(columns))), 18
    left = 16 + 7.6 * max(len(name) for name in rows)
    longest = 8 * max(len(name) for name in columns)
    upright = longest <= tile_w
    gap, top = 22, 52 if upright else 36 + longest
    parts = []
    for p, (panel, values) in enumerate(panels):
        x0 = left + p * (tile_w * len(columns) + gap)
        parts.append(f'<text class="strong" x="{x0:.1f}" y="15">{escape(panel)}</text>')
        for c, column in enumerate(columns):
            parts.append(_column_name(x0 + (c + 0.5) * tile_w, top - 7, column, upright=upright))
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                value = float(values[r, c])
                title = escape(titles.format(row=row, column=column, panel=panel, value=value))
                box = f'x="{x0 + c * tile_w:.1f}" y="{top + r * tile_h}" width="{tile_w - 1}"'
                shade = min(1.0, max(0.03, value))
                parts.append(
                    f'<rect {box} height="{tile_h - 1}" fill="var(--accent)" fill-opacity="{shade:.2f}">'
                    f"<title>{title}</title></rect>"
                )
    for r, row in enumerate(rows):
        at = f'x="{left - 8:.1f}" y="{top + r * tile_h + 13}"'
        parts.append(f'<text {at} text-anchor="end">{escape(row)}</text>')
    width = left + len(panels) * tile_w * len(columns) + (len(panels) - 1) * gap + 4
    return _svg(math.ceil(width), top + tile_h * len(rows) + 4, "".join(parts), alt)


def volcano(
    found: pd.DataFrame,
    *,
    comparison: str | None = None,
    n_names: int = 12,
    width: int = 640,
    height: int = 460,
) -> str:
    """Fold change against evidence of each gene of one comparison; called genes in colour, the best by name.

    Args:
        found: from ``model.differential_expression``. Of change mode, its mean change against the
            probability of a change; else log2 of the ratio of mean rho against K without its sign.
        comparison: which one, such as ``"T vs Rest"``, where there are several.
        n_names: genes to name on each side.
        width: in pixels.
        height: in pixels.

    Raises:
        OptionError: no such comparison, or none named of several; no genes, or values that are not finite.

    Example:
        >>> found = model.differential_expression(groupby="cell_type", group1="T", silent=True)
        >>> volcano(found).startswith("<svg")
        True
    """
    frame = _one_comparison(found, comparison)
    of_change = "lfc_mean" in frame
    if of_change:
        x, y = frame["lfc_mean"].to_numpy(), frame["proba_de"].to_numpy()
    else:
        tiny = np.finfo(np.float32).tiny
        x = np.log2((frame["scale1"].to_numpy() + tiny) / (frame["scale2"].to_numpy() + tiny))
        y = _resolved(frame["bayes_factor"].abs().to_numpy(), frame["proba_m1"].to_numpy())
    if not len(frame):
        raise OptionError("the table has no genes to draw")
    if not (finite := np.isfinite(x) & np.isfinite(y)).all():
        raise OptionError(f"evidence or fold change of gene {frame.index[~finite][0]!r} is not finite")
    called = frame[next(column for column in frame if column.startswith("is_de_"))].to_numpy(bool)
    reach = max(float(np.abs(x).max()), 1e-6)
    frame_px = (58, 34, width - 20, height - 46)
    x_axis = _linear(-reach, reach, frame_px[0], frame_px[2], margin=0.06)
    y_axis = _linear(0.0, max(float(y.max()), 1e-6), frame_px[3], frame_px[1], margin=0.05)
    y_label = "probability of a change" if of_change else "Bayes factor |K|, nats"
    parts = [_grid(x_axis, y_axis, frame_px, "log2 fold change", y_label)]
    points = np.stack([[x_axis(value) for value in x], [y_axis(value) for value in y]], 1)
    side = np.where(called, np.where(x > 0, 1, 2), 0)
    for code, colour in enumerate((GREY, "var(--accent)", "var(--accent-2)")):
        parts.append(_dots(points[side == code], colour, 4.6 if code else 3.4, opacity=0.8 if code else 0.45))
    for code in (1, 2):
        best = np.flatnonzero(side == code)
        best = best[np.lexsort((-np.abs(x[best]), -y[best]))][:n_names]
        parts.append(_gene_names(points[best], [str(frame.index[i]) for i in best], frame_px, left=code == 2))
    what = comparison or (str(frame["comparison"].iloc[0]) if "comparison" in frame else "one vs two")
    text = escape(f"{what}: {int(called.sum()):,} of {len(frame):,} genes called")
    parts.append(f'<text class="strong" x="{frame_px[2]}" y="15" text-anchor="end">{text}</text>')
    return _svg(width, height, "".join(parts), f"Volcano plot of {what}")


def marker_heat_map(found: pd.DataFrame, *, n_genes: int = 4) -> str:
    """The best genes of each comparison, and how high they are in every one's first group.

    Args:
        found: from ``model.differential_expression``, of several groups.
        n_genes: best genes of each, by their evidence of being higher there.

    Raises:
        OptionError: a result of sets of cells, which have no names; no gene that is higher in its group.

    Example:
        >>> found = model.differential_expression(groupby="cell_type", silent=True)
        >>> marker_heat_map(found, n_genes=2).count("<rect")
        8
    """
    if "group1" not in found:
        raise OptionError("a heat map shows groups by name; ask differential_expression with groupby=")
    by = "proba_de" if "proba_de" in found else "bayes_factor"
    higher = found[found["scale1"] > found["scale2"]]
    groups = list(dict.fromkeys(found["group1"]))
    genes = [gene for group in groups for gene in _ranked(higher[higher["group1"] == group], by)[:n_genes]]
    columns = list(dict.fromkeys(genes))
    if n_genes < 1 or not columns:
        n = len(set(found.index))
        raise OptionError(f"no gene of {n:,} is higher in its group, or n_genes={n_genes} asks for none")
    table = np.stack([found.loc[found["group1"] == group, "scale1"].loc[columns] for group in groups])
    return heat_maps(
        [("mean rho, of its highest", table / np.maximum(table.max(0), np.finfo(np.float64).tiny))],
        [str(group) for group in groups], [str(gene) for gene in columns],
        alt="Mean rho of the best genes in each group",
        titles="{column} in {row}: {value:.0%} of its highest mean rho",
    )  # fmt: skip


def _resolved(evidence: NDArray[Any], p: NDArray[Any]) -> NDArray[Any]:
    """Evidence in which all draws agree, a little above the rest: how far above only the bound on p says."""
    agree = (p <= 0) | (p >= 1)
    if agree.all() or not agree.any():
        return evidence
    return np.where(agree, 1.12 * evidence[~agree].max(), evidence)


def _ranked(frame: pd.DataFrame, by: str) -> pd.Index:
    """Genes by falling evidence, and by the ratio of mean rho where it is the same."""
    ratio = np.log(frame["scale1"].to_numpy()) - np.log(frame["scale2"].to_numpy())
    return frame.index[np.lexsort((-ratio, -frame[by].to_numpy()))]


def _one_comparison(found: pd.DataFrame, comparison: str | None) -> pd.DataFrame:
    if "comparison" not in found:
        return found
    known = list(dict.fromkeys(found["comparison"]))
    if comparison is None and len(known) > 1:
        raise OptionError(f"{len(known)} comparisons are in the table; name one: {', '.join(known[:6])}")
    if comparison is not None and comparison not in known:
        raise OptionError(f"{comparison!r} is not in the table; it has {', '.join(known[:6])}")
    return found if comparison is None else found[found["comparison"] == comparison]


def _gene_names(points: NDArray[Any], names: Sequence[str], frame: tuple[float, ...], *, left: bool) -> str:
    """Names outside their points, from the top down, a line each where they would touch."""
    parts, free = [], frame[1] + 4.0
    for k in np.lexsort((points[:, 0] if left else -points[:, 0], points[:, 1])):
        x, y = points[k]
        free = max(free, float(y))
        room = 7.8 * len(names[k]) + 8
        before = x - room > frame[0] and (left or x + room > frame[2])
        place, anchor = (x - 7, "end") if before else (x + 7, "start")
        at = f'x="{place:.1f}" y="{free + 4.5:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="name" {at}>{escape(names[k])}</text>')
        free += 15.0
    return "".join(parts)


def marks(names: Sequence[str], size: int) -> list[str]:
    """What to write on a `scatter`: the names, or numbers where the names would cover the points."""
    covered = sum((8.4 * len(name) + 8) * 18 for name in names)
    return list(names) if covered <= 0.1 * size**2 else [str(k + 1) for k in range(len(names))]


def legend(names: Sequence[str], colours: Sequence[str], marks: Sequence[str] | None = None) -> str:
    """Names with their colours, and with their marks if those are others, as an HTML list that wraps."""
    items = (
        f'<li><i style="background:{colour}"></i>{"" if mark == name else f"<b>{escape(mark)}</b> "}'
        f"{escape(name)}</li>"
        for name, colour, mark in zip(names, colours, marks or names, strict=True)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def standalone(body: str, width: int, height: int, alt: str) -> str:
    """An SVG file of its own, with a paper under it, that follows the reader's light or dark mode."""
    # In a file of its own :root is the svg element.
    paper = f'<rect width="{width}" height="{height}" rx="14" fill="var(--paper)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>{escape(alt)}</title><style>{STYLE}</style>'
        f"{paper}{body}</svg>\n"
    )


def as_file(svg: str) -> str:
    """A chart of this module as a file of its own."""
    found = re.match(r'<svg viewBox="0 0 (\d+) (\d+)".*? aria-label="(.*?)">', svg, re.S)
    if found is None:
        raise OptionError("this is not a chart of atlasvi.plots, which are one <svg> each; draw one first")
    width, height = int(found[1]), int(found[2])
    return standalone(place(svg, 12, 12), width + 24, height + 24, html.unescape(found[3]))


def place(svg: str, x: float, y: float) -> str:
    """One chart within another, with its corner at (x, y)."""
    return svg.replace("<svg ", f'<svg x="{x:g}" y="{y:g}" ', 1)


def _svg(width: int, height: int, body: str, alt: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(alt)}">{body}</svg>'
    )


def _linear(low: float, high: float, start: float, stop: float, *, margin: float) -> Axis:
    span = (high - low) or max(1.0, abs(low) * 0.01)
    if high == low:
        low, high = low - span / 2, high + span / 2
    return Axis(low - margin * span, high + margin * span, start, stop)


def _grid(
    x_axis: Axis,
    y_axis: Axis,
    frame: tuple[float, ...],
    x_label: str,
    y_label: str,
    *,
    upright: bool = False,
    y_ticks: bool = True,
) -> str:
    """Grid lines, ticks and names of two axes; of the second above it, or ``upright`` beside it."""
    left, top, right, bottom = frame
    parts = []
    for value in y_axis.ticks() if y_ticks else ():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        at = f'x="{left - 9}" y="{y + 4.5:.1f}" text-anchor="end"'
        parts.append(f"<text {at}>{_tick(value, y_axis)}</text>")
    for value in x_axis.ticks():
        x = x_axis(value)
        if x_axis.log:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        at = f'x="{x:.1f}" y="{bottom + 19}" text-anchor="middle"'
        parts.append(f"<text {at}>{_tick(value, x_axis)}</text>")
    parts.append(f'<line class="axis" x1="{left}" x2="{right:.1f}" y1="{bottom}" y2="{bottom}"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 41}" text-anchor="middle">{escape(x_label)}</text>')
    if upright:
        at = f'transform="translate(15 {(top + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle"'
    else:
        at = 'x="4" y="15"'
    parts.append(f"<text {at}>{escape(y_label)}</text>")
    return "".join(parts)


def _clipped(body: str, frame: tuple[float, ...]) -> str:
    """Cut off at the frame, with room for a stroke: an svg within an svg hides what is outside it."""
    left, top, width, height = frame[0], frame[1], frame[2] - frame[0] + 4, frame[3] - frame[1] + 4
    box = f"{left:g} {top:g} {width:g} {height:g}"
    at = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {at} viewBox="{box}">{body}</svg>'


def _tick(value: float, axis: Axis) -> str:
    if axis.log:
        power = str(round(math.log10(value))).replace("-", "−")
        return f'10<tspan dy="-5" font-size="10">{power}</tspan>'
    if abs(value) >= 1000 or value == round(value):
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def _hit(x: float, y: float, title: str) -> str:
    return f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>{escape(title)}</title></circle>'


def _dots(points: NDArray[Any], colour: str, diameter: float, *, opacity: float = 0.75) -> str:
    """Points as one path of strokes without length and with round ends: a few bytes each."""
    if not len(points):
        return ""
    path = "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in points)
    stroke = f'stroke="{colour}" stroke-width="{diameter:g}" stroke-opacity="{opacity:g}"'
    return f'<path class="dots" {stroke} d="{path}"/>'


def _layers(
    points: NDArray[Any],
    codes: NDArray[Any],
    colours: Sequence[str],
    diameter: float,
    rng: np.random.Generator,
) -> str:
    parts = []
    for layer in np.array_split(rng.permutation(len(points)), 12):
        for code, colour in enumerate(colours):
            parts.append(_dots(points[layer[codes[layer] == code]], colour, diameter))
    return "".join(parts)


def _fit(xy: NDArray[Any], size: int, *, pad: int) -> NDArray[Any]:
    """Into the square, both directions by one scale, upwards being up."""
    xy = np.asarray(xy, np.float64)
    low, high = xy.min(0), xy.max(0)
    scale = (size - 2 * pad) / max(float((high - low).max()), 1e-12)
    centred = (xy - (low + high) / 2) * scale
    return np.asarray(centred * np.array([1.0, -1.0]) + size / 2)


def _class_names(points: NDArray[Any], codes: NDArray[Any], labels: Sequence[str], size: int) -> list[str]:
    """The names of the classes where each is densest, moved apart where they would touch."""
    shown = [code for code in range(len(labels)) if (codes == code).any()]
    at = np.array([_densest(points[codes == code], size) for code in shown]).reshape(-1, 2)
    half = np.array([[4.2 * len(labels[code]) + 4, 9.0] for code in shown]).reshape(-1, 2)
    for _ in range(200):
        moved = False
        for i in range(len(at)):
            for j in range(i):
                overlap = half[i] + half[j] - np.abs(at[i] - at[j])
                if (overlap > 0).all():
                    # Along the direction in which they are soonest free.
                    axis = int(overlap.argmin())
                    push = 0.5 * overlap[axis] + 0.5
                    sign = 1.0 if at[i, axis] >= at[j, axis] else -1.0
                    at[i, axis] += sign * push
                    at[j, axis] -= sign * push
                    moved = True
        at = np.clip(at, half + 4, size - half - 4)
        if not moved:
            break
    return [
        f'<text class="name" x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{escape(labels[code])}</text>'
        for code, (x, y) in zip(shown, at, strict=True)
    ]


def _densest(points: NDArray[Any], size: int) -> NDArray[Any]:
    """The mean of the points around the fullest cell of a coarse, blurred histogram."""
    import scipy.ndimage

    counts, *_ = np.histogram2d(points[:, 0], points[:, 1], bins=20, range=[[0, size], [0, size]])
    smooth = scipy.ndimage.gaussian_filter(counts, 1.0)
    peak = (np.array(np.unravel_index(smooth.argmax(), smooth.shape)) + 0.5) * size / 20
    near = np.abs(points - peak).max(1) <= size / 10
    if not near.any():
        return np.asarray(peak)
    x, y = points[near].mean(0)
    # A name would hide a small class: it goes above.
    top = points[near, 1].min()
    return np.array([x, top - 12 if y - top < 22 else y])


def _spread(values: list[float], gap: float) -> list[float]:
    """The values, moved as little as it takes to be ``gap`` apart, in the order given."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    out = list(values)
    for _ in range(50):
        for a, b in pairwise(order):
            short = gap - (out[b] - out[a])
            if short > 0:
                out[a] -= short / 2
                out[b] += short / 2
    return out


def _column_name(x: float, y: float, name: str, *, upright: bool) -> str:
    if upright:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(name)}</text>'
    return f'<text transform="translate({x + 4:.1f} {y:.1f}) rotate(-90)">{escape(name)}</text>'
