"""The report of a run: one HTML file that needs nothing beside it, to be kept, mailed and opened years later.

`ReportData` is plain numbers and texts, so that any stage can fill it; whatever it lacks is left out of the page. All
texts are escaped: titles come from users' data and answers from an LLM.
"""

from pathlib import Path
from statistics import fmean, stdev

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from owlrec import __version__
from owlrec.decoding.counters import DecoderCounters
from owlrec.ops.charts import bar_chart, histogram, points_chart
from owlrec.ops.throughput import Throughput


class ArmFigures(BaseModel):
    """One backbone with one arm: metrics on the test split, one value a seed."""

    backbone: str
    arm: str
    auc: list[float]
    gauc: list[float] = []
    log_loss: list[float] = []
    valid_auc: list[float] = []


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
    notes: list[str] = []  # what a reader must know in order not to misread the figures
    versions: dict[str, str] = {}


class ArmRow(BaseModel):
    """A row of the table of arms."""

    backbone: str
    arm: str
    seeds: int
    auc: str
    difference: str  # of the mean AUC to the arm "none" of the same backbone
    gauc: str
    log_loss: str
    valid_auc: str


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
        auc_chart=points_chart(auc, "AUC on the test split"),
        seconds_chart=bar_chart(seconds, "s"),
        tokens_chart=bar_chart(tokens, "tokens"),
        lengths=lengths,
        decoder_rows=decoder_rows(data.decoder) if data.decoder else {},
        speed_chart=bar_chart(speed_ups, "x plain"),
        time_chart=bar_chart(data.throughput.over_time, "tokens/s"),
        replica_chart=bar_chart(data.throughput.by_replica, "tokens/s"),
        version=__version__,
    )


def arm_rows(arms: list[ArmFigures]) -> list[ArmRow]:
    """The table of arms: means over seeds, with one standard deviation where there are several."""
    base = {a.backbone: fmean(a.auc) for a in arms if a.arm == "none" and a.auc}
    rows = []
    for arm in arms:
        difference = ""
        if arm.arm != "none" and arm.backbone in base and arm.auc:
            difference = f"{fmean(arm.auc) - base[arm.backbone]:+.4f}"
        rows.append(
            ArmRow(
                backbone=arm.backbone,
                arm=arm.arm,
                seeds=len(arm.auc),
                auc=_spread(arm.auc),
                difference=difference,
                gauc=_spread(arm.gauc),
                log_loss=_spread(arm.log_loss),
                valid_auc=_spread(arm.valid_auc),
            )
        )
    return rows


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


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.4f}"
