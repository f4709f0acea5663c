"""The command: what it prints, what it writes, and how it refuses."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from owlrec.cli import app, row_count
from owlrec.errors import RecipeError
from owlrec.ops.cost import load_fleet
from owlrec.shards import Artifact, Card, Shard
from owlrec.workspace import Workspace

EXAMPLE = Path(__file__).resolve().parents[2] / "cluster" / "fleet-example.yaml"
FLEET = """
groups:
  - {name: spot, accelerator: x, gpus: 2, price_per_gpu_hour: 3, tokens_per_s: 100, preemption_rate_per_hour: 0.5}
"""


@pytest.fixture
def command(tmp_path):
    """Runs the command over a finished run of 40 users, in 2 shards of 20 rows and 4000 tokens each."""
    workspace = Workspace(tmp_path / "ws")
    artifact = Artifact(workspace, "knowledge/f")
    for shard in (Shard("user", 0), Shard("user", 1)):
        file = workspace.write_bytes(artifact.path(shard.file()), b"x" * 2048)
        artifact.finish(
            Card(
                stage="generate",
                shard=shard.name,
                fingerprint="f",
                files={shard.file(): file},
                rows_in=20,
                rows_out=20,
                counts={"rows_asked": 20, "prompt_tokens": 2000, "output_tokens": 4000},
                seconds=40.0,
                finished=40.0 * (shard.number + 1),
            )
        )
    generated = Card(stage="generate", fingerprint="f", outputs={"knowledge": "knowledge/f"}, seconds=80, finished=80)
    workspace.write_json("stages/generate.json", generated.model_dump(mode="json"))
    (tmp_path / "recipe.yaml").write_text(
        "{name: demo, scenario: movies, workspace: elsewhere, shard_rows: 36, source: {type: movielens-100k}, "
        "engine: {type: echo}}"
    )
    (tmp_path / "fleet.yaml").write_text(FLEET)

    def run(**changes):
        given = {"workspace": workspace.root, "fleet": tmp_path / "fleet.yaml", "users": "3.6e3"} | changes
        recipe, more = given.pop("recipe", tmp_path / "recipe.yaml"), ["--json"] if given.pop("json", False) else []
        options = [f"--{name}={value}" for name, value in given.items()]
        with pytest.raises(SystemExit) as ended:
            app(["plan", str(recipe), *options, *more])
        return ended.value.code

    return run


def test_the_first_line_says_that_all_is_estimated_and_from_what(command, capsys):
    assert command() == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("== plan: estimates, extrapolated from 40 users (finished 19")
    assert first.endswith("ws/knowledge/f")
    assert "if this machine made it: " in out
    assert "3,600 users, 0 items, individual, 0 refreshes" in out
    assert "wall time, h" in out
    assert "spot: 1.0 preemptions" in out
    assert "not planned: collective: the measured run asked about no cohorts" in out
    assert "played as a simulation: " in out
    assert "release: not estimated" in out
    assert "shard plan of users: 100 shards, rows a shard: min " in out
    assert "shard plan of items" not in out


def test_json_is_every_figure_alone_on_standard_output(command, capsys):
    command(json=True)
    printed = capsys.readouterr()
    assert "wall time, h" in printed.err
    figures = json.loads(printed.out)
    # 7200 s of an engine, in shards of 72 s; each preemption loses half of one, 36 s.
    expected_s = 3600 / (1 - 0.5 * 36 / 3600)
    assert figures["plan"]["wall_hours"]["expected"] * 3600 == pytest.approx(expected_s + 18)
    assert figures["plan"]["groups"][0]["cost"]["expected"] == pytest.approx(6 * expected_s / 3600)
    assert figures["workload"]["tokens_per_s"] == {"low": 100.0, "expected": 100.0, "high": 100.0}
    assert figures["shard_plan"]["user"]["shards"] == 100


def test_the_waterfall_is_a_file_of_its_own(command, tmp_path):
    command(plot=tmp_path / "plan.svg", refreshes="2", **{"acting-share": "0.5"})
    picture = (tmp_path / "plan.svg").read_text()
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    for name in ("everything anew each time", "texts with the same prompt kept", "in all"):
        assert f">{name}<" in picture


def test_more_engines_than_shards_are_warned_of(command, capsys):
    command(users="36")
    assert "1 shards for 2 engines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": "many"}, "'many' is not a number of rows"),
        ({"users": "0"}, "calls (0 of user and 0 of item) cannot be planned"),
        ({"items": "5"}, "calls (3600 of user and 5 of item) cannot be planned from a run that measured 40 users"),
        ({"policy": "colective"}, "there is no policy 'colective'. Did you mean 'collective'?"),
        ({"policy": "collective"}, "the measured run asked about no cohorts. Add `cohorts: {}`"),
        ({"refreshes": "3"}, "what share of the users acts between two refreshes?"),
        ({"policy": "streaming", "refreshes": "3", "acting-share": "0.1"}, "the measured run was never refreshed"),
        ({"fleet": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"recipe": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"workspace": "/nowhere/at/all"}, "Run a small recipe first"),
        ({"plot": "/nowhere/at/all.svg"}, "/nowhere/at/all.svg: cannot be written"),
    ],
)
def test_mistakes_end_in_one_plain_line(command, capsys, changes, message):
    assert command(**changes) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(("text", "rows"), [("1e8", 10**8), ("1.5e3", 1500), ("12", 12), ("1_000", 1000)])
def test_row_counts_are_read_as_people_write_them(text, rows):
    assert row_count(text) == rows


@pytest.mark.parametrize("text", ["", "1.5", "-1", "nan", "inf", "1e400", "ten"])
def test_what_is_no_row_count_is_refused(text):
    with pytest.raises(RecipeError, match=r"is not a number of rows\. Write a whole number"):
        row_count(text)


def test_the_example_fleet_loads():
    assert len(load_fleet(EXAMPLE).groups) == 1
