"""A job that is submitted twice is one, and what a lost driver or a lost head leaves is taken up by submitting again.

The heads ask for a token, which their jobs and their users' commands must pass on.
"""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from heads import Head, kill_head, knowledge_rows, local_head, owlrec, owlrec_command, wait_until

from owlrec.recipe import load_recipe
from owlrec.runs.stages import prepare
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
SECRET = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts `owlrec` commands that go on while the test does something else."""
    running: list[subprocess.Popen[str]] = []

    def start(head: Head, *arguments: str) -> subprocess.Popen[str]:
        command = owlrec_command(*arguments)
        running.append(
            subprocess.Popen(
                command, cwd="/", env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_twice_is_once_and_lost_drivers_and_heads_cost_no_row(
    echo_recipe: Path, tmp_path: Path, started: Started, python: Path
) -> None:
    slow = "generate: {engine_cpus: 1}\n"
    echo_recipe.write_text(echo_recipe.read_text().replace("latency_s: 0.3", "latency_s: 6") + slow)
    settings, workspace = load_recipe(echo_recipe), tmp_path / "ws"
    prepare(settings, Workspace(settings.workspace))

    def new_head() -> AbstractContextManager[Head]:
        return local_head(python, env=SECRET)

    with new_head() as head:
        submit = ("submit", str(echo_recipe), "generate", "--address", head.address)
        refused_without_its_token(head, *submit)
        first = started(head, *submit)
        wait_until(lambda: len(generate_jobs(head)) > 0, 120, "the job")
        second = started(head, *submit)
        wait_until(lambda: "is already running" in (second.stdout.readline() if second.stdout else ""), 60, "the job")
        wait_until(lambda: shards(workspace) > 0, 120, "a shard")
        [job] = generate_jobs(head)
        head.kill_where(lambda p: p.cmdline()[1:4] == ["-m", "owlrec", "run"])
        assert [first.wait(), second.wait()] == [137, 137]
        done = shards(workspace)
        assert 0 < done < 12

        resumed, lines = started(head, *submit, "--no-preflight"), [""]

        def read_on() -> bool:
            lines.append(resumed.stdout.readline() if resumed.stdout else "")
            return "shards to do" in lines[-1]

        wait_until(read_on, 120, "what is to do")  # the job's log follows the job by seconds
        wait_until(lambda: shards(workspace) > done, 120, "a further shard")
        kill_head(head)
        resumed.kill()
        output = "".join(lines)
        assert f"job {job['submission_id']}-2 started" in output
        assert f"{12 - done} of 12 shards to do" in output
    done = shards(workspace)
    assert done < 12

    with new_head() as head:
        submit = (*submit[:-1], head.address, "--no-preflight")
        again = owlrec(head, *submit)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"job {job['submission_id']} started" in again.stdout  # a new head has heard of none
        assert f"{12 - done} of 12 shards to do" in again.stdout
        finished = owlrec(head, *submit)
        assert finished.returncode == 0
        assert "has already succeeded" in finished.stdout
    rows = [(row["kind"], row["id"]) for row in knowledge_rows(workspace)]
    assert len(rows) == len(set(rows)) == 180


def refused_without_its_token(head: Head, *submit: str) -> None:
    plain = {name: value for name, value in head.env.items() if name not in SECRET}
    said = {"requires a token": {"RAY_AUTH_MODE": "disabled"}, "has expired": {"RAY_AUTH_TOKEN": "b" * 64}}
    with ThreadPoolExecutor() as pool:  # at once, since each starts a command
        shells = [replace(head, env=plain | env) for env in said.values()]
        for words, refused in zip(said, pool.map(lambda shell: owlrec(shell, *submit), shells), strict=True):
            assert refused.returncode == 1
            assert words in refused.stderr


def generate_jobs(head: Head) -> list[dict]:
    return [job for job in head.jobs() if "owlrec run --only generate" in job["entrypoint"]]


def shards(workspace: Path) -> int:
    return len(list(workspace.glob("knowledge/*/cards/*/*/*.json")))
