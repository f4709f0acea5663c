"""The sweep with real engines and the packaged model: each in a process of its own."""

import pytest

from owlrec.recipe import Recipe
from owlrec.runs.stages import sweep_engine
from owlrec.workspace import Workspace

pytestmark = pytest.mark.vllm


def test_settings_are_measured_on_the_recipes_own_prompts(small_world: Workspace) -> None:
    engine = {"type": "vllm", "model": "smollm2-135m", "max_model_len": 512, "max_num_seqs": 8, "kv_cache_gib": 1}
    values = {"name": "t", "scenario": "movies", "workspace": small_world.root, "source": {"type": "movielens-100k"}}
    recipe = Recipe.model_validate({**values, "engine": engine, "sampling": {"max_tokens": 4}})
    # A step of two tokens cannot hold eight rows, which vLLM refuses.
    axes = {"max_num_seqs": [], "max_num_batched_tokens": [2], "decoding": ["strict"]}
    rows, best, _ = sweep_engine(recipe, small_world, axes, n_prompts=12)
    assert [(row.setting.max_num_batched_tokens, row.setting.decoding) for row in rows] == [
        (None, "off"),
        (2, "off"),
        (None, "strict"),
    ]
    assert "max_num_batched_tokens" in rows[1].error
    for row in (rows[0], rows[2]):
        assert (row.error, row.failed_rows, row.rows) == ("", 0, 8)
        assert row.prompts_per_s > 0
        assert row.output_tokens_per_s > 0
        assert row.cached_share > 0  # of the system turn
        assert 0.5 < row.cache_gib <= 1
    assert best in rows
