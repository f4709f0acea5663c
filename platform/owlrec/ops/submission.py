"""One job for each recipe and pipeline: submitting again finds the existing job, in whatever state it is.

The submission id is a fingerprint of what runs; Ray refuses an id that exists, so that of two that submit at the same
moment one starts the job and both follow it. A job that failed or was stopped is started again under the next number:
stages skip what is finished, so nothing is done twice. After a head without fault tolerance is lost, its list of jobs
is empty, and the same holds.

Ray is imported when a cluster is first asked, since it reads the caller's token at its import.
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
# What travels with a submitted job: the recipe, and OwlRec's own code unless the cluster's image has it.
#
# A folder is put together for Ray to upload as the job's working directory, so that a job does not depend on where it
# was submitted from, nor carries the data and environments that lie there. Ray names an upload by its contents: the
# same code and recipe go over the wire once.


RECIPE = "recipe.yaml"
CODE_ROOT = (
    "platform"  # of the code in the folder, as in the repository: relative, since it lies elsewhere on each node
)
_FOR_PACKAGES = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_packages() -> dict[str, Path]:
    """OwlRec's own code, the decoder included: folder by where it lies in a job's folder."""
    return {f"{CODE_ROOT}/{package.__name__}": Path(package.__path__[0]) for package in (owlrec, owlrec_decoding)}


def workspace_root(workspace: str) -> str:
    """A workspace as the cluster's machines should open it: theirs is another current folder."""
    return workspace if "://" in workspace else os.path.abspath(os.path.expanduser(workspace))


@contextmanager
def job_folder(recipe: Path | None, packages: Mapping[str, Path]) -> Iterator[Path]:
    """A folder with the recipe (if any) as `recipe.yaml` and each package below its name, removed after the block.

    packages: folder by where it should lie, such as platform/owlrec; empty where the cluster has OwlRec installed.
    """
    with TemporaryDirectory(prefix="owlrec-job-") as name:
        folder = Path(name)
        if recipe is not None:
            shutil.copyfile(recipe, folder / RECIPE)
        for place, package in packages.items():
            shutil.copytree(package, folder / place, ignore=_FOR_PACKAGES)
        yield folder


def refuse_local_paths(recipe: Recipe) -> None:
    """Raises RecipeError for data or a model by a path that only holds in the folder where the job is submitted."""
    values = recipe.model_dump(mode="json")
    named = [(f"source.{key}", value) for key, value in values["source"].items() if key != "type"]  # a source's name
    named += [(f"{key}.model", (values[key] or {}).get("model")) for key in ("engine", "encoder")]
    for setting, path in named:
        if isinstance(path, str) and path and "://" not in path and not os.path.isabs(path) and glob.glob(path):
            raise RecipeError(
                f"{setting}: {path} is a file or folder here, which a job's machines do not have. Give the absolute "
                "path of one that all of them mount, or a URI."
            )


def runtime_env(folder: Path, *, installed: bool, extra: Path | None = None) -> dict[str, Any]:
    """Ray's description of the environment that driver and workers get.

    installed: whether the cluster has OwlRec. extra: a YAML file with further fields (pip, uv, env_vars, …), for
    machines that lack dependencies. Raises RecipeError where it is not such a file.
    """
    fields = _read(extra) if extra else {}
    variables = {str(k): str(v) for k, v in (fields.pop("env_vars", None) or {}).items()}
    if not installed:
        # Before any OwlRec that an image may have: code of two versions must not mix.
        variables["PYTHONPATH"] = ":".join([CODE_ROOT, *filter(None, [variables.get("PYTHONPATH")])])
    return {"working_dir": str(folder), **fields} | ({"env_vars": variables} if variables else {})


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(fields, dict) or "working_dir" in fields or not isinstance(fields.get("env_vars") or {}, dict):
        raise RecipeError(
            f"{path}: must hold fields of a Ray runtime environment such as `pip: […]`, and no working_dir, which is "
            "the job's own."
        )
    return fields


# ----------------------------------------------------------------------------------------------------------- submission


ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_AGENT_PATIENCE_S = 60  # a head answers some seconds before it can start jobs
_HEAD_PATIENCE_S = 60  # without an answer, before a follower gives up


@dataclass(frozen=True)
class Submission:
    """A job as it should run; `name` is its submission id, without the number of its attempt."""

    name: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    cpus: float | None = None  # for the driver itself; None = on the head, whatever that has
    gpus: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """A job of a submission, and how it came about."""

    id: str
    state: Literal["started", "running", "finished"]


def submission_name(recipe: Recipe, pipeline: str, arguments: Sequence[str] = ()) -> str:
    """The same for the same recipe, pipeline and arguments, wherever and by whomever they are submitted.

    `recipe.ray` is left out: a job runs on the cluster that it is submitted to.
    """
    key = fingerprint(recipe.model_dump(mode="json", exclude={"ray"}), pipeline, list(arguments), __version__)
    return f"{pipeline.replace('_', '-')}-{recipe.name}-{key[:12]}"


def latest_attempt(jobs: Jobs, name: str) -> tuple[int, Any] | None:
    """The number and the details of the last job of this name: NAME is number 1, NAME-2 number 2. None without any."""
    found = {}
    for job in jobs.list_jobs():
        head, _, number = (job.submission_id or "").rpartition("-")
        if job.submission_id == name:
            found[1] = job
        elif head == name and number.isdigit():
            found[int(number)] = job
    return max(found.items(), key=lambda pair: pair[0]) if found else None


def existing(jobs: Jobs, name: str, *, again: bool = False) -> Attempt | None:
    """The running or the finished job of this name; None where one has to be started.

    again: a finished one does not count.
    """
    return _standing(latest_attempt(jobs, name), again)


def start(jobs: Jobs, submission: Submission, *, again: bool = False) -> Attempt:
    """Starts the next attempt, or finds the one that somebody else has started since we looked.

    Raises ClusterError where the head does not take it.
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
        except (RuntimeError, ValueError, OSError) as error:  # all that the client raises
            if "already exists" in str(error):
                return Attempt(id_, "running")
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not take the job: {_last_line(error)}") from None
        time.sleep(1)


async def follow(jobs: Jobs, id_: str, write: Callable[[str], None]) -> Any:
    """Writes the job's log from its beginning until it has ended; its details then.

    A broken connection is taken up again where it broke. Raises ClusterError where the head stays away.
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
        except (RuntimeError, OSError) as error:  # aiohttp's and requests' errors of connections are OSErrors
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now - silent_since > _HEAD_PATIENCE_S:
                raise ClusterError(
                    f"the head has not answered for {_HEAD_PATIENCE_S} s ({_last_line(error)}); what became of job "
                    f"{id_} is unknown. Once it is back, submit the same command again: a job that still runs is "
                    "followed, a lost one starts over and skips what is finished."
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
    """The code of the driver, as a shell would report it: 128 and the number of the signal that killed it."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code or 1
    return 128 - code if code < 0 else code


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------ preflight
# Can this cluster run this job? Found out before the job is started, so that no GPU is held by what must fail.
#
# Two looks: over HTTP at the head (is it one, may we, which Ray), then through a short job from inside
# (owlrec.ops.preflight_probe: Python, nodes, the workspace as every node sees it, what the autoscaler could bring).
# Findings are the doctor's Checks: `owlrec doctor --cluster` prints them, `owlrec submit` stops at the first that
# fails.


_HTTP_TIMEOUT_S = 10.0
SET_TOKEN = "export RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN (or its file as RAY_AUTH_TOKEN_PATH)"
NAME_DASHBOARD = "name the head's dashboard, such as http://HEAD:8265"


@dataclass(frozen=True)
class GpuDemand:
    """GPUs that a pipeline must have at once: `each` on one machine, `workers` times."""

    each: float
    workers: int
    setting: str  # of the recipe, that asks for them


def http_address(address: str) -> str:
    """The address with a scheme and without a slash at its end. Raises ClusterError where it is not HTTP."""
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "http", "https") or not rest:
        raise ClusterError(f"{address}: jobs are submitted over HTTP")
    return f"{scheme or 'http'}://{rest.rstrip('/')}"


def check_head(url: str, headers: Mapping[str, str]) -> list[Check]:
    """Whether a Ray head answers at `url`, lets us in, and runs the Ray that OwlRec is made for.

    headers: with the token, where there is one. Nothing after the first failure would make sense, so it is the last.
    """
    try:
        answer = httpx.get(f"{url}/api/version", headers=dict(headers), timeout=_HTTP_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = str(error) or type(error).__name__
        return [Check("head", "fail", f"no Ray head answers at {url} ({said})", f"start it, or {NAME_DASHBOARD}")]
    if answer.status_code == 401:
        return [Check("token", "fail", f"{url} asks for a token and got none", SET_TOKEN)]
    if answer.status_code == 403:
        renew = f"ask for its present one, then {SET_TOKEN}"
        return [Check("token", "fail", f"{url} refuses this token: it has expired or is another cluster's", renew)]
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        found = f"what answers at {url} is not a Ray head (status {answer.status_code})"
        return [Check("head", "fail", found, NAME_DASHBOARD)]
    head = Check("head", "ok", url)
    if version != (ours := metadata.version("ray")):
        fix = f"use a cluster of Ray {ours}: OwlRec is made for that version alone"
        return [head, Check("Ray", "fail", f"the cluster runs Ray {version}", fix)]
    return [head, Check("Ray", "ok", version)]


def gpu_demand(recipe: Recipe, pipeline: str) -> GpuDemand | None:
    """What the pipeline asks for, None where it needs no GPU."""
    ranking = recipe.ranking
    if pipeline in ("generate", "refresh", "score_pairs") and recipe.generate.engine_gpus:
        return GpuDemand(recipe.generate.engine_gpus, recipe.generate.min_replicas, "generate.engine_gpus")
    if pipeline in ("train_ctr", "sweep_ctr") and recipe.ctr.use_gpu:
        return GpuDemand(1, recipe.ctr.num_workers, "ctr.use_gpu")
    if pipeline == "tune_ranker" and ranking is not None and ranking.tuning.use_gpu:
        return GpuDemand(1, ranking.tuning.num_workers, "ranking.tuning.use_gpu")
    return None


def probe(jobs: Jobs, runtime_env: Mapping[str, Any], workspace: str | None, *, timeout_s: float) -> dict[str, Any]:
    """Runs the probe on the cluster and gives its report. Raises ClusterError where it does not end well."""
    command = "python -m owlrec.ops.preflight_probe" + (f" {shlex.quote(workspace)}" if workspace else "")
    id_ = start(jobs, Submission(f"preflight-{uuid.uuid4().hex[:12]}", command, runtime_env)).id
    deadline = time.monotonic() + timeout_s
    while (job := jobs.get_job_info(id_)).status not in ENDED:
        if time.monotonic() > deadline:
            jobs.stop_job(id_)
            raise ClusterError(
                f"the cluster did not run a job of no CPU and no GPU within {timeout_s:.0f} s ({job.message}). See "
                f"`ray job logs {id_}` and whether its head has memory left."
            )
        time.sleep(0.3)
    log = jobs.get_job_logs(id_)
    reports = [line[len(MARK) :] for line in log.splitlines() if line.startswith(MARK)]
    if not reports:
        last = "\n".join(f"  {line}" for line in [*log.splitlines(), *(job.message or "").splitlines()][-5:])
        raise ClusterError(
            f"the cluster cannot run OwlRec:\n{last}\nUse an image with OwlRec (cluster/Dockerfile.cpu, .gpu), or have "
            "Ray install what is missing: --runtime-env FILE with `pip: […]`. An image with OwlRec needs --installed."
        )
    report: dict[str, Any] = json.loads(reports[-1])
    return report


def judge(report: Mapping[str, Any], workspace: str | None, demand: GpuDemand | None) -> list[Check]:
    """What the probe's report means for a job that works in `workspace` and asks for `demand`."""
    if tuple(map(int, report["python"].split(".")[:2])) < (3, 11):
        fix = "use images with Python 3.11 or later"
        return [Check("Python", "fail", f"the cluster runs Python {report['python']}", fix)]
    nodes = report["nodes"]
    pythons = sorted({node["python"] for node in nodes if node["python"]} or {report["python"]})
    checks = [Check("Python", "ok", ", ".join(pythons)), Check("nodes", "ok", _machines(nodes))]
    if len({p.rpartition(".")[0] for p in pythons}) > 1:
        checks[0] = Check("Python", "fail", f"nodes run Python {' and '.join(pythons)}", "give all the same image")
    return [*checks, *_workspace(report, workspace), *([check_gpus(demand, report)] if demand else [])]


def check_gpus(demand: GpuDemand, report: Mapping[str, Any]) -> Check:
    """Whether the nodes have the GPUs, or an autoscaler could bring nodes that do."""
    wanted = f"{demand.setting} asks for {demand.workers} x {demand.each:g} GPU"
    fix = f"add a group of GPU nodes to the cluster, or change {demand.setting} in the recipe"
    if report["groups"] is None:
        return Check("GPUs", "warn", f"{wanted}; the operator's groups are not to be seen from the head", fix)
    have = sum(math.floor(node["resources"].get("GPU", 0) / demand.each) for node in report["nodes"])
    if have >= demand.workers:
        return Check("GPUs", "ok", f"{wanted}: there are enough")
    come = 0.0
    for group in report["groups"]:
        fit = math.floor(group["resources"].get("GPU", 0) / demand.each)
        come += fit * (math.inf if group["most"] is None else group["most"]) if fit else 0
    if max(have, come) >= demand.workers:
        return Check("GPUs", "ok", f"{wanted}: the autoscaler can bring them")
    count = sum(node["resources"].get("GPU", 0) for node in report["nodes"])
    none = "no autoscaler could bring more" if not report["groups"] else "its autoscaler could not bring enough"
    return Check("GPUs", "fail", f"{wanted}; the cluster has {count:g}, and {none}", fix)


def refuse(checks: Iterable[Check]) -> None:
    """Raises ClusterError with the first finding that fails."""
    for check in checks:
        if check.ok == "fail":
            raise ClusterError(f"{check.found}. To fix it, {check.fix}.")


def _workspace(report: Mapping[str, Any], workspace: str | None) -> list[Check]:
    problems = [f"on {n['address']}: {n['problem']}" for n in report["nodes"] if n["problem"]]
    if report["problem"]:
        problems = [f"on the head: {report['problem']}"]
    if problems:
        found = f"{workspace or 'the cluster'} is not usable from {len(problems)} of its machines; {problems[0]}"
        fix = "name a workspace that all machines share: a mounted folder's absolute path, or an s3:// or gs:// URI"
        return [Check("workspace", "fail", found, fix)]
    if workspace is None:
        return []
    return [Check("workspace", "ok", f"{workspace}: read and written by {len(report['nodes'])} of its machines")]


def _machines(nodes: list[Mapping[str, Any]]) -> str:
    cpus, gpus = (sum(node["resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs"


# ---------------------------------------------------------------------------------------------------------- the cluster
# Asked through Ray's client, with the caller's token.


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
        url = http_address(address)
        headers = get_auth_headers_if_auth_enabled({})
    except ClusterError as error:
        return None, [Check("head", "fail", str(error), NAME_DASHBOARD)]
    except AuthenticationError as error:
        return None, [Check("token", "fail", f"no token: {str(error).split('. ')[0]}", SET_TOKEN)]
    checks = check_head(url, headers)
    return (None if checks[-1].ok == "fail" else JobSubmissionClient(url)), checks


def connect(address: str) -> Jobs:
    """A client of the jobs of the head at `address`. Raises ClusterError where that cannot take ours."""
    jobs, checks = examine(address)
    refuse(checks)
    assert jobs is not None
    return jobs


def examine_inside(
    jobs: Jobs, runtime_env: Mapping[str, Any], root: str | None, demand: GpuDemand | None = None
) -> list[Check]:
    """What the cluster is like from the inside, for a job in workspace `root` that asks for `demand`."""
    patience = _INSTALL_S if runtime_env.keys() & {"pip", "uv", "conda"} else _PROBE_S
    return judge(probe(jobs, runtime_env, root, timeout_s=patience), root, demand)


def check_cluster(address: str, workspace: str | None) -> list[Check]:
    """What `owlrec doctor --cluster` finds, a workspace as the cluster's machines see it included."""
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
    """Prints a job's log until it has ended, and gives its exit code; 130 where the caller stops following."""
    try:
        job = asyncio.run(follow(jobs, id_, partial(print, end="", flush=True)))
    except KeyboardInterrupt:
        note(f"job {id_} goes on. The same command follows it again; `ray job stop {id_}` ends it.")
        return 130
    code = exit_code(job)
    note(f"job {id_} {job.status.lower()}" + (f", exit code {code}: {job.message or ''}" if code else ""))
    return code
