"""The Ray Data job that runs shards on a pool of engines.

Shards, not rows, flow through Ray Data: a shard is claimed, read, asked and written inside one engine actor, so the
driver holds nothing but manifests however large the input is, and no order or exactly-once promise of the framework is
relied on. Each actor keeps several shards in flight, so that the engine's batch stays full while one shard's last
rows finish.
"""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from pydantic import Field

from owlrec import __version__
from owlrec.config import Config
from owlrec.decoding import DecodingConfig
from owlrec.decoding.counters import DecoderCounters, add_counters
from owlrec.errors import EngineError
from owlrec.generation import EngineConfig, VllmEngineConfig, engine_fingerprint
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.ledger import LEASE_S, open_job, unclaimed
from owlrec.generation.quality import QualityConfig
from owlrec.generation.replica import Replica, Run
from owlrec.generation.shards import Job, Shard, ShardManifest, finished_shards
from owlrec.prompting.rows import PromptConfig, template_fingerprint
from owlrec.ray_data import dataset_rows
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

_IDLE_PASSES = 3
_POLL_S = 5.0  # between looks at the shards that other runs are at


class GenerateConfig(Config):
    """How many replicas of the engine run and what each may use."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    # None = all cores of a CPU-only machine for vLLM (an engine with fewer runs that much slower), 1 for other
    # engines and on GPUs.
    engine_cpus: float | None = None
    engine_gpus: float = Field(0, ge=0)
    # Work that an engine has at hand beyond what it runs: a shard's last rows must not leave its batch half empty.
    shards_in_flight: int = Field(4, ge=1)
    # More dead rows than this share stop the run before it publishes: something is wrong with the prompts or the
    # server.
    max_dead_share: float = Field(0.02, ge=0, le=1)
    # How long a shard stays claimed after its engine was last heard of, where nothing else tells that it is gone.
    lease_s: float = Field(LEASE_S, ge=1)
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


def build_job(
    scenario: Scenario,
    prompts: PromptConfig,
    sampling: SamplingConfig,
    engine: EngineConfig,
    decoding: DecodingConfig | None = None,
    quality: QualityConfig | None = None,
) -> Job:
    """The job with its fingerprint: scenario and wording, model and revision, how tokens are chosen and texts judged,
    owlrec version.

    Which pools draft is no part of it: a run that publishes must find its own texts again when it is resumed.
    """
    decoding, quality = decoding or DecodingConfig(), quality or QualityConfig()
    rule = decoding.relaxation if decoding.mode == "relaxed" else None
    wording = template_fingerprint(prompts, scenario)
    print_ = fingerprint(wording, engine_fingerprint(engine), sampling, decoding.mode, rule, quality, __version__)
    return Job(scenario, prompts, sampling, decoding, quality, print_)


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
    pending: Sequence[Shard],
    on_shard: Callable[[ShardManifest], None] | None = None,
    *,
    retry_dead: Sequence[Shard] = (),
) -> Generated:
    """Runs `pending` shards, or waits for those that another run is at; `on_shard` hears of each as it is done.

    retry_dead: finished shards of which only the dead rows are asked for again.
    Ray must be initialised. Raises EngineError where an engine cannot start or keeps dying; finished shards stay, and
    the same call with what is still pending goes on from there.
    """
    open_job(workspace, job)
    log = str(workspace.log_path("engine"))
    run = Run(workspace, job, engine, uuid.uuid4().hex[:12], config.lease_s, log, config.price_per_replica_hour)
    done: dict[tuple[str, str], ShardManifest] = {}
    counters: dict[str, DecoderCounters] = {}  # by engine, which counts from its start

    def finish(manifest: ShardManifest) -> None:
        if manifest.shard.name not in done:
            done[manifest.shard.name] = manifest
            if on_shard:
                on_shard(manifest)

    def run_pass(shards: Sequence[Shard]) -> None:
        with closing(_run_shards(run, config, shards, again)) as rows:
            for row in rows:
                if row["manifest"]:
                    finish(ShardManifest.model_validate_json(row["manifest"]))
                if row["counters"]:
                    # Shards arrive in any order, so that the latest count of an engine is the largest.
                    found, before = DecoderCounters.model_validate_json(row["counters"]), counters.get(row["engine"])
                    if before is None or found.counts["steps"] > before.counts["steps"]:
                        counters[row["engine"]] = found

    left, idle = [*pending, *retry_dead], 0
    again = {s.name for s in retry_dead}
    while left:
        # Engines start only for shards that nobody is at: what another run holds is waited for without them.
        free = unclaimed(workspace, job, left, run.name)
        if free:
            run_pass(free)
            idle = idle + 1 if not any(s.name in done for s in free) else 0
            if idle == _IDLE_PASSES:
                raise EngineError(f"{len(free)} shards do not finish, first {free[0].part}. {run.log_path} says why.")
        left = [s for s in left if s.name not in done]
        if left:
            time.sleep(min(config.lease_s / 4, _POLL_S))
            for manifest in finished_shards(workspace, job, [s for s in left if s.name not in again]):
                finish(manifest)
            left = [s for s in left if s.name not in done]
    return Generated(list(done.values()), add_counters(counters.values()) if counters else None)


def check_dead_share(
    workspace: Workspace, job: Job, manifests: Iterable[ShardManifest], config: GenerateConfig
) -> None:
    """Raises EngineError, with the commonest reasons, where more rows died than `max_dead_share` allows."""
    manifests = list(manifests)
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
        f"Mend the cause and run again with --retry-dead, which asks for these rows only, or raise max_dead_share to "
        "go on without them."
    )


def _run_shards(
    run: Run, config: GenerateConfig, pending: Sequence[Shard], again: Collection[tuple[str, str]]
) -> Generator[dict[str, str], None, None]:
    import ray  # here, since the recipe imports this module's Config and Ray takes a second to import

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    # A large model may load for longer than the default half hour without a finished shard.
    context.execution_no_progress_timeout_s = 6 * 3600
    # On spot machines a replica may well die while it loads; by default the first such death ends the job.
    context.max_consecutive_actor_init_deaths = 3
    shards = [{"shard": s.model_dump_json(), "retry_dead": s.name in again} for s in pending]
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        Replica,
        fn_constructor_args=(run,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(config.min_replicas, len(pending)),
            max_size=config.most_replicas,
            # Ray Data adds an actor where more tasks than 1.75 times what runs at once wait for one.
            max_tasks_in_flight_per_actor=2 * config.shards_in_flight,
            max_concurrent_calls_per_actor=config.shards_in_flight,
        ),
        num_cpus=_engine_cpus(run.engine, config),
        num_gpus=config.engine_gpus or None,
    )
    mistake = ""
    with closing(dataset_rows(dataset)) as rows:
        for row in rows:
            mistake = row["mistake"]
            if mistake:
                break
            yield row
    if mistake:
        raise EngineError(mistake)


def _engine_cpus(engine: EngineConfig, config: GenerateConfig) -> float:
    if config.engine_cpus is not None:
        return config.engine_cpus
    if isinstance(engine, VllmEngineConfig) and not config.engine_gpus:
        return float(engine.threads or os.cpu_count() or 1)
    return 1.0
