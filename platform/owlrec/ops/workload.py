"""What a finished run says of the work that a row takes: tokens, bytes and speed, each with the range that its shards
span.

The range covers the spread between the measured shards (`per_row` says how) and nothing else: that the millions of rows
to come are like those measured is the user's assumption.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow.fs as pafs
from pydantic import ValidationError

from owlrec.config import Config
from owlrec.decoding.counters import DecoderCounters
from owlrec.errors import WorkspaceError
from owlrec.generation.shards import COUNTERS, KINDS, Kind, ShardManifest
from owlrec.workspace import StageManifest, Workspace, finished_stage

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
    knowledge_bytes: Estimate
    vector_bytes: float | None  # all that `encode` leaves: fp16 tables and their mapped copies; None before it ran


class WorkloadFigures(Config):
    """What a finished run measured."""

    run: str  # the job's folder in the workspace
    finished: float  # seconds since 1970
    kinds: dict[Kind, KindFigures]
    tokens_per_s: Estimate  # output of one engine, prompts included
    release_bytes: float | None = None  # a row; None before `publish` ran
    tokens_per_step: float | None = None  # of a row; None where no decoder counted
    speed_up: dict[int, float] = {}  # by the decoder, by rows in a step: up to and including the key

    @property
    def measured(self) -> str:
        """How many rows are behind the figures, and of when, in words."""
        rows = " and ".join(f"{figures.rows:,} {kind}s" for kind, figures in self.kinds.items())
        return f"{rows} (finished {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.finished))})"


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


def measured_workload(workspace: Workspace, *, engines: int = 1, in_flight: int = 4) -> WorkloadFigures:
    """Figures of the workspace's finished generation run.

    engines: how many the run used at most. in_flight: shards that each had at hand at a time, at most.
    Raises WorkspaceError where none has finished, or it wrote no tokens.
    """
    stage = finished_stage(workspace, "generate")
    if stage is None:
        raise WorkspaceError(
            f"{workspace.root}: no finished generation run to extrapolate from. Run a small recipe first: some shards "
            "of users and items, with the model and the prompts to plan for."
        )
    folder = stage.outputs["knowledge"]
    shards: list[ShardManifest] = []
    kinds: dict[Kind, KindFigures] = {}
    for kind in KINDS:
        found = _manifests(workspace, f"{folder}/{kind}")
        if any(s.output_tokens for s, _ in found):
            rows, prompt, output, size = np.array(
                [(s.rows_in, s.prompt_tokens, s.output_tokens, size) for s, size in found], dtype=np.float64
            ).T
            kinds[kind] = KindFigures(
                rows=int(rows.sum()),
                shards=len(found),
                prompt_tokens=per_row(prompt, rows),
                output_tokens=per_row(output, rows),
                knowledge_bytes=per_row(size, rows),
                vector_bytes=_vector_bytes(workspace, kind),
            )
            shards += [s for s, _ in found if s.output_tokens and s.seconds > 0]
    if not shards:
        raise WorkspaceError(
            f"{workspace.path(folder)}: the finished run wrote no tokens. Run a small recipe with a real model first."
        )
    file = f"{folder}/{COUNTERS}"
    decoder = DecoderCounters.model_validate(workspace.read_json(file)) if workspace.exists(file) else DecoderCounters()
    return WorkloadFigures(
        run=folder,
        finished=stage.finished,
        kinds=kinds,
        tokens_per_s=_measured_speed(stage, shards, engines, in_flight),
        release_bytes=_release_bytes(workspace),
        tokens_per_step=decoder.tokens_per_step if decoder.counts.get("rows") else None,
        speed_up={rows: steps.speed_up for rows, steps in decoder.by_rows.items() if steps.seconds},
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


def _measured_speed(stage: StageManifest, shards: list[ShardManifest], engines: int, in_flight: int) -> Estimate:
    """Tokens over the shards' seconds, or over the stage's, whichever is more: both fall short of an engine's speed,
    since shards overlap in time and the stage's seconds hold the engine's start.
    """
    tokens, seconds = np.array([(s.output_tokens, s.seconds) for s in shards], dtype=np.float64).T
    at_once = "shards" in stage.counts and stage.counts["shards"] == stage.counts.get("shards_this_run")
    overlap = float(seconds.sum()) / (stage.seconds * engines) if at_once and stage.seconds else 1.0
    return Estimate.of(per_row(tokens, seconds).array * min(max(overlap, 1.0), in_flight))


def _sizes(workspace: Workspace, folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by its path in it."""
    base = workspace.path(folder)
    infos = workspace.filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
    return {i.path.removeprefix(base).lstrip("/"): i.size for i in infos if i.is_file}


def _vector_bytes(workspace: Workspace, kind: Kind) -> float | None:
    encoded = finished_stage(workspace, "encode")
    if encoded is None or not encoded.counts.get(f"knowledge_{kind}"):
        return None
    sizes = _sizes(
        workspace, encoded.outputs["vectors"]
    )  # of files <source>-<kind>.parquet and folders <source>-<kind>
    mine = sum(n for path, n in sizes.items() if path.split("/")[0].removesuffix(".parquet").endswith(f"-{kind}"))
    return mine / float(encoded.counts[f"knowledge_{kind}"])


def _release_bytes(workspace: Workspace) -> float | None:
    published = finished_stage(workspace, "publish")
    rows = sum(int(published.counts.get(f"knowledge_{kind}", 0)) for kind in KINDS) if published else 0
    if not published or not rows:
        return None
    sizes = _sizes(workspace, f"releases/{published.outputs['release']}")
    return sum(n for path, n in sizes.items() if not path.startswith("semantic_ids/")) / rows  # codebooks do not grow
