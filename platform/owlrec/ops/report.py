"""The report of a run: one HTML file that needs nothing beside it, to be kept, mailed and opened years later.

Sections whose figures `ReportData` lacks are left out. All texts are escaped.
"""

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel

from owlrec import __version__
from owlrec.cohorts.cohort_model import read_profiles
from owlrec.ctr.experiment import (
    COLD_ITEM_BELOW,
    COLD_USER_BELOW,
    DECISIVE,
    Headline,
    PairedDifference,
    SliceMetrics,
    TrialResult,
    headlines,
    summarize,
)
from owlrec.encoding.compression import QuantizationReport
from owlrec.encoding.vectors import read_reports
from owlrec.evaluation import GridScores, Interval
from owlrec.generation.engines import PACKAGED
from owlrec.generation.job import decoder_counters, iterate_knowledge
from owlrec.ids import KINDS, Kind, shard_of
from owlrec.ranking.question_sets import RankerResult, read_results
from owlrec.releases.format import measure_lookup
from owlrec.releases.release import Release
from owlrec.schema import KNOWLEDGE
from owlrec.shards import Artifact, Card, finished_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace
from owlrec_decoding.controller import DecoderCounters

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# --------------------------------------------------------------------------------------------------------------- charts
# Charts as SVG, drawn by matplotlib, for light and dark pages: points, bars, histograms.
#
# Ink is drawn in black and written as `currentColor` on a transparent figure, so a chart takes the page's text color.
# Text stays text, and the same values give the same bytes. matplotlib is imported with the first chart: it takes half
# a second, and most commands draw none.


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


# --------------------------------------------------------------------------------------------------------------- report
# The report of a run: one self-contained HTML file, to be kept, mailed and opened years later.
#
# Sections without figures in `ReportData` are left out. All texts are escaped: titles come from users' data and answers
# from an LLM. It reads only cards, results and a few rows, so a report of 10^8 users costs no more than one of a
# hundred.


REPORTED_STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr")
_SLICES = 12  # time slices of a job
_SAMPLES_PER_KIND = 3
_LENGTH_ROWS = 20_000
_NOTE = (
    "Credit a gain to the LLM only if `knowledge` beats both `metadata` (titles, attributes and history "
    "encoded without an LLM: the effect of the text encoder) and `shuffled` (the same vectors with the wrong ids of "
    "like popularity: the effect of the adaptor's extra parameters)."
)
_NOTES_ON_MODELS = {
    PACKAGED: (
        "SmolLM2-135M makes up most of its facts, so expect no gain over metadata. A stronger model in the "
        "recipe's engine section changes only the texts."
    ),
    "echo": (
        "The engine echo answers with invented words, so these texts have no value: it only shows that the "
        "machinery works."
    ),
}


class Throughput(BaseModel):
    """Figures of a whole generation job over all its runs."""

    over_time: dict[str, float] = {}  # output tokens/s by twelfth of the time, "0.0 to 5.0 min" and so on
    by_replica: dict[str, float] = {}  # output tokens/s between a replica's first shard and its last
    texts_by_flag: dict[str, int] = {}
    actions: dict[str, int] = {}  # actions of the quality gate


class ArmFigures(BaseModel):
    """One backbone with one arm: metrics on the test split, one value per seed."""

    backbone: str
    arm: str
    auc: list[float]
    gauc: list[float] = []
    log_loss: list[float] = []
    valid_auc: list[float] = []
    calibration_error: list[float] = []
    differences: dict[str, PairedDifference] = {}  # base arm -> difference over common seeds
    slices: dict[str, SliceMetrics] = {}  # slices of the test split, means over seeds


class KnowledgeSample(BaseModel):
    """A prompt about a user or an item, and the LLM's text."""

    kind: str
    title: str  # "user 12", or the item's title
    inputs: list[str]  # one line each: behaviors, attributes
    text: str


class ReportData(BaseModel):
    """All inputs of a report."""

    run: str
    finished: str  # date and time, as shown
    hardware: str
    facts: dict[str, str] = {}  # the line of key figures under the title
    headlines: list[str] = []  # what texts are worth, the decisive comparison first (experiment.headlines)
    gain: float | None = None  # in AUC, of the decisive comparison if it showed one
    protocol: str = ""  # split, label, negatives, seeds
    arms: list[ArmFigures] = []
    stages: list[Card] = []
    knowledge_tokens: dict[str, list[int]] = {}  # by kind; a sample of a large run
    samples: list[KnowledgeSample] = []
    release: dict[str, str] = {}
    lookup: dict[str, str] = {}
    throughput: Throughput = Throughput()  # throughput of the generation job
    decoder: DecoderCounters | None = None  # of the speculative decoder, if any
    semantic_ids: dict[str, QuantizationReport] = {}  # by the name of their vectors: knowledge-user, metadata-item, ...
    ranker: list[RankerResult] = []  # of all runs of the LLM ranker, and of CTR models on the same samples
    notes: list[str] = []  # warnings that a reader of the figures needs
    versions: dict[str, str] = {}


# ------------------------------------------------------------------------------------------------------------- the page

Row = dict[str, str]  # column -> content; Markup is not escaped


class ArmRow(NamedTuple):
    """A row of the table of arms, formatted: means over seeds, with one standard deviation if there are several."""

    backbone: str
    arm: str
    auc: str
    difference: str  # mean AUC minus that of the arm "none" of the same backbone, over common seeds
    interval: str  # of that difference
    gauc: str
    log_loss: str
    calibration_error: str
    valid_auc: str
    seeds: int


class ComparisonRow(NamedTuple):
    """A row of the table of paired comparisons, formatted: AUC of an arm minus that of `base`, of the same backbone."""

    backbone: str
    arm: str
    base: str
    difference: str
    interval: str
    verdict: str
    detectable: str
    rela_imp: str
    seeds: int


def render_report(data: ReportData) -> str:
    """The page as HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    ranker = _by_prompt(data.ranker)
    tokens = {
        f"{card.stage}, {name}": float(count)
        for card in data.stages
        for name, suffix in (
            ("prompts", "_prompt_tokens"),
            ("prompts, cached", "_cached_tokens"),
            ("answers", "_output_tokens"),
        )
        if (count := _total(card, suffix))
    }
    steps = data.decoder.by_rows if data.decoder else {}
    tables = {
        "arms": [row._asdict() for row in arm_rows(data.arms)],
        "heat": heat_rows(data.arms),
        "comparisons": [row._asdict() for row in comparison_rows(data.arms)],
        "slices": slice_rows(data.arms),
        "ranker": ranker_rows(data.ranker),
        "stages": [_stage_row(card) for card in data.stages],
        "flags": [{"flag": name, "texts": f"{n:,}"} for name, n in data.throughput.texts_by_flag.items()],
        "decoder": _pairs(decoder_figures(data.decoder) if data.decoder else {}),
        "semantic_ids": [_codes_row(name, report) for name, report in data.semantic_ids.items()],
        "release": _pairs(data.release),
        "lookup": _pairs(data.lookup),
    }
    charts = {
        "arms": points_chart({(a.backbone, a.arm): a.auc for a in data.arms}, "AUC on the test split"),
        "ranker": points_chart({k: [r.auc for r in results] for k, results in ranker.items()}, "AUC on the test split"),
        "seconds": bar_chart({card.stage: card.seconds for card in data.stages}, "s"),
        "tokens": bar_chart(tokens, "tokens"),
        "time": bar_chart(data.throughput.over_time, "tokens/s"),
        "replicas": bar_chart(data.throughput.by_replica, "tokens/s"),
        "speed_up": bar_chart({f"up to {n} rows": s.speed_up for n, s in steps.items() if s.seconds}, "x plain"),
    }
    return environment.get_template("report.html.j2").render(
        data=data,
        tables=tables,
        charts=charts,
        lengths={kind: histogram(n, f"tokens per text, {kind}s") for kind, n in data.knowledge_tokens.items() if n},
        cold=(COLD_USER_BELOW, COLD_ITEM_BELOW),
        version=__version__,
    )


def arm_rows(arms: Sequence[ArmFigures]) -> list[ArmRow]:
    """The table of arms."""
    base = {a.backbone: fmean(a.auc) for a in arms if a.arm == "none" and a.auc}
    rows = []
    for arm in arms:
        difference, paired = "", arm.differences.get("none")
        if paired:
            difference = f"{paired.auc:+.4f}"
        elif arm.arm != "none" and arm.backbone in base and arm.auc:
            difference = f"{fmean(arm.auc) - base[arm.backbone]:+.4f}"
        interval = _interval(paired.interval if paired else None)
        gauc, log_loss, error, valid = map(_spread, (arm.gauc, arm.log_loss, arm.calibration_error, arm.valid_auc))
        figures = (_spread(arm.auc), difference, interval, gauc, log_loss, error, valid)
        rows.append(ArmRow(arm.backbone, arm.arm, *figures, seeds=len(arm.auc)))
    return rows


def comparison_rows(arms: Sequence[ArmFigures]) -> list[ComparisonRow]:
    """The table of paired comparisons; unknown values are blank."""
    return [
        ComparisonRow(
            backbone=arm.backbone,
            arm=arm.arm,
            base=base,
            difference=f"{paired.auc:+.4f}",
            interval=_interval(paired.interval),
            verdict=paired.verdict,
            detectable="" if paired.detectable is None else f"{paired.detectable:.4f}",
            rela_imp="" if paired.rela_imp is None else f"{paired.rela_imp:+.1%}",
            seeds=paired.seeds,
        )
        for arm in arms
        for base, paired in arm.differences.items()
    ]


def heat_rows(arms: Sequence[ArmFigures]) -> list[Row]:
    """Heat map of gains over "none": one row per backbone that has one, one cell per arm, blank if not measured.

    Color strength is relative to the largest gain; colors fade if the interval includes 0.
    """
    gains = {(a.backbone, a.arm): a.differences["none"] for a in arms if "none" in a.differences}
    largest = max((abs(gain.auc) for gain in gains.values()), default=0.0) or 1.0
    others = [name for name in dict.fromkeys(a.arm for a in arms) if name != "none"]

    def cell(gain: PairedDifference | None) -> Markup:
        if gain is None:
            return Markup("")
        certain = not gain.interval or not gain.interval.low <= 0 <= gain.interval.high
        share = 70 * abs(gain.auc) / largest / (1 if certain else 3)
        color = "green" if gain.auc >= 0 else "ochre"
        style = f"background: color-mix(in srgb, var(--{color}) {share:.0f}%, transparent)"
        return Markup('<span class="heat" style="{}" title="{}">{}</span>').format(
            style, _interval(gain.interval), f"{gain.auc:+.4f}"
        )

    return [
        {"test AUC minus none": backbone} | {arm: cell(gains.get((backbone, arm))) for arm in others}
        for backbone in dict.fromkeys(backbone for backbone, _ in gains)
    ]


def slice_rows(arms: Sequence[ArmFigures]) -> list[Row]:
    """The table of slices: AUC and log-loss, one column per arm; blank if an arm was not measured."""
    names = list(dict.fromkeys(a.arm for a in arms))
    decisive = ("knowledge", DECISIVE) if {"knowledge", DECISIVE} <= set(names) else None
    metrics = {(a.backbone, a.arm, name): metric for a in arms for name, metric in a.slices.items()}
    sizes = {(backbone, name): metric.rows for (backbone, _, name), metric in metrics.items()}

    def cell(metric: SliceMetrics | None) -> str:
        if metric is None:
            return ""
        return f"{'one class' if metric.auc is None else f'{metric.auc:.4f}'} / {metric.log_loss:.4f}"

    def difference(backbone: str, name: str, arm: str, base: str) -> str:
        ours, theirs = (metrics.get((backbone, a, name)) for a in (arm, base))
        if ours is None or theirs is None or ours.auc is None or theirs.auc is None:
            return ""
        return f"{ours.auc - theirs.auc:+.4f}"

    return [
        {"backbone": backbone, "test rows of": name, "rows": f"{size:,}"}
        | ({" - ".join(decisive): difference(backbone, name, *decisive)} if decisive else {})
        | {arm: cell(metrics.get((backbone, arm, name))) for arm in names}
        for (backbone, name), size in sizes.items()
    ]


def ranker_rows(results: Sequence[RankerResult]) -> list[Row]:
    """The table of the LLM ranker: one row per prompt and model, over its seeds, in the order of `results`."""
    return [
        {
            "prompt shows": shown,
            "model": model,
            "seeds": str(len(seeds)),
            "test AUC": _spread([r.auc for r in seeds]),
            "95 % interval": f"[{i.low:.4f}, {i.high:.4f}]" if (i := seeds[0].interval) else "",  # for the first seed
        }
        for (shown, model), seeds in _by_prompt(results).items()
    ]


def _by_prompt(results: Sequence[RankerResult]) -> dict[tuple[str, str], list[RankerResult]]:
    """(content of a prompt, model) -> results of all seeds."""
    groups: dict[tuple[str, str], list[RankerResult]] = {}
    for result in results:
        shots = "all samples" if result.shots is None else f"{result.shots:,} shots"
        model = "zero-shot" if result.model == "zero-shot" else f"{result.model}, {shots}"
        shown = f"{result.shown}, K = {result.behaviors}" if result.behaviors else "CTR models"
        groups.setdefault((shown, model), []).append(result)
    return groups


def decoder_figures(counters: DecoderCounters) -> dict[str, str]:
    """Counters of the decoder, formatted."""
    counts = counters.counts
    drafted, accepted = counts.get("drafted", 0), counts.get("accepted", 0)
    hits = {name.removeprefix("hits_"): n for name, n in counts.items() if name.startswith("hits_")}
    figures = {
        "tokens per row and step": f"{counters.tokens_per_step:.2f} (including steps without drafts)",
        "draft tokens": f"{drafted:,.0f}, {accepted / max(drafted, 1):.0%} accepted",
        "accepted only by the relaxed rule": f"{counts.get('relaxed', 0):,.0f}",
        "drafts by source": ", ".join(f"{name} {n:,.0f}" for name, n in sorted(hits.items())) or "none",
        "requests for unknown pools": f"{counts.get('unknown_pools', 0):,.0f}",
    }
    if steps_s := sum(s.seconds for s in counters.by_rows.values()):
        shares = {name: counts.get(f"{name}_s", 0) / steps_s for name in ("retrieval", "verification")}
        figures["share of step time"] = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    if "yardstick_plain_s" in counts:
        figures["beside stretches without drafts"] = f"{counters.measured_speed_up:.2f}x"
    return figures


def _stage_row(card: Card) -> Row:
    rows, prompts, answers = (_total(card, name) for name in ("_rows_out", "_prompt_tokens", "_output_tokens"))
    speed = answers / card.seconds if card.seconds else 0.0
    counts = {"prompt tokens": prompts, "output tokens": answers, "output tokens/s": round(speed)}
    return {"stage": card.stage, "rows": _count(rows), "seconds": f"{card.seconds:,.1f}"} | {
        name: _count(count) for name, count in counts.items()
    }


def _count(n: int) -> str:
    return f"{n:,}" if n else ""


def _codes_row(name: str, ids: QuantizationReport) -> Row:
    return {
        "vectors": name,
        "how many": f"{ids.vectors:,}",
        "unique": f"{ids.unique_rate:.1%}",
        "with duplicate digit": f"{ids.unique_rate_with_digit:.1%}",
        "codes used, by level": ", ".join(f"{share:.0%}" for share in ids.code_usage),
        "relative error": f"{ids.relative_error:.3f}",
        "bytes per id": f"{ids.bytes_per_entity:.2f}",
    }


def _total(card: Card, suffix: str) -> int:
    return sum(int(count) for name, count in card.counts.items() if name.endswith(suffix))


def _pairs(figures: Mapping[str, str]) -> list[Row]:
    return [{"figure": name, "value": value} for name, value in figures.items()]


def _interval(interval: Interval | None) -> str:
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]" if interval else ""


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


# ----------------------------------------------------------------------------------------------------- reading a run


def throughput(cards: Iterable[Card]) -> Throughput:
    """Speed of a generation job. A shard's tokens are spread evenly over its time."""
    flags: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    rows: list[tuple[str, float, float, int]] = []  # worker, start, end, output tokens
    for card in cards:
        counts = {name: n for name, n in card.counts.items() if isinstance(n, int)}
        flags.update({name.removeprefix("flag_"): n for name, n in counts.items() if name.startswith("flag_")})
        actions.update({name.removeprefix("quality_"): n for name, n in counts.items() if name.startswith("quality_")})
        if (written := counts.get("output_tokens", 0)) and card.seconds:
            rows.append((card.worker, card.finished - card.seconds, card.finished, written))
    figures = Throughput(texts_by_flag=dict(flags), actions=dict(actions))
    if rows:
        spans = pd.DataFrame(rows, columns=["worker", "start", "end", "tokens"])
        start, end, tokens = spans[["start", "end", "tokens"]].to_numpy().T
        edges = np.linspace(start.min(), end.max(), _SLICES + 1)
        overlap = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
        speed = (np.clip(overlap, 0, None) * (tokens / (end - start))[:, None]).sum(axis=0) / np.diff(edges)
        unit, scale = ("min", 60) if edges[-1] - edges[0] >= 120 else ("s", 1)  # gives slices distinct names
        times = [f"{t:.1f}" for t in (edges - edges[0]) / scale]
        figures.over_time = {f"{a} to {b} {unit}": float(s) for (a, b), s in zip(pairwise(times), speed, strict=True)}
        for worker, mine in spans.groupby("worker", sort=False):
            figures.by_replica[str(worker)] = float(mine["tokens"].sum() / (mine["end"].max() - mine["start"].min()))
    return figures


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
    """All figures of a run. Unfinished stages are left out.

    scores: test scores of the trials, if any: without them differences have no interval.
    """
    stages = {stage: card for stage in REPORTED_STAGES if (card := finished_stage(workspace, stage))}
    leading = headlines(results, scores)
    folder = stages["generate"].outputs["knowledge"]
    cards = list(Artifact(workspace, folder).cards().values())
    texts = {kind: _some_rows(workspace, folder, kind) for kind in KINDS}
    about, model = release.manifest, _NOTES_ON_MODELS.get(release.manifest.model)
    return ReportData(
        run=run,
        finished=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        hardware=hardware_line(),
        facts=dict(facts),
        headlines=[*map(str, leading), *price_lines(leading, stages["generate"])],
        gain=_shown_gain(leading),
        protocol=protocol,
        arms=arm_figures(results, scores),
        stages=list(stages.values()),
        knowledge_tokens={kind: table["output_tokens"].to_pylist() for kind, table in texts.items() if table.num_rows},
        samples=[s for kind, table in texts.items() for s in _samples(workspace, kind, table)],
        release={
            "name": release.name,
            "texts": ", ".join(f"{n:,} {kind}s" for kind, n in about.knowledge.items()),
            "dimension": str(about.dim),
            "model": about.model,
            "encoder": about.encoder,
        },
        throughput=throughput(cards),
        decoder=decoder_counters(cards),
        semantic_ids=read_reports(workspace, stages["encode"].outputs["vectors"]) if "encode" in stages else {},
        ranker=read_results(workspace),
        lookup=lookup_figures(release, workspace.read_shard("users", 0, ["user_id"])["user_id"].to_numpy()),
        notes=[_NOTE, *filter(None, [model]), *_coverage_notes(results)],
        versions={name: metadata.version(name) for name in ("ray", "pyarrow", "lmdb", "numpy")},
    )


def _shown_gain(leading: Sequence[Headline | str]) -> float | None:
    first = leading[0] if leading else ""
    shown = isinstance(first, Headline) and first.base.startswith(DECISIVE) and first.difference.verdict == "gain shown"
    return first.difference.auc if isinstance(first, Headline) and shown else None


def price_lines(leading: Sequence[Headline | str], generated: Card) -> list[str]:
    """Price of a gain in tokens: none without tokens, or where the decisive difference is unknown.

    leading: output of `headlines`; generated: the card of `generate`. `owlrec plan` knows the machines' prices.
    """
    tokens = {name: _total(generated, f"_{name}_tokens") for name in ("prompt", "output")}
    first = leading[0] if leading else ""
    if not sum(tokens.values()) or isinstance(first, str) or not first.base.startswith(DECISIVE):
        return []
    paid = " and ".join(f"{short_number(n)} {name} tokens" for name, n in tokens.items())
    gain = first.difference
    if gain.verdict != "gain shown":
        return [f"The texts took {paid}; without a shown gain over {first.base}, .001 of AUC has no price."]
    points = gain.auc / 0.001
    each = " and ".join(f"{short_number(n / points)} {name} tokens" for name, n in tokens.items())
    hours = generated.seconds / 3600 / points
    return [f"The texts took {paid}: per +.001 AUC over {first.base}, {each}, {hours:.2g} hours of this run's engines."]


_LITTLE_COVERAGE = 0.5


def _coverage_notes(results: Iterable[TrialResult]) -> list[str]:
    """A line for each arm and side whose vectors most test rows lack."""
    little = {(r.arm, side): share for r in results for side, share in r.coverage.items() if share < _LITTLE_COVERAGE}
    return [
        f"Arm `{arm}` has vectors of {side}s for only {share:.1%} of the test rows; the others read a learned default."
        for (arm, side), share in little.items()
    ]


def lookup_figures(release: Release, ids: np.ndarray) -> dict[str, str]:
    """Latency of single lookups, for the report and the console."""
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
    """One line about the machine, for tables of figures."""
    memory = psutil.virtual_memory().total / 2**30
    processor = ", ".join([platform.machine(), *_matrix_instructions()])
    python = platform.python_version()
    return f"{os.cpu_count()} CPU cores ({processor}), {memory:.0f} GiB memory, Python {python}"


def _matrix_instructions() -> list[str]:
    """CPU features that determine an LLM's speed, according to Linux."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        return [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_tile", "AMX")) if flag in flags]
    return []


def arm_figures(results: Sequence[TrialResult], scores: GridScores | None = None) -> list[ArmFigures]:
    """Results by backbone and arm, one value per seed; differences and slices as computed by `summarize`."""
    seeds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results:
        seeds.setdefault((r.backbone, r.arm), []).append({"valid_auc": r.valid.auc, **r.test.model_dump()})
    figures = []
    for summary in summarize(results, scores):
        values = pd.DataFrame(seeds[summary.backbone, summary.arm])
        figures.append(
            ArmFigures(
                backbone=summary.backbone,
                arm=summary.arm,
                differences=dict(summary.differences),
                slices=summary.slices,
                **{str(name): column.dropna().tolist() for name, column in values.items()},
            )
        )
    return figures


def _some_rows(workspace: Workspace, folder: str, kind: Kind) -> pa.Table:
    tables = [KNOWLEDGE.empty_table()]
    for table in iterate_knowledge(workspace, folder, (kind,)):
        tables.append(table)
        if sum(t.num_rows for t in tables) >= _LENGTH_ROWS:
            break
    return pa.concat_tables(tables)


def _samples(workspace: Workspace, kind: Kind, texts: pa.Table) -> list[KnowledgeSample]:
    # The longest of the complete texts show best what the model can do; the histogram shows the rest.
    order = pc.sort_indices(texts, sort_keys=[("finish_reason", "descending"), ("output_tokens", "descending")])
    chosen = texts.take(order[:_SAMPLES_PER_KIND]).to_pylist()
    describe = {"user": _users, "item": _items, "cohort": _cohorts}[kind]
    described = describe(workspace, [row["id"] for row in chosen])
    return [
        KnowledgeSample(kind=kind, title=title, inputs=inputs, text=row["text"])
        for row, (title, inputs) in zip(chosen, described, strict=True)
    ]


def _users(workspace: Workspace, ids: list[int]) -> list[tuple[str, list[str]]]:
    users = _by_id(workspace, "users", "user_id", ids)
    histories = _by_id(workspace, "histories", "user_id", ids)
    catalog = ItemCatalog.load(workspace)
    described = []
    for i in ids:
        history = histories.get(i, {"items": [], "ratings": []})
        titles = catalog.titles(np.asarray(history["items"], dtype=np.int64))
        rated = [t if r is None else f"{t}: {r:g}" for t, r in zip(titles, history["ratings"], strict=True)]
        described.append((f"user {i}", [*_fields(users.get(i, {}), {"user_id", "raw_id"}), *rated]))
    return described


def _items(workspace: Workspace, ids: list[int]) -> list[tuple[str, list[str]]]:
    items = _by_id(workspace, "items", "item_id", ids)
    unknown = {"title": "not in the items table"}  # imported knowledge may cover other items
    rows = [items.get(i, unknown) for i in ids]
    return [(row["title"], _fields(row, {"item_id", "raw_id", "title"})) for row in rows]


def _cohorts(workspace: Workspace, ids: list[int]) -> list[tuple[str, list[str]]]:
    built = finished_stage(workspace, "cohorts")
    shards = set(shard_of(np.array(ids, np.int64), workspace.n_shards("cohort")).tolist()) if built and ids else set()
    profiles = read_profiles(workspace, built.outputs["cohorts"], shards).to_pylist() if built and shards else []
    known = {row["id"]: row for row in profiles}
    rows = [known.get(i, {"cohort": str(i), "size": 0, "attributes": [], "titles": []}) for i in ids]
    return [(f"{row['cohort']}, {row['size']} members", [*row["attributes"], *row["titles"]]) for row in rows]


def _by_id(workspace: Workspace, table: str, key: str, ids: list[int]) -> dict[int, dict[str, Any]]:
    shards = np.unique(shard_of(np.array(ids, np.int64), len(workspace.table_shards(table))))
    read = [workspace.read_shard(table, number) for number in shards.tolist()]
    return {row[key]: row for rows in read for row in rows.filter(pc.is_in(rows[key], pa.array(ids))).to_pylist()}


def _fields(row: Mapping[str, Any], without: set[str]) -> list[str]:
    return [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in row.items() if k not in without and v]
