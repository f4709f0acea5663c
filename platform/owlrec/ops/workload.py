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

from owlrec.config import Config
from owlrec.decoding.counters import DecoderCounters
from owlrec.errors import WorkspaceError
from owlrec.generation.job import decoder_counters
from owlrec.refresh.state import pointer, read_state
from owlrec.schema import KINDS, Kind
from owlrec.shards import Artifact, Card, Shard, finished_stage
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


def engine_seconds(cards: Sequence[Card]) -> np.ndarray:
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
    at_work = engine_seconds([card for _, card in every])
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
