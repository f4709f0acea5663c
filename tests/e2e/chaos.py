"""A generation job on a cluster of several nodes that is harmed in every way that a seed picks, and the audit after it.

The LLM is an HTTP server in the test's own process: it counts what it is asked, so that work done twice is seen, and
the job under test is the real command with nothing added.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pyarrow as pa
from processes import command_lines

from owlrec import schema
from owlrec.generation.job import build_job, dead_file, read_knowledge, table_inputs
from owlrec.ids import shard_of
from owlrec.recipe import load_recipe
from owlrec.runner import pending_shards
from owlrec.shards import finish_stage
from owlrec.workspace import Workspace

USERS, ITEMS, SHARDS = 240, 120, 16
REPLICAS, CONCURRENCY = 2, 5
ANSWER_S = 0.08
HARMS = ("kill replica", "kill node", "kill driver", "fill disk", "truncate file", "corrupt card", "second job")
SLOW, SLOW_S = "takes long", 25.0  # in a title
POISON = "never answers"  # in a title: the server refuses it, and its row must end as a dead letter


class Oracle(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers slowly and remembers every question."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        self.answer_s = answer_s
        self.asked: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client may break its connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        time.sleep(SLOW_S if SLOW in prompt else self.server.answer_s)  # type: ignore[attr-defined]
        self.server.asked[prompt] += 1  # type: ignore[attr-defined]
        if POISON in prompt:
            self._reply(400, {"error": "no"})
            return
        text = "The viewer enjoys slow stories with wry humor, since most of what was rated highly is told that way."
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        self._reply(200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 20}})

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def shard_rows() -> int:
    """Rows of the largest shard."""
    sizes = [
        np.bincount(shard_of(np.arange(start, start + rows), n), minlength=n).max()
        for start, rows, n in ((0, USERS, SHARDS), (1000, ITEMS, SHARDS // 2))
    ]
    return int(max(sizes))


def prepare(workspace: Workspace, *, slow_item: bool = False) -> None:
    """Tables of USERS users and ITEMS items, one of which no server will answer.

    slow_item: one more takes as long as nearly all others together, so that a replica works alone at the end.
    """
    strange = {7: f"Film that {POISON}"} | ({3: f"Film that {SLOW}"} if slow_item else {})
    items = pa.table(
        {
            "item_id": pa.array(range(1000, 1000 + ITEMS), pa.int64()),
            "raw_id": [str(i) for i in range(ITEMS)],
            "title": [strange.get(i, f"Film {i}") for i in range(ITEMS)],
        }
    )
    users = pa.table(
        {"user_id": pa.array(range(USERS), pa.int64()), "raw_id": [str(i) for i in range(USERS)], "age": ["30"] * USERS}
    )
    histories = pa.table(
        {
            "user_id": users["user_id"],
            "as_of": pa.array([1_000_000_000_000] * USERS, pa.int64()),
            # Two titles and a rating tell every user's prompt from all others.
            "items": pa.array([[1008 + u % 100, 1008 + u % 97] for u in range(USERS)], pa.list_(pa.int64())),
            "ratings": pa.array([[1.0 + u % 5, 1.0 + u % 3] for u in range(USERS)], pa.list_(pa.float32())),
            "passed": pa.array([[]] * USERS, pa.list_(pa.int64())),
        },
        schema=schema.HISTORIES,
    )
    workspace.write_table("users", users, key="user_id", n_shards=SHARDS)
    workspace.write_table("histories", histories, key="user_id", n_shards=SHARDS)
    workspace.write_table("items", items, key="item_id", n_shards=SHARDS // 2)
    finish_stage(workspace, "prepare", "c" * 64)


def write_recipe(
    path: Path, workspace: Path, server: Oracle, address: str, replicas: tuple[int, int] = (REPLICAS, REPLICAS)
) -> None:
    """A job of at least and at most so many replicas on the cluster at `address`."""
    host, port = server.server_address[:2]
    path.write_text(
        f"""
name: chaos
scenario: movies
workspace: {workspace}
source: {{type: movielens-100k}}
engine: {{type: http, base_url: "http://{host}:{port}/v1", model: oracle, concurrency: {CONCURRENCY}, max_attempts: 2}}
generate: {{replicas: [{replicas[0]}, {replicas[1]}], engine_cpus: 1, max_dead_share: 0.1}}
ray: "{address}"
"""
    )


def submit(recipe: Path, log: Path) -> forked.Forked:
    """The command that a user would type, again and again."""
    return forked.owlrec("run", str(recipe), "--only", "generate", log=log)


def kill_driver(process: forked.Forked) -> None:
    """kill -9 for a driver. Its workers belong to the cluster, which notices."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def replica_pids() -> list[int]:
    """The engine actors of the cluster that this process started."""
    lines = command_lines(psutil.Process().children(recursive=True))
    return [process.pid for process, line in lines.items() if "ray::" in line and "_Actor" in line]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, so that it can be filled; raises OSError where mounting is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise PermissionError("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def wait_for_shards(workspace: Path, number: int, process: forked.Forked, timeout_s: float = 60) -> bool:
    """Waits until so many shards are done; False where the command ended before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if len(list(workspace.glob("knowledge/*/cards/*/*/*.json"))) >= number:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    raise AssertionError(f"{number} shards were not done within {timeout_s} s")


def damage(rng: random.Random, workspace: Path, how: str) -> int:
    """Harms the files of one finished shard; how many shards that undoes."""
    cards = sorted(workspace.glob("knowledge/*/cards/*/*/*.json"))
    if not cards:
        return 0
    card = rng.choice(cards)
    if how == "corrupt card":
        data = bytearray(card.read_bytes())
        data[: len(data) // 2] = os.urandom(len(data) // 2)
        card.write_bytes(data)
    else:
        file = card.parents[3] / card.parents[1].name / f"{card.stem}.parquet"
        with file.open("r+b") as opened:
            opened.truncate(rng.randrange(file.stat().st_size))
    return 1


def audit(recipe: Path, server: Oracle) -> None:
    """Every id once, as knowledge or as a dead letter; every checksum right; no claim left."""
    settings = load_recipe(recipe)
    workspace = Workspace(settings.workspace)
    job = build_job(
        settings.domain, settings.prompts, settings.sampling, settings.engine, settings.decoding, settings.quality
    )
    pending, cards = pending_shards(workspace, job.folder, table_inputs(workspace))
    assert not pending, f"missing, or not whole: {pending}"
    artifact = job.artifact(workspace)
    letters = [artifact.path(dead_file(name)) for name, card in cards.items() if card.rows_dead]
    dead = [row for file in letters for row in workspace.read_parquet(file).to_pylist()]
    for name, card in cards.items():
        for path, file in card.files.items():
            assert workspace.digest(artifact.path(path)) == file.sha256, f"{name}: {path} is not what its card says"
    assert not workspace.entries("claims"), "a claim is left"
    for kind, expected in (("user", range(USERS)), ("item", range(1000, 1000 + ITEMS))):
        ids = read_knowledge(workspace, job.folder, kind)["id"].to_pylist()
        ids += [r["id"] for r in dead if r["kind"] == kind]
        assert sorted(ids) == list(expected), f"{kind}: a row is lost or doubled"
    assert [(r["kind"], r["id"], r["error"]) for r in dead] == [("item", 1007, "RequestRefused")]
    assert len(server.asked) == USERS + ITEMS


def fill(filler: Path) -> None:
    """Writes until the disk is full."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def drain(address: str, node_id: str, seconds: int) -> None:
    """What a cloud's notice of preemption comes to: the node ends in so many seconds."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, capture_output=True)
