"""A recipe small enough to run whole in a test, on the echo engine."""

import sys
import textwrap
from pathlib import Path

import pytest
from heads import make_bare_python

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / "ranking"), str(TESTS / "decoding")]  # whose tiny models are tuned and served here too


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of heads and their nodes: it has OwlRec's dependencies, not OwlRec."""
    return make_bare_python(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture
def echo_recipe(tmp_path: Path) -> Path:
    """MovieLens-100K's 60 users and 120 items in 4 and 8 shards; two trials of CTR."""
    recipe = tmp_path / "echo.yaml"
    recipe.write_text(
        textwrap.dedent(
            f"""
            name: echo
            scenario: movies
            workspace: {tmp_path / "ws"}
            source: {{type: movielens-100k, max_users: 60, max_items: 120}}
            split: {{cuts: half}} # one text per user
            shard_rows: 20
            engine: {{type: echo, latency_s: 0.3}}
            sampling: {{max_tokens: 40}}
            encoder: {{model: hashing}}
            ctr: {{backbones: [dcnv2], arms: [none, knowledge], seeds: [0], epochs: 1}}
            ray: local[2]
            """
        )
    )
    return recipe
