"""What a knowledge generation job would cost on a fleet that is not rented yet, extrapolated from a small finished run.

Tokens, bytes and engine time a row come from the run (see workload.py), speeds of other machines from the user's own
measurements; no figure of any machine is built in. simulation.py plays the same fleet event by event, to check the
formula that stands here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from owlrec.config import Config
from owlrec.errors import RecipeError
from owlrec.ops.fleet import FleetConfig, FleetGroup
from owlrec.ops.workload import Call, Estimate, WorkloadFigures

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
