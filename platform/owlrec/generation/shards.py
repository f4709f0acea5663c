"""One shard of work: read its rows, ask the engine, write knowledge and dead letters, then the manifest that says it
is done.

A shard is one part file of the users or items table. Its manifest is written last and atomically, so it is the only
thing a resumed job needs to look at: no manifest means do it (again), a manifest of another input means do it again.
Names are deterministic, so redoing overwrites and never doubles a row.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel

from owlrec.decoding import DecodingConfig, request_arguments
from owlrec.decoding.counters import DecoderCounters, add_counters
from owlrec.errors import WorkspaceError
from owlrec.generation.engine import Completion, EmptyPrompt, Engine, RowError, SamplingConfig
from owlrec.prompting.rows import ItemCatalog, Prompt, PromptConfig, item_prompts, user_prompts
from owlrec.scenario import Scenario
from owlrec.schema import DEAD_LETTERS, KNOWLEDGE
from owlrec.workspace import Stopwatch, Workspace, fingerprint, finished_stage

Kind = Literal["user", "item"]
COUNTERS = "decoder.json"
KINDS: tuple[Kind, ...] = ("user", "item")
_TABLES: dict[Kind, str] = {"user": "users", "item": "items"}


@dataclass(frozen=True)
class Job:
    """All that shapes the texts of a generation run. Its fingerprint names the folder that the run writes to."""

    scenario: Scenario
    prompts: PromptConfig
    sampling: SamplingConfig
    decoding: DecodingConfig
    fingerprint: str

    @property
    def folder(self) -> str:
        """The job's folder in the workspace."""
        return f"knowledge/{self.fingerprint[:16]}"

    @property
    def counters_file(self) -> str:
        """What the decoder counted over the whole job (DecoderCounters), relative to the workspace."""
        return f"{self.folder}/{COUNTERS}"


class Shard(BaseModel):
    """One part of a table, and a digest of the data that it stands for."""

    kind: Kind
    part: str  # file name in the table's folder
    input_fingerprint: str

    @property
    def table(self) -> str:
        """The table that the shard is a part of."""
        return _TABLES[self.kind]

    def file(self, job: Job, what: Literal["knowledge", "dead", "manifest"]) -> str:
        """Path of one of the shard's outputs, relative to the workspace."""
        stem = self.part.removesuffix(".parquet").replace("part", "shard")
        folder = f"{job.folder}/{self.kind}"
        return {
            "knowledge": f"{folder}/{stem}.parquet",
            "dead": f"{folder}/dead/{stem}.parquet",
            "manifest": f"{folder}/{stem}.json",
        }[what]


class ShardManifest(BaseModel):
    """What a finished shard leaves behind. rows_in == rows_out + rows_dead always."""

    shard: Shard
    job_fingerprint: str
    rows_in: int
    rows_out: int
    rows_dead: int
    sha256: str  # of the knowledge file
    prompt_tokens: int
    output_tokens: int
    seconds: float


def plan_shards(workspace: Workspace, kinds: tuple[Kind, ...] = KINDS) -> list[Shard]:
    """All shards of the prepared tables. Raises WorkspaceError where `prepare` has not finished."""
    prepared = finished_stage(workspace, "prepare")
    if prepared is None:
        raise WorkspaceError(
            f"{workspace.root}: the tables are not prepared. Run `prepare` first, with the same recipe."
        )
    return [
        Shard(kind=kind, part=part, input_fingerprint=fingerprint(prepared.fingerprint, kind, part))
        for kind in kinds
        for part in workspace.table_parts(_TABLES[kind])
    ]


def finished_shard(workspace: Workspace, job: Job, shard: Shard) -> ShardManifest | None:
    """The shard's manifest, if it is done for this very input and its knowledge file is there and whole."""
    path = shard.file(job, "manifest")
    if not workspace.exists(path):
        return None
    manifest = ShardManifest.model_validate(workspace.read_json(path))
    if manifest.shard != shard or manifest.job_fingerprint != job.fingerprint:
        return None
    knowledge = shard.file(job, "knowledge")
    if (
        not workspace.exists(knowledge)
        or hashlib.sha256(workspace.read_bytes(knowledge)).hexdigest() != manifest.sha256
    ):
        return None
    return manifest


async def generate_shard(
    workspace: Workspace,
    job: Job,
    shard: Shard,
    engine: Engine,
    catalog: ItemCatalog,
) -> ShardManifest:
    """Does one shard, wholly. Any exception but RowError means the engine is gone, and passes through."""
    watch = Stopwatch()
    prompts = read_prompts(workspace, job, shard, engine, catalog)

    async def ask(prompt: Prompt) -> Completion | RowError:
        try:
            if not prompt.text:
                raise EmptyPrompt(f"{prompt.kind} {prompt.id} has no title, attribute or behaviour to ask about")
            return await engine.complete(prompt.system, prompt.text, job.sampling, _drafting(job, prompt))
        except RowError as error:
            return error

    outcomes = await asyncio.gather(*map(ask, prompts))
    knowledge, dead = _tables(job, prompts, outcomes)
    digest = workspace.write_parquet(shard.file(job, "knowledge"), knowledge)
    workspace.write_parquet(shard.file(job, "dead"), dead)
    manifest = ShardManifest(
        shard=shard,
        job_fingerprint=job.fingerprint,
        rows_in=len(prompts),
        rows_out=knowledge.num_rows,
        rows_dead=dead.num_rows,
        sha256=digest,
        prompt_tokens=sum(knowledge["prompt_tokens"].to_pylist()),
        output_tokens=sum(knowledge["output_tokens"].to_pylist()),
        seconds=watch.seconds,
    )
    workspace.write_json(shard.file(job, "manifest"), manifest.model_dump())
    return manifest


def _drafting(job: Job, prompt: Prompt) -> dict[str, Any] | None:
    """Which pools to draft from: that of the row's kind, in which its own earlier text comes first."""
    mode = job.decoding.mode
    if mode == "off":
        return None
    rule = job.decoding.relaxation if mode == "relaxed" else None
    return request_arguments([prompt.kind], prompt.id, mode=mode, relaxation=rule)


def read_prompts(workspace: Workspace, job: Job, shard: Shard, engine: Engine, catalog: ItemCatalog) -> list[Prompt]:
    """The shard's prompts, in table order; "" texts included."""
    rows = workspace.read_parquet(f"tables/{shard.table}/{shard.part}")
    if shard.kind == "item":
        return list(item_prompts(rows, job.scenario, job.prompts.framework))
    histories = workspace.read_parquet(f"tables/histories/{shard.part}")
    return list(user_prompts(rows, histories, catalog, job.prompts, job.scenario, engine.count_tokens))


def _tables(job: Job, prompts: list[Prompt], outcomes: list[Completion | RowError]) -> tuple[pa.Table, pa.Table]:
    knowledge, dead = [], []
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        row = {"kind": prompt.kind, "id": prompt.id, "as_of": prompt.as_of}
        if isinstance(outcome, RowError):
            error = type(outcome).__name__
            dead.append(
                {**row, "stage": "generate", "error": error, "message": str(outcome), "attempts": outcome.attempts}
            )
            continue
        knowledge.append(
            {
                **row,
                "text": outcome.text,
                "framework": job.prompts.framework,
                "prompt_sha256": hashlib.sha256(f"{prompt.system}\x00{prompt.text}".encode()).hexdigest(),
                "fingerprint": job.fingerprint,
                "prompt_tokens": outcome.prompt_tokens,
                "output_tokens": outcome.output_tokens,
                "finish_reason": outcome.finish_reason,
                "quality": "ok" if outcome.text else "empty",
                "drafted": outcome.drafted,
                "accepted": outcome.accepted,
                "relaxed": outcome.relaxed,
            }
        )
    return pa.Table.from_pylist(knowledge, schema=KNOWLEDGE), pa.Table.from_pylist(dead, schema=DEAD_LETTERS)


def keep_counters(workspace: Workspace, job: Job, counters: DecoderCounters) -> DecoderCounters:
    """Adds what the decoder counted to what earlier, interrupted runs of this job did; returns the sum."""
    if workspace.exists(job.counters_file):
        counters = add_counters([DecoderCounters.model_validate(workspace.read_json(job.counters_file)), counters])
    workspace.write_json(job.counters_file, counters.model_dump())
    return counters


def iterate_knowledge(workspace: Workspace, folder: str, kinds: tuple[Kind, ...] = KINDS) -> Iterator[pa.Table]:
    """The knowledge tables of a finished job, one shard at a time.

    folder: the job's folder, relative to the workspace. Only shards with a manifest count: a file without one is
    half-done work.
    """
    for kind in kinds:
        for name in workspace.names(folder, kind):
            if name.endswith(".json"):
                yield workspace.read_parquet(f"{folder}/{kind}/{name.removesuffix('.json')}.parquet")


def read_knowledge(workspace: Workspace, folder: str, kind: Kind) -> pa.Table:
    """All knowledge of one kind that a finished job wrote."""
    return pa.concat_tables([KNOWLEDGE.empty_table(), *iterate_knowledge(workspace, folder, (kind,))])
