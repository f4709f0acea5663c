"""Exactly once, whatever dies: seeded runs of a real job on a cluster of several nodes, each harmed in its own way.

`pytest tests/e2e/test_chaos.py --chaos-seeds 20` runs as many as the project's claim rests on; by default one does.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chaos  # type: ignore[import-not-found]
import psutil
import pytest

from owlrec.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.ray]
HARMS_PER_RUN = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--chaos-seeds")))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster for one test that kills drivers: Ray Data sets resources aside for a killed driver's dataset for
    minutes, so that the next job's pool would not grow meanwhile.
    """
    with started_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Any]:
    """A cluster for the tests whose drivers end well."""
    with started_cluster() as started:
        yield started


@contextmanager
def started_cluster() -> Iterator[Any]:
    """A head and two worker nodes on this machine, which jobs join by address."""
    from ray.cluster_utils import Cluster

    node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0}, shutdown_at_exit=False)
    for _ in range(2):
        started.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    started.wait_for_nodes()
    yield started
    started.shutdown()


def test_every_row_once_after_any_harm(cluster: Any, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    # Every harm gets its turn, and so does every pair of them, over enough seeds.
    harms = [chaos.HARMS[seed % len(chaos.HARMS)], *rng.sample(chaos.HARMS, HARMS_PER_RUN - 1)]
    server, folder, log = chaos.Oracle(), tmp_path / "ws", tmp_path / "log"
    recipe = tmp_path / "recipe.yaml"
    try:
        with chaos.small_disk(folder, "24m"):
            chaos.prepare(Workspace(folder))
            chaos.write_recipe(recipe, folder, server, cluster.address)
            lost_shards = harm(rng, cluster, harms, folder, recipe, log)
            assert chaos.submit(recipe, log).wait(timeout=120) == 0
            chaos.audit(recipe, server)
    except PermissionError as error:
        pytest.skip(str(error))
    finally:
        server.shutdown()
        server.server_close()
    # What was begun and not finished is asked again: a replica asks shard after shard, so that one shard a replica and
    # the rows of the next that fill up its queue bound what a death can cost.
    repeated = sum(server.asked.values()) - len(server.asked)
    bound = lost_shards * (chaos.shard_rows() + chaos.CONCURRENCY)
    print(f"seed {seed}: {', '.join(harms)}: {repeated} of {len(server.asked)} rows asked again, at most {bound}")
    assert repeated <= bound, f"{harms}: {repeated} rows were asked again, at most {bound} should be"


def harm(rng: random.Random, cluster: Any, harms: list[str], folder: Path, recipe: Path, log: Path) -> int:
    """Does each harm in the middle of a job, which is submitted again where one ends it; how many shards they may
    cost.
    """
    cost, job = 0, chaos.submit(recipe, log)
    for number, kind in enumerate(harms):
        running = chaos.wait_for_shards(folder, 2 + 5 * number + rng.randrange(3), job)
        time.sleep(rng.random() / 4)
        if kind == "kill replica":
            for pid in rng.sample(pids := chaos.replica_pids(), min(1, len(pids))):
                psutil.Process(pid).kill()
                cost += 1
        elif kind == "kill node":
            node = rng.choice(sorted(cluster.worker_nodes, key=lambda n: n.node_ip_address + n.unique_id))
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
            cost += chaos.REPLICAS
        elif kind == "second job":
            second = chaos.submit(recipe, log)
            assert second.wait(timeout=120) == 0, log.read_text()[-3000:]
        elif kind == "fill disk":
            chaos.fill(folder / "filler")
            if job.wait(timeout=120) and running:
                assert "Free some space" in log.read_text(), log.read_text()[-3000:]
            (folder / "filler").unlink()
            cost += chaos.REPLICAS
        else:
            chaos.kill_driver(job)
            cost += chaos.REPLICAS + (chaos.damage(rng, folder, kind) if kind != "kill driver" else 0)
        if job.poll() is not None:
            job = chaos.submit(recipe, log)
    assert job.wait(timeout=120) == 0, f"{harms}: the last job must end well: {log.read_text()[-3000:]}"
    return cost


def test_pool_grows_under_load_and_shrinks_when_little_is_left(shared_cluster: Any, tmp_path: Path) -> None:
    server, folder, log, recipe = (
        chaos.Oracle(answer_s=3.0),
        tmp_path / "ws",
        tmp_path / "log",
        tmp_path / "recipe.yaml",
    )
    chaos.prepare(Workspace(folder), slow_item=True)
    chaos.write_recipe(recipe, folder, server, shared_cluster.address, replicas=(1, 3))
    job, replicas = chaos.submit(recipe, log), []
    deadline = time.monotonic() + 240
    while job.poll() is None and time.monotonic() < deadline:
        replicas.append(len(chaos.replica_pids()))
        # However long a busy machine takes to start a second replica, the load lasts until it is there.
        server.answer_s = 3.0 if max(replicas) < 2 else 0.4
        time.sleep(0.25)
    assert job.poll() == 0, log.read_text()[-3000:]
    chaos.audit(recipe, server)
    server.shutdown()
    server.server_close()
    seen = [n for n, before in zip(replicas, [0, *replicas], strict=False) if n != before]
    print(f"replicas over time: {seen}")
    most = replicas.index(max(replicas))
    assert max(replicas) >= 2, f"the pool never grew: {seen}"
    assert min(replicas[most:]) < max(replicas), f"the pool never shrank: {seen}"
    assert sum(server.asked.values()) == len(server.asked), "growing and shrinking must repeat nothing"


def test_draining_node_gets_no_new_work_and_loses_no_row(shared_cluster: Any, tmp_path: Path) -> None:
    server, folder, log, recipe = chaos.Oracle(), tmp_path / "ws", tmp_path / "log", tmp_path / "recipe.yaml"
    chaos.prepare(Workspace(folder))
    chaos.write_recipe(recipe, folder, server, shared_cluster.address)
    job = chaos.submit(recipe, log)
    assert chaos.wait_for_shards(folder, 3, job)
    node = shared_cluster.worker_nodes.copy().pop()
    chaos.drain(shared_cluster.address, node.node_id, seconds=2)
    time.sleep(2)
    shared_cluster.remove_node(node, allow_graceful=False)
    shared_cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    assert job.wait(timeout=120) == 0, log.read_text()[-3000:]
    chaos.audit(recipe, server)
    server.shutdown()
    server.server_close()
