"""Trains a grid of trials through Ray Train: the only file of this package that knows Ray. `fit_workers` and
`this_worker` serve LoRA tuning (`ranking.lora`) too.

One worker group trains all pending trials one after another, since starting a group costs about ten seconds, more
than a small trial takes. Each trial is exported as soon as it is trained, its result.json last, and a trial that has
one is never trained again: that is what makes a grid resumable. Within a trial a restarted group goes on from the
trial's own checkpoint (checkpoint.py); Ray's are not used, for they are pickled and belong to a run, not to a grid.
"""

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from owlrec.config import Config
from owlrec.ctr.experiment import ENCODED, CTRConfig, Trial, TrialResult, finished_trials, grid_folder
from owlrec.ctr.knowledge_tables import arm_sources, stored_sources
from owlrec.ctr.trainer import Worker
from owlrec.errors import root_mistake
from owlrec.machine import redirect_output
from owlrec.runner import Pool
from owlrec.workspace import Workspace

# Two ranks that stop answering each other for this long will not recover; torch would wait half an hour.
_COLLECTIVE_TIMEOUT_S = 300
# A group that finds no resources is asked for once a minute (Ray Train); by default Ray never gives up.
_START_ATTEMPTS = 15
_POLL_S = 0.5
_ROWS_HERE = 5_000_000


# Restarts after a lost worker: spot machines go several times in a long run, and a mistake that every restart repeats
# costs some seconds.
MAX_FAILURES = 3
# Between two checkpoints of a trial; a restart goes on from the last, at the very next sample. A step takes some 10 ms,
# a checkpoint less than a second.
CHECKPOINT_STEPS = 1000


class WorkersJob(Config):
    """What every worker of a group is told: names only, for each reads the tables itself."""

    settings: Any  # with num_workers and use_gpu
    threads: int | None = None  # of each worker; None = the machine's cores, shared among its workers
    max_failures: int = MAX_FAILURES


class GridJob(WorkersJob):
    """Of a grid of trials."""

    settings: CTRConfig
    trials: tuple[Trial, ...]
    knowledge: dict[str, dict[str, str]]  # source -> side -> folder, of those that the trials read
    fingerprint: str
    attributes: tuple[str, ...]
    profile: tuple[str, ...]
    soft_labels: str | None = None  # folder of the probabilities to learn from, for settings.distillation
    warm_start: str | None = None  # the artifact that the trials go on from
    checkpoint_steps: int = CHECKPOINT_STEPS


def train_trials(
    workspace: Workspace,
    config: CTRConfig,
    trials: Sequence[Trial],
    *,
    knowledge: Mapping[str, Mapping[str, str]],
    fingerprint: str,
    attributes: Sequence[str],
    profile: Sequence[str],
    soft_labels: str | None = None,
    warm_start: str | None = None,
    pool: Pool | None = None,
    max_failures: int = MAX_FAILURES,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    on_trial: Callable[[TrialResult], None],
) -> list[TrialResult]:
    """Trains those of `trials` that have no result yet, from the tables users, items and samples.

    Ray must be initialised. Worker output goes to the workspace's log file `train_ctr`.
    knowledge: source ("knowledge", "collective", ...; see `arm_sources`) -> side ("user", "item") -> the folder that
        holds its vectors (VectorShards). Those that the trials do not need are left alone.
    fingerprint: of all that decides a result; it names the grid's folder, ctr/<its first 16 digits>.
    attributes, profile: columns of items and users (see `build_features`); profile where config.use_profile only.
    soft_labels: what `ranker score-pairs` wrote, where config.distillation is given.
    warm_start: the folder of an artifact whose weights all trials go on from.
    pool: where the samples are encoded.
    on_trial: called with each new result as it is written, from a second thread of this process.
    Returns all results in the order of `trials`. Raises RecipeError, before any training, where an arm's vectors were
    not given; and what a worker raised, if it is an OwlRecError.
    """
    done = {result.trial for result in finished_trials(workspace, fingerprint, trials)}
    pending = tuple(trial for trial in trials if trial not in done)
    if pending:
        needed = {source for trial in pending for source in stored_sources(arm_sources(trial.arm, knowledge))}
        job = GridJob(
            settings=config,
            trials=pending,
            knowledge={source: dict(folders) for source, folders in knowledge.items() if source in needed},
            fingerprint=fingerprint,
            attributes=tuple(attributes),
            profile=tuple(profile) if config.use_profile else (),
            soft_labels=soft_labels,
            warm_start=warm_start,
            max_failures=max_failures,
            checkpoint_steps=checkpoint_steps,
        )
        encode_once(workspace, job, pool)
        with _announcing(workspace, job, on_trial):
            fit_workers(workspace, _train_pending, job, name=f"ctr/ray/{fingerprint[:8]}")
        workspace.delete_dir(grid_folder(fingerprint), ENCODED)
    return finished_trials(workspace, fingerprint, trials)


def fit_workers(workspace: Workspace, loop: Callable[[dict[str, Any]], None], job: WorkersJob, *, name: str) -> None:
    """Runs `loop` on a group of workers that torch.distributed joins, until it has returned on all of them.

    Ray must be initialised. loop: is given the workspace and, as JSON, the job. name: a path in the workspace for what
    Ray writes meanwhile. Each worker asks for as many CPUs as the job has threads, 1 for None. Raises what a
    worker raised, if it is an OwlRecError.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    settings = job.settings
    # Ray resumes a run whose name and storage it has seen, silently; and it insists on a storage that all nodes share.
    storage, _, prefix = name.rpartition("/")
    run = f"{prefix}-{uuid.uuid4().hex[:8]}"
    filesystem, storage_path = workspace.arrow(storage)
    trainer = TorchTrainer(
        loop,
        train_loop_config={"workspace": workspace, "job": job.model_dump(mode="json")},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": job.threads or 1, **({"GPU": 1} if settings.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=run,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.max_failures, controller_failure_limit=_START_ATTEMPTS),
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
    """Which of the group this process is. torch gets `threads`, or for None its share of the machine's cores."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    context = ray.train.get_context()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return Worker(context.get_world_rank(), context.get_world_size(), str(get_device()))


def _train_pending(loop_config: dict[str, Any]) -> None:
    """What each worker runs."""
    workspace: Workspace = loop_config["workspace"]
    redirect_output(workspace.log_path("train_ctr"))
    from owlrec.ctr.dataset import WarmStart
    from owlrec.ctr.trainer import CheckpointFile, export_trial, keep_freed_memory, train_one

    keep_freed_memory()
    job = GridJob.model_validate(loop_config["job"])
    worker = this_worker(job.threads)
    # After a restart some trials are done. All ranks see the same ones: none is exported before every rank joins its
    # training.
    done = {result.trial for result in finished_trials(workspace, job.fingerprint, job.trials)}
    data = load_data(workspace, job)
    begin = WarmStart.open(workspace, job.warm_start).load_into if job.warm_start else None
    for trial in job.trials:
        if trial not in done:
            path = f"{grid_folder(job.fingerprint)}/{trial.path}/checkpoint.safetensors"
            checkpoint = CheckpointFile(workspace, path, job.checkpoint_steps)
            trained = train_one(trial, data, job.settings, worker, checkpoint, begin)
            if worker.rank == 0:
                export_trial(workspace, job.fingerprint, trained)
                checkpoint.delete()


def encode_once(workspace: Workspace, job: GridJob, pool: Pool | None = None) -> None:
    """Encodes the samples once for all workers, into the grid's folder; an interrupted grid finds them there."""
    from owlrec.ctr.dataset import encode_tables
    from owlrec.ctr.experiment import SoftLabels
    from owlrec.ctr.trainer import read_vocabularies

    distillation, folder = job.settings.distillation, job.soft_labels
    encode_tables(
        workspace,
        grid_folder(job.fingerprint),
        attributes=job.attributes,
        profile=job.profile,
        min_item_count=job.settings.min_item_count,
        soft_labels=SoftLabels(folder, distillation.alpha) if distillation and folder else None,
        before=read_vocabularies(workspace, job.warm_start) if job.warm_start else None,
        pool=pool,
    )


def load_data(workspace: Workspace, job: GridJob) -> Any:
    """fitting.TrainingData of a job whose samples are encoded: mapped, not read."""
    from owlrec.ctr.dataset import open_features, open_tables
    from owlrec.ctr.trainer import TrainingData

    features = open_features(workspace, grid_folder(job.fingerprint))
    return TrainingData(features, open_tables(workspace, job.knowledge))


def needs_ray(rows: int) -> bool:
    """Whether a stage over so many rows takes more than the seconds that a start of Ray takes."""
    return rows > _ROWS_HERE


def stage_pool(workspace: Workspace, rows: int) -> Pool:
    """Where shards of `rows` rows in all are made: here where that takes seconds, else on Ray, which must be
    initialised.
    """
    if not needs_ray(rows):
        return Pool()
    import ray

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return Pool(here=False, max_workers=cores, log_path=str(workspace.log_path("train_ctr")))


def _announcing(
    workspace: Workspace, job: GridJob, on_trial: Callable[[TrialResult], None]
) -> AbstractContextManager[None]:
    """Calls `on_trial` for each result that appears while the block runs."""
    waiting = set(job.trials)

    def look() -> None:
        for result in finished_trials(workspace, job.fingerprint, [t for t in job.trials if t in waiting]):
            waiting.discard(result.trial)
            on_trial(result)

    return looking_meanwhile(look)


@contextmanager
def looking_meanwhile(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` from a second thread as long as the block runs, and once more after it has ended; Ray Train's `fit`
    blocks, and its callbacks run elsewhere.
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
