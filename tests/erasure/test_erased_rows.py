"""Rows out of files: by which column, that places of histories follow, and that a killed run can be finished."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.erasure import erased_rows as rows_module
from owlrec.erasure.erased_rows import Users, erase
from owlrec.schema import INTERACTIONS, SAMPLE_ROWS
from owlrec.sources.preparation import read_batches, write_buckets
from owlrec.sources.splits import read_samples
from owlrec.workspace import Workspace, table_file

USER = Users(np.array([7]), frozenset(["seven"]))


@pytest.mark.parametrize(
    ("path", "columns", "left"),
    [
        ("x/user/00000000.parquet", {"user_id": [7, 8], "id": [1, 7]}, [1]),
        ("knowledge/a/user/00000000.parquet", {"kind": ["user", "item", "user"], "id": [7, 7, 8]}, [1, 2]),
        ("exports/a/user/00000000.parquet", {"raw_id": ["seven", "eight", "nine"], "id": [1, 7, 9]}, [2]),
        ("exports/a/item/00000000.parquet", {"raw_id": ["seven", "eight"], "id": [7, 9]}, [0, 1]),
        ("tables/items/00000000.parquet", {"item_id": [7, 8], "raw_id": ["seven", "8"]}, [0, 1]),
        ("events/a.parquet", {"user_id": ["seven", "eight", None]}, [1, 2]),
        ("events/b.parquet", {"user_id": pa.array([7, None], pa.int64())}, [1]),
    ],
)
def test_a_row_is_known_by_the_right_column(workspace: Workspace, path: str, columns: dict, left: list[int]) -> None:
    table = pa.table(columns)
    workspace.write_parquet(path, table)
    before = workspace.entry(path)
    done = erase(workspace, path, USER)
    assert workspace.read_parquet(path).to_pylist() == table.take(left).to_pylist()
    gone = len(table) - len(left)
    assert [(r.rows, r.left) for r in done] == ([(gone, len(left))] if gone else [])
    assert (workspace.entry(path) == before) == (not done)  # a file without the user is not touched


def test_batches_stay_as_many(workspace: Workspace) -> None:
    table = pa.table({"user_id": pa.array(range(20), pa.int64()), "n": pa.array(range(20))})
    path = "ingest/a/users/00000000.arrow"
    write_buckets(workspace, path, table, "user_id", 4)
    (done,) = erase(workspace, path, USER)
    assert (done.rows, done.left, done.places) == (1, 19, {0})
    batches = read_batches(workspace, path, range(4), 4)
    assert sorted(pa.concat_tables(batches)["n"].to_pylist()) == [n for n in range(20) if n != 7]


def test_lines_are_found_by_whole_words(workspace: Workspace) -> None:
    lines = ["user 7 failed", "user 77 failed", "seven-up", "(seven)", "row of seven", "17"]
    workspace.write_bytes("logs/a.log", "\n".join(lines).encode())
    (done,) = erase(workspace, "logs/a.log", USER)
    assert done.rows == 3
    assert workspace.read_bytes("logs/a.log").decode().split() == ["user", "77", "failed", "seven-up", "17"]


def write_samples(workspace: Workspace) -> None:
    """Users 5, 7 and 9 with 2, 3 and 2 interactions; each has a sample that reads all but the last."""
    workspace.fix_shards({"user": 1, "item": 1})
    user = np.repeat([5, 7, 9], [2, 3, 2])
    columns = {
        "user_id": user,
        "item_id": np.arange(50, 57),
        "rating": np.arange(1, 8).astype(np.float32),
        "timestamp": np.arange(7),
        "label": np.ones(7),
        "split": pa.nulls(7),
        "weight": np.ones(7),
    }
    workspace.write_parquet(table_file("interactions", 0), pa.table(columns).cast(INTERACTIONS))
    samples = {
        "user_id": [5, 7, 7, 9],
        "item_id": [51, 53, 54, 56],
        "label": [1.0] * 4,
        "timestamp": [1, 3, 4, 6],
        "split": ["train"] * 4,
        "history_start": [0, 2, 2, 5],
        "history_end": [1, 3, 4, 6],
        "weight": [1.0] * 4,
    }
    workspace.write_parquet(table_file("samples", 0), pa.table(samples).cast(SAMPLE_ROWS))


def histories(workspace: Workspace) -> dict[int, list[int]]:
    rows = read_samples(workspace, 0).to_pylist()
    return {row["item_id"]: row["history"] for row in rows}


def test_histories_of_others_stay_what_they_were(workspace: Workspace) -> None:
    write_samples(workspace)
    assert histories(workspace) == {51: [50], 53: [52], 54: [52, 53], 56: [55]}
    done = erase(workspace, table_file("samples", 0), USER)
    assert {r.path: r.rows for r in done} == {table_file("interactions", 0): 3, table_file("samples", 0): 2}
    assert histories(workspace) == {51: [50], 56: [55]}
    assert workspace.read_table("interactions")["user_id"].to_pylist() == [5, 5, 9, 9]
    assert erase(workspace, table_file("samples", 0), USER) == []


@pytest.mark.parametrize("writes", [1, 2])
def test_samples_of_a_killed_run_are_finished_even_for_other_users(
    workspace: Workspace, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(workspace)
    write, left = workspace.write_parquet, iter(range(writes))

    def killed(path: str, table: pa.Table) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(path, table)

    with monkeypatch.context() as dying:
        dying.setattr(workspace, "write_parquet", killed)
        with pytest.raises(KeyboardInterrupt):
            erase(workspace, table_file("samples", 0), USER)
    erase(workspace, table_file("samples", 0), Users(np.array([5]), frozenset()))
    assert histories(workspace) == {56: [55]}
    assert workspace.read_table("interactions")["user_id"].to_pylist() == [9, 9]
    assert not Path(workspace.path(rows_module._kept_samples(0))).exists()
