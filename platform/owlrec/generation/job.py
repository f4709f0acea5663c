"""A generation job: its fingerprint, its shards, and its texts.

A job's fingerprint covers only what changes its texts: scenario and wording, the model and its number formats,
sampling, and quality rules. Speed and hardware settings are not part of it, and neither is lossless drafting.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from pydantic import Field, PositiveInt, field_validator

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec.generation import EngineConfig, engine_fingerprint
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.quality import RULES, QualityConfig
from owlrec.ids import KINDS, TABLES, Kind
from owlrec.prompting.rows import PromptConfig, template_fingerprint
from owlrec.scenario import Scenario
from owlrec.schema import KNOWLEDGE
from owlrec.shards import Artifact, Card, Shard, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones, shard_file, table_file
from owlrec_decoding import DecodingConfig
from owlrec_decoding.controller import DecoderCounters, add_counters

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
    cohorts: str | None = None  # cohorts whose pools rows draft from; does not affect texts

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
