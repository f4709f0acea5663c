"""The whole stage on a prepared workspace, with a tiny model: tuned on one word of the title, it ranks by that word."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from toy_taste import NOUNS, toy_texts  # type: ignore[import-not-found]
from worlds import write_samples

from owlrec import schema
from owlrec.ctr.experiment import SoftLabels
from owlrec.errors import EngineError, RecipeError, WorkspaceError
from owlrec.evaluation import auc, load_calibration
from owlrec.ranking.question_sets import read_results
from owlrec.ranking.samples import RankerRun, TuningConfig, TuningSettings
from owlrec.recipe import Recipe
from owlrec.runs.models import score_pairs
from owlrec.runs.models import tune_ranker as run
from owlrec.shards import finish_stage, finished_stage
from owlrec.workspace import Workspace


def prepare(workspace: Workspace) -> None:
    """60 users who watched old films so far; of new ones they like the bright."""
    rng = np.random.default_rng(0)
    titles = [f"{shade} {noun}" for shade in ("Bright", "Dark", "Old") for noun in NOUNS]
    ids = pa.array(range(len(titles)), pa.int64())
    items = pa.table({"item_id": ids, "raw_id": ids.cast(pa.string()), "title": titles})
    people = pa.array(range(60), pa.int64())
    users = pa.table({"user_id": people, "raw_id": people.cast(pa.string()), "gender": ["female", "male"] * 30})
    rows: list[dict[str, Any]] = []
    for user in range(60):
        split = "train" if user < 30 else "valid" if user < 42 else "test"
        for moment in range(6):
            item = int(rng.integers(2 * len(NOUNS)))
            history = rng.integers(2 * len(NOUNS), len(titles), 6).tolist()
            ratings = rng.integers(1, 6, 6).astype(float).tolist()
            row = {"user_id": user, "item_id": item, "label": float(item < len(NOUNS)), "timestamp": moment}
            outcomes = {"history_ratings": ratings, "history_labels": [1.0] * 6}
            rows.append({**row, "history": history, **outcomes, "split": split})
    workspace.write_table("users", users, key="user_id", n_shards=2)
    workspace.write_table("items", items, key="item_id", n_shards=2)
    write_samples(workspace, pa.Table.from_pylist(rows, schema=schema.SAMPLES))
    finish_stage(workspace, "prepare", "f" * 64)


def recipe_for(workspace: Workspace, model: str = "nowhere", **ranking: Any) -> Recipe:
    engine = {"type": "vllm", "model": model, "dtype": "float32", "max_model_len": 512, "threads": 1, "kv_cache_gib": 1}
    values: dict[str, Any] = {"name": "t", "scenario": "movies", "workspace": workspace.root, "engine": engine}
    values["ranking"] = {
        "data": {"shots": 120, "behaviors": 4, "shown": ["recent", "mixed"]},
        "tuning": {"learning_rate": 0.02, "epochs": 4},
        **ranking,
    }
    return Recipe.model_validate({**values, "source": {"type": "movielens-100k"}})


TUNING = TuningSettings(dtype="float32", learning_rate=0.02, batch_rows=16, epochs=4)
SETTINGS = RankerRun(tuning=TUNING, ways=("recent", "mixed"), valid_samples=40, test_samples=60)


@pytest.mark.ray
@pytest.mark.vllm
def test_the_stage_tunes_calibrates_and_evaluates(
    ray_local: None, workspace: Workspace, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(workspace)
    recipe = recipe_for(workspace, write_tiny_ranker(tmp_path / "model", toy_texts()))
    manifest = run(recipe, workspace, SETTINGS)
    assert finished_stage(workspace, "tune_ranker") == manifest
    counts = manifest.counts
    assert (counts["train_rows"], counts["valid_rows"], counts["test_rows"]) == (240, 80, 120)
    evaluations = {(j["model"], j["shown"]): j for j in workspace.read_json(manifest.outputs["evaluations"])}
    assert list(evaluations) == [(m, s) for m in ("zero-shot", "tuned") for s in ("recent", "mixed")]
    for shown in ("recent", "mixed"):
        tuned, plain = evaluations["tuned", shown], evaluations["zero-shot", shown]
        assert tuned["rows"] == 60
        assert tuned["auc"] > max(0.9, plain["auc"] + 0.1)
        assert tuned["log_loss"] < 0.5
    assert {"adapter_config.json", "adapter_model.safetensors", "ranker.json"} == set(
        workspace.names(manifest.outputs["adapter"])
    )
    assert "test split" in capsys.readouterr().out
    results = read_results(workspace)
    assert {(r.model, r.shots, r.behaviors, r.shown) for r in results} == {
        (model, shots, 4, shown) for model, shots in (("zero-shot", 0), ("tuned", 120)) for shown in ("recent", "mixed")
    }
    assert [r.auc for r in results if r.model == "tuned"] == [
        evaluations["tuned", s]["auc"] for s in ("mixed", "recent")
    ]

    assert run(recipe, workspace, SETTINGS) == manifest
    assert "already done" in capsys.readouterr().out

    # What CTR models learn from is the tuned model's answer, calibrated, about pairs that it was not tuned on, too.
    ctr = {"distillation": {"unlabeled": 2}}
    scored = score_pairs(Recipe.model_validate({**recipe.model_dump(), "ctr": ctr}), workspace)
    assert "tuned" in capsys.readouterr().out
    rows = [
        row
        for number in workspace.table_shards("samples")
        for row in SoftLabels(scored.outputs["soft_labels"], 0.5).read(workspace, number).to_pylist()
    ]
    assert {row["user_id"] for row in rows} == set(range(30))
    assert len(rows) == scored.counts["pairs"] > 30 * 6
    p, item = (np.array([row[name] for row in rows]) for name in ("p", "item_id"))
    new = item < 2 * len(NOUNS)
    assert auc((item[new] < len(NOUNS)).astype(float), p[new]) > 0.9
    beside = manifest.outputs["adapter"].rpartition("/")[0]
    calibration = load_calibration(workspace, f"{beside}/calibration-tuned-mixed.json")
    assert p.min() >= calibration.apply(np.array([0.0]))[0] - 1e-6
    assert p.max() <= calibration.apply(np.array([1.0]))[0] + 1e-6


def test_what_the_stage_lacks_is_named(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="no tables yet"):
        run(recipe_for(workspace), workspace)
    prepare(workspace)
    with pytest.raises(RecipeError, match=r"Add `ranking: \{\}`"):
        run(recipe_for(workspace).model_copy(update={"ranking": None}), workspace)
    echo = Recipe.model_validate({**recipe_for(workspace).model_dump(exclude={"engine"}), "engine": {"type": "echo"}})
    with pytest.raises(RecipeError, match="engine is echo, but ranking needs vLLM"):
        run(echo, workspace)


@pytest.mark.ray
def test_a_model_that_cannot_be_asked_is_named_by_the_scoring_actor(ray_local: None, tmp_path: Any) -> None:
    from owlrec.generation import VllmEngineConfig
    from owlrec.ranking.lora import score_questions

    engine = VllmEngineConfig(type="vllm", model=write_tiny_ranker(tmp_path, ["text"], template=None), threads=1)
    with pytest.raises(EngineError, match="no chat template") as raised:
        score_questions(engine, [("s", "t")], {"zero-shot": None}, log_path=str(tmp_path / "log"))
    assert "ray" not in str(raised.value)


def test_an_adapter_depends_on_what_it_learns_from_and_not_on_how_it_is_evaluated() -> None:
    def decided(run: RankerRun = SETTINGS, **ranking: Any) -> dict[str, Any]:
        section = recipe_for(Workspace("/tmp"), **ranking).ranking
        assert section is not None
        return section.decides_adapter(run)

    def tuned(**changes: Any) -> dict[str, Any]:
        return decided(replace(SETTINGS, tuning=replace(TUNING, **changes)))

    usual = decided()
    for same in ({"use_gpu": True}, {"checkpoint_steps": 3}, {"micro_tokens": 9}):
        assert tuned(**same) == usual
    assert decided(replace(SETTINGS, test_samples=7)) == usual
    for other in ({"rank": 4}, {"learning_rate": 1e-4}, {"seed": 1}, {"batch_rows": 8}, {"dtype": "bfloat16"}):
        assert tuned(**other) != usual
    for run_ in (replace(SETTINGS, valid_samples=41), replace(SETTINGS, seed=1)):
        assert decided(run_) != usual
    assert decided(data={"shots": 121}) != usual


def test_a_recipe_sets_some_of_the_tuning() -> None:
    settings = TuningConfig(epochs=4).settings(use_gpu=True)
    assert settings == TuningSettings(epochs=4, use_gpu=True, gradient_checkpointing=True)
    assert TuningConfig().settings() == TuningSettings()
