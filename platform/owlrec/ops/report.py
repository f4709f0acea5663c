"""The report of a run: one HTML file that needs nothing beside it, to be kept, mailed and opened years later.

Whatever `ReportData` lacks is left out of the page. All texts are escaped: titles come from users' data and answers
from an LLM.
"""

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel

from owlrec import __version__
from owlrec.cohorts.model import read_profiles
from owlrec.ctr.experiment import (
    COLD_ITEM_BELOW,
    COLD_USER_BELOW,
    PairedDifference,
    SliceMetrics,
    TrialResult,
    summarise,
)
from owlrec.decoding.controller import DecoderCounters
from owlrec.encoding.semantic_ids import QuantisationReport
from owlrec.encoding.vectors import read_reports
from owlrec.evaluation import GridScores
from owlrec.generation.job import decoder_counters, iterate_knowledge
from owlrec.generation.models import PACKAGED
from owlrec.ranking.judging import RankerResult, read_results
from owlrec.releases.release import Release
from owlrec.releases.rows import measure_lookup
from owlrec.schema import KINDS, KNOWLEDGE, Kind, shard_of
from owlrec.shards import Artifact, Card, finished_stage
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

# ----------------------------------------------------------------------------------------------------------- throughput
# How fast a generation job ran, over time and by replica, and what the quality gate saw: read off its cards.


_SLICES = 12


class Throughput(BaseModel):
    """Figures of a whole job, over all runs that it took."""

    over_time: dict[str, float] = {}  # output tokens/s by slice of time, "0 to 5 min" and so on
    by_replica: dict[str, float] = {}  # output tokens/s between a replica's first shard and its last
    texts_by_flag: dict[str, int] = {}
    actions: dict[str, int] = {}


def throughput(cards: Iterable[Card]) -> Throughput:
    """A shard's tokens are spread evenly over the time that it took."""
    flags: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    spans, engines = [], []
    for card in cards:
        counts = {name: n for name, n in card.counts.items() if isinstance(n, int)}
        flags.update({name.removeprefix("flag_"): n for name, n in counts.items() if name.startswith("flag_")})
        actions.update({name.removeprefix("quality_"): n for name, n in counts.items() if name.startswith("quality_")})
        if (written := counts.get("output_tokens", 0)) and card.seconds:
            spans.append((card.finished - card.seconds, card.finished, written))
            engines.append(card.worker)
    if not spans:
        return Throughput(texts_by_flag=dict(flags), actions=dict(actions))
    start, end, tokens = np.array(spans).T
    edges = np.linspace(start.min(), end.max(), _SLICES + 1)
    overlap = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
    speed = (np.clip(overlap, 0, None) / (end - start)[:, None] * tokens[:, None]).sum(axis=0) / np.diff(edges)
    minutes = (edges - edges[0]) / 60
    names = np.array(engines)
    of = {name: names == name for name in dict.fromkeys(engines)}
    return Throughput(
        over_time={f"{a:.1f} to {b:.1f} min": float(s) for a, b, s in zip(minutes, minutes[1:], speed, strict=False)},
        by_replica={n: float(tokens[mine].sum() / (end[mine].max() - start[mine].min())) for n, mine in of.items()},
        texts_by_flag=dict(flags),
        actions=dict(actions),
    )


# --------------------------------------------------------------------------------------------------------------- charts
# Charts as inline SVG: points with whiskers, bars, histograms, waterfalls.
#
# They are drawn by hand because a report must be readable in light and in dark: colours are CSS classes that the
# page's style sheet defines for both, text stays text, and a chart is a few kilobytes. Every label is escaped: labels
# may come from users' data.


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


# ---------------------------------------------------------------------------------------------------------- report data
# What a report is made of: plain numbers and texts, so that any stage can fill them in.


class ArmFigures(BaseModel):
    """One backbone with one arm: metrics on the test split, one value a seed."""

    backbone: str
    arm: str
    auc: list[float]
    gauc: list[float] = []
    log_loss: list[float] = []
    valid_auc: list[float] = []
    calibration_error: list[float] = []
    differences: dict[str, PairedDifference] = {}  # arm that this one is compared with -> over the seeds of both
    slices: dict[str, SliceMetrics] = {}  # parts of the test split, means over seeds


class StageFigures(BaseModel):
    """What a stage took. Tokens are of the LLM only."""

    stage: str
    seconds: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    rows: int = 0
    skipped: bool = False  # already there from an earlier run


class KnowledgeSample(BaseModel):
    """What the LLM read of a user or an item, and what it wrote."""

    kind: str
    title: str  # "user 12", or the item's title
    inputs: list[str]  # one line each: behaviours, attributes
    text: str


class ReportData(BaseModel):
    """All that a report may show."""

    run: str
    finished: str  # date and time, as it should read
    hardware: str
    facts: dict[str, str] = {}  # the line of key figures under the title
    protocol: str = ""  # split, label, negatives, seeds
    arms: list[ArmFigures] = []
    stages: list[StageFigures] = []
    knowledge_tokens: dict[str, list[int]] = {}  # by kind; of a large run a sample is enough
    samples: list[KnowledgeSample] = []
    release: dict[str, str] = {}
    lookup: dict[str, str] = {}
    throughput: Throughput = Throughput()  # of the generation job
    decoder: DecoderCounters | None = None  # of the speculative decoder, where one ran
    semantic_ids: dict[str, QuantisationReport] = {}  # by the name of their vectors: knowledge-user, metadata-item, ...
    ranker: list[RankerResult] = []  # of all runs of the LLM ranker, and of CTR models on the same samples
    notes: list[str] = []  # what a reader must know in order not to misread the figures
    versions: dict[str, str] = {}


# --------------------------------------------------------------------------------------------------------------- report


class ArmRow(BaseModel):
    """A row of the table of arms."""

    backbone: str
    arm: str
    seeds: int
    auc: str
    difference: str  # of the mean AUC to the arm "none" of the same backbone
    interval: str  # of that difference
    gauc: str
    log_loss: str
    calibration_error: str
    valid_auc: str


class ComparisonRow(BaseModel):
    """A row of the table of paired comparisons: AUC of an arm minus that of `base`, of the same backbone."""

    backbone: str
    arm: str
    base: str
    difference: str
    interval: str
    rela_imp: str
    seeds: int


class RankerRow(BaseModel):
    """A row of the table of the LLM ranker: one way of asking, one model, all its seeds."""

    asked: str
    model: str
    seeds: int
    auc: str
    interval: str  # of the first seed


class SliceRow(BaseModel):
    """A row of the table of slices; one (AUC, log-loss) an arm, in the order of the table's arms."""

    backbone: str
    slice: str
    rows: int
    figures: list[tuple[str, str]]


class HeatCell(BaseModel):
    """One backbone with one arm in the heat map of gains."""

    gain: str  # in AUC, to the arm "none"; blank where it was not taken
    interval: str
    style: str  # what colours the cell


def render_report(data: ReportData) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    auc: dict[str, dict[str, list[float]]] = {}
    for arm in data.arms:
        auc.setdefault(arm.backbone, {})[arm.arm] = arm.auc
    seconds = {s.stage: s.seconds for s in data.stages if not s.skipped}
    tokens = {
        f"{s.stage}, {name}": float(count)
        for s in data.stages
        for name, count in (("prompts", s.prompt_tokens), ("answers", s.output_tokens))
        if count
    }
    lengths = {
        kind: histogram(values, f"tokens a text, {kind}s", colour)
        for colour, (kind, values) in enumerate(data.knowledge_tokens.items(), start=1)
        if values
    }
    steps = data.decoder.by_rows if data.decoder else {}
    speed_ups = {f"up to {rows} rows": s.speed_up for rows, s in steps.items() if s.seconds}
    return environment.get_template("report.html.j2").render(
        data=data,
        rows=arm_rows(data.arms),
        comparisons=comparison_rows(data.arms),
        arm_names=_arm_names(data.arms),
        slice_rows=slice_rows(data.arms),
        heat_arms=[arm for arm in _arm_names(data.arms) if arm != "none"],
        heat_rows=heat_rows(data.arms),
        cold_user_below=COLD_USER_BELOW,
        cold_item_below=COLD_ITEM_BELOW,
        auc_chart=points_chart(auc, "AUC on the test split"),
        seconds_chart=bar_chart(seconds, "s"),
        tokens_chart=bar_chart(tokens, "tokens"),
        lengths=lengths,
        decoder_rows=decoder_rows(data.decoder) if data.decoder else {},
        speed_chart=bar_chart(speed_ups, "x plain"),
        time_chart=bar_chart(data.throughput.over_time, "tokens/s"),
        replica_chart=bar_chart(data.throughput.by_replica, "tokens/s"),
        ranker_rows=ranker_rows(data.ranker),
        ranker_chart=points_chart(_ranker_aucs(data.ranker), "AUC on the test split"),
        version=__version__,
    )


def arm_rows(arms: list[ArmFigures]) -> list[ArmRow]:
    """The table of arms: means over seeds, with one standard deviation where there are several.

    The difference is that of the seeds which both arms have, where it was taken.
    """
    base = {a.backbone: fmean(a.auc) for a in arms if a.arm == "none" and a.auc}
    rows = []
    for arm in arms:
        difference, paired = "", arm.differences.get("none")
        if paired:
            difference = f"{paired.auc:+.4f}"
        elif arm.arm != "none" and arm.backbone in base and arm.auc:
            difference = f"{fmean(arm.auc) - base[arm.backbone]:+.4f}"
        rows.append(
            ArmRow(
                backbone=arm.backbone,
                arm=arm.arm,
                seeds=len(arm.auc),
                auc=_spread(arm.auc),
                difference=difference,
                interval=_interval(paired) if paired else "",
                gauc=_spread(arm.gauc),
                log_loss=_spread(arm.log_loss),
                calibration_error=_spread(arm.calibration_error),
                valid_auc=_spread(arm.valid_auc),
            )
        )
    return rows


def comparison_rows(arms: list[ArmFigures]) -> list[ComparisonRow]:
    """The table of paired comparisons; what is not known of one is left blank."""
    return [
        ComparisonRow(
            backbone=arm.backbone,
            arm=arm.arm,
            base=base,
            difference=f"{paired.auc:+.4f}",
            interval=_interval(paired),
            rela_imp="" if paired.rela_imp is None else f"{paired.rela_imp:+.1%}",
            seeds=paired.seeds,
        )
        for arm in arms
        for base, paired in arm.differences.items()
    ]


def heat_rows(arms: list[ArmFigures]) -> dict[str, list[HeatCell]]:
    """The heat map of gains to "none": backbone -> a cell an arm, in their order; empty where no gain was taken.

    Colours are as strong as the gain is beside the largest one, and fade where its interval holds 0.
    """
    paired = {(a.backbone, a.arm): a.differences["none"] for a in arms if "none" in a.differences}
    largest = max((abs(difference.auc) for difference in paired.values()), default=0.0)
    names = [name for name in _arm_names(arms) if name != "none"]
    rows = {}
    for backbone in dict.fromkeys(arm.backbone for arm in arms):
        of_backbone = [paired.get((backbone, name)) for name in names]
        if any(of_backbone):
            rows[backbone] = [_heat_cell(difference, largest) for difference in of_backbone]
    return rows


def _heat_cell(paired: PairedDifference | None, largest: float) -> HeatCell:
    if paired is None:
        return HeatCell(gain="", interval="", style="")
    share = 70 * abs(paired.auc) / largest if largest else 0.0
    interval = paired.interval
    if interval and interval.low <= 0 <= interval.high:
        share /= 3
    colour = "--s3" if paired.auc >= 0 else "--s2"
    style = f"background: color-mix(in srgb, var({colour}) {share:.0f}%, transparent)"
    return HeatCell(gain=f"{paired.auc:+.4f}", interval=_interval(paired), style=style)


def slice_rows(arms: list[ArmFigures]) -> list[SliceRow]:
    """The table of slices, an arm a column; blank where an arm was not measured."""
    names = _arm_names(arms)
    rows = []
    for backbone in dict.fromkeys(arm.backbone for arm in arms):
        of_arm = {arm.arm: arm.slices for arm in arms if arm.backbone == backbone}
        sizes = {name: metrics.rows for slices in of_arm.values() for name, metrics in slices.items()}
        for name, size in sizes.items():
            figures = [_slice_figures(of_arm.get(arm, {}).get(name)) for arm in names]
            rows.append(SliceRow(backbone=backbone, slice=name, rows=size, figures=figures))
    return rows


def ranker_rows(results: list[RankerResult]) -> list[RankerRow]:
    """The table of the LLM ranker, in the order of `results`."""
    groups: dict[tuple[str, str], list[RankerResult]] = {}
    for result in results:
        groups.setdefault(_ranker_names(result), []).append(result)
    return [
        RankerRow(
            asked=asked,
            model=model,
            seeds=len(of),
            auc=_spread([r.auc for r in of]),
            interval=f"[{i.low:.4f}, {i.high:.4f}]" if (i := of[0].interval) else "",
        )
        for (asked, model), of in groups.items()
    ]


def decoder_rows(counters: DecoderCounters) -> dict[str, str]:
    """What the decoder counted, as the report prints it."""
    counts = counters.counts
    drafted, accepted = counts.get("drafted", 0), counts.get("accepted", 0)
    hits = {name.removeprefix("hits_"): n for name, n in counts.items() if name.startswith("hits_")}
    steps_s = sum(s.seconds for s in counters.by_rows.values())
    rows = {
        "tokens a row and step": f"{counters.tokens_per_step:.2f} (steps without drafts included)",
        "draft tokens": f"{drafted:,.0f}, {accepted / max(drafted, 1):.0%} accepted",
        "accepted by the relaxed rule alone": f"{counts.get('relaxed', 0):,.0f}",
        "drafts by source": ", ".join(f"{name} {n:,.0f}" for name, n in sorted(hits.items())) or "none",
        "requests for unknown pools": f"{counts.get('unknown_pools', 0):,.0f}",
    }
    if steps_s:
        shares = {name: counts.get(f"{name}_s", 0) / steps_s for name in ("retrieval", "verification")}
        rows["share of step time"] = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return rows


def _ranker_aucs(results: list[RankerResult]) -> dict[str, dict[str, list[float]]]:
    aucs: dict[str, dict[str, list[float]]] = {}
    for result in results:
        asked, model = _ranker_names(result)
        aucs.setdefault(asked, {}).setdefault(model, []).append(result.auc)
    return aucs


def _ranker_names(result: RankerResult) -> tuple[str, str]:
    """What a prompt shows, and who answers."""
    shots = "all samples" if result.shots is None else f"{result.shots:,} shots"
    model = "zero-shot" if result.model == "zero-shot" else f"{result.model}, {shots}"
    return (f"{result.shown}, K = {result.behaviours}" if result.behaviours else "CTR models"), model


def _arm_names(arms: list[ArmFigures]) -> list[str]:
    return list(dict.fromkeys(arm.arm for arm in arms))


def _interval(paired: PairedDifference) -> str:
    interval = paired.interval
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]" if interval else ""


def _slice_figures(metrics: SliceMetrics | None) -> tuple[str, str]:
    if metrics is None:
        return "", ""
    return "one class" if metrics.auc is None else f"{metrics.auc:.4f}", f"{metrics.log_loss:.4f}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.4f}"


# ----------------------------------------------------------------------------------------------------------- run report
# Collects what a run left in its workspace into a report: stages, arms, texts, the release and its lookup latency.
#
# Only manifests, results and a few rows are read, so a report of 10^8 users costs no more than one of a hundred.


REPORTED_STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr")
_SAMPLES_A_KIND = 3
_LENGTH_ROWS = 20_000
_NOTE = (
    "A gain is the LLM's only where `knowledge` beats both `shuffled` (the same vectors given to other ids: what the "
    "adaptor's extra parameters are worth) and `metadata` (titles, attributes and history encoded without an LLM: what "
    "the text encoder is worth)."
)
_NOTES_ON_MODELS = {
    PACKAGED: "SmolLM2-135M makes up most facts: with it expect no gain over metadata. A stronger model in the "
    "recipe's engine section changes the texts, and nothing else of the run.",
    "echo": "The engine echo answers with invented words, so these texts can be worth nothing: it shows the machinery.",
}


def collect(
    workspace: Workspace,
    release: Release,
    results: list[TrialResult],
    *,
    scores: GridScores | None,
    run: str,
    protocol: str,
    facts: Mapping[str, str],
) -> ReportData:
    """All figures of a run. Stages without a manifest are left out.

    scores: the test scores of the trials, where they left any: without them differences have no interval.
    """
    manifests = [m for stage in REPORTED_STAGES if (m := finished_stage(workspace, stage))]
    cards = list(Artifact(workspace, _knowledge_folder(manifests)).cards().values())
    texts = {kind: _some_rows(workspace, manifests, kind) for kind in KINDS}
    of_model = _NOTES_ON_MODELS.get(release.manifest.model)
    return ReportData(
        run=run,
        finished=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        hardware=hardware_line(),
        facts=dict(facts),
        protocol=protocol,
        arms=arm_figures(results, scores),
        stages=[_stage_figures(m) for m in manifests],
        knowledge_tokens={kind: table["output_tokens"].to_pylist() for kind, table in texts.items() if table.num_rows},
        samples=[s for kind, table in texts.items() for s in _samples(workspace, kind, table)],
        release={
            "name": release.name,
            "texts": ", ".join(f"{n:,} {kind}s" for kind, n in release.manifest.knowledge.items()),
            "dimension": str(release.manifest.dim),
            "model": release.manifest.model,
            "encoder": release.manifest.encoder,
        },
        throughput=throughput(cards),
        decoder=decoder_counters(cards),
        semantic_ids=_semantic_ids(workspace, manifests),
        ranker=read_results(workspace),
        lookup=lookup_figures(release, _some_users(workspace)),
        notes=[_NOTE, of_model] if of_model else [_NOTE],
        versions={name: metadata.version(name) for name in ("ray", "pyarrow", "lmdb", "numpy")},
    )


def _some_users(workspace: Workspace) -> np.ndarray:
    return workspace.read_shard("users", 0, ["user_id"])["user_id"].to_numpy()


def lookup_figures(release: Release, ids: np.ndarray) -> dict[str, str]:
    """Latency of single lookups, as the report and the console print them."""
    figures = measure_lookup(release.store, "user", ids)
    if not figures["n"]:
        return {}
    return {
        what: (
            f"p50 {figures[f'{what}_p50_us']:.0f} µs, p99 {figures[f'{what}_p99_us']:.0f} µs "
            f"({figures['n']:.0f} single gets)"
        )
        for what in ("knowledge", "vector")
    }


def hardware_line() -> str:
    """The machine in a line, as every table of figures needs it."""
    memory = psutil.virtual_memory().total / 2**30
    processor = ", ".join([platform.machine(), *_matrix_instructions()])
    python = platform.python_version()
    return f"{os.cpu_count()} CPU cores ({processor}), {memory:.0f} GiB memory, Python {python}"


def _matrix_instructions() -> list[str]:
    """What decides an LLM's speed on a CPU, of what Linux says of the first one."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        return [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_tile", "AMX")) if flag in flags]
    return []


def arm_figures(results: list[TrialResult], scores: GridScores | None = None) -> list[ArmFigures]:
    """Results grouped by backbone and arm, one value a seed; differences and slices as `summarise` finds them."""
    groups: dict[tuple[str, str], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.backbone, result.arm), []).append(result)
    return [
        ArmFigures(
            backbone=summary.backbone,
            arm=summary.arm,
            auc=[r.test.auc for r in group],
            gauc=[r.test.gauc for r in group if r.test.gauc is not None],
            log_loss=[r.test.log_loss for r in group],
            valid_auc=[r.valid.auc for r in group],
            calibration_error=[e for r in group if (e := r.test.calibration_error) is not None],
            differences=dict(summary.differences),
            slices=summary.slices,
        )
        for summary, group in zip(summarise(results, scores), groups.values(), strict=True)
    ]


def _stage_figures(manifest: Card) -> StageFigures:
    def total(suffix: str) -> int:
        return sum(int(v) for k, v in manifest.counts.items() if k.endswith(suffix))

    return StageFigures(
        stage=manifest.stage,
        seconds=manifest.seconds,
        prompt_tokens=total("_prompt_tokens"),
        output_tokens=total("_output_tokens"),
        rows=total("_rows_out"),
    )


def _semantic_ids(workspace: Workspace, manifests: list[Card]) -> dict[str, QuantisationReport]:
    return next((read_reports(workspace, m.outputs["vectors"]) for m in manifests if m.stage == "encode"), {})


def _knowledge_folder(manifests: list[Card]) -> str:
    return next(m.outputs["knowledge"] for m in manifests if m.stage == "generate")


def _some_rows(workspace: Workspace, manifests: list[Card], kind: Kind) -> pa.Table:
    folder = _knowledge_folder(manifests)
    tables: list[pa.Table] = []
    for table in iterate_knowledge(workspace, folder, (kind,)):
        tables.append(table)
        if sum(t.num_rows for t in tables) >= _LENGTH_ROWS:
            break
    return pa.concat_tables([KNOWLEDGE.empty_table(), *tables])


def _samples(workspace: Workspace, kind: str, texts: pa.Table) -> list[KnowledgeSample]:
    # The longest of the texts that end by themselves show best what the model can do; the histogram shows the rest.
    order = pc.sort_indices(texts, sort_keys=[("finish_reason", "descending"), ("output_tokens", "descending")])
    chosen = texts.take(order[:_SAMPLES_A_KIND]).to_pylist()
    ids = pa.array([row["id"] for row in chosen], pa.int64())
    return [
        KnowledgeSample(kind=kind, title=title, inputs=inputs, text=row["text"])
        for row, (title, inputs) in zip(chosen, _inputs(workspace, kind, ids), strict=True)
    ]


def _inputs(workspace: Workspace, kind: str, ids: pa.Array) -> list[tuple[str, list[str]]]:
    if kind == "cohort":
        built = finished_stage(workspace, "cohorts")
        shards = set(shard_of(ids.to_numpy(), workspace.n_shards("cohort")).tolist()) if built and ids else set()
        profiles = read_profiles(workspace, built.outputs["cohorts"], shards).to_pylist() if built and shards else []
        cohorts = {row["id"]: row for row in profiles}
        chosen = [
            cohorts.get(i, {"cohort": str(i), "size": 0, "attributes": [], "titles": []}) for i in ids.to_pylist()
        ]
        return [(f"{row['cohort']}, {row['size']} members", [*row["attributes"], *row["titles"]]) for row in chosen]
    if kind == "item":
        items = {row["item_id"]: row for row in _rows(workspace, "items", "item_id", ids)}
        unknown = {"title": "not in the items table"}  # imported knowledge may be of anybody
        rows = [items.get(i, unknown) for i in ids.to_pylist()]
        return [(row["title"], _fields(row, {"item_id", "raw_id", "title"})) for row in rows]
    users = {row["user_id"]: row for row in _rows(workspace, "users", "user_id", ids)}
    histories = {row["user_id"]: row for row in _rows(workspace, "histories", "user_id", ids)}
    catalog = ItemCatalog.load(workspace)
    found = []
    for i in ids.to_pylist():
        history = histories.get(i, {"items": [], "ratings": []})
        titles = catalog.titles(np.asarray(history["items"], dtype=np.int64))
        behaviours = [t if r is None else f"{t}: {r:g}" for t, r in zip(titles, history["ratings"], strict=True)]
        found.append((f"user {i}", [*_fields(users.get(i, {}), {"user_id", "raw_id"}), *behaviours]))
    return found


def _rows(workspace: Workspace, table: str, key: str, ids: pa.Array) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    n_shards = len(workspace.table_shards(table))
    for number in np.unique(shard_of(ids.to_numpy(zero_copy_only=False), n_shards)).tolist():
        rows = workspace.read_shard(table, number)
        found += rows.filter(pc.is_in(rows[key], ids)).to_pylist()
    return found


def _fields(row: Mapping[str, Any], without: set[str]) -> list[str]:
    return [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in row.items() if k not in without and v]
