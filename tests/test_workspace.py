"""Artifacts: atomic, sharded, on a local path or any fsspec URI."""

from pathlib import Path

import pyarrow as pa
import pytest

from owlrec.errors import WorkspaceError
from owlrec.shards import finish_stage, finished_stage, forget_stages
from owlrec.workspace import Workspace, shard_file, shards_for


@pytest.fixture(params=["local", "memory"])
def any_workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    return Workspace(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_tables_round_trip_in_shards(any_workspace: Workspace) -> None:
    table = pa.table({"id": pa.array(range(100), pa.int64()), "x": [str(i) for i in range(100)]})
    any_workspace.write_table("users", table, key="id", n_shards=8)
    assert len(any_workspace.table_shards("users")) == 8
    assert any_workspace.read_table("users").sort_by("id") == table


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
    with pytest.raises(WorkspaceError, match="no number of cohort shards"):
        any_workspace.n_shards("cohort")
    with pytest.raises(ValueError, match="powers of two"):
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
