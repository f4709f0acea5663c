"""A generation job: its fingerprint and folder, its shards, and the worker that turns a shard of prompts into texts."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from owlrec.config import Config
from owlrec.decoding import DecodingConfig, request_arguments
from owlrec.decoding.controller import DecoderCounters, add_counters
from owlrec.errors import EngineError, WorkspaceError
from owlrec.generation import EngineConfig, build_engine, engine_fingerprint
from owlrec.generation.engines import (
    BadRow,
    Completion,
    EmptyPrompt,
    Engine,
    EngineStopped,
    FailedQuality,
    RowError,
    SamplingConfig,
)
from owlrec.generation.quality import RULES, Flag, QualityConfig, QualityGate
from owlrec.machine import on_ray
from owlrec.prompting.prompts import (
    Prompt,
    PromptConfig,
    UnusableRow,
    item_prompts,
    prompts_from_table,
    template_fingerprint,
    user_prompts,
)
from owlrec.runner import Result, Stage, Work, WorkerLost, patiently
from owlrec.scenario import Scenario
from owlrec.schema import DEAD_LETTERS, KINDS, KNOWLEDGE, TABLES, Kind, newest
from owlrec.shards import Artifact, Card, Shard, needed_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones, shard_file, table_file

# ------------------------------------------------------------------------------------------------------------------ job
# What a generation run writes: its job, which shards there are, and the texts that it left.
#
# A job's fingerprint covers the meaning of its texts only: scenario and wording, the model and its number formats, how
# tokens are chosen and texts judged. How fast or on what they are written stays out of it, and so does lossless
# drafting.


DECODER = "decoder"  # a card's count: what the decoder counted over the shard, as JSON
# Work queued in an engine beyond what it runs: a shard's last rows must not leave its batch half empty.
SHARDS_IN_FLIGHT = 4
_SHARD_TABLES: dict[Kind, tuple[str, ...]] = {"user": ("users", "histories"), "item": ("items",)}


class GenerateConfig(Config):
    """How many replicas of the engine run and what each may use."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    # None = all cores of a CPU-only machine for vLLM (an engine with fewer runs that much slower), 1 for other
    # engines and on GPUs.
    engine_cpus: float | None = None
    engine_gpus: float = Field(0, ge=0)
    # More dead rows than this share stop the run before it publishes: something is wrong with the prompts or the
    # server.
    max_dead_share: float = Field(0.02, ge=0, le=1)
    price_per_replica_hour: float | None = Field(None, ge=0)  # in any currency: progress then shows the cost so far

    @property
    def most_replicas(self) -> int:
        """How many may run at once."""
        return max(self.min_replicas, self.max_replicas)

    @property
    def hourly_cost(self) -> float | None:
        """Of all replicas together, when as many run as may."""
        price = self.price_per_replica_hour
        return None if price is None else price * self.most_replicas


@dataclass(frozen=True)
class GenerationJob:
    """All that shapes the texts of a generation run. Its fingerprint names the folder that the run writes to."""

    scenario: Scenario
    prompts: PromptConfig
    sampling: SamplingConfig
    decoding: DecodingConfig
    quality: QualityConfig
    fingerprint: str
    # By kind, a folder of prompts that were made before (schema.PROMPTS), by shard: of cohorts, of a refresh.
    ready: Mapping[str, str] = field(default_factory=dict)
    cohorts: str | None = None  # the folder of cohorts whose pools rows draft from; shapes no text

    @property
    def folder(self) -> str:
        """The job's folder in the workspace."""
        return f"knowledge/{self.fingerprint[:16]}"

    def artifact(self, workspace: Workspace) -> Artifact:
        """Its texts and their cards."""
        return Artifact(workspace, self.folder)

    def input_file(self, shard: Shard) -> str:
        """What a shard's prompts are made of, relative to the workspace."""
        if shard.kind in self.ready:
            return f"{self.ready[shard.kind]}/{shard_file(shard.number)}"
        return table_file(TABLES[_kind(shard)], shard.number)

    def count_prompts(self, workspace: Workspace, shard: Shard) -> int:
        """How many prompts a shard has, about: one per item, cohort or history."""
        of_users = shard.kind == "user" and "user" not in self.ready
        return workspace.count_rows(table_file("histories", shard.number) if of_users else self.input_file(shard))


def build_job(
    scenario: Scenario,
    prompts: PromptConfig,
    sampling: SamplingConfig,
    engine: EngineConfig,
    decoding: DecodingConfig | None = None,
    quality: QualityConfig | None = None,
    *,
    ready: Mapping[str, str] | None = None,
    cohorts: str | None = None,
) -> GenerationJob:
    """The job with its fingerprint. ready, cohorts: see GenerationJob."""
    decoding, quality = decoding or DecodingConfig(), quality or QualityConfig()
    rule = decoding.relaxation if decoding.mode == "relaxed" else None
    wording = template_fingerprint(prompts, scenario)
    named = fingerprint(wording, engine_fingerprint(engine), sampling, rule, quality, RULES)
    return GenerationJob(scenario, prompts, sampling, decoding, quality, named, ready or {}, cohorts)


def table_inputs(workspace: Workspace, kinds: Iterable[Kind] = ("user", "item")) -> dict[Shard, str]:
    """The shards of the prepared tables, each with a digest of its files. Raises WorkspaceError where `prepare` has not
    finished.
    """
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    written = {
        path: file.sha256
        for card in Artifact(workspace, "tables").cards().values()
        for path, file in card.files.items()
    }
    updates = Artifact(workspace, ITEM_UPDATES).cards("item")
    inputs = {}
    for kind in kinds:
        for number in range(workspace.n_shards(kind)):
            files = [f"{table}/{shard_file(number)}" for table in _SHARD_TABLES[kind]]
            digests = [written.get(file, prepared.fingerprint) for file in files]
            shard = Shard(kind, number)
            if shard.name in updates:
                digests.append(updates[shard.name].files[shard.file()].sha256)
            inputs[shard] = fingerprint(kind, number, digests)
    return inputs


def prompt_inputs(workspace: Workspace, kind: Kind, folder: str) -> dict[Shard, str]:
    """A shard for each file of ready-made prompts in `folder`, with the digest of its content."""
    numbers = [int(n.removesuffix(".parquet")) for n in workspace.names(folder) if n.endswith(".parquet")]
    return {Shard(kind, n): workspace.digest(f"{folder}/{shard_file(n)}") for n in numbers}


def iterate_knowledge(workspace: Workspace, folder: str, kinds: Iterable[Kind] = KINDS) -> Iterator[pa.Table]:
    """The texts of a job, one shard at a time. folder: the job's. A file without a card is half-done work."""
    artifact = Artifact(workspace, folder)
    for card in artifact.cards(*kinds).values():
        shard = Shard.of_name(card.shard)
        table = workspace.read_parquet(artifact.path(shard.file()))
        yield read_tombstones(workspace).without(table, "id") if shard.kind == "user" else table


def read_knowledge(workspace: Workspace, folder: str, kind: Kind) -> pa.Table:
    """All texts of one kind that a job wrote: for small jobs, and for tests."""
    return pa.concat_tables([KNOWLEDGE.empty_table(), *iterate_knowledge(workspace, folder, (kind,))])


def add_cards(cards: Iterable[Card]) -> dict[str, float | int | str]:
    """Rows and tokens by kind, texts by flag and what the quality gate did, summed over shards."""
    counts: Counter[str] = Counter({f"{kind}_{name}": 0 for kind in KINDS for name in ("rows_out", "rows_dead")})
    for card in cards:
        kind = Shard.of_name(card.shard).kind
        counts.update({f"{kind}_rows_out": card.rows_out, f"{kind}_rows_dead": card.rows_dead})
        for name, n in card.counts.items():
            if not isinstance(n, str):
                counts[name if name.startswith(("flag_", "quality_")) else f"{kind}_{name}"] += n  # type: ignore[assignment]
    return {**counts}


def decoder_counters(cards: Iterable[Card]) -> DecoderCounters | None:
    """What the decoder counted over shards; None where none ran."""
    parts = [DecoderCounters.model_validate_json(str(c.counts[DECODER])) for c in cards if DECODER in c.counts]
    return add_counters(parts) if parts else None


def check_dead_share(artifact: Artifact, cards: Iterable[Card], config: GenerateConfig) -> None:
    """Raises EngineError, with the commonest reasons, where more rows died than `max_dead_share` allows."""
    cards = list(cards)
    dead, rows = sum(card.rows_dead for card in cards), sum(card.rows_in for card in cards)
    if dead <= config.max_dead_share * rows:
        return
    reasons: Counter[tuple[str, str]] = Counter()
    for card in cards:
        if card.rows_dead:
            table = artifact.workspace.read_parquet(artifact.path(dead_file(card.shard)), ["error", "message"])
            reasons.update(zip(table["error"].to_pylist(), table["message"].to_pylist(), strict=True))
    lines = "\n".join(f"  {n} x {error}: {message}" for (error, message), n in reasons.most_common(3))
    raise EngineError(
        f"{dead} of {rows} rows failed, more than generate.max_dead_share {config.max_dead_share:g} allows. "
        f"Commonest reasons:\n{lines}\n"
        f"Fix the cause and run again with --retry-dead, which asks for these rows only, or raise max_dead_share to "
        "go on without them."
    )


def dead_file(shard: str) -> str:
    """The path of a shard's dead letters, relative to the job's folder; absent where no row died."""
    return f"dead/{shard}.parquet"


def _kind(shard: Shard) -> Kind:
    return next(kind for kind in KINDS if kind == shard.kind)


# --------------------------------------------------------------------------------------------------------------- worker
# One shard of texts: read its rows, ask the engine, judge the answers, write texts and dead letters.
#
# Every row of the shard ends in exactly one of the two tables. A text that the quality gate flags is kept with its
# flag, asked for again with other sampling, replaced by a sentence of the row's own facts, or sent to the dead letters,
# as the recipe's `quality.policy` says. Rows whose prompt is what it was keep their text. A prompt that goes on from
# the answer to the one before it (of the same id) waits for that; where it failed the prompt is left out, of both
# tables.


# ------------------------------------------------------------------------------------------------------ decoder metrics
# The decoder's counters as metrics of the Ray cluster, which every node's agent exposes to Prometheus.
#
# vLLM's own speculation metrics leave out steps without drafts; these count every step. Ray prefixes `ray_` and
# appends `_total`: `ray_owlrec_decoder_accepted_total{engine="…"}`.


_COUNTS = {
    "steps": "Steps of the engine",
    "rows": "Rows of all steps",
    "tokens": "Tokens emitted",
    "drafted": "Draft tokens verified",
    "accepted": "Draft tokens accepted",
    "relaxed": "Draft tokens accepted by the relaxed rule alone",
    "unknown_pools": "Pools named by requests that are not there",
    "bad_rules": "Relaxed rules of requests that were refused",
    "retrieval_s": "Seconds spent on retrieval",
    "verification_s": "Seconds spent on verification",
}
_HITS = "hits_"  # and the source that gave the drafts


class DecoderMetrics:
    """One engine's metrics; made inside a Ray worker."""

    def __init__(self, engine: str) -> None:
        """engine: tells engines of a cluster apart."""
        from ray.util.metrics import Counter

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_decoder_{_full(name)}", about, ("engine",)) for name, about in _COUNTS.items()
        }
        self._hits = Counter(
            "owlrec_decoder_hits", "Drafts proposed, by the source that gave them", ("engine", "source")
        )
        self._tags = {"engine": engine}
        self._before: dict[str, float] = {}

    def update(self, counters: DecoderCounters) -> None:
        """Adds what came since the last call."""
        for name, value in counters.counts.items():
            grown = value - self._before.get(name, 0)
            self._before[name] = value
            if grown <= 0:
                continue
            if name.startswith(_HITS):
                self._hits.inc(grown, {**self._tags, "source": name.removeprefix(_HITS)})
            elif name in self._metrics:
                self._metrics[name].inc(grown, self._tags)


def _full(name: str) -> str:
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name


# --------------------------------------------------------------------------------------------------------------- worker


_ASKED_AT_ONCE = 2048  # rows of one shard: more than an engine has in a batch, and far fewer tasks than rows
METADATA = "metadata"  # the framework of a text that no LLM wrote
READY_MADE = {"cohort": "collective", "user": "streaming"}  # frameworks of prompts from a file, unless the recipe's

Row = Prompt | UnusableRow


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt. Token counts include answers that were thrown away."""

    result: Completion | RowError
    flags: tuple[Flag, ...] = ()  # of the text that is kept, or of the one that a fallback replaced
    first_flags: tuple[Flag, ...] = ()
    retries: int = 0
    fallback: str = ""

    @property
    def text(self) -> str | None:
        """What was written, None where nothing was."""
        return None if isinstance(self.result, RowError) else self.fallback or self.result.text

    @property
    def actions(self) -> list[str]:
        """What the quality gate did with the text."""
        happened = {
            "retried": self.retries > 0,
            "fixed": self.retries > 0 and not self.flags,
            "fallen_back": bool(self.fallback),
            "dropped": isinstance(self.result, FailedQuality),
        }
        return [name for name, did in happened.items() if did] if self.first_flags else []


class GenerateStage(Stage):
    """The texts of a job, on one engine a worker."""

    def __init__(self, job: GenerationJob, engine: EngineConfig, name: str = "generate") -> None:
        self.name, self.folder = name, job.folder
        self.job, self.engine_config = job, engine
        self._engine: Engine | None = None
        self._metrics: DecoderMetrics | None = None
        self._counted = DecoderCounters()

    def open(self, workspace: Workspace, worker: str) -> None:
        """See Stage.open."""
        self._catalog = ItemCatalog.load(workspace) if "user" not in self.job.ready else None
        self._engine = build_engine(self.engine_config, self.job.decoding)
        if self._engine.counters is not None and on_ray():
            self._metrics = DecoderMetrics(worker)

    async def run(self, work: Work) -> Result:
        """See Stage.run."""
        assert self._engine is not None
        result = await generate_shard(work, self.job, self._engine, self._catalog)
        return replace(result, counts={**result.counts, **self._decoded()})

    def close(self) -> None:
        """See Stage.close."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _decoded(self) -> dict[str, str]:
        """What the decoder counted since the shard before."""
        assert self._engine is not None
        counters = self._engine.counters
        if counters is None:
            return {}
        if self._metrics is not None:
            self._metrics.update(counters)
        grown, self._counted = counters.since(self._counted), counters
        return {DECODER: grown.model_dump_json()}


async def generate_shard(work: Work, job: GenerationJob, engine: Engine, catalog: ItemCatalog | None) -> Result:
    """Does one shard, wholly.

    A row that asks what the shard's text of it answered before keeps that text, whatever its file was made of; dead
    rows have none and are asked again. catalog: for prompts of users that are not ready-made.
    Raises ShardTaken before anything is written; WorkerLost where the engine is gone.
    """
    workspace, shard = work.workspace, work.shard
    rows = await asyncio.to_thread(read_prompts, workspace, job, shard, engine, catalog)
    if shard.kind == "user" and len(gone := await asyncio.to_thread(read_tombstones, workspace)):
        rows = [row for row, out in zip(rows, gone.among([row.id for row in rows]), strict=True) if not out]
    kept, chains = _keep_unchanged(_earlier_texts(work, job), rows, engine.count_tokens)
    gate, cohorts = QualityGate(job.quality, job.scenario), _cohorts(workspace, job, shard)
    answers: list[list[tuple[Row, Outcome]]] = [[] for _ in chains]
    places = iter(range(len(chains)))

    async def ask() -> None:
        for at in places:
            for row in chains[at]:
                if answers[at] and isinstance(row, Prompt):
                    row = row.after(answers[at][-1][1].text or "", engine.count_tokens)
                outcome = await _author(job, row, engine, gate, cohorts.get(row.id, ()))
                answers[at].append((row, outcome))
                if outcome.text is None:
                    break

    try:
        await asyncio.gather(*(ask() for _ in range(min(_ASKED_AT_ONCE, len(chains)))))
    except EngineStopped as error:
        raise WorkerLost(str(error)) from error
    framework = READY_MADE.get(shard.kind) if shard.kind in job.ready else None
    asked = [pair for chain in answers for pair in chain]
    became = [outcome for _, outcome in asked]
    new, dead = to_tables(job, framework or job.prompts.framework, [row for row, _ in asked], became)
    # In a thread, since a disk or an object store takes its time, in which other shards' rows can be asked for. A write
    # that fails for a moment is tried again by itself: the answers are paid for.
    return await patiently(lambda: asyncio.to_thread(write_shard, work, kept, new, dead, became))


def write_shard(work: Work, kept: pa.Table, new: pa.Table, dead: pa.Table, outcomes: Sequence[Outcome]) -> Result:
    """Writes a shard's texts, ascending by id and as_of, and its dead letters.

    kept: texts that cost nothing this time. outcomes: of the rows of `new` and `dead`.
    """
    work.check()
    workspace, artifact, shard = work.workspace, work.artifact, work.shard
    knowledge = pa.concat_tables([kept, new]).sort_by([("id", "ascending"), ("as_of", "ascending")])
    files = {shard.file(): workspace.write_parquet(artifact.path(shard.file()), knowledge)}
    letters = dead_file(shard.name)
    if dead.num_rows:
        files[letters] = workspace.write_parquet(artifact.path(letters), dead)
    else:
        workspace.delete_file(artifact.path(letters))
    flags: Counter[str] = Counter()
    for names in kept["quality"].to_pylist():
        flags.update(() if names == "ok" else names.split(","))
    actions: Counter[str] = Counter()
    for outcome in outcomes:
        flags.update(outcome.first_flags)
        actions.update(outcome.actions)
    return Result(
        files,
        rows_in=knowledge.num_rows + dead.num_rows,
        rows_out=knowledge.num_rows,
        rows_dead=dead.num_rows,
        counts={
            "rows_asked": new.num_rows + dead.num_rows,
            "prompt_tokens": _total(new, "prompt_tokens"),
            "output_tokens": _total(new, "output_tokens"),
            "accepted": _total(new, "accepted"),
            **{f"flag_{flag}": n for flag, n in flags.items()},
            **{f"quality_{action}": n for action, n in actions.items()},
        },
    )


def read_prompts(
    workspace: Workspace, job: GenerationJob, shard: Shard, engine: Engine, catalog: ItemCatalog | None
) -> list[Row]:
    """The shard's prompts, in table order; "" texts and rows that cannot be read included."""
    if shard.kind in job.ready:
        return list(prompts_from_table(workspace.read_parquet(job.input_file(shard))))
    rows = workspace.read_shard(TABLES[shard.kind], shard.number)  # type: ignore[index]
    if shard.kind == "item":
        return list(item_prompts(rows, job.scenario, job.prompts.framework))
    assert catalog is not None
    histories = workspace.read_shard("histories", shard.number)
    return list(user_prompts(rows, histories, catalog, job.prompts, job.scenario, engine.count_tokens))


def _earlier_texts(work: Work, job: GenerationJob) -> pa.Table:
    """What this job wrote for the shard before, of whatever inputs; no rows where there is nothing that is whole.

    Its card is not asked: a run that was killed between the file and the card must not pay for the texts twice. Pages
    carry checksums, so that a damaged file is seen.
    """
    path = work.artifact.path(work.shard.file())
    if work.workspace.entry(path) is None:
        return KNOWLEDGE.empty_table()
    try:
        table = work.workspace.read_parquet(path)
        table = table.select(KNOWLEDGE.names).cast(KNOWLEDGE)
    except (WorkspaceError, KeyError, pa.ArrowInvalid):
        return KNOWLEDGE.empty_table()
    return table.filter(pc.equal(table["fingerprint"], job.fingerprint))


async def _author(job: GenerationJob, row: Row, engine: Engine, gate: QualityGate, cohorts: Sequence[str]) -> Outcome:
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
        retries, action = 0, gate.action(flags)
        sampling = job.sampling.model_copy(
            update={"temperature": RULES.retry_temperature, "repetition_penalty": RULES.retry_repetition_penalty}
        )
        while action == "retry" and retries < job.quality.max_retries:
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


def _cohorts(workspace: Workspace, job: GenerationJob, shard: Shard) -> dict[int, list[str]]:
    """The cohorts of a shard's rows, by id, where their retrieval pools are of use."""
    path = f"{job.cohorts}/{shard.file()}"
    if job.cohorts is None or job.decoding.mode == "off" or shard.kind in job.ready or not workspace.exists(path):
        return {}
    found: dict[int, list[str]] = {}
    table = newest(workspace.read_parquet(path, ["id", "as_of", "cohort"]))
    for id_, cohort in zip(table["id"].to_pylist(), table["cohort"].to_pylist(), strict=True):
        found.setdefault(id_, []).append(cohort)
    return found


def _drafting(job: GenerationJob, prompt: Prompt, cohorts: Sequence[str]) -> dict[str, Any] | None:
    """Which pools to draft from: its own earlier text, its cohorts' texts, then those of its kind."""
    mode = job.decoding.mode
    if mode == "off":
        return None
    rule = job.decoding.relaxation if mode == "relaxed" else None
    return request_arguments([*cohorts, prompt.kind], prompt.id, mode=mode, relaxation=rule)


def _digest(row: Prompt) -> str:
    return hashlib.sha256(f"{row.system}\x00{row.text}".encode()).hexdigest()


def _keep_unchanged(
    earlier: pa.Table, rows: Sequence[Row], count_tokens: Callable[[str], int]
) -> tuple[pa.Table, list[list[Row]]]:
    """Knowledge for those rows that ask what an earlier text answered, and the rows that are still to be asked: those
    of a chain, each of which goes on from the answer to the one before it, in one list.
    """
    place = {
        key: i for i, key in enumerate(zip(*(earlier[c].to_pylist() for c in ("id", "prompt_sha256")), strict=True))
    }
    found, moments = list[int](), list[int]()
    chains = list[list[Row]]()
    open_, last = False, -1  # whether the row before is still to be asked; else where its text stands
    for row in rows:
        if isinstance(row, Prompt) and row.earlier_tokens:
            if open_:
                chains[-1].append(row)
                continue
            row = row.after(earlier["text"][last].as_py(), count_tokens)
        at = place.get((row.id, _digest(row))) if isinstance(row, Prompt) else None
        open_ = at is None
        if at is None:
            chains.append([row])
        else:
            last = at
            found.append(at)
            moments.append(row.as_of)
    kept = earlier.take(np.array(found, dtype=np.int64))
    as_of = KNOWLEDGE.get_field_index("as_of")
    return kept.set_column(as_of, KNOWLEDGE.field(as_of), pa.array(moments, pa.int64())), chains


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)


def to_tables(
    job: GenerationJob, framework: str, rows: Sequence[Row], outcomes: Sequence[Outcome]
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
        [outcome.text for _, outcome, _ in good],
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
