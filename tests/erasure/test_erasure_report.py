"""What a report says: unknown ids change nothing, models are named and dropped on demand, mistakes are told."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner
from worlds import write_samples

from owlrec import cli
from owlrec.erasure.forget import forget
from owlrec.errors import WorkspaceError
from owlrec.schema import SAMPLES
from owlrec.workspace import TOMBSTONES, Workspace, read_tombstones


def content(workspace: Workspace) -> dict[str, object]:
    return {p: e for p, e in workspace.entries().items() if not p.startswith((TOMBSTONES, "claims"))}


def test_an_unknown_id_is_counted_and_changes_nothing(small_world: Workspace) -> None:
    before = content(small_world)
    report = forget(small_world, ["nobody", "12345"])
    assert (report.users, report.unknown, report.places, report.models) == (2, 2, [], [])
    assert content(small_world) == before
    assert 12345 in read_tombstones(small_world)  # and stays out


def test_models_are_named_and_dropped_on_demand(small_world: Workspace) -> None:
    samples = [
        {"user_id": user, "item_id": 100, "label": 1.0, "timestamp": 10**12, "history": [101], "split": "train"}
        | {"history_ratings": [4.0], "history_labels": [1.0]}
        for user in (5, 6)
    ]
    write_samples(small_world, pa.Table.from_pylist(samples, SAMPLES))
    small_world.write_json("ctr/grid/din/knowledge/seed-0/result.json", {})
    small_world.write_json("models/grid-din/model.json", {})
    report = forget(small_world, ["5"])
    assert (report.unknown, report.models) == (0, ["ctr/grid", "models/grid-din"])
    assert small_world.exists("models/grid-din")
    assert {(p.place, p.rows) for p in report.places} == {("tables", 4)}  # user, history, sample, interaction
    (run,) = [name for name in small_world.names(TOMBSTONES) if name != "key"]
    written = json.dumps(small_world.read_json(f"{TOMBSTONES}/{run}/report.json"))
    assert json.loads(written)["models"] == report.models
    again = forget(small_world, ["5"], drop_models=True)
    assert (again.unknown, again.models) == (1, report.models)
    assert not small_world.exists("models/grid-din")
    assert not small_world.exists("ctr/grid")


def test_an_unfinished_reshard_comes_first(small_world: Workspace) -> None:
    small_world.write_json("reshard/plan.json", {})
    with pytest.raises(WorkspaceError, match="reshard"):
        forget(small_world, ["5"])
    assert 5 in read_tombstones(small_world)  # silent all the same
    assert small_world.read_table("users")["user_id"].to_pylist().count(5) == 0


def test_the_command_takes_a_file_of_ids(small_world: Workspace, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5\n6\n\n")
    result = CliRunner().invoke(cli.app, ["forget", small_world.path(), "7", "--file", str(tmp_path / "ids.txt")])
    assert result.exit_code == 0, result.output
    assert "3 users forgotten" in result.output
    assert {5, 6, 7} & set(small_world.read_parquet("tables/users/00000000.parquet")["user_id"].to_pylist()) == set()
    nobody = CliRunner().invoke(cli.app, ["forget", small_world.path()])
    assert nobody.exit_code == 1
    assert "no users" in nobody.stderr
    missing = CliRunner().invoke(cli.app, ["forget", small_world.path(), "--file", "/nowhere"])
    assert "/nowhere: cannot be read" in missing.stderr
