"""The `owlrec` command: what it prints for programs, what it refuses, and the entry points that jobs run it by."""

import json
import runpy
from pathlib import Path

import pytest
import typer
from served_world import publish_world
from typer.testing import CliRunner

import owlrec
import pipelines
from owlrec.cli import app
from owlrec.runs import STAGES
from owlrec.runs.stages import stage_function
from owlrec.workspace import Workspace

ENTRIES = sorted(p.stem for p in Path(pipelines.__file__).parent.glob("[a-z]*.py"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(
        f"{{name: shop, scenario: books, workspace: {tmp_path}/ws, source: {{type: movielens-100k}}, "
        "engine: {type: echo}}"
    )
    return path


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"owlrec {owlrec.__version__}\n"


def test_a_recipe_and_its_workspace_are_the_same_target(recipe: Path, tmp_path: Path) -> None:
    name = publish_world(Workspace(tmp_path / "ws"), "first")
    answers = []
    for target in (str(recipe), str(tmp_path / "ws")):
        listed = json.loads(CliRunner().invoke(app, ["release", "list", target, "--json"]).stdout)
        assert [(release["name"], release["current"]) for release in listed] == [(name, True)]
        answer = json.loads(CliRunner().invoke(app, ["lookup", target, "user", "1", "99", "--json"]).stdout)
        assert (answer.pop("release"), answer.pop("took_us") > 0) == (name, True)
        answers.append(answer)
    assert answers[0] == answers[1]
    assert [row["text"] for row in answers[0]["rows"]] == ["first likes films", None]


def test_a_dry_run_as_json(recipe: Path) -> None:
    shown = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--only", "train-ctr", "--json"])
    assert json.loads(shown.stdout) == [{"stage": "train_ctr", "state": "would run"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "encode", "--to", "publish"], "--only"),
        (["--only", "encod"], "Did you mean 'encode'?"),
        (["--from", "publish", "--to", "encode"], "comes after"),
    ],
)
def test_stages_that_make_no_sense_are_refused(recipe: Path, arguments: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["run", str(recipe), *arguments])
    assert (refused.exit_code, message in refused.stderr) == (1, True)


def test_submit_refuses_what_the_job_would(recipe: Path) -> None:
    address = ["--address", "http://127.0.0.1:1"]
    unknown = CliRunner().invoke(app, ["submit", str(recipe), "generat", *address])
    assert (unknown.exit_code, "Did you mean 'generate'?" in unknown.stderr) == (1, True)
    idle = CliRunner().invoke(app, ["submit", str(recipe), "sweep-ctr", "--max-replicas", "2", *address])
    assert (idle.exit_code, "--max-replicas" in idle.stderr) == (1, True)


@pytest.mark.parametrize("stage", ENTRIES)
def test_entry_points_run_commands_that_take_a_recipe(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    monkeypatch.setattr(pipelines, "command", lambda *given: words.extend(given))
    runpy.run_module(f"pipelines.{stage}", run_name="__main__")
    command, rest = typer.main.get_command(app), [*words, "R.yaml"]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    parsed = command.make_context(stage, rest).params  # raises where an argument is not understood
    assert parsed["recipe"] == Path("R.yaml")
    assert parsed.get("only", stage) == stage


def test_every_stage_that_runs_has_a_function_and_an_entry_point() -> None:
    assert set(STAGES) <= set(ENTRIES)
    names = [stage for stage in ENTRIES if stage not in ("refresh", "reshard")]
    assert [stage_function(stage).__name__ for stage in names] == names
