"""One job per recipe and pipeline: submitting again finds the existing job in any state.

The submission id is a fingerprint of the work. Ray refuses an existing id, so if two users submit at the same
moment, one starts the job and both follow it. A failed or stopped job is started again under the next number:
stages skip finished work, so nothing is done twice. After a head without fault tolerance is lost, its list of jobs
is empty, and the same applies.

Ray is imported when a cluster is first contacted, since it reads the caller's token on import.
"""

from __future__ import annotations

import asyncio
import glob
import json
import logging
import math
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import httpx
import yaml

import owlrec
import owlrec_decoding
from owlrec import __version__
from owlrec.errors import ClusterError, OwlRecError, RecipeError
from owlrec.ops.console import note
from owlrec.ops.doctor import Check
from owlrec.ops.preflight_probe import MARK
from owlrec.recipe import Recipe
from owlrec.storage import fingerprint

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient as Jobs

# ----------------------------------------------------------------------------------------------------- submission files
# Contents of a submitted job: the recipe, and OwlRec's own code unless the cluster's image has it.
#
# Ray uploads a temporary folder as the job's working directory, so a job does not depend on the current folder
# and does not upload data or environments from it. Ray names an upload by its contents: the
# same code and recipe are sent once.


RECIPE = "recipe.yaml"
CODE_ROOT = "platform"  # folder of the code, as in the repository; relative, since its path differs per node
_FOR_PACKAGES = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_packages() -> dict[str, Path]:
    """OwlRec's own code, the decoder included: folder by where it lies in a job's folder."""
    return {f"{CODE_ROOT}/{package.__name__}": Path(package.__path__[0]) for package in (owlrec, owlrec_decoding)}


def workspace_root(workspace: str) -> str:
    """A workspace as the cluster's machines should open it, since their current folder differs."""
    return workspace if "://" in workspace else os.path.abspath(os.path.expanduser(workspace))


@contextmanager
def job_folder(recipe: Path | None, packages: Mapping[str, Path]) -> Iterator[Path]:
    """A folder with the recipe (if any) as `recipe.yaml` and each package under its name, removed after the block.

    packages: folder by its target path, such as platform/owlrec; empty if the cluster has OwlRec installed.
    """
    with TemporaryDirectory(prefix="owlrec-job-") as name:
        folder = Path(name)
        if recipe is not None:
            shutil.copyfile(recipe, folder / RECIPE)
        for place, package in packages.items():
            shutil.copytree(package, folder / place, ignore=_FOR_PACKAGES)
        yield folder


def refuse_local_paths(recipe: Recipe) -> None:
    """Raises RecipeError for data or a model with a path that is valid only on this machine."""
    values = recipe.model_dump(mode="json")
    named = [(f"source.{key}", value) for key, value in values["source"].items() if key != "type"]  # a source's name
    named += [(f"{key}.model", (values[key] or {}).get("model")) for key in ("engine", "encoder")]
    for setting, path in named:
        if isinstance(path, str) and path and "://" not in path and not os.path.isabs(path) and glob.glob(path):
            raise RecipeError(
                f"{setting}: {path} is a local file or folder, which the job's machines do not have. Use an "
                "absolute path that all of them mount, or a URI."
            )


def runtime_env(folder: Path, *, installed: bool, extra: Path | None = None) -> dict[str, Any]:
    """Ray's runtime environment for driver and workers.

    installed: whether the cluster has OwlRec. extra: a YAML file with more fields (pip, uv, env_vars, …), for
    machines that lack dependencies. Raises RecipeError if the file is invalid.
    """
    fields = _read(extra) if extra else {}
    variables = {str(k): str(v) for k, v in (fields.pop("env_vars", None) or {}).items()}
    if not installed:
        # Before an image's own OwlRec: code of two versions must not mix.
        variables["PYTHONPATH"] = ":".join([CODE_ROOT, *filter(None, [variables.get("PYTHONPATH")])])
    return {"working_dir": str(folder), **fields} | ({"env_vars": variables} if variables else {})


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict) or "working_dir" in fields or not isinstance(fields.get("env_vars") or {}, dict):
        raise RecipeError(
            f"{path}: must have fields of a Ray runtime environment, such as `pip: […]`, but not working_dir, "
            "which the job sets."
        )
    return fields


# ----------------------------------------------------------------------------------------------------------- submission


ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_AGENT_PATIENCE_S = 60  # a head responds a few seconds before it can start jobs
_HEAD_PATIENCE_S = 60  # without a response, before a follower gives up


@dataclass(frozen=True)
class Submission:
    """Specification of a job; `name` is its submission id, without the attempt number."""

    name: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    cpus: float | None = None  # for the driver itself; None = on the head, without a request
    gpus: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A job of a submission, and how it was found."""

    id: str
    state: Literal["started", "running", "finished"]


def submission_name(recipe: Recipe, pipeline: str, arguments: Sequence[str] = ()) -> str:
    """The same for the same recipe, pipeline and arguments, from any place and for any user.

    Ignores `recipe.ray`: a job runs on the cluster it is submitted to.
    """
    key = fingerprint(recipe.model_dump(mode="json", exclude={"ray"}), pipeline, list(arguments), __version__)
    return f"{pipeline.replace('_', '-')}-{recipe.name}-{key[:12]}"


def latest_attempt(jobs: Jobs, name: str) -> tuple[int, Any] | None:
    """Number and details of the last job with this name: NAME is number 1, NAME-2 number 2. None without any."""
    attempts = {}
    for job in jobs.list_jobs():
        head, _, number = (job.submission_id or "").rpartition("-")
        if job.submission_id == name:
            attempts[1] = job
        elif head == name and number.isdigit():
            attempts[int(number)] = job
    return max(attempts.items(), key=lambda pair: pair[0]) if attempts else None


def existing(jobs: Jobs, name: str, *, again: bool = False) -> Attempt | None:
    """The running or finished job with this name; None if one must be started.

    again: ignore a finished one.
    """
    return _standing(latest_attempt(jobs, name), again)


def start(jobs: Jobs, submission: Submission, *, again: bool = False) -> Attempt:
    """Starts the next attempt, or finds one that somebody else has started meanwhile.

    Raises ClusterError if the head does not accept it.
    """
    last = latest_attempt(jobs, submission.name)
    standing = _standing(last, again)
    if standing is not None:
        return standing
    id_ = submission.name if last is None else f"{submission.name}-{last[0] + 1}"
    deadline = time.monotonic() + _AGENT_PATIENCE_S
    while True:
        try:
            jobs.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=id_,
                runtime_env=dict(submission.runtime_env),
                metadata=dict(submission.metadata),
                entrypoint_num_cpus=submission.cpus,
                entrypoint_num_gpus=submission.gpus,
            )
            return Attempt(id_, "started")
        except (RuntimeError, ValueError, OSError) as error:  # everything that the client raises
            if "already exists" in str(error):
                return Attempt(id_, "running")
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not accept the job: {_last_line(error)}") from None
        time.sleep(1)


async def follow(jobs: Jobs, id_: str, write: Callable[[str], None]) -> Any:
    """Writes the job's log from its beginning until it ends; returns its details.

    Resumes after a broken connection. Raises ClusterError if the head does not return.
    """
    shown, silent_since = 0, None
    while True:
        seen = 0
        try:
            async for text in jobs.tail_job_logs(id_):
                write(text[max(0, shown - seen) :])
                seen += len(text)
                shown = max(shown, seen)
            job = jobs.get_job_info(id_)
            if job.status in ENDED:
                return job
            silent_since = None
        except (RuntimeError, OSError) as error:  # connection errors of aiohttp and requests are OSErrors
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since > _HEAD_PATIENCE_S:
                raise ClusterError(
                    f"the head has not answered for {_HEAD_PATIENCE_S} s ({_last_line(error)}); the state of "
                    f"job {id_} is unknown. Once the head is back, run the same command again: it follows a "
                    "running job, and restarts a lost one without repeating finished work."
                ) from None
        time.sleep(1)


def _standing(last: tuple[int, Any] | None, again: bool) -> Attempt | None:
    if last is None:
        return None
    job = last[1]
    if job.status not in ENDED:
        return Attempt(job.submission_id, "running")
    return Attempt(job.submission_id, "finished") if job.status == "SUCCEEDED" and not again else None


def exit_code(job: Any) -> int:
    """Exit code of the driver, as in a shell: 128 plus the number of the signal that killed it."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code or 1
    return 128 - code if code < 0 else code


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------ preflight
# Checks whether this cluster can run this job before it starts, so that no doomed job holds a GPU.
#
# There are two checks: over HTTP at the head (is it one, is access allowed, which Ray), then by a short job inside
# (owlrec.ops.preflight_probe: Python, nodes, the workspace as every node sees it, the autoscaler's limits).
# Findings are the doctor's Checks: `owlrec doctor --cluster` prints them, and `owlrec submit` stops at the first
# failure.


_HTTP_TIMEOUT_S = 10.0
SET_TOKEN = (
    "export RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN (or the token's file as RAY_AUTH_TOKEN_PATH)"
)
NAME_DASHBOARD = "use the head's dashboard, such as http://HEAD:8265"


@dataclass(frozen=True)
class GpuDemand:
    """GPUs that a pipeline needs at once: `each` on one machine, `workers` times."""

    each: float
    workers: int
    setting: str  # recipe key that requests them


def http_address(address: str) -> str:
    """The address with a scheme and without a trailing slash. Raises ClusterError if it is not HTTP."""
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "http", "https") or not rest:
        raise ClusterError(f"{address}: jobs are submitted over HTTP")
    return f"{scheme or 'http'}://{rest.rstrip('/')}"


def check_head(url: str, headers: Mapping[str, str]) -> list[Check]:
    """Checks that a Ray head responds at `url`, accepts the token, and runs OwlRec's version of Ray.

    headers: with the token, if there is one. Stops at the first failure, since later checks would be meaningless.
    """
    try:
        answer = httpx.get(f"{url}/api/version", headers=dict(headers), timeout=_HTTP_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = str(error) or type(error).__name__
        return [Check("head", "fail", f"no Ray head answers at {url} ({said})", f"start it, or {NAME_DASHBOARD}")]
    if answer.status_code == 401:
        return [Check("token", "fail", f"{url} requires a token", SET_TOKEN)]
    if answer.status_code == 403:
        renew = f"get the current one, then {SET_TOKEN}"
        return [
            Check("token", "fail", f"{url} rejects this token: it has expired or belongs to another cluster", renew)
        ]
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        problem = f"the server at {url} is not a Ray head (status {answer.status_code})"
        return [Check("head", "fail", problem, NAME_DASHBOARD)]
    head = Check("head", "ok", url)
    if version != (ours := metadata.version("ray")):
        fix = f"use a cluster with Ray {ours}: OwlRec supports only that version"
        return [head, Check("Ray", "fail", f"the cluster runs Ray {version}", fix)]
    return [head, Check("Ray", "ok", version)]


def gpu_demand(recipe: Recipe, pipeline: str) -> GpuDemand | None:
    """GPUs that the pipeline requests, None if it needs none."""
    if pipeline in ("generate", "refresh", "score_pairs") and recipe.generate.engine_gpus:
        return GpuDemand(recipe.generate.engine_gpus, recipe.generate.least_replicas, "generate.engine_gpus")
    if pipeline in ("train_ctr", "sweep_ctr", "tune_ranker") and recipe.training.use_gpu:
        return GpuDemand(1, recipe.training.num_workers, "training.use_gpu")
    return None


def probe(jobs: Jobs, runtime_env: Mapping[str, Any], workspace: str | None, *, timeout_s: float) -> dict[str, Any]:
    """Runs the probe on the cluster and returns its report. Raises ClusterError if it fails."""
    command = "python -m owlrec.ops.preflight_probe" + (f" {shlex.quote(workspace)}" if workspace else "")
    id_ = start(jobs, Submission(f"preflight-{uuid.uuid4().hex[:12]}", command, runtime_env)).id
    deadline = time.monotonic() + timeout_s
    while (job := jobs.get_job_info(id_)).status not in ENDED:
        if time.monotonic() > deadline:
            jobs.stop_job(id_)
            raise ClusterError(
                f"the cluster did not run a job that needs no CPU or GPU within {timeout_s:.0f} s "
                f"({job.message}). See `ray job logs {id_}`, and check that the head has free memory."
            )
        time.sleep(0.3)
    log = jobs.get_job_logs(id_)
    reports = [line[len(MARK) :] for line in log.splitlines() if line.startswith(MARK)]
    if not reports:
        last = "\n".join(f"  {line}" for line in [*log.splitlines(), *(job.message or "").splitlines()][-5:])
        raise ClusterError(
            f"the cluster cannot run OwlRec:\n{last}\nUse an image with OwlRec (cluster/Dockerfile.cpu, .gpu), "
            "or let Ray install the missing packages: --runtime-env FILE with `pip: […]`. An image with "
            "OwlRec needs --installed."
        )
    report: dict[str, Any] = json.loads(reports[-1])
    return report


def check_report(report: Mapping[str, Any], workspace: str | None, demand: GpuDemand | None) -> list[Check]:
    """Findings from the probe's report for a job in `workspace` with this `demand`."""
    if tuple(map(int, report["python"].split(".")[:2])) < (3, 11):
        fix = "use images with Python 3.11 or later"
        return [Check("Python", "fail", f"the cluster runs Python {report['python']}", fix)]
    nodes = report["nodes"]
    pythons = sorted({node["python"] for node in nodes if node["python"]} or {report["python"]})
    checks = [Check("Python", "ok", ", ".join(pythons)), Check("nodes", "ok", _machines(nodes))]
    if len({p.rpartition(".")[0] for p in pythons}) > 1:
        checks[0] = Check(
            "Python", "fail", f"nodes run Python {' and '.join(pythons)}", "use the same image on all nodes"
        )
    return [*checks, *_workspace(report, workspace), *([check_gpus(demand, report)] if demand else [])]


def check_gpus(demand: GpuDemand, report: Mapping[str, Any]) -> Check:
    """Checks that the nodes have the GPUs, or that an autoscaler could add nodes with them."""
    wanted = f"{demand.setting} asks for {demand.workers} x {demand.each:g} GPU"
    fix = f"add a group of GPU nodes to the cluster, or change {demand.setting} in the recipe"
    if report["groups"] is None:
        return Check("GPUs", "warn", f"{wanted}; the head cannot see the operator's groups", fix)
    have = sum(math.floor(node["resources"].get("GPU", 0) / demand.each) for node in report["nodes"])
    if have >= demand.workers:
        return Check("GPUs", "ok", f"{wanted}: the cluster has enough")
    come = 0.0
    for group in report["groups"]:
        fit = math.floor(group["resources"].get("GPU", 0) / demand.each)
        come += fit * (math.inf if group["most"] is None else group["most"]) if fit else 0
    if max(have, come) >= demand.workers:
        return Check("GPUs", "ok", f"{wanted}: the autoscaler can add them")
    count = sum(node["resources"].get("GPU", 0) for node in report["nodes"])
    none = "has no autoscaler to add more" if not report["groups"] else "its autoscaler cannot add enough"
    return Check("GPUs", "fail", f"{wanted}; the cluster has {count:g}, and {none}", fix)


def refuse(checks: Iterable[Check]) -> None:
    """Raises ClusterError for the first failed finding."""
    for check in checks:
        if check.ok == "fail":
            raise ClusterError(f"{check.found}. To fix it, {check.fix}.")


def _workspace(report: Mapping[str, Any], workspace: str | None) -> list[Check]:
    problems = [f"on {n['address']}: {n['problem']}" for n in report["nodes"] if n["problem"]]
    if report["problem"]:
        problems = [f"on the head: {report['problem']}"]
    if problems:
        problem = f"{workspace or 'the cluster'} cannot be used from {len(problems)} of its machines; {problems[0]}"
        fix = "use a workspace that all machines share: the absolute path of a mounted folder, or an s3:// or gs:// URI"
        return [Check("workspace", "fail", problem, fix)]
    if workspace is None:
        return []
    return [Check("workspace", "ok", f"{workspace}: read and written by {len(report['nodes'])} of its machines")]


def _machines(nodes: list[Mapping[str, Any]]) -> str:
    cpus, gpus = (sum(node["resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs"


# ---------------------------------------------------------------------------------------------------------- the cluster
# Uses Ray's client with the caller's token.


_PROBE_S = 180.0
_INSTALL_S = 1800.0  # if Ray first installs packages


def examine(address: str) -> tuple[Jobs | None, list[Check]]:
    """Client for the jobs of the head at `address`, with findings; no client if a check failed."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise Ray sends none; read on import
    # Private, but Ray is pinned exactly, and its public client reports a refused token only as a traceback.
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # silences logs of each upload and connection
    try:
        url = http_address(address)
        headers = get_auth_headers_if_auth_enabled({})
    except ClusterError as error:
        return None, [Check("head", "fail", str(error), NAME_DASHBOARD)]
    except AuthenticationError as error:
        return None, [Check("token", "fail", f"no token: {str(error).split('. ')[0]}", SET_TOKEN)]
    checks = check_head(url, headers)
    return (None if checks[-1].ok == "fail" else JobSubmissionClient(url)), checks


def connect(address: str) -> Jobs:
    """Client for the jobs of the head at `address`. Raises ClusterError if it cannot run our jobs."""
    jobs, checks = examine(address)
    refuse(checks)
    assert jobs is not None
    return jobs


def examine_inside(
    jobs: Jobs, runtime_env: Mapping[str, Any], root: str | None, demand: GpuDemand | None = None
) -> list[Check]:
    """Findings from inside the cluster, for a job in workspace `root` with this `demand`."""
    patience = _INSTALL_S if runtime_env.keys() & {"pip", "uv", "conda"} else _PROBE_S
    return check_report(probe(jobs, runtime_env, root, timeout_s=patience), root, demand)


def check_cluster(address: str, workspace: str | None) -> list[Check]:
    """Findings of `owlrec doctor --cluster`, including a workspace as the cluster's machines see it."""
    jobs, checks = examine(address)
    if jobs is None:
        return checks
    root = workspace_root(workspace) if workspace else None
    with job_folder(None, code_packages()) as folder:
        environment = runtime_env(folder, installed=False)
        try:
            return [*checks, *examine_inside(jobs, environment, root)]
        except OwlRecError as error:
            return [*checks, Check("jobs", "fail", str(error), "see above")]


def follow_to_end(jobs: Jobs, id_: str) -> int:
    """Prints a job's log until it ends and returns its exit code; 130 if the caller stops following."""
    try:
        job = asyncio.run(follow(jobs, id_, partial(print, end="", flush=True)))
    except KeyboardInterrupt:
        note(f"job {id_} keeps running. Run the same command to follow it again, or `ray job stop {id_}` to stop it.")
        return 130
    code = exit_code(job)
    note(f"job {id_} {job.status.lower()}" + (f", exit code {code}: {job.message or ''}" if code else ""))
    return code
