"""What a generation run writes: its job, which shards there are, and the texts that it left.

A job's fingerprint covers the meaning of its texts only: scenario and wording, the model and its number formats, how
tokens are chosen and texts judged. How fast or on what they are written stays out of it, and so does lossless drafting.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from pydantic import Field

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
