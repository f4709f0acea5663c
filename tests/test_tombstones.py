"""Tombstones: who is in the set and who is not, that no id can be read from a file, and who honors them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec import workspace as tombstones
from owlrec.storage import Storage
from owlrec.workspace import TOMBSTONES, Tombstones, Workspace, read_tombstones, write_tombstones

IDS = st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40)


@given(forgotten=IDS, asked=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60))
def test_a_set_answers_as_a_set_does(forgotten: set[int], asked: list[int]) -> None:
    storage = Storage("memory://tombstones")
    storage.delete_dir(TOMBSTONES)
    write_tombstones(storage, np.array(sorted(forgotten)))
    gone = read_tombstones(storage)
    everybody = np.array([*asked, *forgotten], dtype=np.int64)
    expected = [id_ in forgotten for id_ in everybody.tolist()]
    assert gone.among(everybody).tolist() == expected
    assert [id_ in gone for id_ in everybody.tolist()] == expected
    assert Tombstones.from_bytes(gone.to_bytes()).among(everybody).tolist() == expected
    assert gone.mark


def test_runs_add_up_and_the_same_users_are_the_same_run(workspace: Workspace) -> None:
    assert read_tombstones(workspace).mark == ""
    first = write_tombstones(workspace, np.array([5, 7]))
    mark = read_tombstones(workspace).mark
    assert write_tombstones(workspace, np.array([7, 5, 7])) == first
    assert read_tombstones(workspace).mark == mark
    assert write_tombstones(workspace, np.array([9])) != first
    gone = read_tombstones(workspace)
    assert gone.among(np.arange(20)).nonzero()[0].tolist() == [5, 7, 9]
    assert len(gone) == 3
    assert gone.mark != mark


def test_another_process_s_tombstones_are_seen(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 5 not in read_tombstones(workspace)
    with monkeypatch.context() as other:
        other.setattr(tombstones, "_latest", tombstones._Latest())
        write_tombstones(workspace, np.array([5]))
    monkeypatch.setattr(tombstones, "_FRESH_S", 0)
    assert 5 in read_tombstones(workspace)


def test_no_id_stands_in_a_file_and_other_keys_give_other_bytes(workspace: Workspace, tmp_path_factory) -> None:
    id_ = 0x1234_5678_9ABC_DEF1
    other = Workspace(tmp_path_factory.mktemp("other"))
    content = []
    for store in (workspace, other):
        run = write_tombstones(store, np.array([id_]))
        files = [store.read_bytes(f"{TOMBSTONES}/{path}") for path in store.entries(TOMBSTONES)]
        for word in (id_.to_bytes(8, "little"), id_.to_bytes(8, "big"), str(id_).encode()):
            assert not any(word in data for data in files)
        content.append(store.read_bytes(f"{run}/tombstones.bin"))
    assert content[0] != content[1]


def test_tables_are_read_without_them(small_world: Workspace) -> None:
    write_tombstones(small_world, np.array([3, 4]))
    left = [user for user in range(1, 41) if user not in (3, 4)]
    assert sorted(small_world.read_table("users")["user_id"].to_pylist()) == left
    assert sorted(small_world.read_table("histories")["user_id"].to_pylist()) == left
    ages = small_world.read_table("users", ["age"])
    assert ages.column_names == ["age"]
    assert len(ages) == 38
    table = pa.table({"user_id": pa.array([3, None, 5], pa.int64())})
    assert read_tombstones(small_world).without(table)["user_id"].to_pylist() == [None, 5]
