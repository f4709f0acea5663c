"""A submission is one job: found while it runs, reported once it has succeeded, restarted if it failed."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from owlrec.errors import ClusterError, RecipeError
from owlrec.ops import submission
from owlrec.ops.submission import (
    RECIPE,
    Attempt,
    Submission,
    existing,
    exit_code,
    follow,
    job_folder,
    refuse_local_paths,
    runtime_env,
    start,
    submission_name,
)
from owlrec.recipe import Recipe, load_recipe

JOB = Submission("generate-shop-0123", "python -m owlrec run --only generate", {"working_dir": "/x"})


@dataclass
class Details:
    submission_id: str | None
    status: str
    driver_exit_code: int | None = None


@dataclass
class FakeJobs:
    """A head that refuses an id it knows, as Ray's does. `chunks` are what each connection to a log yields."""

    jobs: list[Details] = field(default_factory=list)
    refusals: list[Exception] = field(default_factory=list)
    chunks: list[list[Any]] = field(default_factory=list)
    ends_after: int = 1  # connections, until the job has succeeded
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def list_jobs(self):
        return self.jobs

    def submit_job(self, **options):
        if self.refusals:
            raise self.refusals.pop(0)
        if any(job.submission_id == options["submission_id"] for job in self.jobs):
            raise RuntimeError(f"ValueError: Job with submission_id {options['submission_id']} already exists.")
        self.submitted.append(options)
        self.jobs.append(Details(options["submission_id"], "PENDING"))
        return options["submission_id"]

    def get_job_info(self, job_id):
        self.ends_after -= 1
        return Details(job_id, "SUCCEEDED" if self.ends_after <= 0 else "RUNNING")

    async def tail_job_logs(self, job_id):
        for chunk in self.chunks.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
    monkeypatch.setattr(submission, "time", clock)  # that module's, not asyncio's


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "shop",
        "scenario": "books",
        "workspace": "/w",
        "source": {"type": "movielens-100k"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**values, "engine": {"type": "echo"}, **changes}))
    return load_recipe(tmp_path / "r.yaml")


def test_the_name_is_of_what_runs_and_not_of_where(tmp_path):
    usual = submission_name(recipe(tmp_path), "train_ctr")
    assert usual.startswith("train-ctr-shop-")
    assert submission_name(recipe(tmp_path, ray="local[7]"), "train_ctr") == usual
    others = [
        submission_name(recipe(tmp_path), "generate"),
        submission_name(recipe(tmp_path), "train_ctr", ["--retry-dead"]),
        submission_name(recipe(tmp_path, workspace="/v"), "train_ctr"),
        submission_name(recipe(tmp_path, engine={"type": "echo", "answer_tokens": 9}), "train_ctr"),
    ]
    assert len({usual, *others}) == 5


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_running_job_is_found(status):
    jobs = FakeJobs([Details(JOB.name, "FAILED"), Details(f"{JOB.name}-2", status), Details(None, "RUNNING")])
    assert existing(jobs, JOB.name) == Attempt(f"{JOB.name}-2", "running")


def test_a_finished_job_is_reported_unless_asked_for_again():
    jobs = FakeJobs([Details(JOB.name, "SUCCEEDED")])
    assert existing(jobs, JOB.name) == Attempt(JOB.name, "finished")
    assert existing(jobs, JOB.name, again=True) is None
    assert start(jobs, JOB) == Attempt(JOB.name, "finished")
    assert start(jobs, JOB, again=True) == Attempt(f"{JOB.name}-2", "started")


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_a_failed_job_is_started_again_under_the_next_number(status):
    jobs = FakeJobs(
        [Details(JOB.name, "FAILED"), Details(f"{JOB.name}-2", "FAILED"), Details(f"{JOB.name}-10", status)]
    )
    assert existing(jobs, JOB.name) is None
    assert start(jobs, JOB) == Attempt(f"{JOB.name}-11", "started")
    assert jobs.submitted[0]["entrypoint"] == JOB.entrypoint


def test_names_that_only_begin_alike_are_others():
    jobs = FakeJobs([Details(f"{JOB.name}-more", "RUNNING"), Details("generate-shop", "RUNNING")])
    assert existing(jobs, JOB.name) is None
    assert start(jobs, JOB) == Attempt(JOB.name, "started")


def test_what_was_started_while_the_cluster_was_looked_at_is_followed():
    jobs = FakeJobs([Details(JOB.name, "FAILED")])
    assert existing(jobs, JOB.name) is None
    jobs.jobs.append(Details(f"{JOB.name}-2", "RUNNING"))
    assert start(jobs, JOB) == Attempt(f"{JOB.name}-2", "running")
    assert jobs.submitted == []


def test_of_two_at_the_same_moment_one_starts_the_job():
    """The second saw no job when it looked, and the head refuses its id."""
    jobs = FakeJobs(refusals=[RuntimeError(f"Job with submission_id {JOB.name} already exists. Please use another.")])
    assert start(jobs, JOB) == Attempt(JOB.name, "running")
    assert jobs.submitted == []


def test_a_head_that_is_not_ready_is_waited_for_and_a_refusal_is_told():
    jobs = FakeJobs(refusals=[RuntimeError("No available agent to submit job, please try again later.")] * 3)
    assert start(jobs, JOB).state == "started"
    with pytest.raises(ClusterError, match="did not accept the job: the package is too large"):
        start(FakeJobs(refusals=[RuntimeError("Traceback\nthe package is too large")]), JOB)


def test_a_broken_connection_is_taken_up_where_it_broke():
    jobs = FakeJobs(
        chunks=[["one\ntw", RuntimeError("closed")], ["one\n", "two\n"], ["one\ntwo\n", "three\n"]], ends_after=2
    )
    written: list[str] = []
    job = asyncio.run(follow(jobs, JOB.name, written.append))
    assert "".join(written) == "one\ntwo\nthree\n"
    assert job.status == "SUCCEEDED"


def test_a_head_that_stays_away_is_given_up_with_what_to_do(monkeypatch):
    moments = iter([0.0, 30.0, 61.0])
    monkeypatch.setattr(submission.time, "monotonic", lambda: next(moments))  # of _no_waiting's clock
    jobs = FakeJobs(chunks=[[ConnectionError("refused")]] * 3)
    with pytest.raises(ClusterError, match=f"job {JOB.name} is unknown"):
        asyncio.run(follow(jobs, JOB.name, lambda text: None))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("STOPPED", 0, 1),
    ],
)
def test_exit_codes_are_the_drivers(status, code, expected):
    assert exit_code(Details("x", status, code)) == expected


def test_code_travels_without_caches_and_before_an_installed_one(tmp_path):
    package = tmp_path / "owlrec"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "a.pyc").write_bytes(b"")
    (package / "a.py").write_text("")
    (tmp_path / "shop.yaml").write_text("name: shop")
    with job_folder(tmp_path / "shop.yaml", {"platform/owlrec": package}) as folder:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        assert files == ["platform/owlrec/a.py", RECIPE]
        environment = runtime_env(folder, installed=False)
        assert environment == {"working_dir": str(folder), "env_vars": {"PYTHONPATH": "platform"}}
    assert not folder.exists()


def test_on_an_image_with_owlrec_only_the_recipe_travels(tmp_path):
    (tmp_path / "shop.yaml").write_text("name: shop")
    with job_folder(tmp_path / "shop.yaml", {}) as folder:
        assert [p.name for p in folder.iterdir()] == [RECIPE]
        assert runtime_env(folder, installed=True) == {"working_dir": str(folder)}


def test_further_fields_are_added_and_the_working_directory_stays_ours(tmp_path):
    extra = tmp_path / "env.yaml"
    extra.write_text("pip: [lmdb]\nenv_vars: {PYTHONPATH: more, N: 3}")
    environment = runtime_env(tmp_path, installed=False, extra=extra)
    assert environment["pip"] == ["lmdb"]
    assert environment["env_vars"] == {"PYTHONPATH": "platform:more", "N": "3"}
    for wrong in ("working_dir: .", "- pip", "pip: [", "env_vars: [1]"):
        extra.write_text(wrong)
        with pytest.raises(RecipeError, match=r"env\.yaml"):
            runtime_env(tmp_path, installed=False, extra=extra)


def test_paths_that_only_hold_here_are_refused(tmp_path, monkeypatch):
    (tmp_path / "clicks").mkdir()
    (tmp_path / "clicks" / "1.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    here = {"type": "table", "items": "/mnt/items.csv", "interactions": "clicks/*.parquet"}
    with pytest.raises(RecipeError, match=r"source\.interactions: clicks/\*\.parquet is a local file or folder"):
        refuse_local_paths(recipe(tmp_path, source=here))
    there = recipe(tmp_path, source={**here, "interactions": str(tmp_path / "clicks")})
    refuse_local_paths(there)
    (tmp_path / there.source.type).mkdir()  # a folder that happens to be called as the source is
    refuse_local_paths(there)
    refuse_local_paths(recipe(tmp_path, engine={"type": "vllm", "model": "Qwen/Qwen3-4B"}))
    with pytest.raises(RecipeError, match=r"engine\.model: clicks is"):
        refuse_local_paths(recipe(tmp_path, engine={"type": "vllm", "model": "clicks"}))
