"""A job: what its fingerprint sees, every row exactly once, shards done only when whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from shard_runs import ECHO, dead_letters_file, run_shard, texts_file

from owlrec.errors import WorkspaceError
from owlrec.generation import (
    ENGINES,
    EchoEngineConfig,
    HttpEngineConfig,
    VllmEngineConfig,
    engine_fingerprint,
    token_counter,
)
from owlrec.generation.engines import Completion, Engine, SamplingConfig
from owlrec.generation.job import GenerationJob, build_job, table_inputs
from owlrec.prompting.prompts import PromptConfig
from owlrec.recipe import Recipe
from owlrec.runner import pending_shards
from owlrec.scenario import get_scenario
from owlrec.schema import KNOWLEDGE
from owlrec.shards import Shard, finish_stage
from owlrec.workspace import Workspace
from owlrec_decoding import DecodingConfig


def job(**changes: object) -> GenerationJob:
    parts = {
        "scenario": get_scenario("movies"),
        "prompts": PromptConfig(),
        "sampling": SamplingConfig(),
        "engine": ECHO,
    }
    return build_job(**(parts | changes))


def first_shard(workspace: Workspace, kind: str = "user") -> Shard:
    return next(shard for shard in table_inputs(workspace) if shard.kind == kind)


def test_all_shards_together_hold_every_id_once(small_world: Workspace) -> None:
    shards = list(table_inputs(small_world))
    cards = [run_shard(small_world, job(), shard) for shard in shards]
    tables = [small_world.read_parquet(texts_file(job(), s)) for s in shards]
    rows = pa.concat_tables(tables)
    assert rows.schema == KNOWLEDGE
    pairs = list(zip(rows["kind"].to_pylist(), rows["id"].to_pylist(), strict=True))
    expected = {("user", i) for i in range(1, 41)} | {("item", i) for i in range(100, 130)}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    assert sum(card.rows_in for card in cards) == 70
    assert sum(int(card.counts["output_tokens"]) for card in cards) == sum(rows["output_tokens"].to_pylist())


def test_a_new_engine_is_one_file_and_one_line(small_world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "parrot", "own_engine.ParrotConfig")
    values = {"name": "t", "scenario": "movies", "workspace": small_world.root, "source": {"type": "movielens-100k"}}
    engine = {"type": "parrot", "words": "The user likes quiet films about war, and films with a good score."}
    config, other, plucked = (
        Recipe.model_validate({**values, "engine": {**engine, **change}}).engine
        for change in ({}, {"words": "No."}, {"feathers": 0})
    )
    assert token_counter(config)("film") == 4
    assert engine_fingerprint(config) == engine_fingerprint(plucked) != engine_fingerprint(other)
    shard = first_shard(small_world)
    run_shard(small_world, job(engine=config), shard, config)
    texts = small_world.read_parquet(texts_file(job(engine=config), shard))["text"].to_pylist()
    assert set(texts) == {engine["words"]}


def test_shard_is_done_only_under_its_job_and_input(small_world: Workspace) -> None:
    inputs = table_inputs(small_world)
    shard = first_shard(small_world)
    one = {shard: inputs[shard]}
    assert pending_shards(small_world, job().folder, one)[0] == [shard]
    run_shard(small_world, job(), shard, inputs=inputs[shard])
    assert pending_shards(small_world, job().folder, one)[0] == []
    assert pending_shards(small_world, job(sampling=SamplingConfig(max_tokens=5)).folder, one)[0] == [shard]
    finish_stage(small_world, "prepare", "0" * 64)
    assert pending_shards(small_world, job().folder, {shard: table_inputs(small_world)[shard]})[0] == [shard]


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_damaged_knowledge_file_makes_its_shard_undone(small_world: Workspace, damage: str) -> None:
    shard = first_shard(small_world)
    run_shard(small_world, job(), shard)
    file = Path(small_world.path(texts_file(job(), shard)))
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert pending_shards(small_world, job().folder, {shard: "i"})[0] == [shard]


def test_too_long_prompts_go_to_the_dead_letters_with_a_reason(small_world: Workspace) -> None:
    shard = first_shard(small_world)
    short = EchoEngineConfig(type="echo", max_model_len=140)
    card = run_shard(small_world, job(), shard, short)
    dead = small_world.read_parquet(dead_letters_file(job(), shard))
    assert card.rows_dead == card.rows_in == dead.num_rows > 0
    assert card.rows_out == 0
    assert set(dead["error"].to_pylist()) == {"PromptTooLong"}
    assert "context of 140" in dead["message"][0].as_py()


def test_unreachable_server_fills_the_dead_letters_instead_of_stopping(
    small_world: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owlrec.generation.engines._BACKOFF_S", 0.01)
    shard = first_shard(small_world)
    down = HttpEngineConfig(type="http", base_url="http://127.0.0.1:1/v1", model="m", max_attempts=2)
    card = run_shard(small_world, job(), shard, down)
    dead = small_world.read_parquet(dead_letters_file(job(), shard))
    assert card.rows_dead == card.rows_in
    assert set(dead["error"].to_pylist()) == {"RequestFailed"}
    assert set(dead["attempts"].to_pylist()) == {2}


def test_row_with_nothing_to_ask_about_is_dead_not_lost(small_world: Workspace) -> None:
    items = small_world.read_table("items")
    blank = items.set_column(2, "title", pa.array([""] * items.num_rows)).drop_columns(["genres"])
    small_world.write_table("items", blank, key="item_id", n_shards=4)
    cards = [run_shard(small_world, job(), s) for s in table_inputs(small_world, ("item",))]
    assert sum(card.rows_dead for card in cards) == 30


def test_unprepared_workspace_says_what_to_run(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        table_inputs(workspace)


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": get_scenario("books")},
        {"prompts": PromptConfig(history_tokens=99)},
        {"sampling": SamplingConfig(temperature=0.5)},
        {"engine": HttpEngineConfig(type="http", base_url="http://x", model="m")},
    ],
)
def test_job_fingerprint_sees_all_that_shapes_a_text(change: dict) -> None:
    assert job(**change).fingerprint != job().fingerprint


def test_precision_of_an_engine_is_named_once_and_makes_another_job() -> None:
    model = {"type": "vllm", "model": "/m"}
    plain, fp8 = (VllmEngineConfig(**model, **more) for more in ({}, {"precision": "fp8"}))
    assert job(engine=plain).fingerprint != job(engine=fp8).fingerprint
    for twice, key in (({"kv_cache_dtype": "fp8"}, "engine_args.kv_cache_dtype"), ({"quantization": "awq"}, "quant")):
        with pytest.raises(ValidationError, match=key):
            VllmEngineConfig(**model, precision="fp8", engine_args=twice)
    with pytest.raises(ValidationError, match="dtype"):
        VllmEngineConfig(**model, precision="fp8", dtype="float32")


def test_job_fingerprint_ignores_speed_settings() -> None:
    assert job(engine=EchoEngineConfig(type="echo", latency_s=1)).fingerprint == job().fingerprint


@pytest.mark.parametrize("framework", ["once", "rlmrec", "trawl"])
def test_chosen_framework_asks_about_users_and_items_and_names_their_rows(
    small_world: Workspace, framework: str
) -> None:
    for shard in table_inputs(small_world):
        prompts = {}
        for name in ("kar", framework):
            chosen = job(prompts=PromptConfig(framework=name))
            run_shard(small_world, chosen, shard)
            table = small_world.read_parquet(texts_file(chosen, shard))
            assert set(table["framework"].to_pylist()) == {name}
            prompts[name] = set(table["prompt_sha256"].to_pylist())
        assert not prompts["kar"] & prompts[framework]


class _Recording(Engine):
    """Keeps what it is asked with; claims three drafted tokens a row, two accepted, one of them relaxed."""

    def __init__(self) -> None:
        self.extras: list[Any] = []

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        self.extras.append(extra)
        return Completion("text", 1, 1, "stop", drafted=3, accepted=2, relaxed=1)

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_rows_name_their_own_earlier_text_and_the_rule(small_world: Workspace) -> None:
    shard = first_shard(small_world)
    engine = _Recording()
    relaxed = job(decoding=DecodingConfig(mode="relaxed", min_prob=0.2))
    run_shard(small_world, relaxed, shard, engine)
    table = small_world.read_parquet(texts_file(relaxed, shard))
    assert sorted(engine.extras, key=lambda extra: extra["owlrec_document"]) == [
        {
            "owlrec_pools": [],
            "owlrec_document": i,
            "owlrec_mode": "relaxed",
            "owlrec_k": 2,
            "owlrec_min_prob": 0.2,
        }
        for i in table["id"].to_pylist()
    ]
    counts = [set(table[name].to_pylist()) for name in ("drafted", "accepted", "relaxed")]
    assert counts == [{3}, {2}, {1}]
    engine.extras.clear()
    run_shard(small_world, job(), shard, engine)
    assert set(engine.extras) == {None}


def test_lossless_drafting_makes_no_other_job_and_a_relaxed_rule_does() -> None:
    plain = job().fingerprint
    assert plain == job(decoding=DecodingConfig(mode="strict", min_prob=0.5)).fingerprint
    relaxed = {job(decoding=DecodingConfig(mode="relaxed", min_prob=p)).fingerprint for p in (0.1, 0.2)}
    assert len(relaxed | {plain}) == 3


def test_engine_options_that_shape_no_answer_make_no_other_job() -> None:
    fingerprints = {
        job(engine=VllmEngineConfig(type="vllm", model="smollm2-135m", engine_args=options)).fingerprint
        for options in (
            {},
            {"gpu_memory_utilization": 0.8},
            {"tensor_parallel_size": 2, "performance_mode": "throughput"},
        )
    }
    assert len(fingerprints) == 1
    quantized = VllmEngineConfig(type="vllm", model="smollm2-135m", engine_args={"quantization": "fp8"})
    assert job(engine=quantized).fingerprint not in fingerprints
