"""Generation as a job: on Ray Data's actors every row once, dead rows again, and a dead server."""

import pytest

from owlrec.errors import EngineError
from owlrec.generation import EchoEngineConfig, HttpEngineConfig
from owlrec.generation.engines import SamplingConfig
from owlrec.generation.job import (
    GenerateConfig,
    GenerateStage,
    GenerationJob,
    build_job,
    check_dead_share,
    read_knowledge,
    table_inputs,
)
from owlrec.prompting.prompts import PromptConfig
from owlrec.runner import Pool, pending_shards, run_stage
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace

ECHO = EchoEngineConfig(type="echo", latency_s=0.01)
HERE = Pool(in_flight=4)


def job_for(engine: object) -> GenerationJob:
    return build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(), engine)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_two_engines_write_every_row_once(small_world: Workspace) -> None:
    job = job_for(ECHO)
    seen: list[int] = []
    pool = Pool(here=False, min_workers=2, max_workers=2, in_flight=4)
    stage, inputs = GenerateStage(job, ECHO), table_inputs(small_world)
    run_stage(small_world, stage, inputs, pool, lambda card: seen.append(card.rows_in))
    assert sum(seen) == 70
    assert sorted(read_knowledge(small_world, job.folder, "user")["id"].to_pylist()) == list(range(1, 41))
    assert sorted(read_knowledge(small_world, job.folder, "item")["id"].to_pylist()) == list(range(100, 130))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_retry_of_the_dead_runs_beside_what_is_pending_and_asks_for_no_other_row(small_world: Workspace) -> None:
    short = EchoEngineConfig(type="echo", max_model_len=150)  # too short a context for some prompts, by their length
    job, inputs = job_for(ECHO), table_inputs(small_world)
    first = run_stage(small_world, GenerateStage(job, short), dict(list(inputs.items())[:5]), HERE)
    dead = [shard for shard in inputs if shard.name in first and first[shard.name].rows_dead]
    assert dead
    second = run_stage(small_world, GenerateStage(job, ECHO), inputs, Pool(here=False, in_flight=4), again=dead)
    assert {name: second[name] for name in first if not first[name].rows_dead} == {
        name: card for name, card in first.items() if not card.rows_dead
    }
    assert sum(card.rows_dead for card in second.values()) == 0
    users = read_knowledge(small_world, job.folder, "user")
    assert sorted(users["id"].to_pylist()) == list(range(1, 41))
    for shard in dead:
        assert second[shard.name].rows_in == first[shard.name].rows_in
        assert second[shard.name].counts["rows_asked"] == first[shard.name].rows_dead


def test_dead_server_stops_the_run_with_its_reason(small_world: Workspace) -> None:
    down = HttpEngineConfig(type="http", base_url="http://127.0.0.1:1/v1", model="m", max_attempts=1)
    job, inputs = job_for(down), table_inputs(small_world)
    run_stage(small_world, GenerateStage(job, down), inputs, HERE)
    cards = pending_shards(small_world, job.folder, inputs)[1].values()
    with pytest.raises(EngineError, match=r"70 of 70 rows failed(.|\n)*RequestFailed: ConnectError"):
        check_dead_share(job.artifact(small_world), cards, GenerateConfig())
