"""The sweep with real engines, each in a process of its own. What one that fails leaves: tests/generation."""

from pathlib import Path

import pytest
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]

from owlrec.recipe import Recipe
from owlrec.runs.stages import sweep_engine
from owlrec.workspace import Workspace

pytestmark = pytest.mark.vllm


def test_settings_are_measured_on_the_recipes_own_prompts(small_world: Workspace, tmp_path: Path) -> None:
    model = write_tiny_ranker(tmp_path / "model", ["A film that somebody may like."])
    engine = {"type": "vllm", "model": model, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8}
    engine |= {"kv_cache_gib": 1, "threads": 1}
    values = {"name": "t", "scenario": "movies", "workspace": small_world.root, "source": {"type": "movielens-100k"}}
    recipe = Recipe.model_validate({**values, "engine": engine, "sampling": {"max_tokens": 4}})
    axes = {"max_num_seqs": [], "max_num_batched_tokens": [], "decoding": ["strict"]}
    rows, best, _ = sweep_engine(recipe, small_world, axes, n_prompts=12)
    assert [row.setting.decoding for row in rows] == ["off", "strict"]
    for row in rows:
        assert (row.error, row.failed_rows, row.rows) == ("", 0, 8)
        assert row.prompts_per_s > 0
        assert row.output_tokens_per_s > 0
        assert row.cached_share > 0  # of the system turn
        assert 0.5 < row.cache_gib <= 1
    assert best in rows
