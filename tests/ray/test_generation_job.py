"""The Ray Data job: same rows as without Ray, resumable, and silent where all is done."""

import pytest

from owlrec.errors import EngineError
from owlrec.generation import EchoEngineConfig, HttpEngineConfig
from owlrec.generation.batch import GenerateConfig, build_job, check_dead_share, generate
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.shards import finished_shard, plan_shards, read_knowledge
from owlrec.prompting.rows import PromptConfig
from owlrec.scenario import get_scenario
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


def test_dead_server_stops_the_run_with_its_reason(small_world: Workspace) -> None:
    down = HttpEngineConfig(type="http", base_url="http://127.0.0.1:1/v1", model="m", max_attempts=1)
    job = job_for(down)
    shards = plan_shards(small_world)
    generate(small_world, job, down, GenerateConfig(), shards)
    manifests = [m for s in shards if (m := finished_shard(small_world, job, s))]
    with pytest.raises(EngineError, match=r"70 of 70 rows failed(.|\n)*RequestFailed: ConnectError"):
        check_dead_share(small_world, job, manifests, GenerateConfig())
