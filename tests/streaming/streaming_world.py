"""A small published world for refreshes: conftest's 40 users and 30 films, with vectors whose angles are known.

Films 100 to 114 lie in one direction, 115 to 129 in another at a right angle. User u has read films 99+u to 103+u, the
last of them at START + u - 1; user 1 therefore knows the first direction only.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlrec.encoding.coded_vectors import code_vectors
from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.semantic_ids import SemanticIdConfig
from owlrec.generation import EchoEngineConfig
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.job import build_job
from owlrec.prompting.rows import PromptConfig
from owlrec.releases import ReleaseInfo, publish
from owlrec.scenario import get_scenario
from owlrec.schema import INTERACTIONS, KNOWLEDGE, vectors_schema
from owlrec.storage import fingerprint
from owlrec.streaming.asking import job_of_plan
from owlrec.streaming.config import StreamingConfig
from owlrec.streaming.journal import Plan, Position
from owlrec.streaming.planning import make_plan
from owlrec.streaming.settling import finish, publish_delta
from owlrec.workspace import Workspace

START = 1_000_000_000_000  # the histories' as_of; a moment in September 2001
HOUR, DAY = 3_600_000, 86_400_000
MOVIES = get_scenario("movies")
ECHO = EchoEngineConfig(type="echo")
DIM = 4
Row = tuple[int, int, float | None, int]  # user, item, rating, timestamp


def interactions(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * 4
    return pa.table(dict(zip(INTERACTIONS.names, map(list, columns), strict=True)), schema=INTERACTIONS)


def log_events(workspace: Workspace, rows: Sequence[Row], name: str = "one") -> None:
    """Adds a file to the workspace's log."""
    path = Path(workspace.path("events", f"{name}.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(interactions(rows), path)


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
    workspace: Workspace, name: str = "first", without_text: Collection[int] = (), ids: SemanticIdConfig | None = None
) -> str:
    """A full release of the world's users and films, with semantic ids where asked for."""
    users = [u for u in range(1, 41) if u not in without_text]
    items = range(100, 130)
    texts = [
        knowledge(
            "user", {u: f"User {u} likes what is told slowly." for u in users}, {u: START + u - 1 for u in users}
        ),
        knowledge("item", {i: f"Film {i} is slow." for i in items}, dict.fromkeys(items, 0)),
    ]
    of_users = {u: np.full(DIM, u / 64, dtype=np.float32) for u in users}
    tables = {"user": vectors("user", of_users), "item": vectors("item", {i: direction(i) for i in items})}
    coded = {kind: code_vectors(table, ids) for kind, table in tables.items()} if ids else {}
    info = ReleaseInfo(fingerprint=fingerprint(name), model="echo", encoder="minilm")
    return publish(
        workspace,
        knowledge=texts,
        vectors=[coded[kind].table if ids else table for kind, table in tables.items()],
        quantisers={kind: c.quantiser for kind, c in coded.items()},
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
    workspace.write_table("interactions", interactions([*rows, *later]), key="user_id", n_shards=4)


def plan_refresh(
    workspace: Workspace, *, now: int = START + 100 * DAY, shard_rows: int = 100, **config: object
) -> Plan | None:
    """make_plan with a token for each blank-separated word."""
    return make_plan(
        workspace,
        StreamingConfig.model_validate(config),
        MOVIES,
        encoder="minilm",
        shard_rows=shard_rows,
        now=now,
        count_tokens=lambda: lambda text: len(text.split()),
    )


def prompts_of(workspace: Workspace, plan: Plan) -> dict[int, dict[str, object]]:
    """A plan's prompts by user."""
    parts = [workspace.read_parquet(f"{plan.prompts}/{name}") for name in workspace.names(plan.prompts)]
    return {row["id"]: row for part in parts for row in part.to_pylist()}


def carry_out(workspace: Workspace, plan: Plan, failed: Collection[int] = (), partitions: int = 4) -> Position:
    """What the pipeline does with a plan, with an LLM that answers everything but what is asked about `failed`."""
    release, asked = plan.parent, prompts_of(workspace, plan)
    answered = {u: row for u, row in asked.items() if u not in failed}
    if answered:
        texts = {u: f"Renewed text of user {u} as of {row['as_of']}." for u, row in answered.items()}
        table = knowledge("user", texts, {u: row["as_of"] for u, row in answered.items()})
        job = build_job(MOVIES, PromptConfig(), SamplingConfig(), ECHO)
        job = job_of_plan(job, plan)
        release = publish_delta(
            workspace, plan, table, job, engine=ECHO, encoder=EncoderConfig(), partitions=partitions
        )
    return finish(workspace, plan, release, set(answered))


class WordEncoder:
    """In the place of the real encoder: a vector that only the length of the text decides."""

    dimension = DIM

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    def encode(self, texts: Sequence[str], on_batch: object = None) -> np.ndarray:
        return np.array([[len(t) / 128, 0, 0, 1] for t in texts], dtype=np.float32).reshape(len(texts), DIM)
