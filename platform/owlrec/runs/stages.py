"""The stages of a batch (prepare, cohorts, generate, encode, publish), and what all stages share."""

import importlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

import owlrec
from owlrec.cohorts.building import build_cohorts
from owlrec.cohorts.clustering import ITERATIONS
from owlrec.cohorts.cohort_model import POINTER, CohortSettings, previous_folder
from owlrec.ctr.features import carried_columns
from owlrec.ctr.knowledge_tables import DISLIKED, WRITTEN, arm_parts
from owlrec.encoding.compression import CODING
from owlrec.encoding.inputs import (
    ColumnTexts,
    Input,
    ItemMetadata,
    KnowledgeTexts,
    Members,
    UserMetadata,
    WithImported,
    imported_vectors,
)
from owlrec.encoding.stage import EncodingJob
from owlrec.encoding.vectors import read_quantizers
from owlrec.errors import RecipeError, SourceError, WorkspaceError, did_you_mean
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.generation.job import (
    SHARDS_IN_FLIGHT,
    GenerateConfig,
    GenerateStage,
    GenerationJob,
    add_cards,
    build_job,
    cached_share,
    check_dead_share,
    decoder_counters,
    prompt_inputs,
    sample_prompts,
    table_inputs,
)
from owlrec.generation.vllm_engine import WARM_UP, EngineSetting, MeasuredSetting, measure_setting, on_cpu, sweep
from owlrec.ids import KINDS, TABLES, Kind
from owlrec.machine import native_errors_to
from owlrec.ops.console import ShardWatch, note, progress, stage_header, warn
from owlrec.prompting.prompts import cohort_prompts, collective_fingerprint, prompts_table
from owlrec.recipe import Recipe
from owlrec.releases.build import PART_IDS, ReleaseInfo, ShardRows, publish_rows
from owlrec.releases.earlier_texts import ReleasedTexts
from owlrec.releases.release import current_release
from owlrec.runner import Pool, Stage, pending_shards, run_stage
from owlrec.runs import STAGES
from owlrec.scenario import Scenario
from owlrec.shards import Card, Shard, Stopwatch, claimed, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.sources.outcomes import Labels
from owlrec.sources.preparation import TABLES as TABLES_FOLDER
from owlrec.sources.preparation import USER_TABLES, Preparation
from owlrec.sources.splits import SPLITS
from owlrec.storage import Pointer, fingerprint
from owlrec.workspace import Workspace, shards_for, table_file

# ---------------------------------------------------------------------------------------------------------------- stage
# Shared parts of all stages: their order, skipping finished work, cards, and the Ray session.


_MODULES = dict.fromkeys(STAGES, "stages") | {
    **dict.fromkeys(("train_ctr", "evaluate", "export_ctr", "sweep_ctr"), "models"),
    **dict.fromkeys(("tune_ranker", "score_pairs"), "models"),
}

Counts = dict[str, float | int | str]
Outputs = dict[str, str]
StageFunction = Callable[..., Card]  # takes a recipe, its workspace and the stage's own options

# Ray reads these on import. Its own bars and per-worker logs would drown the run's.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # any `uv run` ancestor would otherwise start workers through uv
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_worker_niceness": "0",  # for a local cluster, whose workers are the run itself
    # One idle worker per core at the start could not be used: it lacks the PYTHONPATH of `_runtime_env`.
    "RAY_prestart_worker_first_driver": "0",
}
_OBJECT_STORE_BYTES = 256 << 20  # for a local cluster: blocks carry cards, not data
_SOURCE_ROOT = Path(owlrec.__file__).resolve().parent.parent


def stage_function(name: str) -> StageFunction:
    """Function of a stage. Imports its module, which for CTR models imports torch."""
    stage: StageFunction = getattr(importlib.import_module(f"owlrec.runs.{_MODULES[name]}"), name)
    return stage


def from_stage(stage: str) -> tuple[str, ...]:
    """`stage` and all later ones; a stage outside `owlrec run` by itself."""
    return STAGES[STAGES.index(stage) :] if stage in STAGES else (stage,)


def chosen_stages(first: str = STAGES[0], last: str = STAGES[-1]) -> tuple[str, ...]:
    """Stages from `first` to `last`. Raises RecipeError for an unknown name or the wrong
    order.
    """
    for name in (first, last):
        if name not in STAGES:
            raise RecipeError(f"there is no stage '{name}'.{did_you_mean(name, STAGES)}")
    chosen = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not chosen:
        raise RecipeError(f"stage {first} comes after {last}. The order is {', '.join(STAGES)}.")
    return chosen


def run_stages(recipe: Recipe, stages: Sequence[str], *, retry_dead: bool = False) -> dict[str, Card]:
    """Runs stages one after another, skipping finished ones; returns their cards. retry_dead: for `generate`."""
    workspace = open_workspace(recipe)
    switches = {"generate": {"retry_dead": retry_dead}}
    return {name: stage_function(name)(recipe, workspace, **switches.get(name, {})) for name in stages}


def open_workspace(recipe: Recipe) -> Workspace:
    """The recipe's workspace, checked to be writable."""
    workspace = Workspace(recipe.workspace)
    workspace.check_writable()
    return workspace


def execute(
    workspace: Workspace,
    stage: str,
    fingerprint: str,
    about: str,
    body: Callable[[], tuple[Counts, Outputs]],
    *,
    always: bool = False,
) -> Card:
    """Runs `body` and records its result; unless `always`, skips a stage that has finished with this
    fingerprint.
    """
    stage_header(stage, about)
    done = None if always else finished_stage(workspace, stage, fingerprint)
    if done is not None:
        note("already done")
        return done
    forget_stages(workspace, from_stage(stage))
    watch = Stopwatch()
    counts, outputs = body()
    return finish_stage(workspace, stage, fingerprint, counts=counts, outputs=outputs, seconds=watch.seconds)


def local_cpus(cluster: str) -> int | None:
    """The logical CPUs that `local[4]` names; None for other clusters."""
    given = re.fullmatch(r"local\[(\d+)\]", cluster)
    return int(given[1]) if given else None


@contextmanager
def ray_session(cluster: str, log_path: Path) -> Iterator[None]:
    """Connects to Ray for the block: to the job's own cluster inside `ray job submit`, otherwise to the recipe's.
    Stops a local cluster after the block. Joins an open session.

    cluster: as a recipe's `ray`. log_path: a file for the output of Ray's own native code.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    options: dict[str, Any] = {"address": "auto" if in_job else cluster}
    if not in_job and cluster.startswith("local"):
        os.environ.pop("RAY_ADDRESS", None)  # "local" must never join a cluster named by the shell
        # Token authentication would write ~/.ray/auth_token for a cluster that only this process can reach.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {
            "address": "local",
            "num_cpus": local_cpus(cluster) or os.cpu_count(),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    with native_errors_to(log_path):
        ray.init(**options, log_to_driver=False, logging_level="ERROR", runtime_env=_runtime_env(in_job))
        _quiet_ray_data()
        try:
            yield
        finally:
            ray.shutdown()


def _runtime_env(in_job: bool) -> dict[str, Any]:
    """Workers unpickle owlrec's classes by name, so they need it on their path before any of our code runs."""
    if _SOURCE_ROOT.name != "platform":  # an installed wheel
        return {}
    if in_job and _SOURCE_ROOT.name in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return {}  # `owlrec submit` sets it for the job; Ray refuses the same variable twice
    # In a job the working directory has a different path on each node; a relative entry resolves to it, because workers
    # start there.
    root = _SOURCE_ROOT.name if in_job else str(_SOURCE_ROOT)
    roots = [root] if in_job else [root, str(_SOURCE_ROOT.parent)]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(roots)}}


def _quiet_ray_data() -> None:
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---------------------------------------------------------------------------------------------------------------- batch
# The stages of a batch, from raw data to a release: prepare, cohorts, generate, encode, publish.


PREPARED_HERE = 3_000_000  # up to this many interactions in this process, in about ten seconds


def prepare(recipe: Recipe, workspace: Workspace) -> Card:
    """Reads the source, builds samples and histories, writes five tables. The card's fingerprint covers their content.

    Raises SourceError or SchemaError with file and row if the source breaks the contract: the tables of an
    earlier run then stay. Raises WorkspaceError if another `prepare` is running in this workspace.
    """
    stage_header("prepare", f"{recipe.source.type} to tables")
    source = recipe.source.open()
    tasks = recipe.ctr.task_labels
    source.carry(tuple(dict.fromkeys([*carried_columns(recipe.features), *tasks])))
    labels = Labels.of(recipe.labels, source.outcomes, recipe.scenario.positive_above)
    labels = labels.model_copy(update={"tasks": tasks})
    preparation = Preparation(workspace, source, recipe.split, labels, recipe.shard_rows)
    made_of = preparation.made_of
    done = finished_stage(workspace, "prepare")
    if done is not None and done.counts.get("made_of") == made_of and preparation.whole:
        note("already done")
        return done
    watch = Stopwatch()
    with claimed(workspace, "claims/prepare", "prepare"), ExitStack() as session:
        if preparation.rows > PREPARED_HERE:
            session.enter_context(ray_session(recipe.ray, workspace.log_path("ray")))
        log = str(workspace.log_path("prepare"))

        def make(stage: Stage, inputs: Mapping[Shard, str], about: str, rows: int) -> dict[str, Card]:
            if rows <= PREPARED_HERE:
                return run_stage(workspace, stage, inputs)
            pool = Pool(here=False, max_workers=len(inputs), log_path=log)
            with progress(about, None) as advance:
                return run_stage(workspace, stage, inputs, pool, on_card=lambda card: advance(card.rows_in))

        made, content = preparation.run(make, lambda: forget_stages(workspace, from_stage("prepare")))
        items, users = made.pop("items"), made.pop("all_users")
        note(f"{users:,} users, {items:,} items, {made['interactions']:,} interactions")
        note(", ".join(f"{made[f'samples_{s}']:,} {s} samples" for s in SPLITS) + f"; {labels.about}")
        counts: Counts = {"items": items, **made, "made_of": made_of, "labels": labels.model_dump_json()}
        outputs = {name: f"{TABLES_FOLDER}/{name}" for name in ("items", *USER_TABLES)}
        card = finish_stage(workspace, "prepare", content, counts=counts, outputs=outputs, seconds=watch.seconds)
        preparation.tidy()
        return card


COHORTS_HERE = 200_000  # up to this many users and items, one process is faster than starting Ray


def cohorts(recipe: Recipe, workspace: Workspace) -> Card:
    """Builds the recipe's cohorts; does nothing if it has none."""
    prepared = needed_stage(workspace, "prepare", "there are no prepared tables")
    config, scenario = recipe.cohorts, recipe.domain
    if config is None:
        return execute(workspace, "cohorts", fingerprint("none"), "the recipe has none", lambda: ({}, {}))
    wording, constants = collective_fingerprint(scenario), (CohortSettings(), ITERATIONS)
    named = fingerprint(prepared.fingerprint, config, constants, wording, recipe.split.cuts)
    folder = f"cohorts/{named[:16]}"
    here = int(prepared.counts.get("users", 0)) + int(prepared.counts.get("items", 0)) <= COHORTS_HERE

    def body() -> tuple[Counts, Outputs]:
        log = workspace.log_path("ray")
        pool = Pool(here=here, max_workers=local_cpus(recipe.ray) or 1 << 10, log_path=None if here else str(log))
        with (
            nullcontext() if here else ray_session(recipe.ray, log),
            progress("building cohorts", None, "shards") as advance,
        ):
            counts = build_cohorts(
                workspace,
                folder,
                config,
                scenario,
                partial(_ask, scenario=scenario),
                shard_rows=recipe.shard_rows,
                cuts=recipe.split.cuts,
                pool=pool,
                previous=previous_folder(workspace, folder),
                on_card=lambda card: advance(1),
            )
        Pointer(workspace, POINTER).move(folder)
        for kind in ("user", "item"):
            n, members, largest = (counts[f"{kind}_{name}"] for name in ("cohorts", "members", "cohort_largest"))
            note(f"{n:,} cohorts of {kind}s, of {members / n:.0f} members in the mean, {largest:,} in the largest")
        return {**counts}, {"cohorts": folder}

    return execute(workspace, "cohorts", named, "groups of similar users and items", body)


def cohorts_folder(recipe: Recipe, workspace: Workspace) -> str | None:
    """Folder of the recipe's cohorts, None if it has none. Raises WorkspaceError if they have not been
    built."""
    if recipe.cohorts is None:
        return None
    built = finished_stage(workspace, "cohorts")
    if built is None or "cohorts" not in built.outputs:
        raise WorkspaceError(f"{workspace.root}: no cohorts yet. Run `cohorts` first, with the same recipe.")
    return built.outputs["cohorts"]


def _ask(profiles: pa.Table, scenario: Scenario) -> pa.Table:
    return prompts_table(cohort_prompts(profiles, scenario))


ANSWERED_HERE = 20_000  # an engine without a model answers this many before Ray would start


def generation_job(recipe: Recipe, workspace: Workspace) -> tuple[GenerationJob, dict[Shard, str]]:
    """The recipe's job, and its shards with a digest of the inputs of each. Raises WorkspaceError if `prepare` or
    `cohorts` has not finished.
    """
    cohorts = cohorts_folder(recipe, workspace)
    job = build_job(
        recipe.domain,
        recipe.prompts,
        recipe.sampling,
        recipe.engine,
        recipe.decoding,
        recipe.quality,
        ready={"cohort": f"{cohorts}/prompts"} if recipe.prompts.mode != "individual" else {},
        cohorts=cohorts,
    )
    inputs = table_inputs(workspace) if recipe.prompts.mode != "collective" else {}
    for kind, folder in job.ready.items():
        inputs |= prompt_inputs(workspace, "cohort", folder) if kind == "cohort" else {}
    return job, inputs


def generate(recipe: Recipe, workspace: Workspace, *, retry_dead: bool = False) -> Card:
    """Generates every pending shard of this job; starts no engine if there are none.

    retry_dead: also retry the dead rows of finished shards once.
    """
    model = getattr(recipe.engine, "model", recipe.engine.type)
    stage_header("generate", f"{recipe.prompts.framework} prompts, {model}, decoding {recipe.decoding.mode}")
    job, inputs = generation_job(recipe, workspace)
    pending, done = pending_shards(workspace, job.folder, inputs)
    dead = [shard for shard in inputs if retry_dead and shard.name in done and done[shard.name].rows_dead]
    watch, cards = Stopwatch(), done
    if pending or dead:
        forget_stages(workspace, from_stage("generate"))
        rows = {s.name: job.count_prompts(workspace, s) for s in pending}
        rows |= {s.name: done[s.name].rows_dead for s in dead}
        note(f"{len(pending)} of {len(inputs)} shards to do; engine log: {workspace.log_path('engine')}")
        if dead:
            note(f"{sum(rows[s.name] for s in dead)} dead rows of {len(dead)} shards to retry")
        with progress("writing knowledge", sum(rows.values()), hourly_cost=recipe.generate.hourly_cost) as advance:
            on_card = ShardWatch(advance, workspace.log_path("shards"), rows)
            stage = GenerateStage(job, recipe.engine, earlier_texts=ReleasedTexts)
            cards = write_texts(recipe, workspace, stage, inputs, rows, on_card, done=done, again=dead)
        if counters := decoder_counters(c for name, c in cards.items() if name in rows):
            note(f"decoder: {counters.summary}")
        if share := cached_share(c for name, c in cards.items() if name in rows):
            note(f"{share:.0%} of the prompts' tokens came from the engine's cache")
    else:
        note(f"all {len(inputs)} shards are already done")
    check_dead_share(job.artifact(workspace), cards.values(), recipe.generate)
    # Also covers contents: retrying dead rows adds texts under the same job.
    texts = [(shard.name, cards[shard.name].files[shard.file()].sha256) for shard in inputs]
    named = fingerprint(job.fingerprint, texts)
    before = finished_stage(workspace, "generate", named)
    if before is not None and not pending and not dead:
        return before
    counts = add_cards(cards.values()) | {"shards": len(inputs), "shards_this_run": len(pending) + len(dead)}
    return finish_stage(
        workspace, "generate", named, counts=counts, outputs={"knowledge": job.folder}, seconds=watch.seconds
    )


def sweep_engine(
    recipe: Recipe, workspace: Workspace, axes: Mapping[str, Sequence[Any]], *, n_prompts: int = 256, seed: int = 0
) -> tuple[list[MeasuredSetting], MeasuredSetting, dict[str, dict[str, Any]]]:
    """Measures engine settings on a sample of the recipe's prompts; see vllm_engine.sweep. Writes no texts.

    Returns all measured settings, the best, and the recipe's sections with it, as far as they differ.
    Raises RecipeError for an engine other than vLLM, and WorkspaceError if the workspace is not prepared.
    """
    engine, decoding = recipe.engine, recipe.decoding
    if not isinstance(engine, VllmEngineConfig):
        raise RecipeError(f"engine.type: {engine.type} has no settings to sweep here. Only vllm has.")
    stage_header("sweep-engine", f"{engine.model}, {n_prompts} prompts")
    job, inputs = generation_job(recipe, workspace)
    prompts = sample_prompts(workspace, job, inputs, n_prompts + WARM_UP, seed, engine.token_counter())
    if len(prompts) <= WARM_UP:
        raise WorkspaceError(
            f"{workspace.root}: {len(prompts)} prompts are too few to measure with. Prepare more rows."
        )
    turns = [(prompt.system, prompt.text) for prompt in prompts]
    log = workspace.log_path("sweep")
    note(f"engine log: {log}")

    def measure(setting: EngineSetting) -> MeasuredSetting:
        measured = measure_setting(setting, engine, decoding, recipe.sampling, turns, log)
        note(f"{setting.label}: {measured.error or f'{measured.prompts_per_s:,.1f} prompts/s'}")
        return measured

    rows, best = sweep(EngineSetting.of(engine, decoding), axes, measure, cpu=on_cpu())
    if best.rows > len(turns) / 2:
        warn(f"an engine takes {best.rows:,} rows at once: measure with --prompts {4 * best.rows} for a full batch")
    return rows, best, best.setting.lines(engine, decoding)


def write_texts(
    recipe: Recipe,
    workspace: Workspace,
    stage: Stage,
    inputs: Mapping[Shard, str],
    rows: Mapping[str, int],
    on_card: Callable[[Card], None],
    *,
    done: Mapping[str, Card],
    again: Collection[Shard] = (),
    engine: EngineConfig | None = None,
    here_rows: int | None = None,
) -> dict[str, Card]:
    """Runs a stage that calls an engine on its replicas (`generate:` in the recipe), or in this process if that takes
    seconds.

    rows: of the pending shards, by name. engine: default: the recipe's. here_rows: maximum rows for this
    process; default: as many as take seconds, and none for vLLM or several replicas.
    """
    config, engine = recipe.generate, engine or recipe.engine
    if here_rows is None:
        light = not isinstance(engine, VllmEngineConfig) and config.most_replicas == 1
        here_rows = ANSWERED_HERE if light else 0
    pool = Pool(
        here=sum(rows.values()) <= here_rows,
        min_workers=config.least_replicas,
        max_workers=config.most_replicas,
        cpus=engine_cpus(engine, config),
        gpus=config.engine_gpus,
        in_flight=SHARDS_IN_FLIGHT,
        price_per_hour=config.price_per_replica_hour,
        log_path=str(workspace.log_path("engine")),
    )
    if pool.here:
        return run_stage(workspace, stage, inputs, pool, on_card, done=done, again=again)
    with ray_session(recipe.ray, workspace.log_path("ray")):
        return run_stage(workspace, stage, inputs, pool, on_card, done=done, again=again)


def engine_cpus(engine: EngineConfig, config: GenerateConfig) -> float:
    """Logical CPUs per replica."""
    if config.engine_cpus is not None:
        return config.engine_cpus
    if isinstance(engine, VllmEngineConfig) and not config.engine_gpus:
        return float(engine.threads or os.cpu_count() or 1)
    return 1.0


def encode(recipe: Recipe, workspace: Workspace) -> Card:
    """Encodes new or changed texts of `generate`."""
    stage_header("encode", recipe.encoder.model)
    watch, knowledge = Stopwatch(), needed_stage(workspace, "generate", "no knowledge yet").outputs["knowledge"]
    # Only settings that change a vector: not batch size, device or precision (half on a GPU changes a component by up
    # to 3e-4), nor the number of texts.
    named = fingerprint(recipe.encoder.identity, recipe.encoder.semantic_ids, CODING, knowledge)
    folder = f"vectors/{named[:16]}"
    job = EncodingJob(workspace, folder, recipe.encoder, _inputs(recipe, workspace, knowledge, folder))
    pool = job.pool(str(workspace.log_path("encode")))
    before, pending = finished_stage(workspace, "encode"), job.pending()
    if pending:
        forget_stages(workspace, from_stage("encode"))
    session = nullcontext() if pool.here or not pending else ray_session(recipe.ray, workspace.log_path("ray"))
    with session, progress("encoding", None, "texts") as advance:
        cards = job.run(pool, lambda card: advance(int(card.counts["encoded"])))
    content = {name: [file.sha256 for file in card.files.values()] for name, card in cards.items()}
    if before is not None and before.fingerprint == fingerprint(folder, content) and not pending:
        note("already done")
        return before
    outputs = {"vectors": folder, "knowledge": knowledge}
    return finish_stage(
        workspace,
        "encode",
        fingerprint(folder, content),
        counts=job.counts(cards),
        outputs=outputs,
        seconds=watch.seconds,
    )


def _inputs(recipe: Recipe, workspace: Workspace, knowledge: str, folder: str) -> dict[str, Input]:
    """The recipe's inputs: knowledge, and the inputs of its arms."""
    arms, own = {arm_parts(arm).reads for arm in recipe.ctr.arm_names}, recipe.ctr.own_arms.values()
    sources = {(kind, source) for arm in own for kind in TABLES for source in getattr(arm, f"{kind}s")}
    arms |= {source for _, source in sources}
    inputs: dict[str, Input] = {}
    written = workspace.names(knowledge)
    for kind in KINDS:
        texts = KnowledgeTexts(knowledge, kind)
        imported = imported_vectors(workspace, kind)
        if imported is not None:
            _refuse_other_dim(recipe, workspace.path(imported.folder), imported.dim)
            inputs[f"knowledge-{kind}"] = WithImported(texts, imported.folder)
        elif kind in written:
            inputs[f"knowledge-{kind}"] = texts
    if "metadata" in arms:
        inputs |= {"metadata-user": UserMetadata(), "metadata-item": ItemMetadata()}
    for kind, source in sorted(sources):
        if source not in WRITTEN and imported_vectors(workspace, kind, source) is None:
            inputs[f"{source}-{kind}"] = _column(workspace, kind, source)
    # Without individual knowledge, `shuffled` reads that of cohorts.
    shuffled = any(arm_parts(arm).shuffled for arm in recipe.ctr.arm_names)
    reads = {"collective", "both"} | ({"knowledge"} if shuffled and recipe.prompts.mode == "collective" else set())
    cohorts = cohorts_folder(recipe, workspace) if recipe.prompts.mode != "individual" else None
    if cohorts is not None and arms & reads:
        inputs |= {f"collective-{kind}": Members(cohorts, folder, kind) for kind in TABLES}
        inputs[f"{DISLIKED}-user"] = Members(cohorts, folder, "user", disliked=True)
    return inputs


def _column(workspace: Workspace, kind: Kind, source: str) -> ColumnTexts:
    """Texts of a column of users or items. Raises RecipeError with the arm's source if the table has no such column."""
    columns = workspace.parquet_file(table_file(f"{kind}s", 0)).schema_arrow.names
    if source not in columns:
        hint = did_you_mean(source, [*WRITTEN, *columns[2:]])
        raise RecipeError(
            f"ctr.arms: there is no source '{source}' of {kind}s: `encode` writes none, no vectors were imported under "
            f"this name (`owlrec knowledge import-vectors --source {source}`), and table {kind}s has no such "
            f"column.{hint}"
        )
    return ColumnTexts(kind, source)


def _refuse_other_dim(recipe: Recipe, path: str, dim: int) -> None:
    expected = recipe.encoder.load().dimension
    if dim != expected:
        raise SourceError(
            f"{path} has vectors of {dim} components, but the recipe's encoder has {expected}: a release and "
            "the arms of an experiment need one dimension. Use an encoder of that dimension, or remove the "
            "folder."
        )


PARTS_ON_RAY = 8  # a million users; with fewer parts, this process is faster than starting Ray


def publish(recipe: Recipe, workspace: Workspace) -> Card:
    """Publishes the output of `encode`. Publishing the same contents again makes the same release current."""
    encoded = needed_stage(workspace, "encode", "no vectors yet")
    prepared = needed_stage(workspace, "prepare", "there are no prepared tables")
    named = fingerprint(encoded.fingerprint, prepared.fingerprint)  # of texts and vectors, and of behaviors

    def body() -> tuple[Counts, Outputs]:
        folder = encoded.outputs["vectors"]
        cohorts = cohorts_folder(recipe, workspace) if recipe.prompts.mode != "individual" else None
        n_parts = shards_for(max(int(prepared.counts["users"]), int(prepared.counts["items"])), PART_IDS)
        pool = Pool(here=n_parts < PARTS_ON_RAY, max_workers=n_parts)
        info = ReleaseInfo(
            fingerprint=named,
            model=getattr(recipe.engine, "model", recipe.engine.type),
            encoder=recipe.encoder.model,
            encoder_identity=recipe.encoder.identity,
            history_length=recipe.split.history_length,
            parent=current_release(workspace),
        )
        session = nullcontext() if pool.here else ray_session(recipe.ray, workspace.log_path("ray"))
        with session, progress("publishing", None) as advance:
            manifest = publish_rows(
                workspace,
                info,
                ShardRows(encoded.outputs["knowledge"], folder, cohorts, recipe.split.history_length),
                n_parts,
                quantizers=read_quantizers(workspace, folder, "knowledge"),
                pool=pool,
                on_card=lambda card: advance(card.rows_out),
            )
        note(f"release {manifest.name} is current: {workspace.path('releases', manifest.name)}")
        counts: Counts = {f"knowledge_{k}": n for k, n in manifest.knowledge.items()}
        return counts, {"release": manifest.name}

    return execute(workspace, "publish", named, "an immutable release", body)
