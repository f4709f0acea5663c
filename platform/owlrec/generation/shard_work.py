"""One shard of work: read its rows, ask the engine, judge the answers, write knowledge and dead letters, then the
manifest.

Every row of the shard ends in exactly one of the two tables. A text that the quality gate flags is kept with its flag,
asked for again with other sampling, replaced by a sentence of the row's own facts, or sent to the dead letters, as
the recipe's `quality.policy` says. Where the shard's input has changed since the job last wrote it, rows whose prompt
is still the same keep their text.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.decoding import request_arguments
from owlrec.errors import OwlRecError
from owlrec.generation.engine import BadRow, Completion, EmptyPrompt, Engine, FailedQuality, RowError
from owlrec.generation.quality import Flag, QualityGate
from owlrec.generation.shards import Job, Shard, ShardManifest, earlier_texts
from owlrec.prompting.rows import Prompt, UnusableRow, item_prompts, prompts_from_table, user_prompts
from owlrec.schema import DEAD_LETTERS, KNOWLEDGE
from owlrec.shards import Stopwatch
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

METADATA = "metadata"  # the framework of a text that no LLM wrote
READY_MADE = {"cohort": "collective", "user": "streaming"}  # the framework of prompts from a file, by kind


class ShardLost(OwlRecError):
    """Another run has taken the shard over while it was being worked on; nothing was written."""


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt. Token counts include answers that were thrown away."""

    result: Completion | RowError
    flags: tuple[Flag, ...] = ()  # of the text that is kept, or of the one that a fallback replaced
    first_flags: tuple[Flag, ...] = ()
    retries: int = 0
    fallback: str = ""


@dataclass
class Tally:
    """A shard's texts by flag, and what the quality gate did with them."""

    flags: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Counts one row."""
        if not outcome.first_flags:
            return
        self.flags.update(outcome.first_flags)
        counts = {
            "retried": outcome.retries > 0,
            "mended": outcome.retries > 0 and not outcome.flags,
            "fallen_back": bool(outcome.fallback),
            "dropped": isinstance(outcome.result, FailedQuality),
        }
        self.actions.update({name: 1 for name, happened in counts.items() if happened})


async def generate_shard(
    workspace: Workspace,
    job: Job,
    shard: Shard,
    engine: Engine,
    catalog: ItemCatalog,
    *,
    engine_name: str = "",
    retry_dead: ShardManifest | None = None,
    still_mine: Callable[[], bool] = lambda: True,
) -> ShardManifest:
    """Does one shard, wholly.

    retry_dead: the manifest of the finished shard; only its dead rows are asked again, and the others stay as they are.
    still_mine: asked before anything is written. Raises ShardLost where it says no. Any other exception but RowError
    means the engine is gone, and passes through.
    """
    watch = Stopwatch()
    kept, n_unasked = KNOWLEDGE.empty_table(), 0
    if retry_dead is not None:
        kept, n_unasked = workspace.read_parquet(shard.file(job, "knowledge")), retry_dead.rows_kept
        only = set(workspace.read_parquet(shard.file(job, "dead"), ["id"])["id"].to_pylist())
        rows = read_prompts(workspace, job, shard, engine, catalog, only)
    else:
        rows = read_prompts(workspace, job, shard, engine, catalog)
        earlier = earlier_texts(workspace, job, shard)
        if earlier is not None:
            kept, rows = _keep_unchanged(earlier, rows)
            n_unasked = kept.num_rows
    gate, cohorts = QualityGate(job.quality, job.scenario), _cohorts(workspace, job, shard)
    outcomes = await asyncio.gather(*(_author(job, row, engine, gate, cohorts.get(row.id, ())) for row in rows))
    framework = READY_MADE[shard.kind] if shard.prompts else job.prompts.framework
    knowledge, dead = to_tables(job, framework, rows, outcomes)
    knowledge = pa.concat_tables([kept, knowledge])
    tally = Tally(Counter(retry_dead.flags), Counter(retry_dead.actions)) if retry_dead else Tally()
    for outcome in outcomes:
        tally.add(outcome)
    if not still_mine():
        raise ShardLost(f"{shard.kind} shard {shard.part} was taken over by another run")
    seconds = watch.seconds + (retry_dead.seconds if retry_dead else 0)
    # In a thread, since a disk or an object store takes its time, in which other shards' rows can be asked for.
    write = partial(write_shard, workspace, job, shard, knowledge, dead, tally)
    return await asyncio.to_thread(write, seconds=seconds, engine_name=engine_name, n_unasked=n_unasked)


def write_shard(
    workspace: Workspace,
    job: Job,
    shard: Shard,
    knowledge: pa.Table,
    dead: pa.Table,
    tally: Tally,
    *,
    seconds: float,
    engine_name: str,
    n_unasked: int = 0,
) -> ShardManifest:
    """Writes a shard's tables and then the manifest that makes it done.

    n_unasked: how many rows, the first of `knowledge`, cost nothing this time.
    """
    asked = knowledge.slice(n_unasked)
    manifest = ShardManifest(
        shard=shard,
        job_fingerprint=job.fingerprint,
        rows_in=knowledge.num_rows + dead.num_rows,
        rows_out=knowledge.num_rows,
        rows_dead=dead.num_rows,
        rows_kept=n_unasked,
        sha256=workspace.write_parquet(shard.file(job, "knowledge"), knowledge).sha256,
        dead_sha256=workspace.write_parquet(shard.file(job, "dead"), dead).sha256,
        prompt_tokens=_total(asked, "prompt_tokens"),
        output_tokens=_total(asked, "output_tokens"),
        accepted=_total(asked, "accepted"),
        seconds=round(seconds, 3),
        finished=time.time(),
        engine=engine_name,
        flags=dict(tally.flags),
        actions=dict(tally.actions),
    )
    workspace.write_json(shard.file(job, "manifest"), manifest.model_dump())
    return manifest


def read_prompts(
    workspace: Workspace,
    job: Job,
    shard: Shard,
    engine: Engine,
    catalog: ItemCatalog,
    only: Collection[int] | None = None,
) -> list[Prompt | UnusableRow]:
    """The shard's prompts, in table order; "" texts and rows that cannot be read included.

    only: the ids to return, where not all are wanted.
    """
    rows = workspace.read_parquet(shard.input_file)
    prompts: Iterable[Prompt | UnusableRow]
    if shard.prompts:
        prompts = prompts_from_table(rows)
    elif shard.kind == "item":
        prompts = item_prompts(rows, job.scenario, job.prompts.framework)
    else:
        histories = workspace.read_parquet(f"tables/histories/{shard.part}")
        prompts = user_prompts(rows, histories, catalog, job.prompts, job.scenario, engine.count_tokens)
    return [p for p in prompts if only is None or p.id in only]


async def _author(
    job: Job, row: Prompt | UnusableRow, engine: Engine, gate: QualityGate, cohorts: Sequence[str]
) -> Outcome:
    """Asks for one row's text, as often as the gate wants."""
    try:
        if isinstance(row, UnusableRow):
            return Outcome(BadRow(row.message, row.error))
        if not row.text:
            raise EmptyPrompt(f"{row.kind} {row.id} has no title, attribute or behaviour to ask about")
        extra = _drafting(job, row, cohorts)
        answer = await engine.complete(row.system, row.text, job.sampling, extra)
        first = flags = gate.flags(answer.text, prompt=row.text, finish_reason=answer.finish_reason)
        if not flags:
            return Outcome(answer)
        retries, action, quality = 0, gate.action(flags), job.quality
        sampling = job.sampling.model_copy(
            update={"temperature": quality.retry_temperature, "repetition_penalty": quality.retry_repetition_penalty}
        )
        while action == "retry" and retries < quality.max_retries:
            retries += 1
            again = await engine.complete(row.system, row.text, sampling, extra)
            answer = again.after(answer)
            flags = gate.flags(answer.text, prompt=row.text, finish_reason=answer.finish_reason)
            action = gate.action(flags)
    except RowError as error:
        return Outcome(error)
    if action == "drop" or (action in ("retry", "fall_back") and not row.facts):
        names = ", ".join(flags)
        return Outcome(FailedQuality(f"flagged {names}: {answer.text[:120]!r}", retries + 1), flags, first, retries)
    fallback = row.facts if action in ("retry", "fall_back") else ""
    return Outcome(answer, flags, first, retries, fallback)


def _cohorts(workspace: Workspace, job: Job, shard: Shard) -> dict[int, list[str]]:
    """The cohorts of a shard's rows, by id, where their retrieval pools are of use."""
    path = f"{job.cohorts}/{shard.kind}/{shard.part}"
    if job.cohorts is None or job.decoding.mode == "off" or shard.prompts or not workspace.exists(path):
        return {}
    found: dict[int, list[str]] = {}
    table = workspace.read_parquet(path, ["id", "cohort"])
    for id_, cohort in zip(table["id"].to_pylist(), table["cohort"].to_pylist(), strict=True):
        found.setdefault(id_, []).append(cohort)
    return found


def _drafting(job: Job, prompt: Prompt, cohorts: Sequence[str]) -> dict[str, Any] | None:
    """Which pools to draft from: its own earlier text, its cohorts' texts, then those of its kind."""
    mode = job.decoding.mode
    if mode == "off":
        return None
    rule = job.decoding.relaxation if mode == "relaxed" else None
    return request_arguments([*cohorts, prompt.kind], prompt.id, mode=mode, relaxation=rule)


def _digest(row: Prompt) -> str:
    return hashlib.sha256(f"{row.system}\x00{row.text}".encode()).hexdigest()


def _keep_unchanged(
    earlier: pa.Table, rows: Sequence[Prompt | UnusableRow]
) -> tuple[pa.Table, list[Prompt | UnusableRow]]:
    """Knowledge for those rows that ask what an earlier text answered, and the rows that are still to be asked."""
    place = {
        key: i for i, key in enumerate(zip(*(earlier[c].to_pylist() for c in ("id", "prompt_sha256")), strict=True))
    }
    found, moments, asked = [], [], []
    for row in rows:
        at = place.get((row.id, _digest(row))) if isinstance(row, Prompt) else None
        if at is None:
            asked.append(row)
        else:
            found.append(at)
            moments.append(row.as_of)
    kept = earlier.take(np.array(found, dtype=np.int64))
    as_of = KNOWLEDGE.get_field_index("as_of")
    return kept.set_column(as_of, KNOWLEDGE.field(as_of), pa.array(moments, pa.int64())), asked


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)


def to_tables(
    job: Job, framework: str, rows: Sequence[Prompt | UnusableRow], outcomes: Sequence[Outcome]
) -> tuple[pa.Table, pa.Table]:
    """Knowledge and dead letters of rows and what became of them.

    Built by column: a dict a row would take as long as everything else here.
    """
    good, dead = [], []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome.result, RowError):
            error = outcome.result
            stage = "quality" if isinstance(error, FailedQuality) else "generate"
            dead.append((row.kind, row.id, row.as_of, stage, error.name, str(error), error.attempts))
        else:
            assert isinstance(row, Prompt)
            good.append((row, outcome, outcome.result))
    n = len(good)
    columns = [
        [row.kind for row, _, _ in good],
        [row.id for row, _, _ in good],
        [row.as_of for row, _, _ in good],
        [outcome.fallback or answer.text for _, outcome, answer in good],
        [METADATA if outcome.fallback else framework for _, outcome, _ in good],
        [_digest(row) for row, _, _ in good],
        [job.fingerprint] * n,
        [answer.prompt_tokens for _, _, answer in good],
        [answer.output_tokens for _, _, answer in good],
        [answer.finish_reason for _, _, answer in good],
        [",".join(outcome.flags) or "ok" for _, outcome, _ in good],
        [answer.drafted for _, _, answer in good],
        [answer.accepted for _, _, answer in good],
        [answer.relaxed for _, _, answer in good],
    ]
    knowledge = pa.table([pa.array(c, f.type) for c, f in zip(columns, KNOWLEDGE, strict=True)], schema=KNOWLEDGE)
    letters = [pa.array([d[i] for d in dead], f.type) for i, f in enumerate(DEAD_LETTERS)]
    return knowledge, pa.table(letters, schema=DEAD_LETTERS)
