"""A cluster that grows for a batch, loses a machine in the middle, and shrinks when the batch is done.

A head without CPUs and with Ray's own autoscaler; its cloud is Ray's fake provider, which starts nodes as processes of
this machine (nothing else of it ships in the wheel, hence the configuration as an external provider).
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from heads import ROOT, Head, end_head, free_port, knowledge_rows, local_head, owlrec_command, wait_until
from processes import command_lines

from owlrec.recipe import load_recipe
from owlrec.runs.stages import prepare
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
HEAD_ID = "f" * 51 + "00000"
UP_S, DOWN_S = 30.0, 60.0  # the bars: for pending actors, after the last work
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
_LISTS = (*(f"{name}_commands" for name in _COMMANDS), "cluster_synced_files", "rsync_exclude", "rsync_filter")
_NOTHING = {  # keys that the monitor wants to find
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in _LISTS},
    "file_mounts_sync_continuously": False,
}


@pytest.fixture
def head(tmp_path: Path, python: Path) -> Iterator[Head]:
    """A head whose autoscaler may start two nodes of one CPU; all its processes are gone in the end."""
    from ray.util import get_node_ip_address

    port = free_port()
    small = {"CPU": 1, "object_store_memory": 80_000_000}
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},  # a name the provider knows
        "cpu": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {
        **dict.fromkeys(("launch_multiple", "use_node_id_as_ip", "disable_node_updaters"), True),
        "disable_launch_config_check": True,
        "type": "external",
        "module": PROVIDER,
        "gcs_address": f"{get_node_ip_address()}:{port}",
        "head_node_id": HEAD_ID,
    }
    scaling = {"max_workers": 2, "idle_timeout_minutes": 0.1, "upscaling_speed": 100, "cluster_name": "fake"}
    config = {**scaling, "provider": provider, "head_node_type": "ray.head.default", "available_node_types": types}
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump({**config, **_NOTHING}))
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        **dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), HEAD_ID),
        # As an image that has OwlRec. The fake nodes share one folder for what travels with a job, and each that starts
        # unpacks it anew: code in it would be gone for a moment from under an engine that is just importing it.
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}",
    }
    options = [f"--autoscaling-config={tmp_path / 'fake.yaml'}"]
    with local_head(python, cpus=0, env=env, options=options, port=port) as head:
        yield head


def test_nodes_come_for_pending_actors_and_go_when_idle_and_a_killed_one_costs_no_row(
    echo_recipe: Path, tmp_path: Path, head: Head
) -> None:
    two_engines = "{replicas: [2, 2], engine_cpus: 1}"
    recipe = echo_recipe.read_text().replace("latency_s: 0.3", "latency_s: 5") + f"generate: {two_engines}\n"
    echo_recipe.write_text(recipe)
    settings = load_recipe(echo_recipe)
    prepare(settings, Workspace(settings.workspace))
    wait_until(lambda: len(alive(head)) == 1, 30, "the head")
    assert {"raylet", "gcs_server"} <= {p.name() for p in head.processes()}  # the check for what is left sees them
    log = (tmp_path / "log").open("w+")
    # Its driver needs no CPU, of which the head has none.
    command = owlrec_command("submit", str(echo_recipe), "generate", "--address", head.address, "--installed")
    job = subprocess.Popen(command, cwd="/", env=head.env, stdout=log, stderr=log)
    try:
        wait_until(lambda: pending_actors(head) > 0 or len(alive(head)) > 1, 90, "engines to be asked for")
        asked = time.monotonic()
        wait_until(lambda: len(alive(head)) == 3, UP_S + 30, "two nodes")
        up_s = time.monotonic() - asked
        wait_until(lambda: finished_shards(tmp_path) > 0, 60, "a shard")
        kill_a_node(head)
        code = job.wait()
    finally:
        job.kill()
    ended = time.monotonic()
    wait_until(lambda: len(alive(head)) == machines(head) == 1, DOWN_S + 30, "the head alone")
    down_s = time.monotonic() - ended
    log.seek(0)
    assert code == 0, log.read()
    rows = [(row["kind"], row["id"]) for row in knowledge_rows(tmp_path / "ws")]
    assert len(rows) == len(set(rows)) == 180
    print(f"\nup {up_s:.1f} s after engines were asked for, down {down_s:.1f} s after the job")
    left = end_head(head, patience_s=120)
    assert left == []
    assert up_s < UP_S
    assert down_s < DOWN_S


def kill_a_node(head: Head) -> None:
    """kill -9 for the raylet of a node that has an engine: its workers die with it."""
    head.kill_where(lambda p: p.name() == "raylet" and p.environ().get("RAY_CLOUD_INSTANCE_ID") != HEAD_ID, most=1)


def alive(head: Head) -> list[str]:
    """Ids of nodes."""
    summary = httpx.get(f"{head.address}/nodes?view=summary", timeout=30).json()["data"]["summary"]
    return [n["raylet"]["nodeId"] for n in summary if n["raylet"]["state"] == "ALIVE"]


def machines(head: Head) -> int:
    """Nodes whose processes the provider has not ended yet: each has a log monitor, which outlives its raylet."""
    return sum("log_monitor.py" in line for line in command_lines(head.processes()).values())


def pending_actors(head: Head) -> int:
    """That wait for a node to run on."""
    query = "filter_keys=state&filter_predicates=%3D&filter_values=PENDING_CREATION"
    answer = httpx.get(f"{head.address}/api/v0/actors?{query}", timeout=30).json()
    return sum(a["class_name"].startswith("MapWorker") for a in answer["data"]["result"]["result"])


def finished_shards(folder: Path) -> int:
    return len(list(folder.glob("ws/knowledge/*/cards/*/*/*.json")))
