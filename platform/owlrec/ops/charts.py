"""Charts as SVG, drawn by matplotlib, for light and dark pages: points, bars, histograms.

Ink is drawn in black and written as `currentColor` on a transparent figure, so a chart takes the page's text color.
Text stays text, and the same values give the same bytes. matplotlib is imported with the first chart: it takes half
a second, and most commands draw none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2f7fdc", "#d08a24", "#2a9d6b", "#8a94a3")  # of medium lightness: visible on white and on black
_WIDTH = 8.2  # inches, like all lengths
_ROW, _AXIS = 0.3, 0.7  # height of a row, and of the axis at the bottom
_BINS = 24
_STYLE: Any = {  # matplotlib's settings
    "font.sans-serif": ["DejaVu Sans", "Segoe UI", "Arial"],
    "svg.fonttype": "none",
    "svg.hashsalt": "owlrec",  # fixes names inside the file, which are random without it
    "text.parse_math": False,  # labels may contain a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
}
_PAGE = """<style>svg { background: #ffffff; color: #1b2430; }
@media (prefers-color-scheme: dark) { svg { background: #12161c; color: #e6eaf0; } }</style>"""


def points_chart(values: Mapping[tuple[str, str], Sequence[float]], axis: str) -> Markup:
    """One row per group and series: values as small dots, their mean as a large one.

    values: (group, series), such as a backbone and an arm, -> values, one per seed. Whiskers show one standard
    deviation. The axis does not start at zero, which is fine for dots but not for bars. Values that are not finite are
    left out; "" if none is left.
    """
    rows = {names: finite for names, vs in values.items() if (finite := [v for v in vs if math.isfinite(v)])}
    series = list(dict.fromkeys(name for _, name in rows))

    def plot(axes: "Axes") -> None:
        for y, ((_, name), vs) in enumerate(rows.items()):
            color = COLORS[series.index(name) % len(COLORS)]
            spread = stdev(vs) if len(vs) > 1 else 0.0
            axes.plot(vs, [y] * len(vs), "o", color=color, alpha=0.5, markersize=4)
            axes.errorbar(fmean(vs), y, xerr=spread, fmt="o", color=color, markersize=8)
            value = f"{fmean(vs):.4f}" + (f" ± {spread:.4f}" if len(vs) > 1 else "")
            axes.text(1.01, y, value, transform=axes.get_yaxis_transform(), va="center")
        axes.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [": ".join(filter(None, names)) for names in rows])
        axes.grid(axis="x", alpha=0.3)

    return draw(plot, _ROW * len(rows) + _AXIS, axis) if rows else Markup("")


def bar_chart(values: Mapping[str, float], unit: str) -> Markup:
    """One horizontal bar per label, from zero, with its value at its end; "" without values."""

    def plot(axes: "Axes") -> None:
        bars = axes.barh(range(len(values)), list(values.values()), color=COLORS[0])
        axes.bar_label(bars, [f"{short_number(value)} {unit}" for value in values.values()], padding=4)
        axes.set_yticks(range(len(values)), list(values))
        axes.set(
            ylim=(len(values) - 0.5, -0.5), xlim=(0, max(*values.values(), 0) or 1)
        )  # labels may extend beyond the end
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    return draw(plot, _ROW * (len(values) + 0.5), f"bars in {unit}") if values else Markup("")


def histogram(values: Sequence[float], axis: str) -> Markup:
    """Counts of values in equal bins; a dashed line marks the median. "" without values."""

    def plot(axes: "Axes") -> None:
        axes.hist(values, bins=_BINS, color=COLORS[0])
        axes.axvline(median(values), color="black", linestyle="--")
        axes.set(xlabel=axis, title=f"median {short_number(median(values))}")

    return draw(plot, 2.6, f"histogram of {axis}") if values else Markup("")


def draw(plot: Callable[["Axes"], None], height: float, label: str) -> Markup:
    """Output of `plot` as an `<svg>` element for a page. height: inches. label: alternative text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        plot(figure.subplots())
        no_dates = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=no_dates)
    svg = written.getvalue().partition("<svg")[2].replace("#000000", "currentColor")
    return Markup(f'<svg role="img" aria-label="{escape(label)}" fill="currentColor"{svg}')  # matplotlib escapes texts


def standalone(chart: Markup) -> str:
    """A chart as a standalone file, with a page's colors for light and dark mode."""
    head, rest = chart.split(">", 1)
    return f"{head}>{_PAGE}{rest}"


def short_number(value: float) -> str:
    """Three significant digits; whole numbers from 100 in full; millions from ten million."""
    if value >= 10_000_000:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
