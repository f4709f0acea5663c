"""Can this cluster run this job? Found out before the job is started, so that no GPU is held by what must fail.

Two looks: over HTTP at the head (is it one, may we, which Ray), then through a short job from inside
(owlrec.ops.preflight_probe: Python, nodes, the workspace as every node sees it, what the autoscaler could bring).
Findings are the doctor's Checks: `owlrec doctor --cluster` prints them, `owlrec submit` stops at the first that fails.
"""

import json
import math
import shlex
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from owlrec.errors import ClusterError
from owlrec.ops.doctor import PINS, Check
from owlrec.ops.preflight_probe import MARK
from owlrec.ops.submission import ENDED, Jobs, Submission, start
from owlrec.recipe import Recipe

_RAY = PINS[0]
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
        found = f"what answers at {url} is no Ray head (status {answer.status_code})"
        return [Check("head", "fail", found, NAME_DASHBOARD)]
    head = Check("head", "ok", url)
    if not _RAY.allows(version):
        mend = f"use a cluster of Ray {_RAY.wanted}: OwlRec is made for that version alone"
        return [head, Check("Ray", "fail", f"the cluster runs Ray {version}", mend)]
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
        mend = "use images with Python 3.11 or later"
        return [Check("Python", "fail", f"the cluster runs Python {report['python']}", mend)]
    nodes = report["nodes"]
    pythons = sorted({node["python"] for node in nodes if node["python"]} or {report["python"]})
    checks = [Check("Python", "ok", ", ".join(pythons)), Check("nodes", "ok", _machines(nodes))]
    if len({p.rpartition(".")[0] for p in pythons}) > 1:
        checks[0] = Check("Python", "fail", f"nodes run Python {' and '.join(pythons)}", "give all the same image")
    return [*checks, *_workspace(report, workspace), *([check_gpus(demand, report)] if demand else [])]


def check_gpus(demand: GpuDemand, report: Mapping[str, Any]) -> Check:
    """Whether the nodes have the GPUs, or an autoscaler could bring nodes that do."""
    wanted = f"{demand.setting} asks for {demand.workers} x {demand.each:g} GPU"
    mend = f"add a group of GPU nodes to the cluster, or change {demand.setting} in the recipe"
    if report["groups"] is None:
        return Check("GPUs", "warn", f"{wanted}; the operator's groups are not to be seen from the head", mend)
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
    return Check("GPUs", "fail", f"{wanted}; the cluster has {count:g}, and {none}", mend)


def refuse(checks: Iterable[Check]) -> None:
    """Raises ClusterError with the first finding that fails."""
    for check in checks:
        if check.ok == "fail":
            raise ClusterError(f"{check.found}. To mend it, {check.mend}.")


def _workspace(report: Mapping[str, Any], workspace: str | None) -> list[Check]:
    problems = [f"on {n['address']}: {n['problem']}" for n in report["nodes"] if n["problem"]]
    if report["problem"]:
        problems = [f"on the head: {report['problem']}"]
    if problems:
        found = f"{workspace or 'the cluster'} is not usable from {len(problems)} of its machines; {problems[0]}"
        mend = "name a workspace that all machines share: a mounted folder's absolute path, or an s3:// or gs:// URI"
        return [Check("workspace", "fail", found, mend)]
    if workspace is None:
        return []
    return [Check("workspace", "ok", f"{workspace}: read and written by {len(report['nodes'])} of its machines")]


def _machines(nodes: list[Mapping[str, Any]]) -> str:
    cpus, gpus = (sum(node["resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs"
