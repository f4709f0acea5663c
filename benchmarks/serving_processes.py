"""The processes that serving is measured with: our server, its peers, the load generator."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.load import LoadResult, LoadSpec
from owlrec.releases import open_release
from owlrec.workspace import Workspace

PEERS = Path(__file__).parent / "serving_peers"


@contextmanager
def serving(workspace: Workspace, replicas: int = 1) -> Iterator[str]:
    """`owlrec serve` on the workspace; its address."""
    port = free_port()
    options = {"--port": port, "--replicas": replicas, "--max-replicas": replicas}
    with process([owlrec(), "serve", workspace.path(), *(str(word) for option in options.items() for word in option)]):
        for path in ("readyz", "explorer/readyz"):  # the latter comes last: nothing is started any more under load
            wait_for_answer(f"http://127.0.0.1:{port}/{path}")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def peer(script: str, python: str, workspace: Workspace, folder: Path, n: int) -> Iterator[str]:
    """A peer's server on the same rows; its address. The rows travel as one Parquet file."""
    import pyarrow.parquet as pq

    rows = folder / "rows.parquet"
    if not rows.exists():
        with open_release(workspace, verify=False) as release:
            ids = np.arange(n)
            texts = [k.text for k in release.store.get("user", ids) if k]
            vectors, _ = release.store.vectors("user", ids)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(pa.table({"user_id": ids, "text": texts, "vector": flat}), rows)
    port = free_port()
    with process([python, str(PEERS / script), str(rows), str(port)], cwd=folder):
        wait_for_port(port, 1800)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def process(command: list[str], cwd: Path | None = None) -> Iterator[None]:
    """Runs a command for the block, and ends it with all that it started."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def load(job: LoadSpec, **changes: object) -> LoadResult:
    """Runs the load generator as a process of its own. changes: of the job."""
    job = job.model_copy(update=changes)
    command = [sys.executable, "-m", "benchmarks.load"]
    done = subprocess.run(command, input=job.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the load generator failed:\n{done.stderr[-2000:]}")
    return LoadResult.model_validate_json(done.stdout)


def wait_for_answer(url: str, seconds: float = 300) -> None:
    """Until the address answers without an error."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def wait_for_port(port: int, seconds: float = 60) -> None:
    """Until somebody listens there."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def owlrec() -> str:
    """The command of this environment."""
    return str(Path(sys.executable).parent / "owlrec")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
