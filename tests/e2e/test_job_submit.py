"""`ray job submit` to a head whose Python has OwlRec's dependencies but not OwlRec: the same rows as the local
command.
"""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A virtual environment that sees this one's packages through one .pth line, which skips the editable install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = subprocess.run([python, "-c", "import owlrec"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No module named 'owlrec'" in found.stderr
    return python


@pytest.fixture
def head(bare_python: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A local head with a dashboard, ended by the process group that it was started in."""
    # The agent that starts jobs listens on one fixed port by default, which the test run's own cluster holds already.
    dashboard, port, agent = _free_port(), _free_port(), _free_port()
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{bare_python.parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="owl", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [bare_python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
             f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            _await_port(dashboard, process)
            yield f"http://127.0.0.1:{dashboard}", env
        finally:
            leader = psutil.Process(process.pid)
            family = leader.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs([leader, *family], timeout=10)
            for left in alive:
                left.kill()
            process.wait()


def test_job_writes_the_rows_of_the_local_command(
    echo_recipe: Path, tmp_path: Path, bare_python: Path, head: tuple[str, dict[str, str]]
) -> None:
    address, _ = head
    local, job = tmp_path / "local", tmp_path / "job"
    for stage in ("prepare", "generate"):
        ran = subprocess.run(
            [sys.executable, "-m", f"pipelines.{stage}", "--recipe", str(echo_recipe), "--workspace", str(local)],
            cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        entrypoint = [
            str(bare_python),
            "-m",
            f"pipelines.{stage}",
            "--recipe",
            str(echo_recipe),
            "--workspace",
            str(job),
        ]
        submitted = _submit(bare_python, head, entrypoint)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    # A driver that joined the head has a Ray job id; one that started a cluster of its own inside the job has none.
    jobs = httpx.get(f"{address}/api/jobs/").json()
    (generated,) = [j["job_id"] for j in jobs if "pipelines.generate" in j["entrypoint"]]
    assert generated is not None
    rows = _rows(local)
    assert len(rows) == 180
    assert _rows(job) == rows


def test_standard_library_platform_wins_in_a_task_with_working_dir(
    bare_python: Path, head: tuple[str, dict[str, str]]
) -> None:
    """Ray puts the working directory, here the repository's root, first on the path; see tests/test_layout.py."""
    code = (
        "import ray; ray.init(); f = ray.remote(lambda: __import__('platform').system() + __import__('os').getcwd()); "
        "print(ray.get(f.remote()))"
    )
    submitted = _submit(bare_python, head, [str(bare_python), "-c", code])
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "Linux/" in submitted.stdout
    assert "working_dir_files" in submitted.stdout


def _submit(python: Path, head: tuple[str, dict[str, str]], entrypoint: list[str]) -> subprocess.CompletedProcess[str]:
    """Submits from the repository's root and waits; tries again while the head has no agent for jobs yet."""
    address, env = head
    command = [python, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--working-dir", "."]
    deadline = time.monotonic() + 90
    while True:
        submitted = subprocess.run(
            [*command, "--", *entrypoint], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
        )
        if "No available agent" not in submitted.stderr or time.monotonic() > deadline:
            return submitted
        time.sleep(1)


def _rows(workspace: Path) -> list[dict]:
    files = [f for f in workspace.glob("knowledge/*/*/shard-*.parquet") if f.parent.name in ("user", "item")]
    return sorted((r for f in files for r in pq.read_table(f).to_pylist()), key=lambda r: (r["kind"], r["id"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head ended while it started"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError("the head's dashboard did not answer within 60 s")
