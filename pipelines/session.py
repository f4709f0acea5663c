"""The Ray cluster of a run: the job's own inside `ray job submit`, else the one that the recipe names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from owlrec.process import native_errors_to
from owlrec.recipe import RayConfig
from pipelines import SOURCE_ROOT

# Ray reads these at import. Its own bars and per-worker logs would drown the run's.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # any `uv run` ancestor would otherwise start workers through uv
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_worker_niceness": "0",  # of a local cluster: its workers are the run, not a guest beside it
}


_OBJECT_STORE_BYTES = 256 << 20  # of a local cluster: blocks carry cards, not data


@contextmanager
def ray_session(config: RayConfig, log_path: Path) -> Iterator[None]:
    """Connects to Ray for the block, and ends a local cluster after it. Joins a session that is open already.

    log_path: a file for what Ray's own native code has to say.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    options: dict[str, Any] = {"address": "auto" if in_job else config.address}
    if options["address"] == "local":
        os.environ.pop("RAY_ADDRESS", None)  # "local" must never join a cluster that the shell happens to name
        # Token authentication would write ~/.ray/auth_token for a cluster that nobody else can reach.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {
            "num_cpus": config.num_cpus or os.cpu_count(),
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
    """Workers unpickle owlrec's classes by name, so they need it on their path before any of our code runs there."""
    if not SOURCE_ROOT.is_dir():  # an installed wheel
        return {}
    if in_job and SOURCE_ROOT.name in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return {}  # the job brings it, as `owlrec submit` has it; Ray refuses the same variable twice
    # In a job the working directory lies elsewhere on each node; a relative entry resolves to it, since workers start
    # there.
    root = SOURCE_ROOT.name if in_job else str(SOURCE_ROOT)
    roots = [root] if in_job else [root, str(SOURCE_ROOT.parent)]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(roots)}}


def _quiet_ray_data() -> None:
    import logging

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
