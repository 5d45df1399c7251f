"""Two pictures that all experiments share, as SVG files that follow a light or a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from atlasvi.plots import Axis, standalone
from benchmarks.paper.tables import NAMES, Compared

_ROW, _HEAD, _LEFT, _WIDTH, _RIGHT = 22, 40, 200, 760, 24
_OURS, _OTHERS = "var(--accent)", "var(--cloud)"


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    x_label: str,
    *,
    alt: str,
    low: float,
    high: float,
    zero: bool = False,
) -> str:
    """A panel a data set, a line a method, a dot a seed and a bar their mean; atlasvi's have another colour.

    Values outside of ``low`` to ``high`` are drawn at the edge as an arrow with their mean.
    """
    axis = Axis(low, high, _LEFT, _WIDTH - _RIGHT)
    parts, y = [], 20
    for title, methods in panels.items():
        parts.append(f'<text class="strong" x="14" y="{y + 12}">{escape(title)}</text>')
        top = y + 20
        y = top
        for name, values in methods.items():
            colour = _OURS if name.startswith("atlasvi") else _OTHERS
            middle, mean = y + _ROW / 2, float(np.mean(values))
            parts.append(
                f'<text x="{_LEFT - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            )
            if not low <= mean <= high:
                at, arrow = (_LEFT + 4, "←") if mean < low else (_WIDTH - _RIGHT - 4, "→")
                anchor = "start" if mean < low else "end"
                text = f"{arrow} {mean:,.3g}".replace("-", "−")
                parts.append(f'<text x="{at}" y="{middle + 4:.1f}" text-anchor="{anchor}">{text}</text>')
            else:
                for value in values:
                    x = axis(min(max(value, low), high))
                    title_ = f"<title>{escape(name)}: {value:.4g}</title>"
                    parts.append(
                        f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4" fill="{colour}" fill-opacity="0.55">'
                        f"{title_}</circle>"
                    )
                at = axis(mean)
                parts.append(
                    f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{middle - 8:.1f}" y2="{middle + 8:.1f}" '
                    f'stroke="{colour}" stroke-width="2.5"/>'
                )
            y += _ROW
        parts.insert(0, _lines(axis, top, y, zero=zero))
        y += 16
    parts.append(_scale(axis, y - 8, x_label))
    return standalone("".join(parts), _WIDTH, y + 46, alt)


def forest(found: Sequence[Compared], *, alt: str) -> str:
    """Differences with their intervals, in margins: right of -1 is no worse, right of 0 better."""
    # Wide enough for the differences; intervals may be cut off.
    most = min(
        40.0, max(4.0, 1.3 * max((abs(c.difference.gain) / c.difference.margin for c in found), default=0))
    )
    axis = Axis(-most, most, _LEFT + 150, _WIDTH - 120)
    parts, y, last = [], 40, ""
    lines = []
    for c in found:
        name = f"{c.data}, {'all genes' if c.genes == 'all' else f'{c.genes:,} genes'}"
        if name != last:
            y += 8 if last else 0
            parts.append(f'<text class="strong" x="14" y="{y + 15}">{escape(name)}</text>')
            last, y = name, y + _ROW
        d, middle = c.difference, y + _ROW / 2
        colour = {"worse": "var(--accent-2)", "better": _OURS, "no worse": _OURS}.get(d.word, _OTHERS)
        parts.append(
            f'<text x="{_LEFT + 130}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(NAMES[c.measure])}</text>"
        )
        ends = [axis(min(max(v / d.margin, -most), most)) for v in (d.low, d.gain, d.high) if np.isfinite(v)]
        if len(ends) == 3:
            lines.append(
                f'<line x1="{ends[0]:.1f}" x2="{ends[2]:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" '
                f'stroke="{colour}" stroke-width="2.5"/>'
            )
        x = ends[len(ends) // 2]
        fill = colour if len(ends) == 3 else "var(--paper)"
        lines.append(
            f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4.5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="2"><title>{d.gain / d.margin:+.1f} margins</title></circle>'
        )
        parts.append(f'<text x="{_WIDTH - 108}" y="{middle + 4:.1f}">{d.word}</text>')
        y += _ROW
    grid = _lines(axis, 36, y, zero=True)
    at = axis(-1.0)
    margin = f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="36" y2="{y}" stroke-dasharray="4 4"/>'
    words = (
        f'<text x="{at:.1f}" y="28" text-anchor="middle">margin</text>'
        f'<text x="{axis(most):.1f}" y="28" text-anchor="end">atlasvi better →</text>'
    )
    scale = _scale(axis, y + 4, f"gain of atlasvi, in margins named beforehand (cut off at {most:.0f})")
    return standalone(grid + margin + words + "".join(parts + lines) + scale, _WIDTH, y + 58, alt)


def _lines(axis: Axis, top: float, bottom: float, *, zero: bool) -> str:
    found = []
    for value in axis.ticks():
        x = axis(value)
        kind = "axis" if zero and value == 0 else "grid"
        found.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
    return "".join(found)


def _scale(axis: Axis, y: float, label: str) -> str:
    ticks = "".join(
        f'<text x="{axis(value):.1f}" y="{y + 14:.1f}" text-anchor="middle">'
        f"{f'{value:g}'.replace('-', '−')}</text>"
        for value in axis.ticks()
    )
    middle = (axis.start + axis.stop) / 2
    return ticks + f'<text x="{middle:.1f}" y="{y + 38:.1f}" text-anchor="middle">{escape(label)}</text>'
