"""Trains a grid of trials: in this process if that takes seconds, else with Ray Train; no other file of this package
uses Ray. LoRA tuning (`ranking.lora`) also uses `fit_workers` and `this_worker`.

One worker group trains all pending trials one after another, since starting a group takes about ten seconds, more
than a small trial. Each trial is exported right after training, its result.json last, and a trial with a
result is never trained again, so a grid is resumable. Within a trial, a restarted group resumes from the
trial's own checkpoint (trainer.py); Ray's are not used, because they are pickled and belong to a run, not to a grid.
"""

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from owlrec.config import Config
from owlrec.ctr.experiment import ENCODED, CTRConfig, Trial, TrialResult, WorkersConfig, finished_trials, grid_folder
from owlrec.ctr.features import FeatureSections
from owlrec.ctr.knowledge_tables import arm_sources, stored_sources
from owlrec.ctr.trainer import ALONE, Worker
from owlrec.errors import root_mistake
from owlrec.machine import redirect_output
from owlrec.runner import Pool
from owlrec.workspace import Workspace

# Two ranks without contact for this long will not recover; torch would wait half an hour.
_COLLECTIVE_TIMEOUT_S = 300
# Interval of requests for a group without resources (Ray Train); by default Ray never gives up.
_START_ATTEMPTS = 15
_POLL_S = 0.5
_ROWS_HERE = 5_000_000
# Rows times epochs times trials that train in this process: seconds, where starting a group of workers takes ten.
_ROW_EPOCHS_HERE = 500_000


# Restarts after a lost worker: spot machines are lost several times in a long run, and an error that repeats
# costs only seconds.
MAX_FAILURES = 3
# Time between two checkpoints of a trial; a restart resumes at the very next sample. A step takes about 10 ms,
# a checkpoint less than a second.
CHECKPOINT_STEPS = 1000


class WorkerSpec(Config):
    """Instructions for every worker of a group: names only, since each reads the tables itself."""

    settings: Any
    workers: WorkersConfig = WorkersConfig()
    threads: int | None = None  # per worker; None = the machine's cores, shared among its workers
    max_failures: int = MAX_FAILURES


class GridSpec(WorkerSpec):
    """Instructions for a grid of trials."""

    settings: CTRConfig
    trials: tuple[Trial, ...]
    knowledge: dict[str, dict[str, str]]  # source -> kind -> folder, for the sources that trials read
    fingerprint: str
    features: FeatureSections = {}
    soft_labels: str | None = None  # folder of the LLM's probabilities, for settings.distillation
    warm_start: str | None = None  # the artifact that trials continue from
    checkpoint_steps: int = CHECKPOINT_STEPS


def train_trials(
    workspace: Workspace,
    config: CTRConfig,
    trials: Sequence[Trial],
    *,
    knowledge: Mapping[str, Mapping[str, str]],
    fingerprint: str,
    features: FeatureSections | None = None,
    workers: WorkersConfig | None = None,
    soft_labels: str | None = None,
    warm_start: str | None = None,
    pool: Pool | None = None,
    max_failures: int = MAX_FAILURES,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    here: bool = False,
    on_trial: Callable[[TrialResult], None],
) -> list[TrialResult]:
    """Trains those of `trials` without a result, from the tables users, items and samples.

    here: in this process, on a CPU. Otherwise Ray must be initialized, and worker output goes to the workspace's log
    file `train_ctr`.
    knowledge: source ("knowledge", "collective", ...; see `arm_sources`) -> side ("user", "item") -> folder of
    its vectors (VectorShards). Unneeded ones are ignored.
    fingerprint: of everything that determines a result; its first 16 digits name the grid's folder under ctr/.
    features: of the recipe.
    workers: default: one, without a GPU.
    soft_labels: output of `ranker score-pairs`, if config.distillation is set.
    warm_start: the folder of an artifact whose weights all trials start from.
    pool: encodes the samples.
    on_trial: called with each new result when it is written, from a second thread of this process.
    Returns all results in the order of `trials`. Raises RecipeError before any training if an arm's vectors are
    missing, and any OwlRecError of a worker.
    """
    done = {result.trial for result in finished_trials(workspace, fingerprint, trials)}
    pending = tuple(trial for trial in trials if trial not in done)
    if pending:
        needed = {s for trial in trials for s in stored_sources(arm_sources(trial.arm, knowledge, trial.own))}
        spec = GridSpec(
            settings=config,
            workers=workers or WorkersConfig(),
            trials=pending,
            knowledge={source: dict(folders) for source, folders in knowledge.items() if source in needed},
            fingerprint=fingerprint,
            features=features or {},
            soft_labels=soft_labels,
            warm_start=warm_start,
            max_failures=max_failures,
            checkpoint_steps=checkpoint_steps,
        )
        encode_once(workspace, spec, pool)
        with _announcing(workspace, spec, on_trial):
            if here:
                _train_all(workspace, spec, lone_worker(spec.threads))
            else:
                fit_workers(workspace, _train_pending, spec, name=f"ctr/ray/{fingerprint[:8]}")
        workspace.delete_dir(grid_folder(fingerprint), ENCODED)
    return finished_trials(workspace, fingerprint, trials)


def fit_workers(workspace: Workspace, loop: Callable[[dict[str, Any]], None], spec: WorkerSpec, *, name: str) -> None:
    """Runs `loop` on a group of workers in one torch.distributed group, until all have returned.

    Ray must be initialized. loop: receives the workspace and the spec as JSON. name: a path in the workspace for Ray's
    files. Each worker requests as many CPUs as the spec has threads, 1 for None. Raises any OwlRecError of a worker.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    workers = spec.workers
    # Ray silently resumes a run with a known name and storage, and requires a storage that all nodes share.
    storage, _, prefix = name.rpartition("/")
    run = f"{prefix}-{uuid.uuid4().hex[:8]}"
    filesystem, storage_path = workspace.arrow(storage)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"workspace": workspace, "spec": spec.model_dump(mode="json")},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": spec.threads or 1, **({"GPU": 1} if workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=run,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=spec.max_failures, controller_failure_limit=_START_ATTEMPTS),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _interrupt_handler_restored():
            trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        raise next((m for f in failures if (m := root_mistake(f))), error) from None
    finally:
        workspace.delete_dir(storage, run)


def this_worker(threads: int | None) -> Worker:
    """This process's place in the group. torch gets `threads`, or for None its share of the machine's cores."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    context = ray.train.get_context()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return Worker(context.get_world_rank(), context.get_world_size(), str(get_device()))


def lone_worker(threads: int | None) -> Worker:
    """This process as the only worker. torch gets `threads`, or for None the machine's cores."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return ALONE


def _train_pending(loop_config: dict[str, Any]) -> None:
    """Main function of each worker."""
    workspace: Workspace = loop_config["workspace"]
    redirect_output(workspace.log_path("train_ctr"))
    spec = GridSpec.model_validate(loop_config["spec"])
    _train_all(workspace, spec, this_worker(spec.threads))


def _train_all(workspace: Workspace, spec: GridSpec, worker: Worker) -> None:
    from owlrec.ctr.dataset import WarmStart
    from owlrec.ctr.trainer import CheckpointFile, all_weights, export_trial, keep_freed_memory, train_one

    keep_freed_memory()
    # After a restart some trials are done. All ranks see the same ones: none is exported before every rank joins its
    done = {result.trial for result in finished_trials(workspace, spec.fingerprint, spec.trials)}
    data = load_data(workspace, spec)
    begin = WarmStart.open(workspace, spec.warm_start).load_into if spec.warm_start else None
    for trial in spec.trials:
        if trial not in done:
            path = f"{grid_folder(spec.fingerprint)}/{trial.path}/checkpoint.safetensors"
            checkpoint = CheckpointFile(workspace, path, spec.checkpoint_steps)
            trained = train_one(trial, data, spec.settings, worker, checkpoint, begin)
            weights = all_weights(trained.model, worker)
            if worker.rank == 0:
                export_trial(workspace, spec.fingerprint, trained, weights)
                checkpoint.delete(worker.world_size)


def encode_once(workspace: Workspace, spec: GridSpec, pool: Pool | None = None) -> None:
    """Encodes the samples once for all workers into the grid's folder; an interrupted grid reuses them."""
    from owlrec.ctr.dataset import encode_tables
    from owlrec.ctr.experiment import SoftLabels
    from owlrec.ctr.trainer import read_vocabularies

    distillation, folder = spec.settings.distillation, spec.soft_labels
    encode_tables(
        workspace,
        grid_folder(spec.fingerprint),
        features=spec.features,
        tasks=spec.settings.task_labels,
        min_item_count=spec.settings.min_item_count,
        soft_labels=SoftLabels(folder, distillation.alpha) if distillation and folder else None,
        before=read_vocabularies(workspace, spec.warm_start) if spec.warm_start else None,
        pool=pool,
    )


def load_data(workspace: Workspace, spec: GridSpec) -> Any:
    """fitting.TrainingData of a grid with encoded samples: mapped, not read."""
    from owlrec.ctr.dataset import open_features, open_tables
    from owlrec.ctr.trainer import TrainingData

    features = open_features(workspace, grid_folder(spec.fingerprint))
    return TrainingData(features, open_tables(workspace, spec.knowledge))


def trains_here(config: CTRConfig, workers: WorkersConfig, trials: int, rows: int) -> bool:
    """Whether so many trials over this many rows take less time than starting a group of workers."""
    alone = workers.num_workers == 1 and not workers.use_gpu
    return alone and not needs_ray(rows) and rows * config.epochs * trials <= _ROW_EPOCHS_HERE


def needs_ray(rows: int) -> bool:
    """Whether a stage over this many rows takes longer than starting Ray."""
    return rows > _ROWS_HERE


def stage_pool(workspace: Workspace, rows: int) -> Pool:
    """Where to run shards with `rows` rows in all: in this process if that takes seconds, else on Ray, which must be
    initialized.
    """
    if not needs_ray(rows):
        return Pool()
    import ray

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return Pool(here=False, max_workers=cores, log_path=str(workspace.log_path("train_ctr")))


def _announcing(
    workspace: Workspace, spec: GridSpec, on_trial: Callable[[TrialResult], None]
) -> AbstractContextManager[None]:
    """Calls `on_trial` for each new result while the block runs."""
    waiting = set(spec.trials)

    def look() -> None:
        for result in finished_trials(workspace, spec.fingerprint, [t for t in spec.trials if t in waiting]):
            waiting.discard(result.trial)
            on_trial(result)

    return looking_meanwhile(look)


@contextmanager
def looking_meanwhile(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` from a second thread while the block runs and once after it ends, because Ray Train's `fit`
    blocks and its callbacks run elsewhere.
    """
    stop = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = stop.wait(_POLL_S)
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _interrupt_handler_restored() -> Iterator[None]:
    """Ray Train (2.60) installs its own SIGINT handler in `fit` and leaves it there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
