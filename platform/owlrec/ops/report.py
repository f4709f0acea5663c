"""The report of a run: one HTML file that needs nothing beside it, to be kept, mailed and opened years later.

Whatever `ReportData` lacks is left out of the page. All texts are escaped: titles come from users' data and answers
from an LLM.
"""

from pathlib import Path
from statistics import fmean, stdev

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from owlrec import __version__
from owlrec.ctr.experiment import PairedDifference
from owlrec.ctr.slices import COLD_ITEM_BELOW, COLD_USER_BELOW, SliceMetrics
from owlrec.decoding.counters import DecoderCounters
from owlrec.ops.charts import bar_chart, histogram, points_chart
from owlrec.ops.report_data import ArmFigures, ReportData
from owlrec.ranking.results import RankerResult


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
    delong_p: str
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
            delong_p=_p(paired.evidence.delong_p if paired.evidence else None),
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
    interval = paired.evidence.interval if paired.evidence else None
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
    interval = paired.evidence.interval if paired.evidence else None
    return f"[{interval.low:+.4f}, {interval.high:+.4f}]" if interval else ""


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _slice_figures(metrics: SliceMetrics | None) -> tuple[str, str]:
    if metrics is None:
        return "", ""
    return "one class" if metrics.auc is None else f"{metrics.auc:.4f}", f"{metrics.log_loss:.4f}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.4f}"
