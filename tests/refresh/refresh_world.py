"""A small published world for refreshes: conftest's 40 users and 30 films, with vectors whose angles are known.

Films 100 to 114 lie in one direction, 115 to 129 in another at a right angle. User u has read films 99+u to 103+u, the
last of them at START + u - 1; user 1 therefore knows the first direction only.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from owlrec.encoding.compression import Quantizer, SemanticIdConfig, code_vectors, train_quantizer
from owlrec.encoding.vectors import EncoderConfig, with_codes
from owlrec.generation.job import GenerateStage
from owlrec.recipe import Recipe
from owlrec.refresh import state
from owlrec.refresh.events import EVENTS
from owlrec.refresh.plan import Moved
from owlrec.refresh.state import RefreshPlan, State, read_state
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.runner import Result, Stage, Work, run_stage
from owlrec.runs.upkeep import Refresh, StopSignals
from owlrec.schema import KNOWLEDGE, vector_matrix, vectors_schema
from owlrec.shards import Card
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import last_behaviors
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

START = 1_000_000_000_000  # the histories' as_of; a moment in September 2001
HOUR, DAY = 3_600_000, 86_400_000
DIM = 4
Row = tuple[int, int, float | None, int]  # user, item, rating, timestamp


def interactions(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * 4
    return pa.table(dict(zip(EVENTS.names, map(list, columns), strict=True)), schema=EVENTS)


def log_events(workspace: Workspace, rows: Sequence[Row], name: str = "one") -> None:
    """Adds a file to the workspace's log."""
    workspace.write_parquet(f"events/{name}.parquet", interactions(rows))


def watched(user: int, items: Sequence[int], start: int = START + DAY, rating: float | None = 4.0) -> list[Row]:
    """A user's events, an hour apart."""
    return [(user, item, rating, start + hour * HOUR) for hour, item in enumerate(items)]


def direction(item: int) -> np.ndarray:
    """An item's vector."""
    return np.eye(DIM, dtype=np.float32)[0 if item < 115 else 1]


def knowledge(kind: str, texts: dict[int, str], as_of: dict[int, int]) -> pa.Table:
    defaults = {f.name: "" if pa.types.is_string(f.type) else 0 for f in KNOWLEDGE}
    rows = [{**defaults, "kind": kind, "id": i, "as_of": as_of[i], "text": text} for i, text in texts.items()]
    return pa.Table.from_pylist([{**row, "framework": "kar", "quality": "ok"} for row in rows], KNOWLEDGE)


def vectors(kind: str, rows: dict[int, np.ndarray]) -> pa.Table:
    values = [v.astype(np.float16) for v in rows.values()]
    columns = {"kind": [kind] * len(rows), "id": list(rows), "vector": values, "codes": [[]] * len(rows)}
    return pa.table(columns, schema=vectors_schema(DIM))


def publish_world(
    workspace: Workspace,
    name: str = "first",
    without_text: Collection[int] = (),
    ids: SemanticIdConfig | None = None,
    history_length: int = 0,
) -> str:
    """A full release of the world's users and films, with semantic ids and behaviors where asked for."""
    users = [u for u in range(1, 41) if u not in without_text]
    items = range(100, 130)
    texts = [
        knowledge(
            "user", {u: f"User {u} likes what is told slowly." for u in users}, {u: START + u - 1 for u in users}
        ),
        knowledge("item", {i: f"Film {i} is slow." for i in items}, dict.fromkeys(items, 0)),
    ]
    user_vectors = {u: np.full(DIM, u / 64, dtype=np.float32) for u in users}
    tables = {"user": vectors("user", user_vectors), "item": vectors("item", {i: direction(i) for i in items})}
    quantizers: dict[str, Quantizer] = {}
    for kind, table in tables.items() if ids else ():
        matrix = vector_matrix(table).astype(np.float32)
        quantizers[kind] = train_quantizer(matrix, ids)
        tables[kind] = with_codes(table, code_vectors(quantizers[kind], table["id"].to_numpy(), matrix))
    info = ReleaseInfo(fingerprint=fingerprint(name), model="echo", encoder="minilm", history_length=history_length)
    behaviors = [last_behaviors(workspace.read_table("interactions"), history_length)] if history_length else []
    return publish(
        workspace,
        knowledge=texts,
        vectors=list(tables.values()),
        behaviors=behaviors,
        quantizers=quantizers or None,
        info=info,
    ).name


def write_interactions(workspace: Workspace, later: Sequence[Row] = ()) -> None:
    """What the tables hold of each user: the five films read, the last at as_of, and `later` ones."""
    histories = workspace.read_table("histories").to_pylist()
    rows = [
        (h["user_id"], item, rating, h["as_of"] - (4 - place) * HOUR)
        for h in histories
        for place, (item, rating) in enumerate(zip(h["items"], h["ratings"], strict=True))
    ]
    rated = with_outcomes(interactions([*rows, *later]), Labels(rule="rating_above", rating_above=3), "interactions")
    workspace.write_table("interactions", rated, key="user_id", n_shards=4)


@dataclass
class Answers(Stage):
    """In the place of the LLM: answers everything but what is asked about `failed`: ids, or (kind, id, as_of)."""

    asked: GenerateStage
    failed: Collection[object]

    name = "refresh"

    def __post_init__(self) -> None:
        self.folder = self.asked.folder

    def run(self, work: Work) -> Result:
        kind = work.shard.kind
        rows = work.workspace.read_parquet(self.asked.job.input_file(work.shard)).to_pylist()
        tables = [KNOWLEDGE.empty_table()]
        for row in rows:
            if row["id"] not in self.failed and (kind, row["id"], row["as_of"]) not in self.failed:
                text = f"Renewed text of {kind} {row['id']} as of {row['as_of']}."
                tables.append(knowledge(kind, {row["id"]: text}, {row["id"]: row["as_of"]}))
        table = pa.concat_tables(tables)
        files = {work.shard.file(): work.workspace.write_parquet(work.artifact.path(work.shard.file()), table)}
        return Result(files, len(rows), len(table), len(rows) - len(table))


class AnsweredRefresh(Refresh):
    """A refresh that needs no engine."""

    failed: Collection[object] = ()

    def _ask(self, moved: Moved, stage: GenerateStage) -> Mapping[str, Card]:
        inputs = {shard: file.sha256 for shard, file in moved.prompts.items()}
        return run_stage(self.workspace, Answers(stage, self.failed), inputs)


@dataclass
class PlannedRefresh:
    """A plan whose users have moved on, and that nobody has asked about yet."""

    refresh: AnsweredRefresh
    base: State
    moved: Moved

    @property
    def plan(self) -> RefreshPlan:
        return self.moved.plan

    @property
    def state(self) -> State:
        return self.moved.state

    @property
    def calls(self) -> int:
        return self.state.calls

    @property
    def counts(self) -> dict[str, int]:
        return self.state.counts


def recipe_for(workspace: Workspace, history_tokens: int = 256, **config: object) -> Recipe:
    """config: of the section `streaming`."""
    values = {"name": "t", "scenario": "movies", "workspace": workspace.root, "engine": {"type": "echo"}}
    prompts = {"history_tokens": history_tokens}
    return Recipe.model_validate(
        {**values, "source": {"type": "movielens-100k"}, "prompts": prompts, "streaming": config}
    )


def plan_refresh(
    workspace: Workspace, *, now: int = START + 100 * DAY, drift: float = state.FREEZE_DRIFT, **config: Any
) -> PlannedRefresh | None:
    """Plans the next refresh; None where there is nothing to do. drift: from which on a short term is frozen."""
    refresh = AnsweredRefresh(recipe_for(workspace, **config), workspace, StopSignals())
    base = read_state(workspace)
    with mock.patch.object(state, "FREEZE_DRIFT", drift):
        plan = refresh.planner.read_log(base, now)
        return plan and PlannedRefresh(refresh, base, refresh.planner.move_on(plan, base))


def partition_prompts(workspace: Workspace, planned: PlannedRefresh) -> list[dict[str, object]]:
    """A plan's prompts about users, in their order."""
    folder = planned.state.prompts
    return [row for name in workspace.names(folder) for row in workspace.read_parquet(f"{folder}/{name}").to_pylist()]


def prompts_of(workspace: Workspace, planned: PlannedRefresh) -> dict[int, dict[str, object]]:
    """The same by user, of whom each has one."""
    rows = partition_prompts(workspace, planned)
    by_user = {row["id"]: row for row in rows}
    assert len(by_user) == len(rows)
    return by_user  # type: ignore[return-value]


def carry_out(workspace: Workspace, planned: PlannedRefresh | None, failed: Collection[object] = ()) -> State:
    """What the pipeline does with a plan, with an LLM that answers everything but what is asked about `failed`."""
    assert planned is not None
    planned.refresh.failed = failed
    return planned.refresh.carry_out(planned.plan, planned.base)


class WordEncoder:
    """In the place of the real encoder: a vector that only the length of the text decides."""

    dimension = DIM

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    def encode(self, texts: Sequence[str], on_batch: object = None) -> np.ndarray:
        return np.array([[len(t) / 128, 0, 0, 1] for t in texts], dtype=np.float32).reshape(len(texts), DIM)
