"""The Ray Data job that runs shards on a pool of engines.

Shards, not rows, flow through Ray Data: a shard is read, asked and written inside one engine actor, so the driver
holds nothing but manifests however large the input is, and no order or exactly-once promise of the framework is
relied on. Each actor keeps several shards in flight, so that the engine's batch stays full while one shard's last
rows finish.
"""

import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from owlrec import __version__
from owlrec.config import Config
from owlrec.decoding import DecodingConfig
from owlrec.decoding.counters import DecoderCounters, add_counters
from owlrec.errors import EngineError, OwlRecError
from owlrec.generation import EngineConfig, VllmEngineConfig, build_engine, engine_fingerprint
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.shards import Job, Shard, ShardManifest, generate_shard
from owlrec.ops.decoder_metrics import DecoderMetrics
from owlrec.prompting.rows import ItemCatalog, PromptConfig, template_fingerprint
from owlrec.quiet import redirect_output
from owlrec.scenario import Scenario
from owlrec.workspace import Workspace, fingerprint


class GenerateConfig(Config):
    """How many engines run and what each may use."""

    min_engines: int = Field(1, ge=1)
    max_engines: int = Field(1, ge=1)
    # None = all cores of a CPU-only machine for vLLM (an engine with fewer runs that much slower), 1 for other
    # engines and on GPUs.
    engine_cpus: float | None = None
    engine_gpus: float = Field(0, ge=0)
    # More dead rows than this share stop the run before it publishes: something is wrong with the prompts or the
    # server.
    max_dead_share: float = Field(0.02, ge=0, le=1)


def build_job(
    scenario: Scenario,
    prompts: PromptConfig,
    sampling: SamplingConfig,
    engine: EngineConfig,
    decoding: DecodingConfig | None = None,
) -> Job:
    """The job with its fingerprint: scenario and wording, model and revision, how tokens are chosen, owlrec version.

    Which pools draft is no part of it: a run that publishes must find its own texts again when it is resumed.
    """
    decoding = decoding or DecodingConfig()
    rule = decoding.relaxation if decoding.mode == "relaxed" else None
    wording = template_fingerprint(prompts, scenario)
    print_ = fingerprint(wording, engine_fingerprint(engine), sampling, decoding.mode, rule, __version__)
    return Job(scenario, prompts, sampling, decoding, print_)


class _ShardRunner:
    """The actor: one engine, several shards in flight.

    What a user can mend travels to the driver as a row: raised here, it would arrive under pages of Ray's tracebacks.
    """

    def __init__(self, engine: EngineConfig, workspace: Workspace, job: Job, log_path: str) -> None:
        redirect_output(log_path)
        self.workspace, self.job = workspace, job
        self.catalog = ItemCatalog.load(workspace)
        self.mistake: OwlRecError | None = None
        self.name = uuid.uuid4().hex[:8]
        self.metrics: DecoderMetrics | None = None
        try:
            self.engine = build_engine(engine, job.decoding)
        except OwlRecError as error:
            self.mistake = error

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        for text in batch["shard"]:
            shard = Shard.model_validate_json(str(text))
            try:
                if self.mistake is not None:
                    raise self.mistake
                manifest = await generate_shard(self.workspace, self.job, shard, self.engine, self.catalog)
            except OwlRecError as error:
                yield {"manifest": [""], "mistake": [str(error)], "engine": [self.name], "counters": [""]}
                return
            counters = self._count()
            row = {"manifest": manifest.model_dump_json(), "mistake": "", "engine": self.name, "counters": counters}
            yield {name: [value] for name, value in row.items()}

    def _count(self) -> str:
        if self.engine.counters is None:
            return ""
        if self.metrics is None:
            self.metrics = DecoderMetrics(self.name)
        self.metrics.update(self.engine.counters)
        return self.engine.counters.model_dump_json()


@dataclass(frozen=True)
class Generated:
    """What a call of `generate` did: the manifests of its shards, in any order, and what the decoder counted."""

    manifests: list[ShardManifest]
    counters: DecoderCounters | None


def generate(
    workspace: Workspace,
    job: Job,
    engine: EngineConfig,
    config: GenerateConfig,
    pending: list[Shard],
    on_shard: Callable[[ShardManifest], None] | None = None,
) -> Generated:
    """Runs `pending` shards; `on_shard` hears of each as it is done.

    Ray must be initialised. Raises EngineError where an engine cannot start or dies, or a shard is missing at the
    end; finished shards stay, and the same call with what is still pending goes on from there.
    """
    done: dict[tuple[str, str], ShardManifest] = {}
    counters: dict[str, DecoderCounters] = {}  # by engine, which counts from its start
    with closing(_run(workspace, job, engine, config, pending)) as rows:
        for row in rows:
            manifest = ShardManifest.model_validate_json(row["manifest"])
            done[manifest.shard.kind, manifest.shard.part] = manifest
            if row["counters"]:
                # Shards arrive in any order, so that the latest count of an engine is the largest.
                found, before = DecoderCounters.model_validate_json(row["counters"]), counters.get(row["engine"])
                if before is None or found.counts["steps"] > before.counts["steps"]:
                    counters[row["engine"]] = found
            if on_shard:
                on_shard(manifest)
    missing = [s.part for s in pending if (s.kind, s.part) not in done]
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(pending)} shards did not finish, first {missing[0]}. Run the same command again."
        )
    return Generated(list(done.values()), add_counters(counters.values()) if counters else None)


def check_dead_share(workspace: Workspace, job: Job, manifests: list[ShardManifest], config: GenerateConfig) -> None:
    """Raises EngineError, with the commonest reasons, where more rows died than `max_dead_share` allows."""
    dead, rows = sum(m.rows_dead for m in manifests), sum(m.rows_in for m in manifests)
    if dead <= config.max_dead_share * rows:
        return
    reasons: Counter[tuple[str, str]] = Counter()
    for manifest in manifests:
        if manifest.rows_dead:
            table = workspace.read_parquet(manifest.shard.file(job, "dead"), ["error", "message"])
            reasons.update(zip(table["error"].to_pylist(), table["message"].to_pylist(), strict=True))
    lines = "\n".join(f"  {n} x {error}: {message}" for (error, message), n in reasons.most_common(3))
    raise EngineError(
        f"{dead} of {rows} rows failed, more than generate.max_dead_share {config.max_dead_share:g} allows. "
        f"Commonest reasons:\n{lines}\n"
        f"Mend the cause, delete {workspace.path(job.folder)} and run again, or raise max_dead_share to go on "
        "without them."
    )


def _run(
    workspace: Workspace, job: Job, engine: EngineConfig, config: GenerateConfig, pending: list[Shard]
) -> Generator[dict[str, str], None, None]:
    import ray  # here, since the recipe imports this module's Config and Ray takes a second to import

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A large model may load for longer than the default half hour without a finished shard.
    context.execution_no_progress_timeout_s = 6 * 3600
    shards = [{"shard": s.model_dump_json()} for s in pending]
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        _ShardRunner,
        fn_constructor_args=(engine, workspace, job, str(workspace.log_path("engine"))),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(config.min_engines, len(pending)),
            max_size=config.max_engines,
            max_tasks_in_flight_per_actor=8,
            max_concurrent_calls_per_actor=4,
        ),
        num_cpus=_engine_cpus(engine, config),
        num_gpus=config.engine_gpus or None,
    )
    # An error's traceback keeps the iterator alive, and with it Ray Data's thread, which ends the whole process from
    # native code when it finds Ray shut down: the message would be lost. Closed here, it stops first.
    with closing(iter(dataset.iter_rows())) as rows:
        for row in rows:
            if row["mistake"]:
                raise EngineError(row["mistake"])
            yield row


def _engine_cpus(engine: EngineConfig, config: GenerateConfig) -> float:
    if config.engine_cpus is not None:
        return config.engine_cpus
    if isinstance(engine, VllmEngineConfig) and not config.engine_gpus:
        return float(engine.threads or os.cpu_count() or 1)
    return 1.0
