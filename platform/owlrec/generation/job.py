"""A generation job: its fingerprint and folder, its shards, and the worker that turns a shard of prompts into texts."""

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PositiveInt, field_validator

from owlrec.config import Config
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
from owlrec.ids import KINDS, TABLES, Kind
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
from owlrec.schema import DEAD_LETTERS, KNOWLEDGE, newest
from owlrec.shards import Artifact, Card, Shard, needed_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones, shard_file, table_file
from owlrec_decoding import DecodingConfig, request_arguments
from owlrec_decoding.controller import DecoderCounters, add_counters

# ------------------------------------------------------------------------------------------------------------------ job
# A generation job: its fingerprint, its shards, and its texts.
#
# A job's fingerprint covers only what changes its texts: scenario and wording, the model and its number formats,
# sampling, and quality rules. Speed and hardware settings are not part of it, and neither is lossless drafting.


DECODER = "decoder"  # key of a card's decoder counters, as JSON
# Work queued in an engine beyond its batch, so that a shard's last rows do not leave the batch half empty.
SHARDS_IN_FLIGHT = 4
_SHARD_TABLES: dict[Kind, tuple[str, ...]] = {"user": ("users", "histories"), "item": ("items",)}


class GenerateConfig(Config):
    """Replicas of the engine and the resources of each."""

    replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = 1  # at most; or at least and at most
    # None = all cores of a CPU-only machine for vLLM (its speed scales with them), 1 for other
    # engines and on GPUs.
    engine_cpus: float | None = None
    engine_gpus: float = Field(0, ge=0)
    # A larger share of dead rows stops the run before it publishes: something is wrong with the prompts or the
    # server.
    max_dead_share: float = Field(0.02, ge=0, le=1)
    price_per_replica_hour: float | None = Field(None, ge=0)  # in any currency; progress then shows the cost so far

    @field_validator("replicas")
    @classmethod
    def _ascending(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(replicas, tuple) and replicas[0] > replicas[1]:
            raise ValueError("name the least first")
        return replicas

    @property
    def least_replicas(self) -> int:
        """How many there are from the start to the end."""
        return self.replicas[0] if isinstance(self.replicas, tuple) else 1

    @property
    def most_replicas(self) -> int:
        """Maximum number of running replicas."""
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas

    @property
    def hourly_cost(self) -> float | None:
        """For all replicas together, at the maximum number."""
        price = self.price_per_replica_hour
        return None if price is None else price * self.most_replicas


@dataclass(frozen=True)
class GenerationJob:
    """Everything that determines the texts of a generation run. Its fingerprint names the run's folder."""

    scenario: Scenario
    prompts: PromptConfig
    sampling: SamplingConfig
    decoding: DecodingConfig
    quality: QualityConfig
    fingerprint: str
    # By kind, a folder of ready-made prompts (schema.PROMPTS), by shard: for cohorts and refreshes.
    ready: Mapping[str, str] = field(default_factory=dict)
    cohorts: str | None = None  # cohorts whose texts rows draft from; does not affect texts

    @property
    def folder(self) -> str:
        """The job's folder in the workspace."""
        return f"knowledge/{self.fingerprint[:16]}"

    def artifact(self, workspace: Workspace) -> Artifact:
        """The job's texts and cards."""
        return Artifact(workspace, self.folder)

    def input_file(self, shard: Shard) -> str:
        """Input of a shard's prompts, relative to the workspace."""
        if shard.kind in self.ready:
            return f"{self.ready[shard.kind]}/{shard_file(shard.number)}"
        return table_file(TABLES[_kind(shard)], shard.number)

    def count_prompts(self, workspace: Workspace, shard: Shard) -> int:
        """Approximate number of prompts of a shard: one per item, cohort or history."""
        reads_histories = shard.kind == "user" and "user" not in self.ready
        return workspace.count_rows(
            table_file("histories", shard.number) if reads_histories else self.input_file(shard)
        )


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
    """Shards of the prepared tables, each with a digest of its files. Raises WorkspaceError if `prepare` has not
    finished.
    """
    prepared = needed_stage(workspace, "prepare", "there are no prepared tables")
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
    """One shard per file of ready-made prompts in `folder`, with the digest of its content."""
    numbers = [int(n.removesuffix(".parquet")) for n in workspace.names(folder) if n.endswith(".parquet")]
    return {Shard(kind, n): workspace.digest(f"{folder}/{shard_file(n)}") for n in numbers}


def iterate_knowledge(workspace: Workspace, folder: str, kinds: Iterable[Kind] = KINDS) -> Iterator[pa.Table]:
    """Texts of a job, one shard at a time. folder: the job's. Skips unfinished files, which have no card."""
    artifact = Artifact(workspace, folder)
    for card in artifact.cards(*kinds).values():
        shard = Shard.from_name(card.shard)
        table = workspace.read_parquet(artifact.path(shard.file()))
        yield read_tombstones(workspace).without(table, "id") if shard.kind == "user" else table


def read_knowledge(workspace: Workspace, folder: str, kind: Kind) -> pa.Table:
    """All texts of one kind from a job, for small jobs and for tests."""
    return pa.concat_tables([KNOWLEDGE.empty_table(), *iterate_knowledge(workspace, folder, (kind,))])


def add_cards(cards: Iterable[Card]) -> dict[str, float | int | str]:
    """Sums over shards: rows and tokens by kind, texts by flag, actions of the quality gate."""
    counts: Counter[str] = Counter({f"{kind}_{name}": 0 for kind in KINDS for name in ("rows_out", "rows_dead")})
    for card in cards:
        kind = Shard.from_name(card.shard).kind
        counts.update({f"{kind}_rows_out": card.rows_out, f"{kind}_rows_dead": card.rows_dead})
        for name, n in card.counts.items():
            if not isinstance(n, str):
                counts[name if name.startswith(("flag_", "quality_")) else f"{kind}_{name}"] += n  # type: ignore[assignment]
    return {**counts}


def decoder_counters(cards: Iterable[Card]) -> DecoderCounters | None:
    """Decoder counters summed over shards; None without a decoder."""
    parts = [DecoderCounters.model_validate_json(str(c.counts[DECODER])) for c in cards if DECODER in c.counts]
    return add_counters(parts) if parts else None


def cached_share(cards: Iterable[Card]) -> float:
    """Share of the prompts' tokens that came from the engines' caches; 0 if none did, or the engine does not say."""
    cards = list(cards)
    cached, read = (sum(float(c.counts.get(name, 0)) for c in cards) for name in ("cached_tokens", "prompt_tokens"))
    return cached / read if read else 0.0


def check_dead_share(artifact: Artifact, cards: Iterable[Card], config: GenerateConfig) -> None:
    """Raises EngineError, with the most common reasons, if more rows died than `max_dead_share` allows."""
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
        f"Most common reasons:\n{lines}\nFix the cause and run again with --retry-dead, which retries only "
        "these rows, or raise max_dead_share to continue without them."
    )


def dead_file(shard: str) -> str:
    """Path of a shard's dead letters, relative to the job's folder; missing if no row died."""
    return f"dead/{shard}.parquet"


def _kind(shard: Shard) -> Kind:
    return next(kind for kind in KINDS if kind == shard.kind)


# --------------------------------------------------------------------------------------------------------------- worker
# One shard of texts: reads its rows, calls the engine, checks the answers, writes texts and dead letters.
#
# Every row of the shard ends in exactly one of the two tables. A text flagged by the quality gate is kept with its
# flag, generated again with other sampling, replaced by a sentence of the row's own facts, or moved to the dead
# letters, by the recipe's `quality.policy`. Rows with an unchanged prompt keep their text. A prompt that continues from
# the answer to the previous one (of the same id) waits for it; if that fails, the prompt is left out of both tables.


# ------------------------------------------------------------------------------------------------------ decoder metrics
# The decoder's counters as metrics of the Ray cluster, which every node's agent exports to Prometheus.
#
# vLLM's own speculation metrics leave out steps without drafts; these count every step. Ray prefixes `ray_` and
# appends `_total`: `ray_owlrec_decoder_accepted_total{engine="…"}`.


_COUNTS = {
    "steps": "Engine steps",
    "rows": "Rows in all steps",
    "tokens": "Tokens emitted",
    "drafted": "Draft tokens verified",
    "accepted": "Draft tokens accepted",
    "relaxed": "Draft tokens accepted only by the relaxed rule",
    "unknown_pools": "Missing pools named by requests",
    "refused_pools": "Pools with tokens that the model does not have",
    "bad_rules": "Invalid relaxed rules in requests",
    "retrieval_s": "Seconds spent on retrieval",
    "verification_s": "Seconds spent on verification",
}
_HITS = "hits_"  # followed by the source of the drafts


class DecoderMetrics:
    """One engine's metrics; created inside a Ray worker."""

    def __init__(self, engine: str) -> None:
        """engine: distinguishes engines of a cluster."""
        from ray.util.metrics import Counter

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_decoder_{_full(name)}", about, ("engine",)) for name, about in _COUNTS.items()
        }
        self._hits = Counter("owlrec_decoder_hits", "Drafts proposed, by source", ("engine", "source"))
        self._tags = {"engine": engine}
        self._before: dict[str, float] = {}

    def update(self, counters: DecoderCounters) -> None:
        """Adds the counts since the last call."""
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


_ASKED_AT_ONCE = 2048  # rows of one shard: more than an engine's batch, far fewer than a shard's rows
METADATA = "metadata"  # framework of a text not written by an LLM
READY_MADE = {
    "cohort": "collective",
    "user": "streaming",
}  # default frameworks of ready-made prompts

Row = Prompt | UnusableRow


@dataclass(frozen=True)
class Outcome:
    """Result of one prompt. Token counts include discarded answers."""

    result: Completion | RowError
    flags: tuple[Flag, ...] = ()  # of the kept text, or of the one replaced by a fallback
    first_flags: tuple[Flag, ...] = ()
    retries: int = 0
    fallback: str = ""

    @property
    def text(self) -> str | None:
        """The text, None if there is none."""
        return None if isinstance(self.result, RowError) else self.fallback or self.result.text

    @property
    def actions(self) -> list[str]:
        """Actions of the quality gate on the text."""
        happened = {
            "retried": self.retries > 0,
            "fixed": self.retries > 0 and not self.flags,
            "fallen_back": bool(self.fallback),
            "dropped": isinstance(self.result, FailedQuality),
        }
        return [name for name, did in happened.items() if did] if self.first_flags else []


class EarlierTexts(ABC):
    """Texts that rows are drafted from, for the shards of one engine."""

    @abstractmethod
    def offered(
        self,
        engine: Engine,
        shard: str,
        kind: Kind,
        ids: Sequence[int],
        cohorts: Mapping[int, Sequence[str]],
        own: Mapping[int, str],
    ) -> AbstractAsyncContextManager[Mapping[int, list[str]]]:
        """The names of the pools of each row, by id, which the engine keeps for the block.

        shard: its name. cohorts: names by id. own: the newest texts of some ids.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes what it reads from."""


class GenerateStage(Stage):
    """Texts of a job, with one engine per worker."""

    def __init__(
        self,
        job: GenerationJob,
        engine: EngineConfig,
        name: str = "generate",
        *,
        earlier_texts: Callable[[Workspace, bool], EarlierTexts] | None = None,
    ) -> None:
        """earlier_texts: opens the texts to draft from in a workspace, if the job drafts; the second argument says
        whether to leave out relaxed ones."""
        self.name, self.folder = name, job.folder
        self.job, self.engine_config = job, engine
        self._open_earlier = earlier_texts
        self._engine: Engine | None = None
        self._earlier: EarlierTexts | None = None
        self._metrics: DecoderMetrics | None = None
        self._counted = DecoderCounters()

    def open(self, workspace: Workspace, worker: str) -> None:
        """See Stage.open."""
        self._catalog = ItemCatalog.load(workspace) if "user" not in self.job.ready else None
        self._engine = build_engine(self.engine_config, self.job.decoding)
        if self._open_earlier is not None and self.job.decoding.mode != "off":
            self._earlier = self._open_earlier(workspace, self.job.decoding.mode == "relaxed")
        if self._engine.counters is not None and on_ray():
            self._metrics = DecoderMetrics(worker)

    async def run(self, work: Work) -> Result:
        """See Stage.run."""
        assert self._engine is not None
        result = await generate_shard(work, self.job, self._engine, self._catalog, self._earlier)
        return replace(result, counts={**result.counts, **self._decoded()})

    def close(self) -> None:
        """See Stage.close."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._earlier is not None:
            self._earlier.close()
            self._earlier = None

    def _decoded(self) -> dict[str, str]:
        """Decoder counts since the previous shard."""
        assert self._engine is not None
        counters = self._engine.counters
        if counters is None:
            return {}
        if self._metrics is not None:
            self._metrics.update(counters)
        grown, self._counted = counters.since(self._counted), counters
        return {DECODER: grown.model_dump_json()}


async def generate_shard(
    work: Work,
    job: GenerationJob,
    engine: Engine,
    catalog: ItemCatalog | None,
    earlier_texts: EarlierTexts | None = None,
) -> Result:
    """Generates one complete shard.

    A row whose prompt was already answered keeps that text, whatever its input file; dead
    rows have none and are retried. catalog: for prompts of users that are not ready-made. earlier_texts: to draft from.
    Raises ShardTaken before anything is written, and WorkerLost if the engine is dead.
    """
    workspace, shard = work.workspace, work.shard
    earlier, kept, chains = await asyncio.to_thread(_read_chains, work, job, engine, catalog)
    gate = QualityGate(job.quality, job.scenario)
    answers: list[list[tuple[Row, Outcome]]] = [[] for _ in chains]
    # Prompts that begin alike are asked one after another, while the engine's cache still has what they share.
    places = iter(sorted(range(len(chains)), key=lambda at: _text(chains[at][0])))

    async def ask(pools: Mapping[int, Sequence[str]]) -> None:
        for at in places:
            for row in chains[at]:
                if answers[at] and isinstance(row, Prompt):
                    row = row.after(answers[at][-1][1].text or "", engine.count_tokens)
                outcome = await _author(job, row, engine, gate, pools.get(row.id, ()))
                answers[at].append((row, outcome))
                if outcome.text is None:
                    break

    try:
        async with AsyncExitStack() as offered:
            pools: Mapping[int, Sequence[str]] = {}
            if earlier_texts is not None and chains:
                ids = list(dict.fromkeys(chain[0].id for chain in chains))
                cohorts, own = await asyncio.to_thread(lambda: (_cohorts(workspace, job, shard), _own_texts(earlier)))
                pools = await offered.enter_async_context(
                    earlier_texts.offered(engine, shard.name, _kind(shard), ids, cohorts, own)
                )
            await asyncio.gather(*(ask(pools) for _ in range(min(_ASKED_AT_ONCE, len(chains)))))
    except EngineStopped as error:
        raise WorkerLost(str(error)) from error
    framework = READY_MADE.get(shard.kind) if shard.kind in job.ready else None
    asked = [pair for chain in answers for pair in chain]
    outcomes = [outcome for _, outcome in asked]
    rows = [row for row, _ in asked]
    new, dead = await asyncio.to_thread(to_tables, job, framework or job.prompts.framework, rows, outcomes)
    # In a thread, since a disk or an object store takes time that other shards' rows can use. A write
    # that fails temporarily is retried, because the answers have been paid for.
    return await patiently(lambda: asyncio.to_thread(write_shard, work, kept, new, dead, outcomes))


def write_shard(work: Work, kept: pa.Table, new: pa.Table, dead: pa.Table, outcomes: Sequence[Outcome]) -> Result:
    """Writes a shard's texts, ascending by id and as_of, and its dead letters.

    kept: reused texts. outcomes: of the rows of `new` and `dead`.
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
            "cached_tokens": sum(o.result.cached_tokens for o in outcomes if isinstance(o.result, Completion)),
            **{f"flag_{flag}": n for flag, n in flags.items()},
            **{f"quality_{action}": n for action, n in actions.items()},
        },
    )


def _read_chains(
    work: Work, job: GenerationJob, engine: Engine, catalog: ItemCatalog | None
) -> tuple[pa.Table, pa.Table, list[list[Row]]]:
    """The shard's earlier texts, and what _keep_unchanged makes of them."""
    rows, earlier = (
        read_prompts(work.workspace, job, work.shard, engine.count_tokens, catalog),
        _earlier_texts(work, job),
    )
    return earlier, *_keep_unchanged(earlier, rows, engine.count_tokens)


def read_prompts(
    workspace: Workspace,
    job: GenerationJob,
    shard: Shard,
    count_tokens: Callable[[str], int],
    catalog: ItemCatalog | None,
) -> list[Row]:
    """The shard's prompts without those of forgotten users, in table order, including "" texts and unreadable rows.

    catalog: for prompts of users that are not ready-made.
    """
    rows: list[Row]
    if shard.kind in job.ready:
        rows = list(prompts_from_table(workspace.read_parquet(job.input_file(shard))))
    else:
        table = workspace.read_shard(TABLES[shard.kind], shard.number)  # type: ignore[index]
        if shard.kind == "item":
            return list(item_prompts(table, job.scenario, job.prompts.framework))
        assert catalog is not None
        histories = workspace.read_shard("histories", shard.number)
        rows = list(user_prompts(table, histories, catalog, job.prompts, job.scenario, count_tokens))
    if shard.kind == "user" and len(gone := read_tombstones(workspace)):
        rows = [row for row, out in zip(rows, gone.among([row.id for row in rows]), strict=True) if not out]
    return rows


def sample_prompts(
    workspace: Workspace,
    job: GenerationJob,
    shards: Iterable[Shard],
    n: int,
    seed: int,
    count_tokens: Callable[[str], int],
) -> list[Prompt]:
    """At most `n` prompts of randomly chosen shards, of each kind in proportion to its shards, in the order of asking.

    Without those that have nothing to ask or continue from an answer.
    """
    by_kind: dict[str, list[Shard]] = {}
    for shard in shards:
        by_kind.setdefault(shard.kind, []).append(shard)
    rng, n_shards = np.random.default_rng(seed), sum(map(len, by_kind.values()))
    catalog = ItemCatalog.load(workspace) if "user" in by_kind and "user" not in job.ready else None
    chosen: list[Prompt] = []
    for theirs in by_kind.values():
        wanted = min(n - len(chosen), max(1, round(n * len(theirs) / n_shards)))
        for at in rng.permutation(len(theirs)):
            rows = read_prompts(workspace, job, theirs[at], count_tokens, catalog)
            usable = [row for row in rows if isinstance(row, Prompt) and row.text and not row.earlier_tokens]
            picked = [usable[i] for i in rng.permutation(len(usable))[:wanted]]
            chosen, wanted = chosen + picked, wanted - len(picked)
            if not wanted:
                break
    return sorted(chosen, key=_text)


def _earlier_texts(work: Work, job: GenerationJob) -> pa.Table:
    """Texts that this job wrote for the shard before, from any inputs; no rows if there is no valid file.

    Ignores the card: a run killed between the file and the card must not pay for the texts twice. Pages
    have checksums, so a damaged file is detected.
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


def _own_texts(earlier: pa.Table) -> dict[int, str]:
    """The newest text of each id, without those with relaxed tokens."""
    table = newest(earlier.filter(pc.equal(earlier["relaxed"], 0)))
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


async def _author(job: GenerationJob, row: Row, engine: Engine, gate: QualityGate, pools: Sequence[str]) -> Outcome:
    """Generates one row's text, with as many retries as the gate requires."""
    try:
        if isinstance(row, UnusableRow):
            return Outcome(BadRow(row.message, row.error))
        if not row.text:
            raise EmptyPrompt(f"{row.kind} {row.id} has no title, attribute or behavior for a prompt")
        extra = _drafting(job, row, pools)
        answer = await engine.complete(row.system, row.text, job.sampling, extra)
        first = flags = gate.flags(answer.text, prompt=row.text, finish_reason=answer.finish_reason)
        if not flags:
            return Outcome(answer)
        retries, action = 0, gate.action(flags)
        options = job.sampling.options | {"repetition_penalty": RULES.retry_repetition_penalty}
        sampling = job.sampling.model_copy(update={"temperature": RULES.retry_temperature, "options": options})
        while action == "retry" and retries < RULES.max_retries:
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
    """Cohorts of a shard's rows, by id."""
    path = f"{job.cohorts}/{shard.file()}"
    if job.cohorts is None or shard.kind in job.ready or not workspace.exists(path):
        return {}
    cohorts: dict[int, list[str]] = {}
    table = newest(workspace.read_parquet(path, ["id", "as_of", "cohort"]))
    for id_, cohort in zip(table["id"].to_pylist(), table["cohort"].to_pylist(), strict=True):
        cohorts.setdefault(id_, []).append(cohort)
    return cohorts


def _drafting(job: GenerationJob, prompt: Prompt, pools: Sequence[str]) -> dict[str, Any] | None:
    """What to draft from: the row's own earlier text, then its pools."""
    mode = job.decoding.mode
    if mode == "off":
        return None
    rule = job.decoding.relaxation if mode == "relaxed" else None
    return request_arguments(pools, prompt.id, mode=mode, relaxation=rule)


def _text(row: Row) -> tuple[str, str]:
    return (row.system, row.text) if isinstance(row, Prompt) else ("", "")


def _digest(row: Prompt) -> str:
    return hashlib.sha256(f"{row.system}\x00{row.text}".encode()).hexdigest()


def _keep_unchanged(
    earlier: pa.Table, rows: Sequence[Row], count_tokens: Callable[[str], int]
) -> tuple[pa.Table, list[list[Row]]]:
    """Knowledge for rows whose prompt an earlier text answered, and the remaining rows: those of
    a chain, each of which continues from the answer to the previous one, in one list.
    """
    place = {
        key: i for i, key in enumerate(zip(*(earlier[c].to_pylist() for c in ("id", "prompt_sha256")), strict=True))
    }
    kept_rows, moments = list[int](), list[int]()
    chains = list[list[Row]]()
    open_, last = False, -1  # whether the previous row is pending; otherwise the index of its text
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
            kept_rows.append(at)
            moments.append(row.as_of)
    kept = earlier.take(np.array(kept_rows, dtype=np.int64))
    as_of = KNOWLEDGE.get_field_index("as_of")
    return kept.set_column(as_of, KNOWLEDGE.field(as_of), pa.array(moments, pa.int64())), chains


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)


def to_tables(
    job: GenerationJob, framework: str, rows: Sequence[Row], outcomes: Sequence[Outcome]
) -> tuple[pa.Table, pa.Table]:
    """Knowledge and dead letters from rows and their results.

    Built by column: a dict per row would take as long as everything else here.
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
