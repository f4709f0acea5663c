"""What a finished run says of the work that a row takes: tokens, bytes and engine time, each with the range that its
shards span.

The range covers the spread between the measured shards (`per_row` says how) and nothing else: that the millions of rows
to come are like those measured is the user's assumption. An engine answers in the order of asking, so that the time
between the ends of two of its shards is what the later one cost, however many it has at hand.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow.fs as pafs
from pydantic import ValidationError

from owlrec.config import Config
from owlrec.decoding.counters import DecoderCounters
from owlrec.errors import WorkspaceError
from owlrec.generation.shards import COUNTERS, KINDS, Kind, ShardManifest
from owlrec.shards import Card, finished_stage
from owlrec.streaming.journal import ROOT as STREAMING
from owlrec.streaming.journal import Plan as RefreshPlan
from owlrec.streaming.journal import read_position
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


def engine_seconds(manifests: Sequence[ShardManifest]) -> np.ndarray:
    """Time of its engine that each shard took, float64 [n shards]; the sum over an engine is the time it was at work.

    That is the time since the engine's shard before it was done, but never more than the shard's own: an interrupted
    run's pause is nobody's.
    """
    found, before = np.zeros(len(manifests)), defaultdict[str, float](lambda: -np.inf)
    for i in sorted(range(len(manifests)), key=lambda i: manifests[i].finished):
        shard = manifests[i]
        found[i] = min(shard.finished - before[shard.engine], shard.seconds)
        before[shard.engine] = shard.finished
    return found


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
    of_kind: dict[Call, list[tuple[ShardManifest, int]]] = {k: _manifests(workspace, f"{folder}/{k}") for k in KINDS}
    run = [shard for shards in of_kind.values() for shard, _ in shards]
    of_kind["refresh"] = _refreshed(workspace, folder, stage.finished)
    every = [(call, shard, size) for call, shards in of_kind.items() for shard, size in shards]
    at_work = engine_seconds([shard for _, shard, _ in every])
    kinds: dict[Call, KindFigures] = {}
    for call in of_kind:
        mine = [(shard, size, t) for (c, shard, size), t in zip(every, at_work, strict=True) if c == call]
        if any(shard.output_tokens for shard, *_ in mine):
            kinds[call] = _figures(mine, _vector_bytes(workspace, "user" if call == "refresh" else call))
    output, seconds = np.array([s.output_tokens for s in run], dtype=np.float64), at_work[: len(run)]
    if not output.any():
        raise WorkspaceError(
            f"{workspace.path(folder)}: the finished run wrote no tokens. Run a small recipe with a real model first."
        )
    file = f"{folder}/{COUNTERS}"
    decoder = DecoderCounters.model_validate(workspace.read_json(file)) if workspace.exists(file) else DecoderCounters()
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


def _figures(found: Sequence[tuple[ShardManifest, int, float]], vector_bytes: float | None) -> KindFigures:
    """Of one kind's shards, with the bytes of their knowledge files and the time of their engines."""
    rows, asked, prompt, output, size, seconds = np.array(
        [(s.rows_in, s.rows_in - s.rows_kept, s.prompt_tokens, s.output_tokens, *more) for s, *more in found],
        dtype=np.float64,
    ).T
    return KindFigures(
        rows=int(rows.sum()),
        shards=len(found),
        prompt_tokens=per_row(prompt, asked),
        output_tokens=per_row(output, asked),
        seconds=per_row(seconds, asked),
        knowledge_bytes=per_row(size, rows),
        vector_bytes=vector_bytes,
    )


def _manifests(workspace: Workspace, folder: str) -> list[tuple[ShardManifest, int]]:
    """Each shard of a kind, with the bytes of its knowledge file."""
    sizes, found = _sizes(workspace, folder), []
    for name in workspace.names(folder):
        if name.startswith("shard-") and name.endswith(".json"):
            try:
                manifest = ShardManifest.model_validate(workspace.read_json(f"{folder}/{name}"))
            except ValidationError:
                raise WorkspaceError(
                    f"{workspace.path(folder, name)} is no shard manifest of this version. Run `generate` again."
                ) from None
            found.append((manifest, sizes.get(f"{name.removesuffix('.json')}.parquet", 0)))
    return found


def _refreshed(workspace: Workspace, folder: str, after: float) -> list[tuple[ShardManifest, int]]:
    """Shards of the refreshes that came after a run: jobs of their own, whose prompts are a refresh's."""
    jobs = (f"knowledge/{name}/user" for name in workspace.names("knowledge") if not folder.endswith(f"/{name}"))
    found = [shard for job in jobs for shard in _manifests(workspace, job)]
    return [(s, size) for s, size in found if s.finished > after and (s.shard.prompts or "").startswith(STREAMING)]


def _startup(stage: Card, shards: Sequence[ShardManifest]) -> float | None:
    if not stage.seconds or stage.counts.get("shards") != stage.counts.get("shards_this_run", 0):
        return None
    first = defaultdict[str, float](lambda: np.inf)
    for shard in shards:
        first[shard.engine] = min(first[shard.engine], shard.finished - shard.seconds)
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
    position, prepared = read_position(workspace), finished_stage(workspace, "prepare")
    if position is None:
        return {}
    file = f"{STREAMING}/plans/{position.state.rpartition('/')[2]}/plan.json"
    plan = RefreshPlan.model_validate(workspace.read_json(file)) if workspace.exists(file) else None
    acting = plan.counts.get("users_with_news", 0) if plan else 0
    if not plan or not acting:
        return {}
    users = float(prepared.counts.get("users", 0)) if prepared else 0.0
    return {"calls_per_acting": plan.calls / acting} | ({"acting_share": acting / users} if users else {})


def _sizes(workspace: Workspace, folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it."""
    base = workspace.path(folder)
    infos = workspace.filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
    return {i.path.removeprefix(base).lstrip("/"): i.size for i in infos if i.is_file}


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
    return sum(n for path, n in sizes.items() if not path.startswith("semantic_ids/")) / rows  # codebooks do not grow
