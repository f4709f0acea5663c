"""Fixtures that several test folders share: one local Ray cluster a test run, a small world of tables, a clean
cache.
"""

import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from processes import command_lines
from s3 import s3_server

from owlrec import schema
from owlrec.machine import cache_folder
from owlrec.shards import finish_stage
from owlrec.sources.outcomes import Labels
from owlrec.workspace import Workspace

# Before anything imports Ray or Hugging Face libraries: they read these once.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_ENABLE_STATE_TRACKING="0",
    RAY_prestart_worker_first_driver="0",  # idle workers without our PYTHONPATH, which nothing could run on
    RAY_worker_niceness="0",  # Ray's 15 would leave the cluster's workers a thirtieth of what the other lane gets
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("RAY_ADDRESS", None)
# How long an example takes hangs on who else computes.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")

ROOT = Path(__file__).resolve().parent.parent
STARTING = ("ray", "vllm", "e2e", "process")  # `make check` runs what has none of these markers
WATCHING = ("serving", "releases", "client")  # folders of tests that ask servers, and say how soon they must answer


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the chaos test and the fuzzer go on, and which lane of the suite runs."""
    parser.addoption("--chaos-seeds", type=int, default=1, help="seeded runs of tests/e2e")
    parser.addoption("--store-users", type=int, default=60, help="users of the chain in tests/e2e/test_object_store.py")
    parser.addoption("--fuzz-cases", type=int, default=200, help="requests of tests/serving/test_fuzz.py, at least")
    parser.addoption("--lane", choices=("main", "e2e", "beside"), help="of the suite: see tests/lanes.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Does not import what holds no test of the lane: the decoder's tests alone import vLLM, ten seconds of it."""
    lane = config.getoption("--lane")
    return True if lane and collection_path.suffix == ".py" and not may_hold(collection_path, lane) else None


def may_hold(path: Path, lane: str) -> bool:
    """Whether a file may hold tests of a lane, by its text; all may hold those of `beside`."""
    if lane == "beside" or not path.name.startswith("test_"):
        return True
    text = path.read_text()
    return (
        "mark.e2e" in text
        if lane == "e2e"
        else re.search(r"mark\.ray|ray_local", text) is not None or path.parent.name in WATCHING
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the lane that was asked for; what watches the clock comes last in its own, when another may be done."""
    wanted = config.getoption("--lane")
    if wanted is None:
        return
    lanes = {lane: [item for item in items if lane_of(item) == lane] for lane in ("main", "e2e", "beside")}
    for lane, theirs in lanes.items():
        assert all(may_hold(item.path, lane) for item in theirs), f"a test of {lane} would not be collected there"
    items[:] = sorted(lanes.pop(wanted), key=watches_the_clock)
    config.hook.pytest_deselected(items=[item for others in lanes.values() for item in others])


def lane_of(item: pytest.Item) -> str:
    """Whether a test runs whole commands, waits for a cluster or watches the clock, or computes.

    What uses the run's one cluster is in `main` whatever it runs: another lane would start a second one.
    """
    on_cluster = "ray_local" in item.fixturenames  # type: ignore[attr-defined]
    if item.get_closest_marker("e2e") and not on_cluster:
        return "e2e"
    return "main" if on_cluster or item.get_closest_marker("ray") or watches_the_clock(item) else "beside"


def watches_the_clock(item: pytest.Item) -> bool:
    return item.path.parent.name in WATCHING


@pytest.fixture(autouse=True)
def _only_computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts Python without one of the markers: `make check` would wait for its imports.

    The S3 server, which all tests share, is paid for once.
    """
    if any(map(request.node.get_closest_marker, STARTING)):
        return
    start = subprocess.Popen.__init__

    def refused(self: subprocess.Popen[bytes], args: Any, *rest: Any, **named: Any) -> None:
        if not isinstance(args, str) and str(args[0]) == sys.executable and "moto.server" not in args:
            pytest.fail(f"starts {args[:3]}: mark it `process`")
        start(self, args, *rest, **named)

    monkeypatch.setattr(subprocess.Popen, "__init__", refused)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """Fails the run if a process that it started outlives it: a test suite on a shared machine must clean up."""
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    # These two end with this process, whose pipe they read.
    ours = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    left = [p for p, line in command_lines(started).items() if not any(name in line for name in ours)]
    _, alive = psutil.wait_procs(left, timeout=20)
    names = [f"{p.pid} {line[:80]}" for p, line in command_lines(alive).items()]
    assert not names, f"processes left behind: {names}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of this run alone, since every fetch looks through all copies; converted models are everybody's."""
    models, folder = cache_folder("models"), tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(models)
    os.environ["OWLREC_CACHE"] = str(folder)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """The test run's one Ray cluster: logical CPUs enough for an actor pool beside a worker group on two cores."""
    import ray

    # Short, since Ray puts Unix sockets below it, whose paths are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="owl", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            _temp_dir=folder,
            log_to_driver=False,
            namespace="tests",
            _system_config={"metrics_report_interval_ms": 1000},  # metrics reach their page at once, not after 10 s
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of an S3 server on loopback that the environment names."""
    with s3_server("owlrec"):
        yield "owlrec"


@pytest.fixture
def s3_root(s3_bucket: str) -> str:
    """A prefix of its own in that bucket."""
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace(tmp_path / "ws")


@pytest.fixture
def small_world(workspace: Workspace) -> Workspace:
    """A prepared workspace: 40 users who watched some of 30 films, in 4 shards of users and 3 of items."""
    users = pa.table(
        {
            "user_id": pa.array(range(1, 41), pa.int64()),
            "raw_id": [str(i) for i in range(1, 41)],
            "gender": ["male", "female"] * 20,
            "age": [str(18 + i) for i in range(40)],
        }
    )
    items = pa.table(
        {
            "item_id": pa.array(range(100, 130), pa.int64()),
            "raw_id": [str(i) for i in range(100, 130)],
            "title": [f"Film {i} (19{70 + i % 30})" for i in range(30)],
            "genres": [["Drama", "War"] if i % 2 else ["Comedy"] for i in range(30)],
        }
    )
    histories = pa.table(
        {
            "user_id": users["user_id"],
            "as_of": pa.array([1_000_000_000_000 + i for i in range(40)], pa.int64()),
            "items": pa.array([[100 + (u + k) % 30 for k in range(5)] for u in range(40)], pa.list_(pa.int64())),
            "ratings": pa.array(
                [[float(1 + (u + k) % 5) for k in range(5)] for u in range(40)], pa.list_(pa.float32())
            ),
            "passed": pa.array([[]] * 40, pa.list_(pa.int64())),
        },
        schema=schema.HISTORIES,
    )
    workspace.write_table("users", users, key="user_id", n_shards=4)
    workspace.write_table("histories", histories, key="user_id", n_shards=4)
    workspace.write_table("items", items, key="item_id", n_shards=4)
    labels = Labels(rule="rating_above", rating_above=3)
    finish_stage(workspace, "prepare", "f" * 64, counts={"labels": labels.model_dump_json()})
    return workspace
