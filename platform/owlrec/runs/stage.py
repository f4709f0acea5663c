"""Shared parts of all stages: their order, skipping finished work, cards, and the Ray session."""

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import owlrec
from owlrec.errors import RecipeError, did_you_mean
from owlrec.ops.console import note, stage_header
from owlrec.process import native_errors_to
from owlrec.recipe import Recipe
from owlrec.runs import STAGES
from owlrec.shards import Card, Stopwatch, finish_stage, finished_stage, forget_stages
from owlrec.workspace import Workspace

_MODULES = dict.fromkeys(STAGES, "batch") | {
    **dict.fromkeys(("train_ctr", "evaluate", "export_ctr", "sweep_ctr"), "ctr"),
    **dict.fromkeys(("tune_ranker", "score_pairs"), "ranker"),
}

Counts = dict[str, float | int | str]
Outputs = dict[str, str]
Stage = Callable[..., Card]  # takes a recipe, its workspace and the stage's own options

# Ray reads these on import. Its own bars and per-worker logs would drown the run's.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # any `uv run` ancestor would otherwise start workers through uv
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_worker_niceness": "0",  # for a local cluster, whose workers are the run itself
}
_OBJECT_STORE_BYTES = 256 << 20  # for a local cluster: blocks carry cards, not data
_SOURCE_ROOT = Path(owlrec.__file__).resolve().parent.parent


def stage_function(name: str) -> Stage:
    """Function of a stage. Imports its module, which for CTR models imports torch."""
    stage: Stage = getattr(importlib.import_module(f"owlrec.runs.{_MODULES[name]}"), name)
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
