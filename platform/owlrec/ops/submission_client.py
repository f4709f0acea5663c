"""The way to a cluster's head: a client of its jobs that carries the caller's token, and following a job to its end."""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from owlrec.errors import ClusterError, OwlRecError
from owlrec.ops import submission as preflight
from owlrec.ops.console import note
from owlrec.ops.doctor import Check
from owlrec.ops.submission import Jobs, exit_code, follow

_PROBE_S = 180.0
_INSTALL_S = 1800.0  # where Ray installs packages first


def examine(address: str) -> tuple[Jobs | None, list[Check]]:
    """A client of the jobs of the head at `address`, and what was found of it; no client where a check failed."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray sends none otherwise; it reads this at its import
    # Private, but Ray is pinned exactly, and its public client tells a refused token by a traceback alone.
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # of each upload and connection
    try:
        url = preflight.http_address(address)
        headers = get_auth_headers_if_auth_enabled({})
    except ClusterError as error:
        return None, [Check("head", "fail", str(error), preflight.NAME_DASHBOARD)]
    except AuthenticationError as error:
        return None, [Check("token", "fail", f"no token: {str(error).split('. ')[0]}", preflight.SET_TOKEN)]
    checks = preflight.check_head(url, headers)
    return (None if checks[-1].ok == "fail" else JobSubmissionClient(url)), checks


def connect(address: str) -> Jobs:
    """A client of the jobs of the head at `address`. Raises ClusterError where that cannot take ours."""
    jobs, checks = examine(address)
    preflight.refuse(checks)
    assert jobs is not None
    return jobs


def examine_inside(
    jobs: Jobs, runtime_env: Mapping[str, Any], root: str | None, demand: preflight.GpuDemand | None = None
) -> list[Check]:
    """What the cluster is like from the inside, for a job in workspace `root` that asks for `demand`."""
    patience = _INSTALL_S if runtime_env.keys() & {"pip", "uv", "conda"} else _PROBE_S
    return preflight.judge(preflight.probe(jobs, runtime_env, root, timeout_s=patience), root, demand)


def check_cluster(address: str, workspace: str | None) -> list[Check]:
    """What `owlrec doctor --cluster` finds, a workspace as the cluster's machines see it included."""
    jobs, checks = examine(address)
    if jobs is None:
        return checks
    root = preflight.workspace_root(workspace) if workspace else None
    with preflight.job_folder(None, preflight.code_packages()) as folder:
        environment = preflight.runtime_env(folder, installed=False)
        try:
            return [*checks, *examine_inside(jobs, environment, root)]
        except OwlRecError as error:
            return [*checks, Check("jobs", "fail", str(error), "see above")]


def follow_to_end(jobs: Jobs, id_: str) -> int:
    """Prints a job's log until it has ended, and gives its exit code; 130 where the caller stops following."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = asyncio.run(follow(jobs, id_, write))
    except KeyboardInterrupt:
        note(f"job {id_} goes on. The same command follows it again; `ray job stop {id_}` ends it.")
        return 130
    code = exit_code(job)
    note(f"job {id_} {job.status.lower()}" + (f", exit code {code}: {job.message or ''}" if code else ""))
    return code
