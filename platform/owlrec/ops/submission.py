"""One job for each recipe and pipeline: whoever submits it again finds the job that is there, in whatever state it is.

The submission id is a fingerprint of what runs; Ray refuses an id that exists, so that of two that submit at the same
moment one starts the job and both follow it. A job that failed or was stopped is begun anew under the next number:
stages skip what is finished, so nothing is done twice. After a head without fault tolerance is lost, its list of jobs
is empty, and the same holds.

This module speaks to Ray's JobSubmissionClient and imports no Ray.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from owlrec import __version__
from owlrec.errors import ClusterError
from owlrec.recipe import Recipe
from owlrec.storage import fingerprint

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_AGENT_PATIENCE_S = 60  # a head answers some seconds before it can start jobs
_HEAD_PATIENCE_S = 60  # without an answer, before a follower gives up


class Jobs(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def list_jobs(self) -> list[Any]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def submit_job(self, **options: Any) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


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
    print_ = fingerprint(recipe.model_dump(mode="json", exclude={"ray"}), pipeline, list(arguments), __version__)
    return f"{pipeline.replace('_', '-')}-{recipe.name}-{print_[:12]}"


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
                    "followed, a lost one starts anew and skips what is finished."
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
