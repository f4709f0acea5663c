"""Cohorts to release: one call a cohort, every user and item resolves, and a second run asks only what has moved."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from owlrec.cli import app
from owlrec.cohorts.cohort_model import POINTER, read_profiles
from owlrec.recipe import load_recipe
from owlrec.releases.release import open_release
from owlrec.runs import STAGES
from owlrec.runs.stages import stage_function
from owlrec.shards import Artifact, Shard, finished_stage
from owlrec.storage import Pointer
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e


def write_recipe(path: Path, workspace: Path, users: int) -> Path:
    path.write_text(
        f"""
        name: collective
        scenario: movies
        workspace: {workspace}
        source: {{type: movielens-100k, max_users: {users}, max_items: 200}}
        shard_rows: 50
        cohorts:
          mean_size: 12
        prompts: {{mode: collective}}
        engine: {{type: echo}}
        encoder: {{model: hashing}}
        sampling: {{max_tokens: 40}}
        ctr: {{backbones: [dcnv2], arms: [none, collective, shuffled], seeds: [0], epochs: 1}}
        """
    )
    return path


def run(recipe: Path, last: str = STAGES[-1]) -> None:
    """The recipe's stages up to `last`, in this process and on the test run's cluster."""
    settings = load_recipe(recipe)
    for stage in STAGES[: STAGES.index(last) + 1]:
        stage_function(stage)(settings, Workspace(settings.workspace))


def calls(workspace: Workspace) -> tuple[int, int]:
    """Rows of the last job, and how many of them were asked for."""
    generated = finished_stage(workspace, "generate")
    assert generated is not None
    cards = Artifact(workspace, generated.outputs["knowledge"]).cards()
    assert {Shard.from_name(name).kind for name in cards} == {"cohort"}
    return sum(c.rows_in for c in cards.values()), sum(int(c.counts["rows_asked"]) for c in cards.values())


def test_a_cohort_s_text_serves_its_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ws"
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, 120)
    run(recipe)
    workspace = Workspace(folder)
    rows, asked = calls(workspace)
    assert rows == asked
    users = workspace.read_table("users")["user_id"].to_numpy()
    items = workspace.read_table("items")["item_id"].to_numpy()
    assert rows * 5 < len(users) + len(items)
    with open_release(workspace) as release:
        for kind, ids in (("user", users), ("item", items)):
            knowledge = release.store.get(kind, ids)
            assert all(k is not None and k.framework == "collective" and "echo-" in k.text for k in knowledge)
            assert release.store.vectors(kind, ids)[1].all()
        assert any(len(c) == 2 for c in release.store.cohorts("user", users))  # liked and disliked
        assert release.store.get("user", [10**9]) == [None]

    looked_up = CliRunner().invoke(app, ["lookup", str(recipe), "user", str(users[0])])
    assert "echo-" in looked_up.stdout

    capsys.readouterr()
    run(recipe, "generate")
    assert "shards are already done" in capsys.readouterr().out

    # A few more users: cohorts that have hardly moved keep their prompt, and so their text.
    run(write_recipe(recipe, folder, 126), "generate")
    rows, asked = calls(workspace)
    assert 0 < asked < rows
    before, after = (
        set(read_profiles(workspace, cohorts)["cohort"].to_pylist()) for cohorts in Pointer(workspace, POINTER).history
    )
    assert len(before & after) > len(before) / 2  # names outlive the run


def test_collective_prompts_without_cohorts_are_a_recipe_error(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "ws", 60)
    text = recipe.read_text()
    start, end = text.index("        cohorts:"), text.index("        prompts:")
    recipe.write_text(text[:start] + text[end:])
    refused = CliRunner().invoke(app, ["run", str(recipe), "--dry-run"])
    assert refused.exit_code == 1
    assert "needs cohorts" in refused.stderr
