"""The Ray Data job: same rows as without Ray, resumable, and silent where all is done."""

import asyncio
import threading
import time

import pytest

from owlrec.errors import EngineError
from owlrec.generation import EchoEngineConfig, HttpEngineConfig, build_engine
from owlrec.generation.batch import GenerateConfig, build_job, check_dead_share, generate
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.ledger import Ledger
from owlrec.generation.shard_work import generate_shard
from owlrec.generation.shards import finished_shard, finished_shards, plan_shards, read_knowledge
from owlrec.prompting.rows import PromptConfig
from owlrec.scenario import get_scenario
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
ECHO = EchoEngineConfig(type="echo", latency_s=0.01)


def job_for(engine: object) -> object:
    return build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(), engine)


def test_two_engines_write_every_row_once(small_world: Workspace) -> None:
    job = job_for(ECHO)
    seen: list[int] = []
    generate(
        small_world, job, ECHO, GenerateConfig(min_replicas=2, max_replicas=2), plan_shards(small_world),
        on_shard=lambda m: seen.append(m.rows_in),
    )  # fmt: skip
    assert sum(seen) == 70
    assert sorted(read_knowledge(small_world, job.folder, "user")["id"].to_pylist()) == list(range(1, 41))
    assert sorted(read_knowledge(small_world, job.folder, "item")["id"].to_pylist()) == list(range(100, 130))


def test_only_pending_shards_are_touched(small_world: Workspace) -> None:
    job = job_for(ECHO)
    shards = plan_shards(small_world)
    generate(small_world, job, ECHO, GenerateConfig(), shards[:3])
    before = [finished_shard(small_world, job, s) for s in shards[:3]]
    generate(
        small_world, job, ECHO, GenerateConfig(), [s for s in shards if finished_shard(small_world, job, s) is None]
    )
    assert [finished_shard(small_world, job, s) for s in shards[:3]] == before
    assert len(read_knowledge(small_world, job.folder, "user")) == 40


def test_retry_of_the_dead_runs_beside_what_is_pending_and_asks_for_no_other_row(small_world: Workspace) -> None:
    short = EchoEngineConfig(type="echo", max_model_len=150)  # too short a context for some prompts, by their length
    job, shards = job_for(ECHO), plan_shards(small_world)
    first = generate(small_world, job, short, GenerateConfig(), shards[:5])
    dead = [m.shard for m in first.manifests if m.rows_dead]
    assert dead
    before = {m.shard.name: m for m in first.manifests}
    second = generate(small_world, job, ECHO, GenerateConfig(), shards[5:], retry_dead=dead)
    assert {m.shard.name for m in second.manifests} == {s.name for s in [*shards[5:], *dead]}
    assert sum(m.rows_dead for m in second.manifests) == 0
    assert len(finished_shards(small_world, job, shards)) == len(shards)
    users = read_knowledge(small_world, job.folder, "user")
    assert sorted(users["id"].to_pylist()) == list(range(1, 41))
    again = next(m for m in second.manifests if m.shard in dead)
    assert again.rows_in == before[again.shard.name].rows_in


def test_shards_that_another_run_holds_are_waited_for_not_done_twice(small_world: Workspace) -> None:
    job, shards = job_for(ECHO), plan_shards(small_world)
    other = Ledger(small_world, job, "another run")
    assert other.claim(shards[0])

    def finish_there() -> None:
        time.sleep(4)
        engine = build_engine(ECHO)
        asyncio.run(
            generate_shard(small_world, job, shards[0], engine, ItemCatalog.load(small_world), engine_name="there")
        )
        other.close()

    thread = threading.Thread(target=finish_there)
    thread.start()
    done = generate(small_world, job, ECHO, GenerateConfig(), shards)
    thread.join()
    assert {m.shard.name: m.engine == "there" for m in done.manifests} == {s.name: s == shards[0] for s in shards}


def test_dead_server_stops_the_run_with_its_reason(small_world: Workspace) -> None:
    down = HttpEngineConfig(type="http", base_url="http://127.0.0.1:1/v1", model="m", max_attempts=1)
    job = job_for(down)
    shards = plan_shards(small_world)
    generate(small_world, job, down, GenerateConfig(), shards)
    manifests = [m for s in shards if (m := finished_shard(small_world, job, s))]
    with pytest.raises(EngineError, match=r"70 of 70 rows failed(.|\n)*RequestFailed: ConnectError"):
        check_dead_share(small_world, job, manifests, GenerateConfig())
