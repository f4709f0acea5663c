"""What a knowledge generation job would cost on a fleet that is not rented yet, extrapolated from a small finished run.

Tokens and bytes a row come from the run (see workload.py), speeds from the user's own measurements; no figure of any
machine is built in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from owlrec.config import Config
from owlrec.errors import RecipeError, did_you_mean
from owlrec.generation.shards import Kind
from owlrec.ops.workload import Estimate, WorkloadFigures

_POOL_BYTES_A_TOKEN = 9.1


class FleetGroup(Config):
    """Machines of one sort. For engines that run on no GPU, read `gpu` as machine."""

    name: str
    accelerator: str  # free text
    gpus: int = Field(ge=1)
    gpus_per_engine: int = Field(1, ge=1)
    price_per_gpu_hour: float = Field(ge=0)  # in the user's own currency
    # How fast one engine is, in one of three ways: output tokens/s at full batch (without prefill_tokens_per_s if
    # prompts were included); or [rows in a step, its seconds] of plain decoding, which the decoder's measured speed-up
    # multiplies; or neither, which means as fast as an engine of the measured run.
    tokens_per_s: float | None = Field(None, gt=0)
    curve: list[tuple[float, float]] | None = Field(None, min_length=1)
    prefill_tokens_per_s: float | None = Field(None, gt=0)
    preemption_rate_per_hour: float = Field(0, ge=0)  # of one engine
    startup_s: float = Field(0, ge=0)  # until an engine has loaded its model

    @property
    def engines(self) -> int:
        """How many engines the group runs."""
        return self.gpus // self.gpus_per_engine

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


class FleetConfig(Config):
    """The machines to plan for; all groups work on the job together."""

    groups: list[FleetGroup] = Field(min_length=1)
    storage_price_per_gib_month: float = Field(0, ge=0)


def load_fleet(path: str | Path) -> FleetConfig:
    """Reads a fleet file. Raises RecipeError, which lists every mistake with its key."""
    try:
        return FleetConfig.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). cluster/fleet-example.yaml shows one.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is no valid YAML ({' '.join(str(error).split())}).") from None
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {_explain(detail)}" for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    key, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        names = (FleetGroup if len(detail["loc"]) > 1 else FleetConfig).model_fields
        message = f"unknown key.{did_you_mean(str(detail['loc'][-1]), names)}"
    return f"{key}: {message}" if key else message


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

    users: int
    items: int
    shards: int
    prompt_tokens: Estimate
    output_tokens: Estimate
    wall_hours: Estimate
    gpu_hours: Estimate
    cost: Estimate
    groups: list[GroupPlan]
    storage_gib: dict[str, Estimate]  # knowledge; vectors, release and pools where they are known
    storage_cost_per_month: Estimate


def plan(
    workload: WorkloadFigures,
    fleet: FleetConfig,
    *,
    users: int,
    items: int,
    shard_rows: int,
    in_flight: int = 4,
    pool_tokens: int = 0,
) -> Plan:
    """What knowledge for so many users and items takes; low and high push all uncertain figures one way at once.

    in_flight: shards that an engine has at hand at a time, as in GenerateConfig: a preemption loses half of each, on
    average. pool_tokens: bound of the retrieval pool of a kind, 0 for no pools.
    Raises RecipeError where nothing is asked for, a kind was not measured, or preemptions outrun the work.
    """
    asked: dict[Kind, int] = {"user": users, "item": items}
    rows = {kind: n for kind, n in asked.items() if n}
    if not rows or min(rows.values()) < 0 or rows.keys() - workload.kinds.keys():
        raise RecipeError(
            f"{users} users and {items} items cannot be planned from a run that measured "
            f"{workload.measured}. Ask for rows of measured kinds."
        )
    of = {kind: workload.kinds[kind] for kind in rows}
    shards = sum(-(-n // shard_rows) for n in rows.values())
    prompt = np.sum([n * of[k].prompt_tokens.array for k, n in rows.items()], axis=0)
    output = np.sum([n * of[k].output_tokens.array for k, n in rows.items()], axis=0)
    speeds, sources = zip(*(engine_speed(group, workload) for group in fleet.groups), strict=True)
    seconds = np.array(  # [groups, 3], of one engine for all rows; fast is low
        [
            output / speed.array[::-1] + (prompt / group.prefill_tokens_per_s if group.prefill_tokens_per_s else 0)
            for group, speed in zip(fleet.groups, speeds, strict=True)
        ]
    )
    low, expected, high = (_schedule(fleet.groups, column, shards, in_flight) for column in seconds.T)
    wall = np.array([low.wall_s, expected.wall_s, high.wall_s]) / 3600
    groups = []
    for i, group in enumerate(fleet.groups):
        gpu_hours = group.gpus * wall * [s.shares[i] > 0 for s in (low, expected, high)]
        groups.append(
            GroupPlan(
                name=group.name,
                engines=group.engines,
                speed_from=sources[i],
                tokens_per_s=speeds[i],
                work_share=expected.shares[i],
                preemptions=float(gpu_hours[1]) / group.gpus_per_engine * group.preemption_rate_per_hour,
                repeated_share=expected.repeated[i],
                gpu_hours=Estimate.of(gpu_hours),
                cost=Estimate.of(gpu_hours * group.price_per_gpu_hour),
            )
        )
    storage = _storage(workload, rows, pool_tokens)
    return Plan(
        users=users,
        items=items,
        shards=shards,
        prompt_tokens=Estimate.of(prompt),
        output_tokens=Estimate.of(output),
        wall_hours=Estimate.of(wall),
        gpu_hours=Estimate.of(np.sum([g.gpu_hours.array for g in groups], axis=0)),
        cost=Estimate.of(np.sum([g.cost.array for g in groups], axis=0)),
        groups=groups,
        storage_gib={name: Estimate.of(gib) for name, gib in storage.items()},
        storage_cost_per_month=Estimate.of(np.sum(list(storage.values()), axis=0) * fleet.storage_price_per_gib_month),
    )


def engine_speed(group: FleetGroup, workload: WorkloadFigures) -> tuple[Estimate, str]:
    """Output tokens a second of one engine at its best batch, and where the figure is from.

    A curve's low end is without the decoder's speed-up, which was measured on another machine; batches larger than any
    it was measured at have none.
    """
    if group.tokens_per_s:
        return Estimate.of([group.tokens_per_s] * 3), "tokens_per_s"
    if not group.curve:
        return workload.tokens_per_s, "measured run"
    bands = sorted(workload.speed_up)
    up = [next((workload.speed_up[band] for band in bands if rows <= band), 1.0) for rows, _ in group.curve]
    plain = max(rows / seconds for rows, seconds in group.curve)
    drafted = max(rows / seconds * u for (rows, seconds), u in zip(group.curve, up, strict=True))
    return Estimate.of([min(plain, drafted), drafted, max(plain, drafted)]), "curve"


@dataclass(frozen=True)
class _Schedule:
    wall_s: float
    shares: list[float]  # of the work, by group
    repeated: list[float]  # share of a group's time that goes to work lost and done again


def _schedule(groups: Sequence[FleetGroup], seconds: np.ndarray, shards: int, in_flight: int) -> _Schedule:
    """Shares the work out so that all groups end together.

    seconds: float64 [groups], of one engine of the group for all the work. Each engine first starts, and at the end
    waits for the time of one shard; a group that would end later than the others before it did any work gets none.
    """
    shard_s = seconds / shards
    startup, rate = (np.array([getattr(g, n) for g in groups]) for n in ("startup_s", "preemption_rate_per_hour"))
    repeated = rate / 3600 * (in_flight * shard_s / 2 + startup)
    if repeated.max() >= 1:
        worst = groups[int(repeated.argmax())]
        raise RecipeError(
            f"group '{worst.name}': at {worst.preemption_rate_per_hour:g} preemptions an hour its engines lose work "
            f"faster than they do it (a shard takes {shard_s[repeated.argmax()]:,.0f} s). Make shard_rows smaller."
        )
    speed = np.array([g.engines for g in groups]) * (1 - repeated) / seconds  # of the whole work a second
    delay = startup + shard_s
    at_work = np.ones(len(groups), dtype=bool)
    while True:
        wall_s = float((1 + (speed * delay)[at_work].sum()) / speed[at_work].sum())
        late = at_work & (delay >= wall_s)
        if not late.any():
            break
        at_work &= ~late
    shares = np.where(at_work, speed * (wall_s - delay), 0.0)
    return _Schedule(wall_s, shares.tolist(), repeated.tolist())


def _storage(workload: WorkloadFigures, rows: dict[Kind, int], pool_tokens: int) -> dict[str, np.ndarray]:
    """GiB by artifact, [3] each."""
    of = {kind: workload.kinds[kind] for kind in rows}
    found = {"knowledge": np.sum([n * of[k].knowledge_bytes.array for k, n in rows.items()], axis=0)}
    vectors = [(n, of[k].vector_bytes) for k, n in rows.items()]
    if all(size is not None for _, size in vectors):
        found["vectors"] = np.full(3, sum(n * (size or 0.0) for n, size in vectors))
    if workload.release_bytes is not None:
        found["release"] = np.full(3, sum(rows.values()) * workload.release_bytes)
    if pool_tokens:
        tokens = [np.minimum(n * of[k].output_tokens.array, pool_tokens) for k, n in rows.items()]
        found["pools"] = np.sum(tokens, axis=0) * _POOL_BYTES_A_TOKEN
    return {name: size / 2**30 for name, size in found.items()}
