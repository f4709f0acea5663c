"""Local heads as `ray start --head` starts them, beside the test run's own cluster: free ports, a mark to find every
process of theirs by, and an end that leaves none.
"""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent.parent
_MARK = "OWLREC_TEST_HEAD"


@dataclass(frozen=True)
class Head:
    """A running head. `env` is what a user's shell beside it would have."""

    address: str
    port: int
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    mark: str

    def processes(self) -> list[psutil.Process]:
        """All that were started for this head, its nodes' and jobs' too, wherever their parents went.

        Found by the mark, and as children of what has it: a process that gave itself a title has overwritten its own.
        """
        here = {p.pid: p for p in psutil.process_iter(["ppid"])}
        ours = {pid for pid, p in here.items() if _mark_of(p) == self.mark}
        while children := {pid for pid, p in here.items() if p.info["ppid"] in ours} - ours:
            ours |= children
        return [here[pid] for pid in ours]

    def kill_where(self, wanted: Callable[[psutil.Process], bool], most: int = 99) -> None:
        """kill -9 for at most so many of its processes, and one at least."""
        killed = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if killed < most and wanted(process):
                    process.kill()
                    killed += 1
        assert killed, "there is no such process"

    def jobs(self) -> list[dict]:
        """Of the jobs API."""
        token = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"} if "RAY_AUTH_TOKEN" in self.env else {}
        listed: list[dict] = httpx.get(f"{self.address}/api/jobs/", headers=token, timeout=30).json()
        return listed


def make_bare_python(folder: Path) -> Path:
    """A virtual environment that sees this one's packages through one .pth line, which skips the editable install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    imported = subprocess.run([python, "-c", "import owlrec"], cwd=folder, capture_output=True, text=True, check=False)
    assert "No module named 'owlrec'" in imported.stderr
    return python


@contextmanager
def local_head(
    python: Path, *, cpus: int = 2, env: Mapping[str, str] = {}, options: Sequence[str] = (), port: int | None = None
) -> Iterator[Head]:
    """A head with a dashboard for the block. env: in its processes, and in those of a user beside it."""
    # The agent that starts jobs listens on one fixed port by default, which the test run's own cluster holds already.
    dashboard, agent, mark = free_port(), free_port(), uuid.uuid4().hex
    port = port or free_port()
    users = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{python.parent}:{os.environ['PATH']}", **env}
    with tempfile.TemporaryDirectory(prefix="owl", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
             f"--num-cpus={cpus}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--temp-dir={folder}", f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={100 * 2**20}",
             "--disable-usage-stats", *options],
            env=users | {_MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        head = Head(f"http://127.0.0.1:{dashboard}", port, users, process, mark)
        try:
            _await_dashboard(dashboard, process)
            yield head
        finally:
            end_head(head)


def kill_head(head: Head) -> None:
    """kill -9 for all at once, as when its machine is lost."""
    _kill(head.processes())
    head.process.wait()


def end_head(head: Head, patience_s: float = 5) -> list[psutil.Process]:
    """Ends a head as a service manager would. What has outlived it after `patience_s` is killed, and given back."""
    tree = head.processes()
    if head.process.poll() is None:
        head.process.send_signal(signal.SIGTERM)
        psutil.wait_procs(tree, timeout=patience_s)
    left = [p for p in {*tree, *head.processes()} if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    _kill(left)
    head.process.wait()
    return left


def knowledge_rows(workspace: Path) -> list[dict]:
    """What `generate` wrote about users and items, in order."""
    files = [f for f in workspace.glob("knowledge/*/*/*.parquet") if f.parent.name in ("user", "item")]
    return sorted((r for f in files for r in pq.read_table(f).to_pylist()), key=lambda r: (r["kind"], r["id"]))


PATIENCE = 4


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Fails with `what` where that takes longer, on two cores that other lanes of the suite use as well: than
    PATIENCE times as long. A machine that is suspended meanwhile costs none."""
    for _ in range(round(PATIENCE * seconds / 0.2)):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {PATIENCE * seconds} s")


def owlrec(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The `owlrec` command, from a user's folder that is no checkout."""
    command = owlrec_command(*arguments)
    return subprocess.run(command, cwd="/", env=head.env, capture_output=True, text=True, check=False)


def owlrec_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "owlrec", *arguments]


def free_port() -> int:
    """Below 10000: above that, Ray's workers take ports of their own."""
    while True:
        with socket.socket() as probe:
            port = 6400 + uuid.uuid4().int % 3500
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _await_dashboard(port: int, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, "the head ended while it started"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, 60, "the head's dashboard")


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_MARK)
    except psutil.Error:
        return None
