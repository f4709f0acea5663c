"""Charts as inline SVG: points with whiskers, bars, histograms, waterfalls.

They are drawn by hand because a report must be readable in light and in dark: colours are CSS classes that the page's
style sheet defines for both, text stays text, and a chart is a few kilobytes. Every label is escaped: labels may come
from users' data.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from markupsafe import Markup, escape

_WIDTH = 720
_STYLE = """<style>
svg { background: #ffffff; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
text { fill: #5b6675; } .figure, .strong { fill: #1b2430; } .grid { stroke: #8a94a3; }
.s0 { fill: #8a94a3; } .s1 { fill: #1f6fd6; } .s2 { fill: #c77c11; } .s3 { fill: #1d8a5c; }
@media (prefers-color-scheme: dark) {
  svg { background: #12161c; } text { fill: #9aa6b4; } .figure, .strong { fill: #e6eaf0; }
  .s0 { fill: #8d99a8; } .s1 { fill: #5aa2f5; } .s2 { fill: #e5a54a; } .s3 { fill: #4bbd8a; }
}
</style>"""
_ROW = 26


def points_chart(values: Mapping[str, Mapping[str, Sequence[float]]], axis: str) -> Markup:
    """One row a group and series: values as small dots, their mean as a large one, whiskers of one standard deviation.

    values: group (a backbone) -> series (an arm) -> values (one a seed). The axis does not start at zero, which dots
    allow and bars would not. Values that are not finite are left out.
    """
    rows = [
        (group, series, finite)
        for group, by_series in values.items()
        for series, vs in by_series.items()
        if (finite := [v for v in vs if math.isfinite(v)])
    ]
    if not rows:
        return Markup("")
    low, high = _bounds([v for *_, vs in rows for v in (*vs, fmean(vs) - _deviation(vs), fmean(vs) + _deviation(vs))])
    names = list(dict.fromkeys(series for _, series, _ in rows))
    left, top, parts = 190, 10, []
    groups = list(dict.fromkeys(group for group, *_ in rows))
    height = top + _ROW * len(rows) + 14 * (len(groups) - 1)
    scale = _Scale(low, high, left, _WIDTH - 70)
    parts.append(_vertical_axis(scale, top, height, axis))
    y, before = top, rows[0][0]
    for group, series, vs in rows:
        y += 14 if group != before else 0
        middle, colour = y + _ROW / 2, f"s{names.index(series) % 4}"
        mean, deviation = fmean(vs), _deviation(vs)
        if group != before or y == top:
            parts.append(_text(10, middle, group, "start", "strong"))
        parts.append(_text(left - 12, middle, series, "end"))
        parts.append(_line(scale(mean - deviation), middle, scale(mean + deviation), middle, f"whisker {colour}"))
        parts += [f'<circle cx="{scale(v):.1f}" cy="{middle:.1f}" r="2.5" class="seed {colour}"/>' for v in vs]
        tip = escape(f"{group}, {series}: {mean:.4f} ± {deviation:.4f} over {len(vs)} seeds")
        circle = f'<circle cx="{scale(mean):.1f}" cy="{middle:.1f}" r="5.5" class="mean {colour}">'
        parts.append(f"{circle}<title>{tip}</title></circle>")
        parts.append(_text(_WIDTH - 60, middle, f"{mean:.4f}", "start", "figure"))
        y, before = y + _ROW, group
    return _svg(parts, height + 40, axis)


def bar_chart(values: Mapping[str, float], unit: str) -> Markup:
    """One horizontal bar a label, from zero, its value at its end."""
    if not values:
        return Markup("")
    left, top = max(190, min(460, 20 + 6 * max(map(len, values)))), 6
    scale = _Scale(0, max(*values.values(), 0.0) or 1.0, left, _WIDTH - 110)
    parts = []
    for number, (label, value) in enumerate(values.items()):
        y = top + number * _ROW
        parts.append(_text(left - 12, y + _ROW / 2, label, "end"))
        width = max(scale(value) - left, 1)
        parts.append(f'<rect x="{left}" y="{y + 5}" width="{width:.1f}" height="{_ROW - 10}" rx="2" class="s1"/>')
        parts.append(_text(scale(value) + 8, y + _ROW / 2, f"{_short(value)} {unit}", "start", "figure"))
    return _svg(parts, top + _ROW * len(values) + 6, f"bars in {unit}")


def waterfall_chart(first: str, begin: float, changes: Mapping[str, float], unit: str) -> Markup:
    """How a value came to be: a bar of what it was, one floating bar a change, and a bar of what is left.

    changes: by label, in order; below 0 for what was saved.
    """
    left, top, right = 230, 6, _WIDTH - 110
    ends = [begin]
    for change in changes.values():
        ends.append(ends[-1] + change)
    scale = _Scale(min(0.0, *ends), max(*ends, 0.0) or 1.0, left, right)
    bars = [(first, 0.0, begin, "s0", begin)]
    bars += [
        (label, start, end, "s3" if change <= 0 else "s2", change)
        for (label, change), start, end in zip(changes.items(), ends, ends[1:], strict=False)
    ]
    bars.append(("in all", 0.0, ends[-1], "s1", ends[-1]))
    parts = []
    for number, (label, start, end, colour, value) in enumerate(bars):
        y, low, high = top + number * _ROW, scale(min(start, end)), scale(max(start, end))
        parts.append(_text(left - 12, y + _ROW / 2, label, "end"))
        place = f'x="{low:.1f}" y="{y + 5}" width="{max(high - low, 1):.1f}" height="{_ROW - 10}" rx="2"'
        parts.append(f'<rect {place} class="{colour}"/>')
        sign = "+" if label in changes and value > 0 else "-" if value < 0 else ""
        parts.append(_text(high + 8, y + _ROW / 2, f"{sign}{_short(abs(value))}", "start", "figure"))
        if number < len(bars) - 1:
            parts.append(_line(scale(end), y + _ROW - 5, scale(end), y + _ROW + 5, "grid"))
    return _svg(parts, top + _ROW * len(bars) + 6, f"waterfall in {unit}")


def standalone(chart: Markup) -> str:
    """A chart as a file of its own: with colours that a page would give it, for light and dark."""
    head, rest = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{_STYLE}{rest}'


def histogram(values: Sequence[float], axis: str, colour: int = 0, bins: int = 24) -> Markup:
    """How often values fall into equal bins; a dashed line marks the median."""
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    step = _nice_step((high - low) / bins) if high > low else 1.0
    first = math.floor(low / step)
    counts = [0] * (math.floor(high / step) - first + 1)
    for value in values:
        counts[math.floor(value / step) - first] += 1
    left, top, bottom = 56, 24, 194
    scale = _Scale(first * step, (first + len(counts)) * step, left, _WIDTH - 20)
    rise = (bottom - top) / max(counts)
    parts = [_vertical_axis(scale, top, bottom, axis)]
    for tick in sorted({0, max(counts) // 2, max(counts)}):
        parts.append(_text(left - 8, bottom - tick * rise, f"{tick:,}", "end"))
    width = scale(step) - scale(0)
    for number, count in enumerate(counts):
        x, height = scale((first + number) * step), count * rise
        place = f'x="{x + 0.5:.1f}" y="{bottom - height:.1f}" width="{max(width - 1, 0.5):.1f}" height="{height:.1f}"'
        tip = f"{(first + number) * step:g} to {(first + number + 1) * step:g}: {count:,}"
        parts.append(f'<rect {place} class="s{colour % 4}"><title>{tip}</title></rect>')
    median = sorted(values)[len(values) // 2]
    parts.append(_line(scale(median), top - 16, scale(median), bottom, "median"))
    side, shift = ("end", -6) if scale(median) > _WIDTH * 0.7 else ("start", 6)
    parts.append(_text(scale(median) + shift, top - 10, f"median {_short(median)}", side, "figure"))
    return _svg(parts, bottom + 40, f"histogram of {axis}")


class _Scale:
    """Maps values to x positions."""

    def __init__(self, low: float, high: float, left: float, right: float) -> None:
        self.low, self.high, self.left, self.right = low, high, left, right

    def __call__(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def ticks(self) -> list[float]:
        step = _nice_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    step = _nice_step(max(high - low, 1e-3) / 5)
    return math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step


def _nice_step(raw: float) -> float:
    """The smallest of 1, 2, 2.5, 5 or 10 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _vertical_axis(scale: _Scale, top: float, bottom: float, name: str) -> str:
    parts = []
    for tick in scale.ticks():
        parts.append(_line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(_text(scale(tick), bottom + 13, f"{tick:,.6g}", "middle"))
    parts.append(_text((scale.left + scale.right) / 2, bottom + 31, name, "middle", "axis"))
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"'
    return f'<text {place} class="{style}">{escape(text)}</text>'


def _short(value: float) -> str:
    if value >= 10_000_000:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _svg(parts: Sequence[str], height: float, label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )  # all texts inside went through escape()
