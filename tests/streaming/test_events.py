"""The log: canonical order, what is new to it, what a row may hold, and when it is the wrong log."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming_world import DAY, START, interactions, log_events  # type: ignore[import-not-found]

from owlrec.errors import SchemaError, SourceError
from owlrec.streaming import events as events_module
from owlrec.streaming.events import Events, EventsConfig, are_among, canonical, check_watermark, open_log, read_log
from owlrec.workspace import Workspace


def events(rows: list[tuple[int, int, float | None, int]]) -> Events:
    return Events.from_table(interactions(rows))


def rows(found: Events) -> list[tuple[int, int, int]]:
    return list(zip(found.user.tolist(), found.item.tolist(), found.time.tolist(), strict=True))


def log_of(workspace: Workspace) -> Workspace:
    return open_log(workspace, EventsConfig())


def test_canonical_order_is_by_user_time_and_item_and_doubles_are_one() -> None:
    found = canonical(events([(2, 7, 1, 10), (1, 9, None, 20), (1, 8, 3, 20), (1, 9, 4, 20), (1, 9, 2, 20)]))
    assert rows(found) == [(1, 8, 20), (1, 9, 20), (2, 7, 10)]
    assert found.rating.tolist() == [3, 4, 1]  # of three ratings at one moment the highest


def test_rating_that_is_no_number_is_none() -> None:
    found = events([(1, 1, float("inf"), 5), (1, 2, None, 5), (1, 3, float("nan"), 5)])
    assert np.isnan(found.rating).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([None, 1.0, 2.0]), st.integers(0, 3))))
def test_canonical_form_does_not_depend_on_order(given_rows: list[tuple[int, int, float | None, int]]) -> None:
    one, other = canonical(events(given_rows)), canonical(events(given_rows[::-1]))
    assert one.digest() == other.digest()
    assert set(rows(one)) == {(u, i, t) for u, i, _, t in given_rows}
    assert len(one) == len(set(rows(one)))


@given(
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))),
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))),
)
def test_are_among_agrees_with_sets(asked: set[tuple[int, int, int]], known: set[tuple[int, int, int]]) -> None:
    one, other = (events([(u, i, 1.0, t) for u, i, t in sorted(s)]) for s in (asked, known))
    assert are_among(one, other).tolist() == [key in known for key in sorted(asked)]


def test_log_without_watermark_is_read_whole(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START), (2, 6, None, START + 1)], "b")
    log_events(workspace, [(1, 5, 4.0, START), (3, 7, 1.0, START - DAY)], "a")
    read = read_log(log_of(workspace), None, {})
    assert rows(read.events) == [(1, 5, START), (2, 6, START + 1), (3, 7, START - DAY)]
    assert (read.newest, read.duplicates, read.refused.num_rows) == (START + 1, 1, 0)
    assert read.files == {"a.parquet": 2, "b.parquet": 2}


def test_only_rows_that_are_new_to_the_log_can_be_too_late(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START - 9), (1, 6, 4.0, START), (1, 7, 4.0, START - 8)])
    known = read_log(log_of(workspace), START - 1, {"one.parquet": 2})
    assert known.refused.to_pylist() == [{"user_id": 1, "item_id": 7, "timestamp": START - 8, "error": "TooLate"}]
    assert rows(known.events) == [(1, 6, START)]
    assert read_log(log_of(workspace), START - 1, {"one.parquet": 3}).refused.num_rows == 0
    assert read_log(log_of(workspace), START - 1, {}).refused.num_rows == 2


def test_event_at_the_horizon_is_in_time(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START)])
    assert len(read_log(log_of(workspace), START, {}).events) == 1
    assert len(read_log(log_of(workspace), START + 1, {}).events) == 0


def test_file_without_new_rows_behind_the_horizon_is_not_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_events(workspace, [(1, 5, 4.0, START - DAY)], "old")
    log_events(workspace, [(1, 6, 4.0, START)], "new")
    opened = []
    conformed = events_module._conformed
    monkeypatch.setattr(events_module, "_conformed", lambda file, path: (opened.append(path), conformed(file, path))[1])
    read = read_log(log_of(workspace), START - 1, {"old.parquet": 1, "new.parquet": 1})
    assert [Path(path).name for path in opened] == ["new.parquet"]
    assert rows(read.events) == [(1, 6, START)]


def test_broken_rows_are_refused_and_the_others_taken(workspace: Workspace) -> None:
    broken = [(None, 5, 4.0, START), (1, None, 4.0, START), (1, 5, 4.0, None)]
    wrong_unit = [(1, 5, 4.0, START // 1000), (1, 5, 4.0, START * 1000)]
    log_events(workspace, [(1, 5, 4.0, START), *broken, *wrong_unit])
    read = read_log(log_of(workspace), None, {})
    assert rows(read.events) == [(1, 5, START)]
    assert read.refused["error"].to_pylist() == ["NullField"] * 3 + ["NotMilliseconds"] * 2
    assert read.newest == START


def test_log_may_be_one_file_without_ratings_and_with_arrow_moments(workspace: Workspace, tmp_path: Path) -> None:
    moment = pa.array([datetime.fromtimestamp(START / 1000, UTC)], pa.timestamp("us", "UTC"))
    table = pa.table({"user_id": [1], "item_id": pa.array([5], pa.int32()), "timestamp": moment, "device": ["tv"]})
    pq.write_table(table, tmp_path / "log.parquet")
    read = read_log(open_log(workspace, EventsConfig(events=str(tmp_path / "log.parquet"))), None, {})
    assert rows(read.events) == [(1, 5, START)]
    assert np.isnan(read.events.rating).all()


def test_hidden_and_foreign_files_are_left_out_and_folders_searched(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START)], "day=1")
    folder = Path(workspace.path("events"))
    (folder / "deep").mkdir()
    (folder / "day=1.parquet").rename(folder / "deep" / "day=1.parquet")
    (folder / "_SUCCESS").write_text("")
    (folder / ".part.parquet").write_text("half")
    (folder / "notes.txt").write_text("")
    assert read_log(log_of(workspace), None, {}).files == {"deep/day=1.parquet": 1}


def test_unreadable_file_and_missing_column_are_named(workspace: Workspace) -> None:
    folder = Path(workspace.path("events"))
    folder.mkdir(parents=True)
    (folder / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"half\.parquet: cannot be read as Parquet .* rename"):
        read_log(log_of(workspace), None, {})
    pq.write_table(pa.table({"user_id": [1], "timestamp": [START]}), folder / "half.parquet")
    with pytest.raises(SchemaError, match="item_id"):
        read_log(log_of(workspace), None, {})


def test_empty_log_at_first_says_what_to_put_there(workspace: Workspace) -> None:
    read = read_log(log_of(workspace), None, {})
    assert (len(read.events), read.newest) == (0, None)
    with pytest.raises(SourceError, match=r"events: no events are there\. Put Parquet files with the columns user_id"):
        check_watermark(log_of(workspace), None, None, "streaming")


@pytest.mark.parametrize(("newest", "ends"), [(None, "is empty"), (START, "ends at 2001-09-09 01:46:40 UTC")])
def test_log_behind_the_watermark_is_refused(workspace: Workspace, newest: int | None, ends: str) -> None:
    with pytest.raises(SourceError, match=f"the log {ends}.*to begin anew, delete streaming"):
        check_watermark(log_of(workspace), newest, START + 1, "streaming")
    check_watermark(log_of(workspace), START + 1, START + 1, "streaming")
