"""Inline SVG without a plotting library: strips that stretch with their table cell, and line charts for cards.

Colours are CSS classes of the page, so that one file is right in light and dark. Strips place things in per cent of their
width and need no view box: text and dots keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from mpdeploy.gates.verdict import format_number
from mpdeploy.measure.statistics import FloatArray

_MAX_POINTS = 600
"""Raw points drawn of one side; evenly thinned beyond, and the page says so."""


def _svg(body: str, label: str, *, css: str, height: int, view: str = "") -> str:
    box = f' viewBox="{view}"' if view else ""
    text = escape(label, quote=True)
    return (
        f'<svg class="{css}" role="img" aria-label="{text}" width="100%" height="{height}"{box}>'
        f"<title>{escape(label)}</title>{body}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.2f}%" y1="{y1}" x2="{x2:.2f}%" y2="{y2}"/>'


def verdict_strip(
    measured: float, bounds: tuple[float, float] | None, limit: float, *, verdict: str, limit_is: str, label: str
) -> str:
    """A number, its interval and its limit on one axis; the side that is allowed is shaded."""
    if math.isnan(measured):
        return ""
    finite = [value for value in (measured, limit, 0.0, *(bounds or ())) if math.isfinite(value)]
    if limit_is == "smallest":
        finite.remove(0.0)
    low, high = min(finite), max(finite)
    pad = 0.12 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return (
            100.0 * min(1.0, max(0.0, (value - low) / (high - low)))
            if math.isfinite(value)
            else 97.0
            if value > 0
            else 1.0
        )

    allowed = (0.0, x(limit)) if limit_is == "largest" else (x(limit), 100.0)
    parts = [f'<rect class="allowed" x="{allowed[0]:.2f}%" y="3" width="{allowed[1] - allowed[0]:.2f}%" height="22"/>']
    parts.append(_line(x(limit), 0, x(limit), 28, "limit"))
    if bounds is not None:
        left, right = x(bounds[0]), x(bounds[1])
        parts.append(_line(left, 14, right, 14, f"interval s-{verdict}"))
        parts += [_line(end, 9, end, 19, f"interval s-{verdict}") for end in (left, right)]
    parts.append(f'<circle class="f-{verdict}" cx="{x(measured):.2f}%" cy="14" r="4.5"/>')
    return _svg("".join(parts), label, css="strip", height=28)


def log_strip(values: Sequence[tuple[str, float]], limit: float | None, decades: tuple[int, int], *, label: str) -> str:
    """Dots on a logarithmic axis: zero at the left edge, infinity at the right; the limit is a line."""
    first, last = decades

    def x(value: float) -> float:
        return _log_x(value, decades)

    parts = [_line(x(10.0**decade), 4, x(10.0**decade), 24, "grid") for decade in range(first, last + 1)]
    if limit is not None and limit > 0.0:
        parts.append(f'<rect class="allowed" x="0" y="4" width="{x(limit):.2f}%" height="20"/>')
        parts.append(_line(x(limit), 1, x(limit), 27, "limit"))
    for name, value in values:
        bad = not math.isfinite(value) or (limit is not None and value > limit)
        parts.append(
            f'<circle class="{"f-fail" if bad else "f-data"}" cx="{x(value):.2f}%" cy="14" r="5">'
            f"<title>{escape(name)}: {format_number(value)}</title></circle>"
        )
    return _svg("".join(parts), label, css="strip", height=28)


def pair_strip(values: Sequence[tuple[str, float]], decades: tuple[int, int], *, label: str) -> str:
    """Two dots on a logarithmic axis, 'before' and 'after', joined by a line."""
    first, last = decades
    parts = [
        _line(_log_x(10.0**decade, decades), 4, _log_x(10.0**decade, decades), 24, "grid")
        for decade in range(first, last + 1)
    ]
    if len(values) == 2:
        parts.append(_line(_log_x(values[0][1], decades), 14, _log_x(values[1][1], decades), 14, "interval p-a"))
    for name, value in values:
        css = "f-data" if name == "after" else "f-before"
        parts.append(
            f'<circle class="{css}" cx="{_log_x(value, decades):.2f}%" cy="14" r="5">'
            f"<title>{escape(name)}: {format_number(value)}</title></circle>"
        )
    return _svg("".join(parts), label, css="strip", height=28)


def _log_x(value: float, decades: tuple[int, int]) -> float:
    """Per cent of the width: zero at the left edge, infinity at the right."""
    first, last = decades
    if value <= 0.0:
        return 2.0
    if not math.isfinite(value):
        return 98.0
    return 6.0 + 88.0 * min(1.0, max(0.0, (math.log10(value) - first) / (last - first)))


def decade_labels(decades: tuple[int, int]) -> str:
    """The axis that belongs to `log_strip`s of the same decades."""
    first, last = decades
    step = max(1, (last - first) // 5)
    marks = [
        f'<text x="{6.0 + 88.0 * (decade - first) / (last - first):.2f}%" y="13" text-anchor="middle">1e{decade}</text>'
        for decade in range(first + 1, last, step)  # the outermost ones would stand in the words at the ends
    ]
    ends = '<text x="0%" y="13">0</text><text x="100%" y="13" text-anchor="end">lost</text>'
    return _svg(ends + "".join(marks), "logarithmic axis", css="strip axis", height=18)


def decades_of(values: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around all positive finite values."""
    logs = [math.log10(value) for value in values if value > 0.0 and math.isfinite(value)]
    if not logs:
        return -4, 0
    first, last = math.floor(min(logs)), math.ceil(max(logs))
    return (first, last) if last > first else (first - 1, last + 1)


def latency_points(sides: Mapping[str, FloatArray], *, label: str) -> str:
    """Every raw latency as a point: time along the run to the right, milliseconds upwards, median as a line.

    The highest percentile is drawn at its place, so the axis is logarithmic where the largest is far from the smallest.
    """
    values = np.concatenate([side[np.isfinite(side) & (side > 0)] for side in sides.values()])
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    logarithmic = high > 4.0 * low
    scale = np.log if logarithmic else np.asarray
    bottom, top = float(scale(low)), float(scale(high))
    span = (top - bottom) or abs(top) or 1.0

    def y(value: float) -> float:
        return 148.0 - 136.0 * (float(scale(value)) - bottom) / span

    marks = sorted({low, float(np.sqrt(low * high)) if logarithmic else (low + high) / 2, high})
    parts = [
        f'<line class="grid" x1="52" y1="{y(mark):.1f}" x2="600" y2="{y(mark):.1f}"/>'
        f'<text x="48" y="{y(mark) + 4:.1f}" text-anchor="end">{_short(float(f"{mark:.3g}"))}</text>'
        for mark in marks
    ]
    for (_, side), css in zip(sides.items(), ("a", "b"), strict=False):
        shown = side[:: max(1, -(-len(side) // _MAX_POINTS))]
        points = "".join(
            f"M{52 + 548 * (index + 0.5) / len(shown):.1f} {y(float(value)):.1f}h0"
            for index, value in enumerate(shown)
            if np.isfinite(value) and value > 0
        )
        middle = y(float(np.nanmedian(side)))
        parts.append(f'<path class="points p-{css}" d="{points}"/>')
        parts.append(f'<line class="median m-{css}" x1="52" y1="{middle:.1f}" x2="600" y2="{middle:.1f}"/>')
    return _svg("".join(parts), label, css="plot", height=170, view="0 0 604 160")


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    log_scale: bool = False,
    x_name: str = "epoch",
    marks: Sequence[float] = (),
) -> str:
    """Curves over epochs (or what `x_name` says): name -> (x, y) points; values that are not finite leave a gap.

    `marks` are drawn as ticks below the curves.
    """
    points = [point for curve in series.values() for point in curve if _drawable(point[1], log_scale)]
    if not points:
        return ""
    xs, ys = [point[0] for point in points], [_level(point[1], log_scale) for point in points]
    left, right, bottom, top = min(xs), max(xs), min(ys), max(ys)
    width, height = (right - left) or 1.0, (top - bottom) or abs(top) or 1.0

    def at(x: float) -> float:
        return 54 + 256 * (x - left) / width

    def place(point: tuple[float, float]) -> str:
        return f"{at(point[0]):.1f} {126 - 112 * (_level(point[1], log_scale) - bottom) / height:.1f}"

    parts = []
    for mark in (bottom, top) if top > bottom else (bottom,):
        y = 126 - 112 * (mark - bottom) / height
        parts.append(f'<line class="grid" x1="54" y1="{y:.1f}" x2="310" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="50" y="{y + 4:.1f}" text-anchor="end">{_short(2.0**mark if log_scale else mark)}</text>'
        )
    parts.append(
        f'<text x="54" y="144">{left:g}</text><text x="310" y="144" text-anchor="end">{escape(x_name)} {right:g}</text>'
    )
    parts += [
        f'<line class="tick" x1="{at(x):.1f}" y1="122" x2="{at(x):.1f}" y2="131"/>' for x in marks if left <= x <= right
    ]
    for curve, css in zip(series.values(), ("b", "a"), strict=False):
        path, pen_down = [], False
        for point in curve:
            if _drawable(point[1], log_scale):
                path.append(("L" if pen_down else "M") + place(point))
            pen_down = _drawable(point[1], log_scale)
        parts.append(f'<path class="curve c-{css}" d="{"".join(path)}"/>')
        if len(curve) <= 24:
            parts += [
                f'<circle class="k-{css}" cx="{x}" cy="{y}" r="2.5"/>'
                for x, y in (place(point).split() for point in curve if _drawable(point[1], log_scale))
            ]
    return _svg("".join(parts), label, css="plot", height=150, view="0 0 316 150")


def seed_strip(candidate: Sequence[float], reference: Sequence[float], *, label: str) -> str:
    """Two rows of dots on one axis, a dot a seed, pairs joined: mixed precision above, FP32 below."""
    values = [*candidate, *reference]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0

    def x(value: float) -> float:
        return 60 + 240 * (value - low + pad) / (high - low + 2 * pad)

    parts = ['<text x="0" y="22">AMP</text><text x="0" y="62">FP32</text>']
    parts += [
        f'<line class="grid" x1="{x(one):.1f}" y1="18" x2="{x(other):.1f}" y2="58"/>'
        for one, other in zip(candidate, reference, strict=False)
    ]
    for row, css, y in ((candidate, "f-data", 18), (reference, "f-before", 58)):
        parts += [
            f'<circle class="{css}" cx="{x(value):.1f}" cy="{y}" r="4.5"><title>{format_number(value)}</title></circle>'
            for value in row
        ]
    parts.append(
        f'<text x="60" y="84">{_short(low)}</text><text x="300" y="84" text-anchor="end">{_short(high)}</text>'
    )
    return _svg("".join(parts), label, css="plot", height=90, view="0 0 316 90")


def _short(value: float) -> str:
    """A number of an axis: at most seven characters."""
    text = format_number(value)
    return text if len(text) <= 7 else f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def _drawable(value: float, log_scale: bool) -> bool:
    return math.isfinite(value) and (value > 0.0 or not log_scale)


def _level(value: float, log_scale: bool) -> float:
    return math.log2(value) if log_scale else value


_FORMATS = {"fp16": (-14, -25, 15), "bf16": (-126, -134, 127)}
"""Exponent of the smallest normal value, of the largest that rounds to zero, and of the largest value."""


def exponent_histogram(counts: Mapping[int, int], precision: str, *, label: str) -> str:
    """How many values have each power of two (logarithmic heights), coloured by what the half format does to them."""
    present = [exponent for exponent, count in counts.items() if count > 0 and exponent > -127]
    if not present:
        return ""
    normal, zero, largest = _FORMATS.get(precision, _FORMATS["fp16"])
    lowest, highest = min(present), max(present)
    first = min(lowest, normal if normal > lowest - 16 else lowest) - 1
    last = max(highest, largest if largest < highest + 4 else highest) + 1
    width, top = 262.0 / (last - first + 1), math.log10(1 + max(counts.values()))
    parts = []
    for exponent in range(first, last + 1):
        count = counts.get(exponent, 0)
        if not count or exponent <= -127:  # zeros and float32 subnormals
            continue
        css = "x-lost" if exponent > largest or exponent <= zero else "x-weak" if exponent < normal else "x-good"
        height = 4 + 92 * math.log10(1 + count) / top
        parts.append(
            f'<rect class="{css}" x="{48 + width * (exponent - first):.1f}" y="{110 - height:.1f}" '
            f'width="{max(width - 0.8, 0.8):.1f}" height="{height:.1f}"><title>2^{exponent}: {count:,}</title></rect>'
        )
    for edge in (normal, largest + 1):
        if first <= edge <= last + 1:
            x = 48 + width * (edge - first)
            parts.append(f'<line class="limit" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="112"/>')
    parts.append(f'<text x="48" y="126">2^{first}</text><text x="310" y="126" text-anchor="end">2^{last}</text>')
    parts.append(f'<text x="44" y="18" text-anchor="end">{max(counts.values()):.0e}</text>')
    return _svg("".join(parts), label, css="plot", height=130, view="0 0 316 130")


def share_bar(parts: Sequence[tuple[str, int]], *, label: str) -> str:
    """A bar split by counts; each part is a CSS class and a count."""
    total = sum(count for _, count in parts)
    if not total:
        return ""
    body, start = "", 0.0
    for css, count in parts:
        width = 100.0 * count / total
        body += f'<rect class="{css}" x="{start:.2f}%" y="0" width="{width:.2f}%" height="14"/>'
        start += width
    return _svg(body, label, css="strip", height=14)
