"""The log: canonical order, what is new to it, what a row may hold, and when it is the wrong log."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refresh_world import DAY, START, interactions, log_events  # type: ignore[import-not-found]

from owlrec.errors import SchemaError, SourceError
from owlrec.ids import shard_of
from owlrec.refresh.events import (
    Buckets,
    Events,
    Log,
    LogFile,
    ReadEvents,
    RefreshConfig,
    are_among,
    canonical,
    event_groups,
)
from owlrec.runner import run_stage
from owlrec.runs.upkeep import is_transient
from owlrec.sources.outcomes import Labels
from owlrec.workspace import Workspace


def events(rows: list[tuple[int, int, float | None, int]]) -> Events:
    return Events.from_table(interactions(rows))


def rows(events: Events) -> list[tuple[int, int, int]]:
    return list(zip(events.user.tolist(), events.item.tolist(), events.time.tolist(), strict=True))


@dataclass
class Reading:
    """What was read of a workspace's log."""

    log: Log
    buckets: Buckets
    card_counts: dict[str, int]
    events: Events  # of all shards, in canonical order
    errors: list[tuple[int | None, str]]  # of dead letters: user, error
    rows: dict[str, int]  # by file, as is known from now on


def read(
    workspace: Workspace,
    horizon: int | None = None,
    known: dict[str, int] | None = None,
    n_shards: int = 4,
    **config: object,
) -> Reading:
    """Reads the log's unread files. known: rows by file at the refresh before, whose files have grown since."""
    before = {name: LogFile(bytes=0, e_tag="", rows=n) for name, n in (known or {}).items()}
    log = Log.events(workspace, RefreshConfig.model_validate(config), before)
    fragments, rows = log.fragments()
    grouping = event_groups(fragments, n_shards)
    paths = {file.path: before[name].rows for name, file in log.unread.items() if name in before}
    stage = ReadEvents("r", grouping, paths, horizon, n_shards, Labels(rule="rating_above", rating_above=3))
    workspace.delete_dir("r")
    cards = run_stage(workspace, stage, grouping.inputs()).values()
    buckets = Buckets.of("r", n_shards, cards)
    counts = Counter[str]()
    for card in cards:
        counts.update({name: int(n) for name, n in card.counts.items() if name.startswith("refused")})
    dead = [workspace.read_parquet(f"r/{p}").to_pylist() for c in cards for p in c.files if p.startswith("dead")]
    return Reading(
        log,
        buckets,
        dict(counts),
        canonical(Events.join(buckets.read(workspace, n) for n in buckets.shards())),
        [(row["id"], row["error"]) for rows_ in dead for row in rows_],
        {name: rows[file.path] for name, file in log.unread.items()},
    )


def test_canonical_order_is_by_user_time_and_item_and_doubles_are_one() -> None:
    kept = canonical(events([(2, 7, 1, 10), (1, 9, None, 20), (1, 8, 3, 20), (1, 9, 4, 20), (1, 9, 2, 20)]))
    assert rows(kept) == [(1, 8, 20), (1, 9, 20), (2, 7, 10)]
    assert kept.rating.tolist() == [3, 4, 1]  # of three ratings at one moment the highest


def test_rating_that_is_no_number_is_none() -> None:
    kept = events([(1, 1, float("inf"), 5), (1, 2, None, 5), (1, 3, float("nan"), 5)])
    assert np.isnan(kept.rating).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([None, 1.0, 2.0]), st.integers(0, 3))))
def test_canonical_form_does_not_depend_on_order(given_rows: list[tuple[int, int, float | None, int]]) -> None:
    one, other = canonical(events(given_rows)), canonical(events(given_rows[::-1]))
    assert (rows(one), one.rating.tobytes()) == (rows(other), other.rating.tobytes())
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
    log = read(workspace)
    assert rows(log.events) == [(1, 5, START), (2, 6, START + 1), (3, 7, START - DAY)]
    assert (log.buckets.newest, log.errors, log.card_counts) == (START + 1, [], {"refused": 0})
    assert log.rows == {"a.parquet": 2, "b.parquet": 2}


@pytest.mark.parametrize("n_shards", [1, 4, 16])  # of the last, four share a bucket
def test_each_shard_reads_its_own_events(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, n_shards: int) -> None:
    monkeypatch.setattr("owlrec.refresh.events.MAX_BUCKETS", 4)
    users = [3, 50_000, 7, 2**40, 12]
    log_events(workspace, [(u, 5, 4.0, START + n) for n, u in enumerate(users)], "one")
    log_events(workspace, [(users[0], 6, 4.0, START)], "two")
    log = read(workspace, n_shards=n_shards)
    homes = shard_of(np.array(users), n_shards)
    assert log.buckets.shards() == sorted(set(homes.tolist()))
    for number in set(homes.tolist()):
        theirs = {(u, 5, START + n) for n, u in enumerate(users) if homes[n] == number}
        theirs |= {(users[0], 6, START)} if homes[0] == number else set()
        assert set(rows(log.buckets.read(workspace, number))) == theirs


def test_only_rows_that_are_new_to_the_log_can_be_too_late(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START - 9), (1, 6, 4.0, START), (1, 7, 4.0, START - 8)])
    log = read(workspace, START - 1, {"one.parquet": 2})
    assert (log.errors, log.card_counts) == ([(1, "TooLate")], {"refused": 1, "refused_TooLate": 1})
    assert rows(log.events) == [(1, 6, START)]
    assert read(workspace, START - 1, {"one.parquet": 3}).errors == []
    assert len(read(workspace, START - 1).errors) == 2


def test_event_at_the_horizon_is_in_time(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START)])
    assert len(read(workspace, START).events) == 1
    assert len(read(workspace, START + 1).events) == 0


def test_file_that_nobody_has_written_since_is_not_read(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START - DAY)], "old")
    before = Log.events(workspace, RefreshConfig(), {})
    (old,) = before.files.values()
    known = {"old.parquet": LogFile(bytes=old.bytes, e_tag=old.e_tag, rows=1, newest=START - DAY)}
    log_events(workspace, [(1, 6, 4.0, START)], "new")
    log = Log.events(workspace, RefreshConfig(), known)
    assert (list(log.unread), log.kept) == (["new.parquet"], known)
    log_events(workspace, [(1, 5, 4.0, START - DAY), (1, 6, 4.0, START)], "old")
    assert sorted(Log.events(workspace, RefreshConfig(), known).unread) == ["new.parquet", "old.parquet"]


def test_broken_rows_are_refused_and_the_others_taken(workspace: Workspace) -> None:
    broken = [(None, 5, 4.0, START), (1, None, 4.0, START), (1, 5, 4.0, None)]
    wrong_unit = [(1, 5, 4.0, START // 1000), (1, 5, 4.0, START * 1000)]
    log_events(workspace, [(1, 5, 4.0, START), *broken, *wrong_unit])
    log = read(workspace)
    assert rows(log.events) == [(1, 5, START)]
    assert log.errors == [(None, "NullField"), *[(1, "NullField")] * 2, *[(1, "NotMilliseconds")] * 2]
    assert log.buckets.newest == START


def test_newest_event_up_to_a_moment(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START), (2, 5, 4.0, START + 7)], "one")
    log_events(workspace, [(1, 5, 4.0, START + 3)], "two")
    buckets = read(workspace).buckets
    moments = [buckets.newest_until(workspace, START + n) for n in (-1, 0, 3, 6, 7, 9)]
    assert moments == [None, START, START + 3, START + 3, START + 7, START + 7]


def test_log_may_be_one_file_without_ratings_and_with_arrow_moments(workspace: Workspace, tmp_path: Path) -> None:
    moment = pa.array([datetime.fromtimestamp(START / 1000, UTC)], pa.timestamp("us", "UTC"))
    table = pa.table({"user_id": [1], "item_id": pa.array([5], pa.int32()), "timestamp": moment, "device": ["tv"]})
    pq.write_table(table, tmp_path / "log.parquet")
    log = read(workspace, events=str(tmp_path / "log.parquet"))
    assert rows(log.events) == [(1, 5, START)]
    assert np.isnan(log.events.rating).all()
    assert list(log.log.files) == ["log.parquet"]


def test_hidden_and_foreign_files_are_left_out_and_folders_searched(workspace: Workspace) -> None:
    log_events(workspace, [(1, 5, 4.0, START)], "day=1")
    folder = Path(workspace.path("events"))
    (folder / "deep").mkdir()
    (folder / "day=1.parquet").rename(folder / "deep" / "day=1.parquet")
    (folder / "_SUCCESS").write_text("")
    (folder / ".part.parquet").write_text("half")
    (folder / "notes.csv").write_text("")
    assert read(workspace).rows == {"deep/day=1.parquet": 1}


def test_unreadable_file_and_missing_column_are_named(workspace: Workspace) -> None:
    folder = Path(workspace.path("events"))
    folder.mkdir(parents=True)
    (folder / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"half\.parquet: cannot be read as Parquet .* rename") as raised:
        read(workspace)
    assert is_transient(raised.value)  # it may be in the middle of its writing
    pq.write_table(pa.table({"user_id": [1], "timestamp": [START]}), folder / "half.parquet")
    with pytest.raises(SchemaError, match="item_id"):
        read(workspace)


def test_value_of_another_type_is_named_by_file_and_row(workspace: Workspace) -> None:
    folder = Path(workspace.path("events"))
    folder.mkdir(parents=True)
    ids = pa.array(["1", "2", "three", "4"])
    table = pa.table({"user_id": ids, "item_id": [1, 2, 3, 4], "timestamp": [START] * 4})
    pq.write_table(table, folder / "log.parquet", row_group_size=2)
    with pytest.raises(SchemaError, match=r"log\.parquet, row 2: column 'user_id' holds 'three'"):
        read(workspace)


def test_empty_log_at_first_says_what_to_put_there(workspace: Workspace) -> None:
    log = Log.events(workspace, RefreshConfig(), {})
    assert log.fragments() == ([], {})
    with pytest.raises(SourceError, match=r"events: there are no events\. Add Parquet files with the columns user_id"):
        log.check_watermark(None, None, "refresh")


@pytest.mark.parametrize(("newest", "ends"), [(None, "is empty"), (START, "ends at 2001-09-09 01:46:40 UTC")])
def test_log_behind_the_watermark_is_refused(workspace: Workspace, newest: int | None, ends: str) -> None:
    log = Log.events(workspace, RefreshConfig(), {})
    with pytest.raises(SourceError, match=f"the log {ends}.*to start over, delete refresh"):
        log.check_watermark(newest, START + 1, "refresh")
    log.check_watermark(START + 1, START + 1, "refresh")
