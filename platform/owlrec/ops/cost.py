"""Cost estimates for a large batch: rows x tokens per row / measured speed x price, each with a range.

`Workload` has a row's costs in a finished run: tokens, bytes and seconds of `generate`, `encode` and `publish`, read
from the cards of their shards. `FleetConfig` has the user's machines and prices; no machine's figures are built in.
A range covers only the spread between the measured shards (see `per_row`): the user assumes that future rows
resemble the measured ones.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from owlrec.config import Config
from owlrec.ctr.experiment import GAIN
from owlrec.encoding.stage import TIMED_SECONDS, TIMED_TEXTS
from owlrec.errors import RecipeError, WorkspaceError, did_you_mean
from owlrec.generation.job import decoder_counters
from owlrec.ids import BEHAVIOR, KINDS
from owlrec.ops.console import note, table, warn
from owlrec.refresh.state import pointer, read_state
from owlrec.releases.format import read_manifest
from owlrec.shards import Artifact, Card, Shard, finished_stage
from owlrec.workspace import Workspace
from owlrec_decoding.controller import DecoderCounters

Range = np.ndarray  # float64 [3]: low, expected, high
TextKind = Literal["user", "item", "cohort", "refresh"]  # subject of a text; refresh: a user with new behaviors
Texts = Mapping[TextKind, int]  # number per kind
Policy = Literal["individual", "collective", "streaming"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

_EXPECTED = 1
_NONE = np.zeros(3)
_ONE_SHARD_FACTOR = 2.0  # a single shard has no spread: half to double is an obvious guess
_MEMBERSHIP_BYTES = 40  # per id in a release: key, two cohorts of 8 bytes, LMDB's header and slack
_HOURS_PER_MONTH = 730

# ------------------------------------------------------------------------------------------------------- measured run


@dataclass(frozen=True)
class TextFigures:
    """Cost of one text of a kind, including failed rows."""

    rows: int  # measured
    prompt_tokens: Range
    output_tokens: Range
    engine_s: Range  # of one otherwise idle engine
    file_bytes: Range  # in the knowledge files


@dataclass(frozen=True)
class Workload:
    """Measurements of a finished run; None if it did not get that far."""

    run: str  # the job's folder in the workspace
    finished: float  # seconds since 1970
    texts: Mapping[TextKind, TextFigures]
    shard_rows: int  # of the recipe; also used for the large batch
    in_flight: int = 1  # shards per engine, enough to fill its batch; a preemption loses half of each, on average
    startup_s: float | None = None  # until an engine started its first shard; None if the run was interrupted
    plain_factor: float = 1.0  # an engine's time without the decoder / its measured time
    encode_s: Range | None = None  # of one worker, per text
    publish_s: Range | None = None  # of one worker, per id
    vector_bytes: Range | None = None  # per text
    release_bytes: Range | None = None  # per id with its own text
    behavior_bytes: float = 0.0  # maximum per user in a release
    texts_per_user: float = 1.0  # one per moment at which `prepare` cuts a history
    cohorts_per_user: float | None = None
    cohorts_per_item: float | None = None
    texts_per_cohort: float = 1.0
    gain: float | None = None  # shown gain in AUC over the decisive base, if the run was evaluated and showed one
    acting_share: float | None = None  # of the users, before the last refresh
    texts_per_acting: float | None = None  # in the last refresh

    @property
    def measured(self) -> str:
        """Number and date of the measured rows, in words."""
        rows = ", ".join(f"{f.rows:,} {'rewrite' if kind == 'refresh' else kind}s" for kind, f in self.texts.items())
        return f"{rows} (finished {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.finished))})"

    def total(self, figure: str, texts: Texts) -> Range:
        """A figure of `TextFigures` times the number of texts."""
        return sum((n * getattr(self.texts[kind], figure) for kind, n in texts.items() if n), _NONE)

    def shards(self, texts: Texts) -> int:
        """Number of shards for these texts."""
        return sum(-(-n // self.shard_rows) for n in texts.values())

    def without_decoder(self) -> "Workload":
        """The same on engines without drafts."""
        slower = {kind: replace(f, engine_s=f.engine_s * self.plain_factor) for kind, f in self.texts.items()}
        return replace(self, texts=slower)


def per_row(sums: np.ndarray, rows: np.ndarray) -> Range:
    """Sum of `sums` over sum of `rows`, and a range from the spread between shards.

    sums, rows: float64 [n shards]. With r the ratio, its standard error is that of a ratio estimator, e = std(sums - r
    rows) / (sqrt(n) mean(rows)). The range is r / f to r f with f = 1 + 2 e / r, which never reaches 0; f is 2 if
    there is only one shard.
    """
    ratio, factor = sums.sum() / rows.sum(), _ONE_SHARD_FACTOR
    if len(sums) > 1 and ratio > 0:
        factor = 1 + 2 * np.std(sums - ratio * rows, ddof=1) / (len(sums) ** 0.5 * rows.mean()) / ratio
    return np.array([ratio / factor, ratio, ratio * factor])


def engine_seconds(cards: Sequence[Card]) -> np.ndarray:
    """Engine time of each shard, float64 [n shards]; the sum over an engine is its working time.

    An engine answers in request order, so a shard took the time since the engine's previous shard finished, but
    never more than its own seconds: a pause of an interrupted run belongs to no shard.
    """
    seconds, before = np.zeros(len(cards)), defaultdict[str, float](lambda: -np.inf)
    for i in sorted(range(len(cards)), key=lambda i: cards[i].finished):
        seconds[i] = min(cards[i].finished - before[cards[i].worker], cards[i].seconds)
        before[cards[i].worker] = cards[i].finished
    return seconds


def measured_workload(workspace: Workspace, shard_rows: int, in_flight: int = 1) -> Workload:
    """Figures of the workspace's finished run and of later refreshes. shard_rows, in_flight: see Workload.

    Raises WorkspaceError if no generation run has finished, or it wrote no tokens.
    """
    stage = finished_stage(workspace, "generate")
    if stage is None:
        raise WorkspaceError(f"{workspace.root}: no finished run to extrapolate from. Run a small recipe first.")
    folder = stage.outputs["knowledge"]
    run = _cards(workspace, "generate", folder)
    jobs = [f"knowledge/{name}" for name in workspace.names("knowledge") if not folder.endswith(f"/{name}")]
    others = [card for job in jobs for card in _cards(workspace, "refresh", job, "user")]
    cards = run + [card for card in others if card.finished > stage.finished]
    seconds = engine_seconds(cards)
    texts = {}
    for kind in get_args(TextKind):
        places = [
            i for i, c in enumerate(cards) if (Shard.from_name(c.shard).kind if i < len(run) else "refresh") == kind
        ]
        if any(_count(cards[i], "output_tokens") for i in places):
            texts[kind] = _text_figures([cards[i] for i in places], seconds[places])
    if not texts.keys() & KINDS:
        raise WorkspaceError(
            f"{workspace.path(folder)}: the run wrote no tokens. Run a recipe with a real model first."
        )
    steps = [sums for sums in (decoder_counters(run) or DecoderCounters()).by_rows.values() if sums.seconds]
    encoded, published = finished_stage(workspace, "encode"), finished_stage(workspace, "publish")
    # Vectors of metadata are an experimental control and not counted.
    names = [f"knowledge-{kind}" for kind in KINDS]
    vectors = _cards(workspace, "encode", encoded.outputs["vectors"], *names) if encoded else []
    parts = _cards(workspace, "publish", f"releases/{published.outputs['release']}", "part") if published else []
    ids = [f"knowledge/{kind}" for kind in KINDS]
    evaluated = finished_stage(workspace, "evaluate")
    gain = float(evaluated.counts[GAIN]) if evaluated and GAIN in evaluated.counts else None
    return Workload(
        run=folder,
        finished=stage.finished,
        texts=texts,
        shard_rows=shard_rows,
        in_flight=in_flight,
        startup_s=_startup(stage, run),
        gain=gain,
        plain_factor=1 + sum(sums.plain_s - sums.seconds for sums in steps) / seconds[: len(run)].sum(),
        encode_s=_ratio(vectors, lambda card: _count(card, TIMED_SECONDS), lambda card: _count(card, TIMED_TEXTS)),
        publish_s=_ratio(parts, lambda card: card.seconds, lambda card: _count(card, *ids)),
        vector_bytes=_ratio(vectors, _bytes, lambda card: card.rows_out),
        release_bytes=_ratio(parts, _bytes, lambda card: _count(card, *ids)),
        **_population(
            workspace,
            texts["cohort"].rows if "cohort" in texts else 0,
            published.outputs["release"] if published and parts else "",
        ),
    )


def _cards(workspace: Workspace, stage: str, folder: str, *kinds: str) -> list[Card]:
    return [card for card in Artifact(workspace, folder).cards(*kinds).values() if card.stage == stage]


def _count(card: Card, *names: str) -> float:
    return sum(float(card.counts.get(name, 0)) for name in names)


def _bytes(card: Card) -> float:
    return sum(file.bytes for file in card.files.values())


def _ratio(cards: list[Card], amount: Callable[[Card], float], rows: Callable[[Card], float]) -> Range | None:
    """Amount per row, over cards with rows."""
    pairs = np.array([(amount(card), rows(card)) for card in cards if rows(card)])
    return per_row(*pairs.T) if len(pairs) else None


def _text_figures(cards: list[Card], seconds: np.ndarray) -> TextFigures:
    names = ("rows_asked", "prompt_tokens", "output_tokens")
    asked, prompt, output = (np.array([_count(card, name) for card in cards]) for name in names)
    rows = np.array([float(card.rows_in) for card in cards])
    size = np.array([float(card.files[Shard.from_name(card.shard).file()].bytes) for card in cards])
    figures = (per_row(prompt, asked), per_row(output, asked), per_row(seconds, asked), per_row(size, rows))
    return TextFigures(int(rows.sum()), *figures)


def _startup(stage: Card, cards: list[Card]) -> float | None:
    if not stage.seconds or stage.counts.get("shards") != stage.counts.get("shards_this_run", 0):
        return None
    first = defaultdict[str, float](lambda: np.inf)
    for card in cards:
        first[card.worker] = min(first[card.worker], card.finished - card.seconds)
    return max(0.0, float(np.mean(list(first.values()))) - (stage.finished - stage.seconds))


def _population(workspace: Workspace, cohort_texts: int, release: str) -> dict[str, Any]:
    """Fields of `Workload` about users: texts, cohorts, behaviors, and users active before the last refresh."""
    stages = [finished_stage(workspace, "prepare"), finished_stage(workspace, "cohorts")]
    counts = {name: n for stage in stages if stage for name, n in stage.counts.items() if isinstance(n, int | float)}
    users, figures = counts.get("users", 0), dict[str, Any]()
    cohorts = {kind: counts.get(f"{kind}_cohorts", 0) for kind in ("user", "item")}
    figures |= {
        f"cohorts_per_{kind}": n / counts[f"{kind}s"] for kind, n in cohorts.items() if counts.get(f"{kind}s") and n
    }
    if sum(cohorts.values()) and cohort_texts:
        figures["texts_per_cohort"] = cohort_texts / sum(cohorts.values())
    if users and counts.get("texts"):
        figures["texts_per_user"] = counts["texts"] / users
    if users and release:
        kept = min(read_manifest(workspace, release).history_length, counts.get("interactions", 0) / users)
        figures["behavior_bytes"] = kept * BEHAVIOR.itemsize
    state = read_state(workspace) if pointer(workspace).current else None
    if state and (acting := state.counts.get("users_with_news", 0)):
        figures |= {"texts_per_acting": state.calls / acting, "acting_share": acting / users if users else None}
    return figures


# --------------------------------------------------------------------------------------------------------------- fleet


class FleetGroup(Config):
    """Machines of one type that run engines. For engines without a GPU, read `gpu` as machine."""

    name: str
    accelerator: str  # free text
    gpus: int = Field(ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    price_per_gpu_hour: float = Field(ge=0)  # in the user's own currency
    on_demand_price_per_gpu_hour: float | None = Field(None, ge=0)  # for spot machines, to show their savings
    # Output of one engine at full batch, including prompts; None = as fast as an engine of the measured run.
    tokens_per_s: float | None = Field(None, gt=0)
    prefill_tokens_per_s: float | None = Field(None, gt=0)  # of prompts, if tokens_per_s excludes them
    preemption_rate_per_hour: float = Field(0, ge=0)  # per engine
    provision_s: float = Field(0, ge=0)  # from the request for a machine to its start; not billed
    # From a machine's start to a loaded engine; billed. None = as measured for engines in the measured
    # run; 0 for others.
    startup_s: float | None = Field(None, ge=0)
    idle_timeout_s: float = Field(0, ge=0)  # until the autoscaler stops an idle machine; billed

    @property
    def engines(self) -> int:
        """Number of engines in the group."""
        return self.gpus // self.gpus_per_engine

    def starts_in(self, workload: Workload) -> float:
        """`startup_s` in seconds; the measured value by default."""
        measured = None if self.tokens_per_s else workload.startup_s
        return self.startup_s if self.startup_s is not None else measured or 0.0

    def seconds(self, workload: Workload, texts: Texts) -> Range:
        """Time of one engine for all texts; fast is low."""
        if not self.tokens_per_s:
            return workload.total("engine_s", texts)
        reading = workload.total("prompt_tokens", texts) / (self.prefill_tokens_per_s or np.inf)
        return workload.total("output_tokens", texts) / self.tokens_per_s + reading

    @model_validator(mode="after")
    def _consistent(self) -> "FleetGroup":
        if self.gpus % self.gpus_per_engine:
            raise ValueError(
                f"{self.gpus} GPUs cannot be split into engines of {self.gpus_per_engine}; change one of them"
            )
        if self.prefill_tokens_per_s and not self.tokens_per_s:
            raise ValueError("prefill_tokens_per_s needs tokens_per_s; the measured speed includes prompts")
        return self


class StageWorkers(Config):
    """Workers of `encode` or `publish`."""

    workers: int = Field(1, ge=1)
    price_per_worker_hour: float = Field(ge=0)
    rows_per_s: float | None = Field(None, gt=0)  # per worker; None = as measured


class ServingNodes(Config):
    """Machines that answer requests. Each has whole releases on its own disk."""

    requests_per_s: float = Field(gt=0)  # in the busiest hour
    requests_per_s_per_replica: float = Field(gt=0)  # maximum of one replica in `benchmarks.serving` or your own test
    load_share: float = Field(0.5, gt=0, le=1)  # target share of that maximum; latency grows with it
    replicas_per_node: int = Field(1, ge=1)
    price_per_node_hour: float = Field(ge=0)
    releases_per_node: int = Field(2, ge=1)  # the current one and the next one, copied before the switch
    disk_price_per_gib_month: float = Field(0, ge=0)


class Assumptions(Config):
    """Values that replace measured ones."""

    prompt_tokens: dict[TextKind, float] = {}  # per text
    output_tokens: dict[TextKind, float] = {}

    def applied(self, workload: Workload) -> Workload:
        """The figures with these replacements; a text's engine time and bytes follow its output."""
        texts = dict(workload.texts)
        for kind in self.prompt_tokens.keys() | self.output_tokens.keys():
            if kind not in texts:
                raise RecipeError(f"assume: tokens of a {kind}, but {workload.measured} were measured. Remove it.")
            old = texts[kind]
            prompt = self.prompt_tokens.get(kind, old.prompt_tokens[_EXPECTED])
            output = self.output_tokens.get(kind, old.output_tokens[_EXPECTED])
            longer = output / old.output_tokens[_EXPECTED]
            texts[kind] = TextFigures(
                old.rows, np.full(3, prompt), np.full(3, output), old.engine_s * longer, old.file_bytes * longer
            )
        return replace(workload, texts=texts)


class FleetConfig(Config):
    """The machines of a plan; all groups generate together."""

    groups: list[FleetGroup] = Field(min_length=1)
    encode: StageWorkers | None = None
    publish: StageWorkers | None = None
    serving: ServingNodes | None = None
    storage_price_per_gib_month: float = Field(0, ge=0)  # for the workspace
    assume: Assumptions = Assumptions()

    @model_validator(mode="after")
    def _named(self) -> "FleetConfig":
        if len({group.name for group in self.groups}) < len(self.groups):
            raise ValueError("two groups have the same name; figures are listed by name, so make names unique")
        return self

    def on_demand(self) -> "FleetConfig":
        """The fleet on on-demand machines, at their price if given."""
        groups = []
        for group in self.groups:
            price = group.on_demand_price_per_gpu_hour
            change = {} if price is None else {"price_per_gpu_hour": price, "preemption_rate_per_hour": 0.0}
            groups.append(group.model_copy(update=change))
        return self.model_copy(update={"groups": groups})


def load_fleet(path: str | Path) -> FleetConfig:
    """Reads a fleet file. Raises RecipeError with every error and its key."""
    try:
        return FleetConfig.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). See cluster/fleet-example.yaml.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Correct it.") from None
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {_explain(detail)}" for detail in error.errors())) from None


def _explain(mistake: Any) -> str:
    location, message = mistake["loc"], mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        sections: dict[str, type[Config]] = {"groups": FleetGroup, "serving": ServingNodes, "assume": Assumptions}
        section = sections.get(location[0], StageWorkers) if len(location) > 1 else FleetConfig
        message = f"unknown key.{did_you_mean(str(location[-1]), section.model_fields)}"
    return f"{'.'.join(map(str, location)) or 'the file'}: {message}"


# -------------------------------------------------------------------------------------------------------------- demand


class Horizon(Config):
    """Scope of a plan: a first full run, and refreshes after it."""

    users: int = Field(0, ge=0)
    items: int = Field(0, ge=0)
    refreshes: int = Field(0, ge=0)
    acting_share: float | None = Field(None, ge=0, le=1)  # of the users, between two refreshes; None = as measured
    cohorts: int | None = Field(None, ge=1)  # None = in proportion to users and items, as in the measured run
    renewed_share: float = Field(1.0, ge=0, le=1)  # of the cohorts, regenerated at each refresh: at worst all


@dataclass(frozen=True)
class Demand:
    """Texts to generate, and the resulting size of a release."""

    first: Texts  # in the full run
    per_refresh: Texts = field(default_factory=dict)
    refreshes: int = 0
    ids: int = 0  # with their own text
    members: Mapping[str, int] = field(default_factory=dict)  # users and items with only cohort texts

    @property
    def texts(self) -> dict[TextKind, int]:
        """Texts of all runs; kinds without any are left out."""
        total = {k: self.first.get(k, 0) + self.refreshes * self.per_refresh.get(k, 0) for k in get_args(TextKind)}
        return {kind: n for kind, n in total.items() if n}


def demand(policy: Policy, horizon: Horizon, workload: Workload) -> Demand:
    """LLM calls of a policy.

    individual: a text for every user and item; active users get a new one from the whole prompt (an unchanged prompt
    keeps its text). collective: a text for every cohort (REKI), and a new one when its members have changed.
    streaming: texts for all at first, then a rewrite from the new behaviors of users whose interests moved (LIBER).
    Raises RecipeError if the measured run lacks data that the policy needs.
    """
    if policy == "collective":
        shares = workload.cohorts_per_user, workload.cohorts_per_item
        if "cohort" not in workload.texts or (horizon.cohorts is None and None in shares):
            raise RecipeError(
                "collective: the measured run wrote no cohort texts. Add `cohorts: {}` and `prompts: {mode: "
                "both}` to its recipe and run it again."
            )
        proportional = round(horizon.users * (shares[0] or 0)) + round(horizon.items * (shares[1] or 0))
        cohorts = horizon.cohorts or proportional
        members = {"user": horizon.users, "item": horizon.items}
        texts, renewed = round(cohorts * workload.texts_per_cohort), round(cohorts * horizon.renewed_share)
        return Demand({"cohort": texts}, {"cohort": renewed}, horizon.refreshes, cohorts, members)
    first: Texts = {"user": round(horizon.users * workload.texts_per_user), "item": horizon.items}
    full = Demand(first, ids=horizon.users + horizon.items, refreshes=horizon.refreshes)
    if not horizon.refreshes:
        return full
    share = horizon.acting_share if horizon.acting_share is not None else workload.acting_share
    if share is None:
        raise RecipeError(
            "the share of users active between two refreshes is unknown. Set --acting-share (such as 0.02), "
            "or run `owlrec refresh` once on the measured run."
        )
    acting = round(share * horizon.users)
    if policy == "individual":
        return replace(full, per_refresh={"user": acting})
    if workload.texts_per_acting is None or "refresh" not in workload.texts:
        raise RecipeError("streaming: the measured run was never refreshed. Run `owlrec refresh` on it once.")
    return replace(full, per_refresh={"refresh": round(acting * workload.texts_per_acting)})


# ------------------------------------------------------------------------------------------------------------ estimate


@dataclass(frozen=True)
class CostEstimate:
    """Estimate of a whole job, and of storing and serving its output."""

    texts: Mapping[TextKind, int]
    shards: int
    figures: Mapping[str, Range]  # per stage: hours, and cost in the fleet file's currency; missing ones are left out

    def expected(self, figure: str) -> float:
        """Middle of a figure's range."""
        return float(self.figures[figure][_EXPECTED])


def estimate_cost(workload: Workload, fleet: FleetConfig, needed: Demand) -> CostEstimate:
    """Estimates the cost of the texts; low and high push all uncertain figures in one direction.

    workload: with `fleet.assume` applied. A refresh is assumed to publish only its texts, without behaviors.
    Raises RecipeError if nothing is planned, a kind was not measured, or preemptions outrun the work.
    """
    texts = needed.texts
    if not texts or min(texts.values()) < 0 or texts.keys() - workload.texts.keys():
        asked = " and ".join(f"{n} of {kind}" for kind, n in (texts or needed.first).items())
        raise RecipeError(
            f"texts ({asked}) cannot be planned from a run that measured {workload.measured}. Plan only "
            "measured kinds, or first run the missing ones on a small scale."
        )
    ids = needed.ids + sum(needed.members.values()) + needed.refreshes * sum(needed.per_refresh.values())
    figures = {f"{name} tokens": workload.total(f"{name}_tokens", texts) for name in ("prompt", "output")}
    figures |= _generate(workload, fleet.groups, needed)
    figures |= _stage("encode", fleet.encode, sum(texts.values()), workload.encode_s)
    figures |= _stage("publish", fleet.publish, ids, workload.publish_s)
    figures["cost"] = sum((cost for name, cost in figures.items() if name.endswith(": cost")), _NONE)
    stored = _stored_gib(workload, needed)
    figures |= {f"storage: {name}, GiB": gib for name, gib in stored.items()}
    figures["storage: cost per month"] = sum(stored.values(), _NONE) * fleet.storage_price_per_gib_month
    if fleet.serving:
        figures |= _serving(fleet.serving, stored.get("release", _NONE))
    shards = workload.shards(needed.first) + needed.refreshes * workload.shards(needed.per_refresh)
    return CostEstimate(texts, shards, figures)


def _generate(workload: Workload, groups: Sequence[FleetGroup], needed: Demand) -> dict[str, Range]:
    """All runs of `generate`, each on newly started machines."""
    wall, paid, lost = np.zeros(3), np.zeros((len(groups), 3)), np.zeros((len(groups), 3))
    for texts, times in ((needed.first, 1), (needed.per_refresh, needed.refreshes)):
        if times and (shards := workload.shards(texts)):
            seconds = np.array([group.seconds(workload, texts) for group in groups])
            startup = np.array([group.starts_in(workload) for group in groups])
            runs = [schedule(groups, startup, column, shards, workload.in_flight) for column in seconds.T]
            walls, paids, losts = (np.array(values).T for values in zip(*runs, strict=True))
            wall, paid, lost = wall + times * walls / 3600, paid + times * paids / 3600, np.maximum(lost, losts)
    gpu_hours = np.array([[group.gpus] for group in groups]) * paid
    cost = np.array([[group.price_per_gpu_hour] for group in groups]) * gpu_hours
    figures = {
        "generate: wall hours": wall,
        "generate: GPU-hours": gpu_hours.sum(axis=0),
        "generate: cost": cost.sum(axis=0),
    }
    for group, hours, share in zip(groups, gpu_hours, lost, strict=True):
        figures[f"generate on {group.name}: GPU-hours"] = hours
        if group.preemption_rate_per_hour:
            figures[f"generate on {group.name}: share lost to preemptions"] = share
    return figures


def schedule(
    groups: Sequence[FleetGroup], startup: np.ndarray, seconds: np.ndarray, shards: int, in_flight: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Assigns the shards of a run one after another to free engines, like Ray Data.

    startup: seconds, float64 [groups]. seconds: float64 [groups], of one engine of the group for all the work.
    Returns the run's seconds; the paid seconds of each engine of a group, float64 [groups]; and the share of them
    spent on preempted work and on starts after preemptions, float64 [groups].
    Each engine first waits for its machine and starts. When no shards are left to start, an engine has half a shard
    left on average, and the run ends when a shard of the slowest group does. A group that would start later than that
    gets no work. Raises RecipeError if a group loses work faster than it finishes it.
    """
    shard_s = in_flight * seconds / shards  # from a shard's start to its end
    engines, provision, rate, idle = (
        np.array([getattr(group, name) for group in groups])
        for name in ("engines", "provision_s", "preemption_rate_per_hour", "idle_timeout_s")
    )
    delay = startup + provision
    lost = rate / 3600 * (shard_s / 2 + delay)
    if lost.max() >= 1:
        worst = int(lost.argmax())
        raise RecipeError(
            f"group '{groups[worst].name}': at {rate[worst]:g} preemptions per hour its engines lose work "
            f"faster than they finish it (a shard takes {shard_s[worst]:,.0f} s). Make shard_rows smaller."
        )
    speed = engines * (1 - lost) / seconds  # of the whole work per second
    at_work = np.ones(len(groups), dtype=bool)
    while True:
        begun_s = float((1 + (speed * (delay - shard_s / 2))[at_work].sum()) / speed[at_work].sum())
        begun_s = max(begun_s, float(delay.min()))  # start of the last shard
        late = at_work & (delay > begun_s)
        if not late.any():
            break
        at_work &= ~late
    wall_s = begun_s + float((shard_s * (1 - 1 / (2 * in_flight * engines)))[at_work].max())
    # A machine that is being replaced is not billed until the replacement starts.
    there = (begun_s + shard_s / 2 - provision) * (1 - rate / 3600 * provision)
    return wall_s, np.where(at_work, there + idle, 0.0), lost


def _stage(name: str, workers: StageWorkers | None, rows: int, row_s: Range | None) -> dict[str, Range]:
    if workers and workers.rows_per_s:
        row_s = np.full(3, 1 / workers.rows_per_s)
    if not workers or row_s is None:
        return {}
    hours = rows * row_s / 3600
    return {
        f"{name}: wall hours": hours / workers.workers,
        f"{name}: worker-hours": hours,
        f"{name}: cost": hours * workers.price_per_worker_hour,
    }


def _stored_gib(workload: Workload, needed: Demand) -> dict[str, Range]:
    """By artifact, after compaction: a refresh's text replaces an existing one."""
    kept: Texts = {kind: n for kind, n in needed.first.items() if kind != "refresh"}
    size = {"knowledge": workload.total("file_bytes", kept)}
    if workload.vector_bytes is not None:
        size["vectors"] = sum(kept.values()) * workload.vector_bytes
    if workload.release_bytes is not None:
        members_bytes = _MEMBERSHIP_BYTES * sum(needed.members.values())
        behaviors_bytes = workload.behavior_bytes * needed.members.get("user", 0)
        size["release"] = needed.ids * workload.release_bytes + members_bytes + behaviors_bytes
    return {name: total / 2**30 for name, total in size.items()}


def _serving(given: ServingNodes, release_gib: Range) -> dict[str, Range]:
    replicas = np.ceil(given.requests_per_s / (given.requests_per_s_per_replica * given.load_share))
    nodes = np.ceil(replicas / given.replicas_per_node)
    disk = given.releases_per_node * release_gib
    per_node = _HOURS_PER_MONTH * given.price_per_node_hour + disk * given.disk_price_per_gib_month
    return {
        "serving: replicas": np.full(3, replicas),
        "serving: nodes": np.full(3, nodes),
        "serving: release files per node, GiB": disk,
        "serving: cost per month": nodes * per_node,
    }


# -------------------------------------------------------------------------------------------------- savings and report


class Saving(NamedTuple):
    """One option's savings, on top of those before it; the first row is the starting point. Expected values."""

    name: str
    texts: int
    gpu_hours: float
    cost: float
    saved: float  # negative if it costs more


def savings(
    workload: Workload, fleet: FleetConfig, horizon: Horizon, policy: Policy
) -> tuple[list[Saving], CostEstimate]:
    """Savings of each option, and the resulting estimate.

    Starts with all users and items regenerated at every refresh, no drafts, on-demand machines. The savings add up to
    the difference; each depends on those before it, and options without effect are left out. Raises
    RecipeError like `demand` and `estimate_cost`.
    """
    asked, once = demand(policy, horizon, workload), horizon.model_copy(update={"refreshes": 0})
    everybody: Texts = {"user": horizon.users, "item": horizon.items}
    again = replace(demand("individual", once, workload), per_refresh=everybody, refreshes=horizon.refreshes)
    plain, steady = workload.without_decoder(), fleet.on_demand()
    ways = [("regenerate everything each time", plain, steady, again)]
    if policy != "collective" and horizon.refreshes:
        ways.append(("keep texts with unchanged prompts", plain, steady, demand("individual", horizon, workload)))
    ways.append((f"{policy} texts", plain, steady, asked))
    ways += [("retrieval decoder", workload, steady, asked), ("spot machines", workload, fleet, asked)]
    steps: list[Saving] = []
    for name, figures, machines, needed in ways:
        estimate = estimate_cost(figures, machines, needed)
        cost = estimate.expected("cost")
        if not steps or cost != steps[-1].cost:
            gpu_hours = estimate.expected("generate: GPU-hours")
            saved = steps[-1].cost - cost if steps else 0.0
            steps.append(Saving(name, sum(estimate.texts.values()), gpu_hours, cost, saved))
    return steps, estimate


def price_per_point(workload: Workload, estimate: CostEstimate) -> Range | None:
    """Cost of the estimate per .001 of AUC that the measured run gained; None if it showed no gain."""
    return None if not workload.gain else estimate.figures["cost"] / (workload.gain / 0.001)


def report(workload: Workload, fleet: FleetConfig, horizon: Horizon, policy: Policy) -> dict[str, Any]:
    """Prints an estimate, a comparison of policies, and the savings; returns every figure for a JSON file."""
    workload = fleet.assume.applied(workload)
    steps, estimate = savings(workload, fleet, horizon, policy)
    kinds = ", ".join(f"{n:,} {'rewrite' if kind == 'refresh' else kind}s" for kind, n in estimate.texts.items())
    note(
        f"{horizon.users:,} users, {horizon.items:,} items, {policy}, {horizon.refreshes:,} refreshes after a full run"
    )
    rows = [(name, *(float(figure[i]) for i in (1, 0, 2))) for name, figure in estimate.figures.items()]
    table(f"texts: {kinds}", ["estimate", "expected", "low", "high"], rows)
    note("low and high show the spread between the measured shards, not differences between those and future rows")
    price = price_per_point(workload, estimate)
    if workload.gain is not None and price is not None:
        low, expected, high = price
        note(
            f"per +.001 AUC over metadata, if these texts gain as the measured run's ({workload.gain:+.4f}): "
            f"{expected:,.2f} ({low:,.2f} to {high:,.2f})"
        )
    wanted = ("encode: cost", "publish: cost", "storage: release, GiB", "serving: cost per month")
    if lacking := [name for name in wanted if name not in estimate.figures]:
        note(f"not measured, or not priced in the fleet file: {'; '.join(lacking)}")
    if estimate.shards < (engines := sum(group.engines for group in fleet.groups)):
        warn(f"{estimate.shards} shards for {engines} engines: some would be idle. Make shard_rows smaller.")
    policies: dict[Policy, CostEstimate] = {}
    for name in POLICIES:
        try:
            policies[name] = estimate_cost(workload, fleet, demand(name, horizon, workload))
        except RecipeError as error:
            note(f"not planned: {error}")
    columns = ["prompt tokens", "output tokens", "generate: GPU-hours", "generate: wall hours", "cost"]
    beside = [(name, sum(e.texts.values()), *map(e.expected, columns)) for name, e in policies.items()]
    table("policies, expected", ["policy", "texts", *columns], beside)
    shares = [f"{step.saved / steps[0].cost:.1%}" if steps[0].cost else "" for step in steps]
    columns = ["one after another", "texts", "GPU-hours", "cost", "saved", "of all"]
    table("expected savings", columns, [(*step, share) for step, share in zip(steps, shares, strict=True)])
    return {
        "estimate": asdict(estimate),
        "policies": {name: asdict(e) for name, e in policies.items()},
        "savings": [step._asdict() for step in steps],
        "workload": asdict(workload),
    }
