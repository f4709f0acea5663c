"""Artifacts: atomic, sharded, on a local path or any fsspec URI."""

from pathlib import Path

import pyarrow as pa
import pytest

from owlrec.errors import WorkspaceError
from owlrec.shards import finish_stage, finished_stage, forget_stages
from owlrec.workspace import ITEM_UPDATES, Workspace, as_texts, shard_file, shards_for


@pytest.fixture(params=["local", "memory"])
def any_workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    return Workspace(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_tables_round_trip_in_shards(any_workspace: Workspace) -> None:
    table = pa.table({"id": pa.array(range(100), pa.int64()), "x": [str(i) for i in range(100)]})
    any_workspace.write_table("users", table, key="id", n_shards=8)
    assert len(any_workspace.table_shards("users")) == 8
    assert any_workspace.read_table("users").sort_by("id") == table


def test_items_that_came_after_prepare_stand_over_the_table(any_workspace: Workspace) -> None:
    items = {"item_id": [1, 2, 3], "raw_id": ["1", "2", "3"], "title": ["A", "B", "C"], "tags": [["x"], [], ["y"]]}
    any_workspace.write_table("items", pa.table(items), key="item_id", n_shards=1)
    updates = {"item_id": [2, 9], "raw_id": ["2", "9"], "title": ["New B", "I"], "tags": ["x, y", ""], "seen": [1, 2]}
    any_workspace.write_parquet(f"{ITEM_UPDATES}/item/{shard_file(0)}", pa.table(updates))
    table = any_workspace.read_shard("items", 0)
    assert table["item_id"].to_pylist() == [1, 2, 3, 9]
    assert table["title"].to_pylist() == ["A", "New B", "C", "I"]
    assert table["tags"].to_pylist() == [["x"], ["x, y"], ["y"], []]
    titles = any_workspace.read_shard("items", 0, ["title"])
    assert titles.to_pydict() == {"title": ["A", "New B", "C", "I"]}


def test_texts_and_lists_of_texts_become_each_other() -> None:
    text, texts = pa.string(), pa.list_(pa.string())
    table = pa.table({"a": pa.array(["x", ""], text), "b": pa.array([["x", "y"], None], texts)})
    wanted = pa.schema([("a", texts), ("b", text), ("c", text), ("d", texts)])
    assert as_texts(table, wanted).to_pydict() == {"a": [["x"], []], "b": ["x, y", ""], "c": ["", ""], "d": [[], []]}


def test_missing_artifacts_say_which_stage_to_run(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        workspace.read_table("users")
    with pytest.raises(WorkspaceError, match="does not exist"):
        workspace.read_json("nothing.json")


def test_corrupt_parquet_is_named(workspace: Workspace) -> None:
    workspace.fix_shards({"user": 1})
    workspace.write_bytes("tables/users/00000000.parquet", b"no parquet")
    with pytest.raises(WorkspaceError, match=r"00000000\.parquet cannot be read"):
        workspace.read_table("users")


def test_stage_counts_as_finished_only_under_its_fingerprint(workspace: Workspace) -> None:
    assert finished_stage(workspace, "prepare") is None
    finish_stage(workspace, "prepare", "a", seconds=1)
    assert finished_stage(workspace, "prepare", "a") is not None
    assert finished_stage(workspace, "prepare", "b") is None
    forget_stages(workspace, ["prepare", "generate"])
    assert finished_stage(workspace, "prepare") is None


def test_numbers_of_shards_stay_as_they_were_fixed_first(any_workspace: Workspace) -> None:
    any_workspace.fix_shards({"user": 8})
    any_workspace.fix_shards({"user": 16, "item": 4})
    assert {kind: Workspace(any_workspace.root).n_shards(kind) for kind in ("user", "item")} == {"user": 8, "item": 4}
    with pytest.raises(WorkspaceError, match="number of cohort shards"):
        any_workspace.n_shards("cohort")
    with pytest.raises(ValueError, match="power of two"):
        any_workspace.fix_shards({"cohort": 3})
    any_workspace.grow_shards({"user": 16})
    assert Workspace(any_workspace.root).n_shards("user") == 16


def test_a_workspace_of_the_first_edition_is_refused(workspace: Workspace) -> None:
    workspace.write_json("manifests/prepare.json", {})
    with pytest.raises(WorkspaceError, match="first edition"):
        workspace.fix_shards({"user": 1})


def test_a_shard_beyond_a_hundred_thousand_is_found_by_its_number() -> None:
    names = [shard_file(number) for number in (2, 99_999, 100_000, 12_345_678)]
    assert names == sorted(names)
    assert names[2] == "00100000.parquet"


def test_rows_per_shard_give_a_power_of_two() -> None:
    assert [shards_for(rows, 1024) for rows in (0, 1, 1024, 1025, 10**6)] == [1, 1, 1, 2, 1024]
