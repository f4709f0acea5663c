"""The sweep over engine settings: the walk over the grid, the sample, processes that fail, and what a recipe gets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from owlrec.cli import app
from owlrec.generation import EchoEngineConfig, VllmEngineConfig, vllm_engine
from owlrec.generation.engines import SamplingConfig
from owlrec.generation.job import build_job, sample_prompts, table_inputs
from owlrec.generation.vllm_engine import EngineSetting, MeasuredSetting, measure_setting, sweep
from owlrec.prompting.prompts import PromptConfig
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace, write_tombstones
from owlrec_decoding import DecodingConfig

ENGINE = VllmEngineConfig(type="vllm", model="/nowhere")
OFF = DecodingConfig()
TURNS = [("be brief", "a"), ("be brief", "b")]


class Machine:
    """An engine takes 128 rows and 4,096 tokens where nothing else is set; its rate is a product of factors."""

    def __init__(self, factors: Mapping[tuple[str, Any], float]) -> None:
        self.factors, self.measured = factors, list[EngineSetting]()

    def __call__(self, setting: EngineSetting) -> MeasuredSetting:
        self.measured.append(setting)
        rate = 10.0
        for name, value in setting:
            rate *= self.factors.get((name, value), 1.0)
        if not rate:
            return MeasuredSetting(setting=setting, error="out of memory")
        rows, tokens = setting.max_num_seqs or 128, setting.max_num_batched_tokens or 4096
        return MeasuredSetting(setting=setting, prompts_per_s=rate, rows=rows, step_tokens=tokens)


def test_each_axis_starts_from_the_best_so_far_and_failures_stay_in_the_table() -> None:
    machine = Machine(
        {
            ("max_num_seqs", 64): 0.5,
            ("max_num_seqs", 256): 2.0,
            ("max_num_batched_tokens", 2048): 0.0,
            ("max_num_batched_tokens", 8192): 1.01,  # noise
            ("precision", "fp8"): 1.5,
            ("decoding", "strict"): 0.9,
        }
    )
    rows, best = sweep(EngineSetting(), {}, machine, cpu=False)
    many = EngineSetting(max_num_seqs=256)
    fp8 = EngineSetting(max_num_seqs=256, precision="fp8")
    assert machine.measured == [
        EngineSetting(),
        EngineSetting(max_num_seqs=64),
        many,
        many.model_copy(update={"max_num_batched_tokens": 2048}),
        many.model_copy(update={"max_num_batched_tokens": 8192}),
        fp8,
        fp8.model_copy(update={"decoding": "strict"}),
    ]
    assert best.setting == fp8
    assert [row.setting for row in rows] == machine.measured
    assert [row.error for row in rows if row.error] == ["out of memory"]


def test_given_values_replace_those_of_their_axis_and_a_cpu_has_no_fp8() -> None:
    machine = Machine({("max_num_seqs", None): 0.0, ("max_num_seqs", 3): 0.1})
    _, best = sweep(EngineSetting(), {"max_num_seqs": [3, 3], "max_num_batched_tokens": []}, machine, cpu=True)
    assert best.setting == EngineSetting(max_num_seqs=3)  # the first one failed
    assert [(s.max_num_seqs, s.precision, s.decoding) for s in machine.measured] == [
        (None, "auto", "off"),
        (3, "auto", "off"),
        (3, "auto", "strict"),
    ]


def test_a_recipe_gets_the_keys_that_differ() -> None:
    engine = ENGINE.model_copy(update={"engine_args": {"gpu_memory_utilization": 0.8, "max_num_seqs": 4}})
    own = EngineSetting.of(engine, OFF)
    assert own == EngineSetting(max_num_seqs=4)
    assert own.lines(engine, OFF) == {}
    best = EngineSetting(max_num_seqs=8, max_num_batched_tokens=99, precision="fp8", decoding="strict")
    lines = best.lines(engine, OFF)
    assert lines == {
        "engine": {
            "max_num_seqs": 8,
            "precision": "fp8",
            "engine_args": {"gpu_memory_utilization": 0.8, "max_num_batched_tokens": 99},
        },
        "decoding": {"mode": "strict"},
    }
    pasted = VllmEngineConfig.model_validate(engine.model_dump() | lines["engine"])
    assert EngineSetting.of(pasted, DecodingConfig(**lines["decoding"])) == best


@pytest.mark.process
@pytest.mark.parametrize(
    ("child", "message"),
    [
        ("import os; os._exit(9)", "ended with 9"),
        ("import time; time.sleep(60)", "more than 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
    ],
)
def test_an_engine_that_dies_or_hangs_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str, message: str
) -> None:
    monkeypatch.setattr(vllm_engine, "_CHILD", child)
    monkeypatch.setattr(vllm_engine, "_SETTING_S", 1.0 if "sleep" in child else 60.0)
    setting = EngineSetting(max_num_seqs=2)
    row = measure_setting(setting, ENGINE, OFF, SamplingConfig(), TURNS, tmp_path / "log")
    assert (row.setting, row.prompts_per_s) == (setting, 0.0)
    assert message in row.error


@pytest.mark.process
def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    wrong = ENGINE.model_copy(update={"engine_args": {"quantization": "awq"}})
    for setting, engine, key in (
        (EngineSetting(), ENGINE, "/nowhere"),
        (EngineSetting(precision="fp8"), wrong, "quant"),
    ):
        assert key in measure_setting(setting, engine, OFF, SamplingConfig(), TURNS, tmp_path / "log").error


def sampled(workspace: Workspace, n: int, seed: int = 0) -> list[Any]:
    job = build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(), EchoEngineConfig(type="echo"))
    return sample_prompts(workspace, job, table_inputs(workspace), n, seed, len)


def test_the_sample_is_of_all_kinds_by_seed_in_the_order_of_asking(small_world: Workspace) -> None:
    prompts = sampled(small_world, 14)
    texts = [(prompt.system, prompt.text) for prompt in prompts]
    assert len(set(texts)) == 14
    assert texts == sorted(texts)
    kinds = [shard.kind for shard in table_inputs(small_world)]
    assert [prompt.kind for prompt in prompts].count("user") == round(14 * kinds.count("user") / len(kinds))
    assert sampled(small_world, 14) == prompts
    assert sampled(small_world, 14, seed=1) != prompts
    assert len(sampled(small_world, 1000)) == 70  # all there are


def test_forgotten_users_are_not_sampled(small_world: Workspace) -> None:
    write_tombstones(small_world, np.arange(1, 40))
    users = [prompt.id for prompt in sampled(small_world, 1000) if prompt.kind == "user"]
    assert users == [40]


def test_the_command_prints_a_table_and_the_recipes_lines(
    small_world: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, machine = tmp_path / "r.yaml", Machine({("max_num_seqs", 256): 2.0, ("decoding", "strict"): 0.0})
    values = {
        "name": "t",
        "scenario": "movies",
        "workspace": str(small_world.root),
        "source": {"type": "movielens-100k"},
    }
    recipe.write_text(yaml.safe_dump({**values, "engine": {"type": "vllm", "model": "smollm2-135m"}}))
    asked = []

    def measure(setting: EngineSetting, *job: Any) -> MeasuredSetting:
        asked.append(job[3])
        return machine(setting)

    monkeypatch.setattr("owlrec.runs.stages.measure_setting", measure)
    monkeypatch.setattr("owlrec.runs.stages.on_cpu", lambda: True)
    monkeypatch.setattr(VllmEngineConfig, "token_counter", lambda self: len)
    arguments = ["sweep-engine", str(recipe), "--prompts", "20", "--max-num-batched-tokens", "512"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert yaml.safe_load(shown.stdout[shown.stdout.index("engine:\n") :]) == {"engine": {"max_num_seqs": 256}}
    for word in ("fastest", "out of memory", "--prompts 1024"):
        assert word in shown.stdout
    assert all(len(turns) == 20 + vllm_engine.WARM_UP for turns in asked)
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert printed["recipe"] == {"engine": {"max_num_seqs": 256}}
    assert printed["best"]["prompts_per_s"] == 20
    assert [row["error"] for row in printed["settings"]].count("out of memory") == 1
    unknown = CliRunner().invoke(app, [*arguments, "--decoding", "strikt"])
    assert (unknown.exit_code, "'strict'" in unknown.stderr) == (1, True)


def test_only_vllm_has_settings_to_sweep(small_world: Workspace, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    values = {
        "name": "t",
        "scenario": "movies",
        "workspace": str(small_world.root),
        "source": {"type": "movielens-100k"},
    }
    recipe.write_text(yaml.safe_dump({**values, "engine": {"type": "echo"}}))
    refused = CliRunner().invoke(app, ["sweep-engine", str(recipe)])
    assert (refused.exit_code, "engine.type" in refused.stderr) == (1, True)
