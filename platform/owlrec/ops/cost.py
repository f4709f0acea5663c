"""What a finished run says of the work that a row takes: tokens, bytes and engine time, each with the range that its
shards span.

The range covers the spread between the measured shards (`per_row` says how) and nothing else: that the millions of rows
to come are like those measured is the user's assumption. An engine answers in the order of asking, so that the time
between the ends of two of its shards is what the later one cost, however many it has at hand.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from owlrec.config import Config
from owlrec.decoding.controller import DecoderCounters
from owlrec.errors import RecipeError, WorkspaceError, did_you_mean
from owlrec.generation.job import decoder_counters
from owlrec.generation.shard_plan import consecutive_ids, shard_sizes
from owlrec.ops.charts import COLORS, draw, short_number, standalone
from owlrec.ops.console import note, table, warn
from owlrec.ops.simulation import SimulatedGroup, simulate
from owlrec.refresh.state import pointer, read_state
from owlrec.schema import KINDS, Kind
from owlrec.shards import Artifact, Card, Shard, Stopwatch, finished_stage
from owlrec.workspace import Workspace

Call = Literal["user", "item", "cohort", "refresh"]  # what the LLM is asked about; refresh: a user who has moved on
_ONE_SHARD_FACTOR = 2.0  # a single shard shows no spread: from half to double is a guess, and looks like one


class Estimate(Config):
    """An expected value and the range around it."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray | Sequence[float]) -> "Estimate":
        """values: [3], low to high."""
        return cls(low=float(values[0]), expected=float(values[1]), high=float(values[2]))

    @property
    def array(self) -> np.ndarray:
        """float64 [3], low to high."""
        return np.array([self.low, self.expected, self.high])


class KindFigures(Config):
    """What one row of a kind took, rows that failed included."""

    rows: int
    shards: int
    prompt_tokens: Estimate
    output_tokens: Estimate
    seconds: Estimate  # of one engine that does nothing else
    knowledge_bytes: Estimate
    vector_bytes: float | None  # all that `encode` leaves: fp16 tables and their mapped copies; None before it ran


class WorkloadFigures(Config):
    """What a finished run measured."""

    run: str  # the job's folder in the workspace
    finished: float  # seconds since 1970
    kinds: dict[Call, KindFigures]
    tokens_per_s: Estimate  # output of one engine, prompts included
    startup_s: float | None = None  # until an engine had its first shard; None where the run was interrupted
    release_bytes: float | None = None  # a row; None before `publish` ran
    tokens_per_step: float | None = None  # of a row; None where no decoder counted
    speed_up: dict[int, float] = {}  # by the decoder, by rows in a step: up to and including the key
    plain_factor: float = 1.0  # an engine's time without the decoder, over what it was
    cohorts_per_user: float | None = None  # None where the run built no cohorts
    cohorts_per_item: float | None = None
    acting_share: float | None = None  # of the users, in the last refresh; None before any
    calls_per_acting: float | None = None  # of the LLM, in that refresh

    @property
    def measured(self) -> str:
        """How many rows are behind the figures, and of when, in words."""
        rows = [f"{f.rows:,} {'renewals' if call == 'refresh' else f'{call}s'}" for call, f in self.kinds.items()]
        listed = " and ".join([", ".join(rows[:-1]), rows[-1]]) if len(rows) > 1 else rows[0]
        return f"{listed} (finished {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.finished))})"


def per_row(sums: np.ndarray, rows: np.ndarray) -> Estimate:
    """Sum of `sums` over sum of `rows`, and a range from the spread between shards.

    sums, rows: float64 [n shards]. With r the ratio, its standard error is that of a ratio estimator, e = std(sums - r
    rows) / (sqrt(n) mean(rows)). The range is r / f to r f with f = 1 + 2 e / r, which never reaches 0; f is 2 where
    there is but one shard.
    """
    ratio, factor = float(sums.sum() / rows.sum()), _ONE_SHARD_FACTOR
    if len(sums) > 1 and ratio > 0:
        error = float(np.std(sums - ratio * rows, ddof=1)) / (len(sums) ** 0.5 * float(rows.mean()))
        factor = 1 + 2 * error / ratio
    return Estimate.of([ratio / factor, ratio, ratio * factor])


def measured_engine_seconds(cards: Sequence[Card]) -> np.ndarray:
    """Time of its engine that each shard took, float64 [n shards]; the sum over an engine is the time it was at work.

    That is the time since the engine's shard before it was done, but never more than the shard's own: an interrupted
    run's pause is nobody's.
    """
    at_work, before = np.zeros(len(cards)), defaultdict[str, float](lambda: -np.inf)
    for i in sorted(range(len(cards)), key=lambda i: cards[i].finished):
        card = cards[i]
        at_work[i] = min(card.finished - before[card.worker], card.seconds)
        before[card.worker] = card.finished
    return at_work


def measured_workload(workspace: Workspace) -> WorkloadFigures:
    """Figures of the workspace's finished generation run, and of the refreshes after it.

    Raises WorkspaceError where none has finished, or it wrote no tokens.
    """
    stage = finished_stage(workspace, "generate")
    if stage is None:
        raise WorkspaceError(
            f"{workspace.root}: no finished generation run to extrapolate from. Run a small recipe first: some shards "
            "of users and items, with the model and the prompts to plan for."
        )
    folder = stage.outputs["knowledge"]
    run = list(Artifact(workspace, folder).cards().values())
    of_call: dict[Call, list[Card]] = {kind: [c for c in run if Shard.of_name(c.shard).kind == kind] for kind in KINDS}
    of_call["refresh"] = _refreshed(workspace, folder, stage.finished)
    every = [(call, card) for call, cards in of_call.items() for card in cards]
    at_work = measured_engine_seconds([card for _, card in every])
    kinds: dict[Call, KindFigures] = {}
    for call in of_call:
        mine = [(card, t) for (c, card), t in zip(every, at_work, strict=True) if c == call]
        if any(_count(card, "output_tokens") for card, _ in mine):
            kinds[call] = _figures(mine, _vector_bytes(workspace, "user" if call == "refresh" else call))
    output = np.array([_count(card, "output_tokens") for call, card in every if call != "refresh"])
    seconds = at_work[: len(output)]
    if not output.any():
        raise WorkspaceError(
            f"{workspace.path(folder)}: the finished run wrote no tokens. Run a small recipe with a real model first."
        )
    decoder = decoder_counters(run) or DecoderCounters()
    drafting = [steps for steps in decoder.by_rows.values() if steps.seconds]
    saved = sum(steps.plain_s - steps.seconds for steps in drafting)
    return WorkloadFigures(
        run=folder,
        finished=stage.finished,
        kinds=kinds,
        tokens_per_s=per_row(output[seconds > 0], seconds[seconds > 0]),
        startup_s=_startup(stage, run),
        release_bytes=_release_bytes(workspace),
        tokens_per_step=decoder.tokens_per_step if decoder.counts.get("rows") else None,
        speed_up={rows: steps.speed_up for rows, steps in decoder.by_rows.items() if steps.seconds},
        plain_factor=1 + saved / float(seconds.sum()),
        **_cohorts(workspace),
        **_last_refresh(workspace),
    )


def _figures(timed: Sequence[tuple[Card, float]], vector_bytes: float | None) -> KindFigures:
    """Of one kind's shards, with the time of their engines."""
    names = ("rows_asked", "prompt_tokens", "output_tokens")
    rows, asked, prompt, output, size, seconds = np.array(
        [(c.rows_in, *(_count(c, n) for n in names), c.files[Shard.of_name(c.shard).file()].bytes, t) for c, t in timed]
    ).T
    return KindFigures(
        rows=int(rows.sum()),
        shards=len(timed),
        prompt_tokens=per_row(prompt, asked),
        output_tokens=per_row(output, asked),
        seconds=per_row(seconds, asked),
        knowledge_bytes=per_row(size, rows),
        vector_bytes=vector_bytes,
    )


def _count(card: Card, name: str) -> float:
    return float(card.counts.get(name, 0))


def _refreshed(workspace: Workspace, folder: str, after: float) -> list[Card]:
    """Shards of the refreshes that came after a run, which are jobs of their own."""
    jobs = [f"knowledge/{name}" for name in workspace.names("knowledge") if not folder.endswith(f"/{name}")]
    cards = [card for job in jobs for card in Artifact(workspace, job).cards("user").values()]
    return [card for card in cards if card.finished > after and card.stage == "refresh"]


def _startup(stage: Card, cards: Sequence[Card]) -> float | None:
    if not stage.seconds or stage.counts.get("shards") != stage.counts.get("shards_this_run", 0):
        return None
    first = defaultdict[str, float](lambda: np.inf)
    for card in cards:
        first[card.worker] = min(first[card.worker], card.finished - card.seconds)
    return max(0.0, float(np.mean(list(first.values()))) - (stage.finished - stage.seconds))


def _cohorts(workspace: Workspace) -> dict[str, float]:
    built, prepared = finished_stage(workspace, "cohorts"), finished_stage(workspace, "prepare")
    counts = {**(prepared.counts if prepared else {}), **(built.counts if built else {})}
    return {
        f"cohorts_per_{kind}": float(counts[f"{kind}_cohorts"]) / float(counts[f"{kind}s"])
        for kind in ("user", "item")
        if counts.get(f"{kind}_cohorts") and counts.get(f"{kind}s")
    }


def _last_refresh(workspace: Workspace) -> dict[str, float]:
    prepared = finished_stage(workspace, "prepare")
    state = read_state(workspace) if pointer(workspace).current else None
    acting = state.counts.get("users_with_news", 0) if state else 0
    if not state or not acting:
        return {}
    users = float(prepared.counts.get("users", 0)) if prepared else 0.0
    return {"calls_per_acting": state.calls / acting} | ({"acting_share": acting / users} if users else {})


def _sizes(workspace: Workspace, folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it."""
    return {path: entry.bytes for path, entry in workspace.entries(folder).items()}


def _vector_bytes(workspace: Workspace, kind: Kind) -> float | None:
    encoded = finished_stage(workspace, "encode")
    if encoded is None or not encoded.counts.get(f"knowledge_{kind}"):
        return None
    # Of files <source>-<kind>.parquet and folders <source>-<kind>.
    sizes = _sizes(workspace, encoded.outputs["vectors"])
    mine = sum(n for path, n in sizes.items() if path.split("/")[0].removesuffix(".parquet").endswith(f"-{kind}"))
    return mine / float(encoded.counts[f"knowledge_{kind}"])


def _release_bytes(workspace: Workspace) -> float | None:
    published = finished_stage(workspace, "publish")
    rows = sum(int(published.counts.get(f"knowledge_{kind}", 0)) for kind in KINDS) if published else 0
    if not published or not rows:
        return None
    sizes = _sizes(workspace, f"releases/{published.outputs['release']}")
    return sum(n for path, n in sizes.items() if path.startswith("parts/")) / rows  # codebooks do not grow


# ---------------------------------------------------------------------------------------------------------------- fleet
# The machines that a plan is made for, as a YAML file describes them: how many, how fast, at what price, how often
# lost.
#
# Every figure is the user's own: nothing here knows any machine, vendor or price.


class FleetGroup(Config):
    """Machines of one sort. For engines that run on no GPU, read `gpu` as machine."""

    name: str
    accelerator: str  # free text
    gpus: int = Field(ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    price_per_gpu_hour: float = Field(ge=0)  # in the user's own currency
    on_demand_price_per_gpu_hour: float | None = Field(None, ge=0)  # of spot machines, to tell what they save
    # How fast one engine is, in one of three ways: output tokens/s at full batch (without prefill_tokens_per_s if
    # prompts were included); or [rows in a step, its seconds] of plain decoding, which the decoder's measured speed-up
    # multiplies; or neither, which means as fast as an engine of the measured run.
    tokens_per_s: float | None = Field(None, gt=0)
    curve: list[tuple[float, float]] | None = Field(None, min_length=1)
    prefill_tokens_per_s: float | None = Field(None, gt=0)
    preemption_rate_per_hour: float = Field(0, ge=0)  # of one engine
    provision_s: float = Field(0, ge=0)  # until the cloud gives a machine that was asked for; not paid
    # From a machine to an engine that has loaded its model; paid. None = as measured, for engines as in the measured
    # run; 0 for others.
    startup_s: float | None = Field(None, ge=0)
    idle_timeout_s: float = Field(0, ge=0)  # before the autoscaler gives back a machine without work; paid

    @property
    def engines(self) -> int:
        """How many engines the group runs."""
        return self.gpus // self.gpus_per_engine

    def starts_in(self, workload: WorkloadFigures) -> float:
        """Seconds of `startup_s`, measured where none are given."""
        measured = not (self.tokens_per_s or self.curve)
        return self.startup_s if self.startup_s is not None else (workload.startup_s or 0.0) * measured

    @model_validator(mode="after")
    def _consistent(self) -> "FleetGroup":
        if self.gpus % self.gpus_per_engine:
            raise ValueError(f"{self.gpus} gpus cannot be shared out in engines of {self.gpus_per_engine}; change one")
        if self.curve and (self.tokens_per_s or not self.prefill_tokens_per_s or min(map(min, self.curve)) <= 0):
            raise ValueError(
                "a curve holds rows and seconds above 0, takes the place of tokens_per_s, and needs "
                "prefill_tokens_per_s, since its steps read no prompts"
            )
        if self.prefill_tokens_per_s and not (self.curve or self.tokens_per_s):
            raise ValueError(
                "prefill_tokens_per_s without tokens_per_s or curve; the measured run's speed has prompts in"
            )
        return self


class Assumptions(Config):
    """What to plan with in place of what was measured."""

    prompt_tokens: dict[Call, float] = {}  # a row
    output_tokens: dict[Call, float] = {}
    speed_up: dict[int, float] = {}  # by the decoder: up to so many rows in a step

    def applied(self, workload: WorkloadFigures) -> WorkloadFigures:
        """The figures with these in their place; a row's engine time follows its output."""
        kinds = dict(workload.kinds)
        for call in self.prompt_tokens.keys() | self.output_tokens.keys():
            if call not in kinds:
                raise RecipeError(f"assume: tokens of a {call}, but {workload.measured} were measured. Leave it out.")
            found = kinds[call]
            prompt = self.prompt_tokens.get(call, found.prompt_tokens.expected)
            output = self.output_tokens.get(call, found.output_tokens.expected)
            longer = output / found.output_tokens.expected
            kinds[call] = found.model_copy(
                update={
                    "prompt_tokens": Estimate.of([prompt] * 3),
                    "output_tokens": Estimate.of([output] * 3),
                    "seconds": Estimate.of(found.seconds.array * longer),
                    "knowledge_bytes": Estimate.of(found.knowledge_bytes.array * longer),
                }
            )
        return workload.model_copy(update={"kinds": kinds, "speed_up": self.speed_up or workload.speed_up})


class FleetConfig(Config):
    """The machines to plan for; all groups work on the job together."""

    groups: list[FleetGroup] = Field(min_length=1)
    storage_price_per_gib_month: float = Field(0, ge=0)
    assume: Assumptions = Assumptions()


def load_fleet(path: str | Path) -> FleetConfig:
    """Reads a fleet file. Raises RecipeError, which lists every mistake with its key."""
    try:
        return FleetConfig.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). cluster/fleet-example.yaml shows one.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is no valid YAML ({' '.join(str(error).split())}). Correct it there.") from None
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {_explain(detail)}" for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    key, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        names = {1: FleetConfig.model_fields, 2: Assumptions.model_fields}.get(
            len(detail["loc"]), FleetGroup.model_fields
        )
        message = f"unknown key.{did_you_mean(str(detail['loc'][-1]), names)}"
    return f"{key}: {message}" if key else message


# ------------------------------------------------------------------------------------------------------------- planning
# What a knowledge generation job would cost on a fleet that is not rented yet, extrapolated from a small finished run.
#
# Tokens, bytes and engine time a row come from the run (see workload.py), speeds of other machines from the user's own
# measurements; no figure of any machine is built in. simulation.py plays the same fleet event by event, to check the
# formula that stands here.


_POOL_BYTES_A_TOKEN = 9.1
_MEMBERSHIP_BYTES = 40  # of an id in a release: key, two cohorts of 8 bytes, LMDB's header and slack


class GroupPlan(Config):
    """One group's part of a plan."""

    name: str
    engines: int
    speed_from: str  # tokens_per_s, curve or measured run
    tokens_per_s: Estimate  # output of one engine
    work_share: float  # of all rows; 0 where the others are done before its engines have started
    preemptions: float
    repeated_share: float  # of the time after the start: work lost to preemptions, and starts after them
    gpu_hours: Estimate
    cost: Estimate


class Plan(Config):
    """Estimates of a whole job."""

    calls: dict[Call, int]
    shards: int
    prompt_tokens: Estimate
    output_tokens: Estimate
    wall_hours: Estimate
    gpu_hours: Estimate
    cost: Estimate
    groups: list[GroupPlan]
    storage_gib: dict[str, Estimate]  # knowledge; vectors, release and pools where they are known
    storage_cost_per_month: Estimate


@dataclass(frozen=True)
class Work:
    """How a job is cut up."""

    shard_rows: int
    shards_at_once: int = 1  # of an engine: as many as fill its batch; a preemption loses half of each, on average
    pool_tokens: int = 0  # bound of the retrieval pool of a kind, 0 for no pools
    decoder: bool = True  # whether engines draft as they did in the measured run


@dataclass(frozen=True)
class Runs:
    """Calls of a first run, and of each of those that come after it, on machines that start anew."""

    first: Mapping[Call, int]
    each: Mapping[Call, int] = field(default_factory=dict)
    refreshes: int = 0

    @property
    def total(self) -> dict[Call, int]:
        """Calls of all runs."""
        calls = {call: n + self.refreshes * self.each.get(call, 0) for call, n in self.first.items()}
        return calls | {call: self.refreshes * n for call, n in self.each.items() if call not in calls}


def plan(
    workload: WorkloadFigures,
    fleet: FleetConfig,
    runs: Runs,
    work: Work,
    *,
    stored: Mapping[Call, int] | None = None,
    members: int = 0,
) -> Plan:
    """What so many calls of each sort take; low and high push all uncertain figures one way at once.

    stored: texts that are kept, by sort; None = one a call, refreshes apart. members: users and items that only cohorts
    know, of which a release holds their memberships.
    Raises RecipeError where nothing is asked for, a kind was not measured, or preemptions outrun the work.
    """
    workload = fleet.assume.applied(workload)
    rows = {call: n for call, n in runs.total.items() if n}
    if not rows or min(rows.values()) < 0 or rows.keys() - workload.kinds.keys():
        asked = " and ".join(f"{n} of {call}" for call, n in (rows or runs.total).items())
        raise RecipeError(
            f"calls ({asked}) cannot be planned from a run that measured {workload.measured}. Ask for rows of measured "
            "kinds, or run what is missing on a small scale first."
        )
    first = _run(workload, fleet, runs.first, work)
    each = _run(workload, fleet, runs.each, work)
    wall, paid, seconds = (getattr(first, n) + runs.refreshes * getattr(each, n) for n in ("wall", "paid", "seconds"))
    done = first.done + runs.refreshes * each.done
    prompt, output = _tokens(workload, rows)
    groups = []
    for i, group in enumerate(fleet.groups):
        gpu_hours = group.gpus * paid[i]
        groups.append(
            GroupPlan(
                name=group.name,
                engines=group.engines,
                speed_from=_source(group),
                tokens_per_s=Estimate.of(np.sort(output / seconds[i])),
                work_share=float(done[i] / done.sum()),
                preemptions=group.engines * float(paid[i][1]) * group.preemption_rate_per_hour,
                repeated_share=first.repeated[i] if first.done[i] else each.repeated[i],
                gpu_hours=Estimate.of(gpu_hours),
                cost=Estimate.of(gpu_hours * group.price_per_gpu_hour),
            )
        )
    kept: dict[Call, int] = {call: n for call, n in (stored or rows).items() if n and call != "refresh"}
    storage = _storage(workload, kept, work.pool_tokens, members)
    return Plan(
        calls=rows,
        shards=first.shards + runs.refreshes * each.shards,
        prompt_tokens=Estimate.of(prompt),
        output_tokens=Estimate.of(output),
        wall_hours=Estimate.of(wall),
        gpu_hours=Estimate.of(np.sum([g.gpu_hours.array for g in groups], axis=0)),
        cost=Estimate.of(np.sum([g.cost.array for g in groups], axis=0)),
        groups=groups,
        storage_gib={name: Estimate.of(gib) for name, gib in storage.items()},
        storage_cost_per_month=Estimate.of(np.sum(list(storage.values()), axis=0) * fleet.storage_price_per_gib_month),
    )


@dataclass(frozen=True)
class _Run:
    """One run: low, expected and high, [3] each."""

    shards: int
    wall: np.ndarray  # hours [3]
    paid: np.ndarray  # hours of each engine [groups, 3]
    seconds: np.ndarray  # of one engine for all the work [groups, 3]
    done: np.ndarray  # output tokens [groups], expected
    repeated: list[float]  # by group, expected


def _run(workload: WorkloadFigures, fleet: FleetConfig, calls: Mapping[Call, int], work: Work) -> _Run:
    groups, rows = fleet.groups, {call: n for call, n in calls.items() if n}
    if not rows:
        nothing = np.zeros((len(groups), 3))
        return _Run(0, np.zeros(3), nothing, nothing, np.zeros(len(groups)), [0.0] * len(groups))
    shards = sum(-(-n // work.shard_rows) for n in rows.values())
    seconds = np.array([engine_seconds(group, workload, rows, work) for group in groups])
    startup = [group.starts_in(workload) for group in groups]
    found = [_schedule(groups, startup, column, shards, work.shards_at_once) for column in seconds.T]
    return _Run(
        shards,
        np.array([s.wall_s for s in found]) / 3600,
        np.array([s.paid_s for s in found]).T / 3600,
        seconds,
        np.array(found[1].shares) * _tokens(workload, rows)[1][1],
        found[1].repeated,
    )


def _tokens(workload: WorkloadFigures, rows: Mapping[Call, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of prompts and of answers, [3] each."""
    prompt = np.sum([n * workload.kinds[k].prompt_tokens.array for k, n in rows.items()], axis=0)
    return prompt, np.sum([n * workload.kinds[k].output_tokens.array for k, n in rows.items()], axis=0)


def engine_seconds(group: FleetGroup, workload: WorkloadFigures, rows: Mapping[Call, int], work: Work) -> np.ndarray:
    """Time of one engine of the group for all the rows, float64 [3]; fast is low.

    A curve's high end is without the decoder's speed-up, which was measured on another machine; batches larger than any
    it was measured at have none.
    """
    prompt, output = _tokens(workload, rows)
    reading = prompt / group.prefill_tokens_per_s if group.prefill_tokens_per_s else 0
    if group.tokens_per_s:
        return np.asarray(output / group.tokens_per_s + reading)
    if group.curve:
        speed = _curve_speed(group.curve, workload.speed_up if work.decoder else {})
        return np.asarray(output / speed[::-1] + reading)
    seconds = np.sum([n * workload.kinds[k].seconds.array for k, n in rows.items()], axis=0)
    return np.asarray(seconds * (1.0 if work.decoder else workload.plain_factor))


def _source(group: FleetGroup) -> str:
    return "tokens_per_s" if group.tokens_per_s else "curve" if group.curve else "measured run"


def _curve_speed(curve: Sequence[tuple[float, float]], speed_up: Mapping[int, float]) -> np.ndarray:
    """Output tokens a second at the best batch, float64 [3], ascending."""
    bands = sorted(speed_up)
    up = [next((speed_up[band] for band in bands if rows <= band), 1.0) for rows, _ in curve]
    plain = max(rows / seconds for rows, seconds in curve)
    drafted = max(rows / seconds * u for (rows, seconds), u in zip(curve, up, strict=True))
    return np.array([min(plain, drafted), drafted, max(plain, drafted)])


@dataclass(frozen=True)
class _Schedule:
    wall_s: float
    shares: list[float]  # of the work, by group
    repeated: list[float]  # share of a group's time that goes to work lost and done again
    paid_s: list[float]  # by group, of each of its engines


def _schedule(
    groups: Sequence[FleetGroup], startup: Sequence[float], seconds: np.ndarray, shards: int, at_once: int
) -> _Schedule:
    """Hands the shards out one after another to whoever is free, as Ray Data does.

    startup: seconds, by group. seconds: float64 [groups], of one engine of the group for all the work. Each engine
    first waits for its machine and starts. When no shard is left to begin, every engine has half a shard to do in the
    mean, and the last one is done when a shard of the slowest group is. A group that would start later than that gets
    no work.
    """
    shard_s = at_once * seconds / shards  # from a shard's beginning to its end
    provision, rate, idle = (
        np.array([getattr(g, n) for g in groups]) for n in ("provision_s", "preemption_rate_per_hour", "idle_timeout_s")
    )
    delay = np.array(startup) + provision
    repeated = rate / 3600 * (shard_s / 2 + delay)
    if repeated.max() >= 1:
        worst = groups[int(repeated.argmax())]
        raise RecipeError(
            f"group '{worst.name}': at {worst.preemption_rate_per_hour:g} preemptions an hour its engines lose work "
            f"faster than they do it (a shard takes {shard_s[repeated.argmax()]:,.0f} s). Make shard_rows smaller."
        )
    engines = np.array([g.engines for g in groups])
    speed = engines * (1 - repeated) / seconds  # of the whole work a second
    at_work = np.ones(len(groups), dtype=bool)
    while True:
        begun_s = float((1 + (speed * (delay - shard_s / 2))[at_work].sum()) / speed[at_work].sum())
        begun_s = max(begun_s, float(delay.min()))  # when the last shard is begun
        late = at_work & (delay > begun_s)
        if not late.any():
            break
        at_work &= ~late
    wall_s = begun_s + float((shard_s * (1 - 1 / (2 * at_once * engines)))[at_work].max())
    shares = np.where(at_work, speed * (begun_s - delay + shard_s / 2), 0.0)
    # A machine that is being replaced is not paid for until it is there.
    there = (begun_s + shard_s / 2 - provision) * (1 - rate / 3600 * provision)
    paid = np.where(at_work, there + idle, 0.0)
    return _Schedule(wall_s, (shares / shares.sum()).tolist(), repeated.tolist(), paid.tolist())


def _storage(
    workload: WorkloadFigures, rows: Mapping[Call, int], pool_tokens: int, members: int
) -> dict[str, np.ndarray]:
    """GiB by artifact, [3] each, once all is compacted."""
    of = {call: workload.kinds[call] for call in rows}
    found = {"knowledge": sum((rows[k] * of[k].knowledge_bytes.array for k in of), np.zeros(3))}
    if all(figures.vector_bytes is not None for figures in of.values()):
        found["vectors"] = np.full(3, sum(rows[k] * (of[k].vector_bytes or 0.0) for k in of))
    if workload.release_bytes is not None:
        found["release"] = np.full(
            3, sum(rows[k] for k in of) * workload.release_bytes + members * float(_MEMBERSHIP_BYTES)
        )
    if pool_tokens:
        tokens = [np.minimum(rows[k] * of[k].output_tokens.array, pool_tokens) for k in of]
        found["pools"] = sum(tokens, np.zeros(3)) * _POOL_BYTES_A_TOKEN
    return {name: size / 2**30 for name, size in found.items()}


# ------------------------------------------------------------------------------------------------------------- policies
# Three ways to know users and to keep what is known fresh, as numbers of calls of the LLM.
#
# individual: a text for every user and item; who has acted since is asked about anew, with the whole prompt (a prompt
# that stays the same keeps its text, see generation/worker.py). collective: a text for every cohort (REKI), again
# where its members have changed. streaming: texts for every user and item at first, then a rewrite from the new
# behaviours of those whose interests have moved (LIBER).


Policy = Literal["individual", "collective", "streaming"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Horizon(Config):
    """What is planned for: a first full run, and refreshes after it."""

    users: int = Field(0, ge=0)
    items: int = Field(0, ge=0)
    refreshes: int = Field(0, ge=0)
    acting_share: float | None = Field(None, ge=0, le=1)  # of the users, between two refreshes; None = as measured
    calls_per_acting: float | None = Field(None, ge=0, le=1)  # streaming asks about; None = as measured
    cohorts: int | None = Field(None, ge=1)  # None = in proportion to users and items, as in the measured run
    renewed_share: float = Field(1.0, ge=0, le=1)  # of the cohorts, asked about again at a refresh: at worst all

    def acting(self, workload: WorkloadFigures) -> int:
        """Users who act between two refreshes. Raises RecipeError where nobody says how many."""
        share = self.acting_share if self.acting_share is not None else workload.acting_share
        if share is None:
            raise RecipeError(
                "what share of the users acts between two refreshes? Say it (--acting-share 0.02), or run `owlrec "
                "refresh` once on the measured run."
            )
        return round(share * self.users)


def runs_of(policy: Policy, horizon: Horizon, workload: WorkloadFigures) -> Runs:
    """Calls of each sort, of the full run and of each refresh.

    Raises RecipeError where the measured run lacks what the policy needs.
    """
    if policy == "collective":
        cohorts = _cohort_calls(horizon, workload)
        return Runs({"cohort": cohorts}, {"cohort": round(cohorts * horizon.renewed_share)}, horizon.refreshes)
    full: dict[Call, int] = {"user": horizon.users, "item": horizon.items}
    if not horizon.refreshes:
        return Runs(full)
    acting = horizon.acting(workload)
    if policy == "individual":
        return Runs(full, {"user": acting}, horizon.refreshes)
    asked = horizon.calls_per_acting if horizon.calls_per_acting is not None else workload.calls_per_acting
    if asked is None or "refresh" not in workload.kinds:
        raise RecipeError(
            "streaming: the measured run was never refreshed. Run `owlrec refresh` on it once, with some new events."
        )
    return Runs(full, {"refresh": round(acting * asked)}, horizon.refreshes)


def stored_of(policy: Policy, horizon: Horizon, workload: WorkloadFigures) -> tuple[dict[Call, int], int]:
    """Texts that are kept once all is compacted, by sort, and ids that are known by their cohorts alone."""
    if policy == "collective":
        return {"cohort": _cohort_calls(horizon, workload)}, horizon.users + horizon.items
    return {"user": horizon.users, "item": horizon.items}, 0


def _cohort_calls(horizon: Horizon, workload: WorkloadFigures) -> int:
    shares = {"users": workload.cohorts_per_user, "items": workload.cohorts_per_item}
    if "cohort" not in workload.kinds or (horizon.cohorts is None and None in shares.values()):
        raise RecipeError(
            "collective: the measured run asked about no cohorts. Add `cohorts: {}` and `prompts: {mode: both}` to its "
            "recipe and run it again."
        )
    if horizon.cohorts is not None:
        return horizon.cohorts
    return round(horizon.users * (shares["users"] or 0)) + round(horizon.items * (shares["items"] or 0))


# --------------------------------------------------------------------------------------------------------------- levers
# What each way of saving saves: from a plan that does nothing clever down to the one that was asked for.
#
# The ways are pulled one after another, in the order in which they are listed, so that the savings add up to the
# difference; what one saves depends on those before it.


class Lever(Config):
    """One way of saving, pulled after those before it; the first is where all begins."""

    name: str
    calls: int
    gpu_hours: float
    cost: float
    saved: float  # of the cost; below 0 where it costs more


def levers(
    workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, policy: Policy, work: Work
) -> tuple[list[Lever], Plan]:
    """The ways and what they save, expected values, and the plan that they end in.

    Begins with all users and items asked about at every refresh, no drafts, on-demand machines. A way that changes
    nothing is left out. Raises RecipeError as `plan` and `runs_of` do.
    """
    full = runs_of("individual", horizon.model_copy(update={"refreshes": 0}), workload).first
    ours, plain, steady = runs_of(policy, horizon, workload), replace(work, decoder=False), on_demand(fleet)
    steps: list[tuple[str, Runs, Work, FleetConfig]] = [
        ("everything anew each time", Runs(full, full, horizon.refreshes), plain, steady)
    ]
    if policy != "collective" and horizon.refreshes:
        kept = runs_of("individual", horizon, workload)
        steps.append(("texts with the same prompt kept", kept, plain, steady))
    steps += [
        (f"{policy} calls", ours, plain, steady),
        ("retrieval decoder", ours, work, steady),
        ("spot machines", ours, work, fleet),
    ]
    stored, members = stored_of(policy, horizon, workload)
    found: list[Lever] = []
    for number, (name, runs, cut, machines) in enumerate(steps):
        planned = plan(workload, machines, runs, cut, stored=stored, members=members)
        cost = planned.cost.expected
        before = found[-1].cost if found else cost
        if not number or cost != before:
            total = sum(planned.calls.values())
            found.append(
                Lever(name=name, calls=total, gpu_hours=planned.gpu_hours.expected, cost=cost, saved=before - cost)
            )
    return found, planned


def on_demand(fleet: FleetConfig) -> FleetConfig:
    """The fleet as machines that nobody takes away, at the price of such where one is given."""
    groups = [
        group
        if group.on_demand_price_per_gpu_hour is None
        else group.model_copy(
            update={"price_per_gpu_hour": group.on_demand_price_per_gpu_hour, "preemption_rate_per_hour": 0.0}
        )
        for group in fleet.groups
    ]
    return fleet.model_copy(update={"groups": groups})


# ---------------------------------------------------------------------------------------------------------- plan report
# What a plan looks like: tables for a terminal, a waterfall of what saves what, and a check by simulation.


_MOST_SIMULATED = 200_000  # shards, a second or two


@dataclass(frozen=True)
class Report:
    """What was printed, for files."""

    figures: dict[str, Any]
    waterfall: str  # SVG


def report(workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, policy: Policy, work: Work) -> Report:
    """Prints a plan, the policies beside it, what saves what, and how a simulation of it went."""
    ways, planned = levers(workload, fleet, horizon, policy, work)
    note(
        f"{horizon.users:,} users, {horizon.items:,} items, {policy}, {horizon.refreshes:,} refreshes after a full run"
    )
    print_plan(planned, workload)
    policies, lacking = plans_by_policy(workload, fleet, horizon, work)
    print_policies(policies, lacking)
    print_levers(ways)
    note(check_by_simulation(runs_of(policy, horizon, workload).first, workload, fleet, work))
    if planned.shards < (wanted := sum(group.engines for group in planned.groups)):
        warn(f"{planned.shards} shards for {wanted} engines: some would stand idle. Make shard_rows smaller.")
    first_run = stored_of(policy, horizon, workload)[0]
    figures = {
        "shard_plan": {call: plan_shards(call, n, work.shard_rows) for call, n in first_run.items() if n},
        "plan": planned.model_dump(),
        "policies": {name: p.model_dump() for name, p in policies.items()},
        "levers": [way.model_dump() for way in ways],
        "workload": workload.model_dump(),
    }
    return Report(figures, levers_svg(ways))


def plans_by_policy(
    workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, work: Work
) -> tuple[dict[Policy, Plan], dict[Policy, str]]:
    """A plan for each policy, and why there is none for the others."""
    found: dict[Policy, Plan] = {}
    lacking: dict[Policy, str] = {}
    for policy in POLICIES:
        try:
            stored, members = stored_of(policy, horizon, workload)
            runs = runs_of(policy, horizon, workload)
            found[policy] = plan(workload, fleet, runs, work, stored=stored, members=members)
        except RecipeError as error:
            lacking[policy] = str(error)
    return found, lacking


def print_plan(planned: Plan, workload: WorkloadFigures) -> None:
    """Totals, storage and groups, each with its range."""
    totals = {"wall time, h": planned.wall_hours, "GPU-hours": planned.gpu_hours, "cost": planned.cost}
    totals |= {"prompt tokens": planned.prompt_tokens, "output tokens": planned.output_tokens}
    storage = planned.storage_gib | {"cost a month": planned.storage_cost_per_month}
    about: dict[Call, str] = {"refresh": "to renew users"}
    calls = ", ".join(f"{n:,} {about.get(call, f'about {call}s')}" for call, n in planned.calls.items())
    for title, shown in {f"{sum(planned.calls.values()):,} calls: {calls}": totals, "storage, GiB": storage}.items():
        table(
            title, ["estimate", "expected", "low", "high"], [(n, e.expected, e.low, e.high) for n, e in shown.items()]
        )
    columns = ["group", "engines", "tokens/s of one", "speed from", "share", "GPU-hours", "cost"]
    groups = [
        (g.name, g.engines, g.tokens_per_s.expected, g.speed_from, g.work_share, g.gpu_hours.expected, g.cost.expected)
        for g in planned.groups
    ]
    table("groups, expected", columns, groups)
    for g in planned.groups:
        if g.preemptions:
            note(f"{g.name}: {g.preemptions:,.1f} preemptions, which take {g.repeated_share:.1%} of its working time")
    for name in sorted({"vectors", "release"} - planned.storage_gib.keys()):
        note(f"{name}: not estimated, since the measured run wrote none")
    if workload.tokens_per_step is not None:
        up = ", ".join(f"{value:.2f}x up to {n} rows" for n, value in workload.speed_up.items())
        note(f"decoder, as measured: {workload.tokens_per_step:.2f} tokens a row and step; speed-up {up or 'unknown'}")
    note("low and high show the spread between the measured shards, not how rows to come may differ from those")


def print_policies(found: Mapping[Policy, Plan], lacking: Mapping[Policy, str]) -> None:
    """The policies side by side, and what those that cannot be planned lack."""
    columns = ["policy", "calls", "prompt tokens", "output tokens", "GPU-hours", "wall time, h", "cost"]
    rows = [
        (policy, sum(p.calls.values()), *(e.expected for e in
         (p.prompt_tokens, p.output_tokens, p.gpu_hours, p.wall_hours, p.cost)))
        for policy, p in found.items()
    ]  # fmt: skip
    table("policies, expected", columns, rows)
    for reason in lacking.values():
        note(f"not planned: {reason}")


def print_levers(found: Sequence[Lever]) -> None:
    """What each way of saving saves."""
    begin = found[0].cost
    shares = [f"{lever.saved / begin:.1%}" if begin else "" for lever in found]
    rows = [(way.name, way.calls, way.gpu_hours, way.cost, way.saved, s) for way, s in zip(found, shares, strict=True)]
    table("what saves what, expected", ["one after another", "calls", "GPU-hours", "cost", "saved", "of all"], rows)


def levers_svg(found: Sequence[Lever]) -> str:
    """The waterfall of costs, as a file of its own: what all cost, a floating bar per lever, and what is left."""
    first, *rest = found
    left = first.cost - sum(lever.saved for lever in rest)
    labels = [first.name, *(lever.name for lever in rest), "in all"]
    widths = [first.cost, *(-lever.saved for lever in rest), left]
    starts = [0.0, *np.cumsum([first.cost, *(-lever.saved for lever in rest)])[:-1].tolist(), 0.0]

    def plot(axes: Any) -> None:
        colors = [COLORS[3], *(COLORS[2] if lever.saved >= 0 else COLORS[1] for lever in rest), COLORS[0]]
        bars = axes.barh(range(len(labels)), widths, left=starts, color=colors)
        signs = ["", *("-" if lever.saved > 0 else "+" for lever in rest), ""]
        axes.bar_label(bars, [f"{sign}{short_number(abs(w))}" for sign, w in zip(signs, widths, strict=True)])
        axes.set_yticks(range(len(labels)), labels)
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="cost")

    return standalone(draw(plot, 0.3 * len(labels) + 0.7, "waterfall of costs"))


def check_by_simulation(calls: Mapping[Call, int], workload: WorkloadFigures, fleet: FleetConfig, work: Work) -> str:
    """Plays a run once, loss by loss, or as much of it as can be played in a moment; what came out beside the formula,
    in words."""
    shards = sum(-(-n // work.shard_rows) for n in calls.values())
    part = {call: -(-n * min(shards, _MOST_SIMULATED) // shards) for call, n in calls.items()}
    one = plan(workload, fleet, Runs(part), work)
    played = simulate(simulated_groups(one, workload, fleet, work), one.shards, spread=work.shard_rows**-0.5)
    hours = sum(s * g.gpus_per_engine for s, g in zip(played.paid_s, fleet.groups, strict=True)) / 3600
    what = "the full run" if one.shards == shards else f"{one.shards:,} shards of the full run"
    return (
        f"{what} played as a simulation: {played.wall_s / 3600:,.4g} h, {hours:,.4g} GPU-hours, "
        f"{sum(played.losses):,} preemptions "
        f"(formula: {one.wall_hours.expected:,.4g} h, {one.gpu_hours.expected:,.4g} GPU-hours)"
    )


def simulated_groups(planned: Plan, workload: WorkloadFigures, fleet: FleetConfig, work: Work) -> list[SimulatedGroup]:
    """The fleet's groups with the expected time of a shard of the plan; those without a share of it have no engines."""
    workload = fleet.assume.applied(workload)
    return [
        SimulatedGroup(
            engines=group.engines if plan_.work_share else 0,
            shard_s=float(engine_seconds(group, workload, planned.calls, work)[1]) / planned.shards,
            shards_at_once=work.shards_at_once,
            provision_s=group.provision_s,
            startup_s=group.starts_in(workload),
            losses_per_hour=group.preemption_rate_per_hour,
            idle_timeout_s=group.idle_timeout_s,
        )
        for group, plan_ in zip(fleet.groups, planned.groups, strict=True)
    ]


def plan_shards(name: str, n_rows: int, shard_rows: int) -> dict[str, object]:
    """Cuts consecutive ids into shards, as far as that can be done before any real id is there; the sizes."""
    watch = Stopwatch()
    found = shard_sizes(consecutive_ids(n_rows), shard_rows)
    each = "rows a shard: min {:,.0f}, median {:,.0f}, max {:,.0f}".format(*found.spread)
    note(f"shard plan of {name}s: {len(found.rows):,} shards, {each}; computed in {watch.seconds:.1f} s")
    return {"shards": len(found.rows), "rows": found.spread}
