"""Charts as inline SVG. Colours come from the page's style sheet, so that they follow dark mode."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CHART = (440, 220)
MARGIN = (10, 10, 30, 44)
"""Pixels above, right, below and left of a chart's area."""


MOST_TICKS = 6
MOST_SEPARATE = 160
"""Cells in a row up to which each is set apart from the next."""


@dataclass(frozen=True)
class Series:
    """One line: `style` is the class s1 to s4, values by x, None where there is none."""

    label: str
    style: str
    values: Sequence[float | None]


def line_chart(title: str, x_label: str, xs: Sequence[float], series: Sequence[Series]) -> Markup:
    """Lines over one x axis; logarithmic in y, values of zero and less left out."""
    known = [
        v for line in series for v in line.values if v is not None and math.isfinite(v) and v > 0
    ]
    if not known or not xs:
        return Markup("")
    width, height = CHART
    top, right, bottom, left = MARGIN
    low, high = min(known), max(known)
    # A part that has died away should not flatten all the others.
    low = max(low, high * 1e-5)
    ticks = log_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span_x = (max(xs) - min(xs)) or 1
    span_y = math.log(high / low) or 1

    def at_x(value: float) -> float:
        return left + (width - left - right) * (value - min(xs)) / span_x

    def at_y(value: float) -> float:
        share = math.log(max(value, low) / low) / span_y
        return height - bottom - (height - top - bottom) * share

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in nice_ticks(min(xs), max(xs)):
        parts.append(
            f'<text class="tick" x="{at_x(tick):.1f}" y="{height - bottom + 16}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text class="tick" x="{width - right}" y="{height - 2}" text-anchor="end">'
        f"{escape(x_label)}</text>"
    )
    for line in series:
        path, pen = [], "M"
        for x, value in zip(xs, line.values, strict=True):
            if value is None or not math.isfinite(value) or value <= 0:
                pen = "M"
                continue
            path.append(f"{pen}{at_x(x):.1f} {at_y(value):.1f}")
            pen = "L"
        parts.append(f'<path class="line {escape(line.style)}" d="{"".join(path)}"/>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{height - bottom}"/>')
    # What the script needs to read values off the chart.
    points = {
        "x": list(xs),
        "left": left,
        "right": width - right,
        "label": x_label,
        "lines": [
            [line.label, [None if v is None else float(f"{v:.4g}") for v in line.values]]
            for line in series
        ],
    }
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" data-points="{escape(json.dumps(points))}">'
        f"{''.join(parts)}</svg>"
    )


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers over a logarithmic range, two to about six, inside it where that is enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= MOST_TICKS:
            break
    if len(inside) >= 2:
        return inside
    below = [tick for tick in ticks if tick <= low] or ticks[:1]
    above = [tick for tick in ticks if tick >= high] or ticks[-1:]
    return sorted({below[-1], *inside, above[0]})


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Whole numbers of 1, 2 or 5 times a power of ten inside a linear range."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    step = max(1.0, step)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def strip(rows: Sequence[Sequence[int | None]]) -> Markup:
    """Rows of cells, one column a layer: class q0 (worst) to q5, qn where nothing is known.

    Where there are many, neighbours of one class become one rectangle.
    """
    columns = max((len(row) for row in rows), default=0)
    parts = []
    for y, row in enumerate(rows):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start] or columns <= MOST_SEPARATE:
                level = row[start]
                style = "qn" if level is None else f"q{level}"
                width = x - start if columns > MOST_SEPARATE else 0.94
                parts.append(
                    f'<rect class="{style}" x="{start}" y="{y * 10}" width="{width}" height="9"/>'
                )
                start = x
    return Markup(
        f'<svg viewBox="0 0 {columns} {10 * len(rows) - 1}" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(parts)}'
        f'<rect class="mark" x="-2" y="0" width="1" height="{10 * len(rows) - 1}"/></svg>'
    )


def histogram(counts: Sequence[int], label: str) -> Markup:
    """Bars over the levels -q to q. Level zero, where the pruned weights are, is a bar of its own
    colour, cut at the height of the others."""
    zero = len(counts) // 2
    others = [*counts[:zero], *counts[zero + 1 :]]
    most = max(others, default=0) or 1
    wide = len(counts) <= 31
    width = 0.82 if wide else 1.0
    area = "".join(
        f"M{i + (1 - width) / 2:.2f} 40v{-38 * min(count / most, 1):.2f}h{width}V40z"
        for i, count in enumerate(counts)
        if count and i != zero
    )
    at_zero = f"M{zero + (1 - width) / 2:.2f} 40v-40h{width}v40z" if counts[zero] else ""
    return Markup(
        f'<svg class="hist" viewBox="0 0 {len(counts)} 41" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><path class="zero" d="{at_zero}"/>'
        f'<path class="bars" d="{area}"/>'
        f'<line class="axis" x1="0" x2="{len(counts)}" y1="40.5" y2="40.5"/></svg>'
    )


def mask_crop(
    values: Sequence[Sequence[float]], group: int, unit: int, printed: bool, label: str
) -> Markup:
    """Cells of a weight: kept ones filled by sign and size, zeros empty, groups set apart.

    `unit` neighbours that are kept or pruned together touch; `printed` writes the numbers in.
    """
    size, gap = 14, 5
    columns = max((len(row) for row in values), default=0)

    def at(column: int) -> int:
        return column * size + column // group * gap + column // unit % (group // unit) * (unit > 1)

    most = max((abs(v) for row in values for v in row), default=0.0) or 1.0
    parts = []
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            place = f'x="{at(x)}" y="{y * size}" width="{size - 1}" height="{size - 1}"'
            if value == 0:
                parts.append(f'<rect class="gone" {place}/>')
                continue
            depth = 0.3 + 0.7 * math.sqrt(abs(value) / most)
            style = "plus" if value > 0 else "minus"
            parts.append(
                f'<rect class="{style}" {place} fill-opacity="{depth:.2f}">'
                f"<title>{value:g}</title></rect>"
            )
            if printed:
                middle = f'x="{at(x) + size / 2 - 0.5}" y="{y * size + size / 2 + 2.5}"'
                parts.append(f'<text class="cell" {middle}>{value:g}</text>')
    width = at(columns - 1) + size if columns else 1
    return Markup(
        f'<svg class="crop" viewBox="-1 -1 {width + 1} {len(values) * size + 1}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
