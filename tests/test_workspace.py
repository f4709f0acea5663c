"""Artifacts: atomic, sharded, on a local path or any fsspec URI."""

import errno
import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pytest

from owlrec.errors import WorkspaceError
from owlrec.shards import finish_stage, finished_stage, forget_stages
from owlrec.storage import file_digest, fingerprint
from owlrec.workspace import Workspace


@pytest.fixture(params=["local", "memory"])
def any_workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    return Workspace(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_tables_round_trip_in_shards(any_workspace: Workspace) -> None:
    table = pa.table({"id": pa.array(range(100), pa.int64()), "x": [str(i) for i in range(100)]})
    any_workspace.write_table("users", table, key="id", n_shards=8)
    assert len(any_workspace.table_shards("users")) == 8
    assert any_workspace.read_table("users").sort_by("id") == table


def test_failed_write_leaves_the_old_file_and_no_temporary_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(file: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    workspace.write_bytes("a/b", b"old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(WorkspaceError, match=r"cannot be written \(.*no space left\). Free some space"):
        workspace.write_bytes("a/b", b"new")
    assert workspace.read_bytes("a/b") == b"old"
    assert os.listdir(workspace.path("a")) == ["b"]


def test_parquet_digest_is_that_of_the_file(any_workspace: Workspace) -> None:
    written = any_workspace.write_parquet("t.parquet", pa.table({"x": [1, 2]}))
    assert written.sha256 == hashlib.sha256(any_workspace.read_bytes("t.parquet")).hexdigest()


def test_unwritable_workspace_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="file/below is not writable"):
        Workspace(tmp_path / "file" / "below").check_writable()


def test_missing_artifacts_say_which_stage_to_run(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="Run `prepare` first"):
        workspace.read_table("users")
    with pytest.raises(WorkspaceError, match="does not exist"):
        workspace.read_json("nothing.json")


def test_corrupt_parquet_is_named(workspace: Workspace) -> None:
    workspace.write_bytes("tables/users/00000000.parquet", b"no parquet")
    with pytest.raises(WorkspaceError, match=r"00000000\.parquet cannot be read"):
        workspace.read_table("users")


def test_fingerprint_ignores_key_order_and_sees_every_value() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, [{"a": 1}])}) == 5


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_stage_counts_as_finished_only_under_its_fingerprint(workspace: Workspace) -> None:
    assert finished_stage(workspace, "prepare") is None
    finish_stage(workspace, "prepare", "a", seconds=1)
    assert finished_stage(workspace, "prepare", "a") is not None
    assert finished_stage(workspace, "prepare", "b") is None
    forget_stages(workspace, ["prepare", "generate"])
    assert finished_stage(workspace, "prepare") is None


def test_only_one_of_two_creates_a_file(workspace: Workspace) -> None:
    for store in (workspace, Workspace("memory://create-once")):
        assert store.create_bytes("a/b", b"first")
        assert not store.create_bytes("a/b", b"second")
        assert store.read_bytes("a/b") == b"first"
        assert store.names("a") == ["b"]
        store.delete_file("a/b")
        store.delete_file("a/b")
