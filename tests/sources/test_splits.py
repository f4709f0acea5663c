"""The sample builder: hand-worked cases, a brute-force oracle in plain Python, and the laws that no input may break."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.errors import LeakageError, SchemaError
from owlrec.schema import HISTORIES, INTERACTIONS, SAMPLES
from owlrec.sources.movielens import MovieLens100KSource
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import SPLITS, SplitConfig, SplitTables, build_samples, last_behaviors, refuse_leaks

Row = tuple[int, int, Any, int]  # user, item, rating, timestamp
RATED = pa.schema([field for field in INTERACTIONS if field.name not in ("label", "split")])
ABOVE_3 = Labels(rule="rating_above", rating_above=3)
DRAWN = Labels(rule="positives_only", rating_above=3, negatives=1)


def table(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * 4
    return pa.table(dict(zip(RATED.names, map(list, columns), strict=True)), schema=RATED)


def crowd(behaviours: list[tuple[int, Any, int]], n_users: int = 30) -> list[Row]:
    """`n_users` users, numbered from 1, who all did the same (item, rating, timestamp)."""
    return [(user, *behaviour) for user in range(1, n_users + 1) for behaviour in behaviours]


def of_user(tables: SplitTables, user: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One user's samples, without user_id and split, and history row."""
    samples = [row for row in tables.samples.to_pylist() if row.pop("user_id") == user and row.pop("split")]
    (history,) = (row for row in tables.histories.to_pylist() if row["user_id"] == user)
    return samples, history


def test_hand_worked_user() -> None:
    # N = 5, so the LLM reads 3; item 12 comes before 13 at moment 30 because its id is smaller.
    rows = crowd([(14, 4.0, 50), (13, 3.0, 30), (10, 5.0, 10), (11, 1.0, 20), (12, 3.5, 30)])
    samples, history = of_user(build_samples(table(rows), SplitConfig(history_length=3), ABOVE_3), user=7)
    assert history == {"user_id": 7, "as_of": 30, "items": [10, 11, 12], "ratings": [5.0, 1.0, 3.5], "passed": []}
    # Item 13 has the moment of the last behaviour read: no sample, but part of item 14's past.
    assert samples == [
        {
            "item_id": 14,
            "label": 1.0,
            "timestamp": 50,
            "history": [11, 12, 13],
            "history_ratings": [1.0, 3.5, 3.0],
            "history_labels": [0.0, 1.0, 0.0],
        }
    ]


def test_samples_of_one_moment_do_not_see_each_other() -> None:
    rows = crowd([(1, 5, 10), (2, 5, 20), (3, 3, 30), (4, 4, 30)])
    samples, _ = of_user(build_samples(table(rows), SplitConfig(), ABOVE_3), user=1)
    assert [(s["item_id"], s["history"], s["label"]) for s in samples] == [(3, [1, 2], 0.0), (4, [1, 2], 1.0)]


def test_the_llm_reads_at_most_its_limit() -> None:
    rows = crowd([(item, 5, item * 10) for item in range(1, 101)])
    tables = build_samples(table(rows), SplitConfig(llm_history=30), ABOVE_3)
    samples, history = of_user(tables, user=1)
    assert history["items"] == list(range(1, 31))
    assert history["as_of"] == 300
    assert [s["item_id"] for s in samples] == list(range(31, 101))
    assert samples[-1]["history"] == list(range(90, 100))


def test_one_behaviour_gives_a_history_and_no_sample() -> None:
    rows = [*crowd([(1, 5, 10), (2, 5, 20)]), (99, 1, 5, 10)]
    tables = build_samples(table(rows), SplitConfig(), ABOVE_3)
    samples, history = of_user(tables, user=99)
    assert samples == []
    assert history == {"user_id": 99, "as_of": 10, "items": [1], "ratings": [5.0], "passed": []}
    assert tables.counts["users_without_samples"] == 1


def test_counts_add_up() -> None:
    rows = crowd([(1, 5, 10), (2, 2, 10), (3, 5, 20), (4, 5, 30)], n_users=20)
    assert build_samples(table(rows), SplitConfig(), ABOVE_3).counts == {
        "interactions": 80,
        "users": 20,
        "users_without_samples": 0,
        "read_by_llm": 40,
        "ties_dropped": 0,
        "samples": 40,
        "samples_train": 32,
        "positives_train": 32,
        "samples_valid": 4,
        "positives_valid": 4,
        "samples_test": 4,
        "positives_test": 4,
    }
    tied = crowd([(1, 5, 10), (2, 2, 10), (3, 5, 10), (4, 5, 30)], n_users=20)
    assert build_samples(table(tied), SplitConfig(), ABOVE_3).counts["ties_dropped"] == 20


@pytest.mark.parametrize(("n_users", "expected"), [(10, [8, 1, 1]), (943, [754, 94, 95]), (25, [20, 2, 3])])
def test_users_are_cut_exactly(n_users: int, expected: list[int]) -> None:
    tables = build_samples(table(crowd([(1, 5, 10), (2, 5, 20)], n_users)), SplitConfig(), ABOVE_3)
    assert [tables.counts[f"samples_{name}"] for name in SPLITS] == expected


def test_seed_changes_who_is_in_which_split() -> None:
    rows = table(crowd([(1, 5, 10), (2, 5, 20)], 200))
    splits = [build_samples(rows, SplitConfig(seed=seed), ABOVE_3).samples["split"].to_pylist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_time_split_puts_equal_timestamps_on_one_side() -> None:
    # Position 16 of the 20 samples lies amid the moment 108, all of which therefore goes to valid.
    moments = [*range(101, 108), *[108] * 10, 109, 110, 111]
    rows = [row for user, moment in enumerate(moments) for row in ((user, 1, 5.0, 10), (user, 2, 5.0, moment))]
    samples = build_samples(table(rows), SplitConfig(method="time"), ABOVE_3).samples.to_pylist()
    assert {name: sorted(s["timestamp"] for s in samples if s["split"] == name) for name in SPLITS} == {
        "train": list(range(101, 108)),
        "valid": [108] * 10 + [109],
        "test": [110, 111],
    }


def test_a_predefined_split_is_read_from_its_column() -> None:
    rows = table(crowd([(item, 5, 10 * item) for item in range(1, 7)], 3))
    names = pa.array(["valid", "train", "test", "train", "test", "valid"] * 3)
    samples = build_samples(rows.append_column("split", names), SplitConfig(method="column"), ABOVE_3).samples
    assert samples["item_id"].to_pylist() == [4, 5, 6] * 3  # the first half is the LLM's, whatever its split
    assert samples["split"].to_pylist() == ["train", "test", "valid"] * 3


def test_positives_without_ratings_are_quoted_without_one() -> None:
    rows = crowd([(1, None, 10), (2, None, 20)])
    samples, history = of_user(build_samples(table(rows), SplitConfig(), DRAWN), user=1)
    assert history["ratings"] == [None]
    assert samples[0]["label"] == 1.0


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_single_missing_ratings_are_refused(missing: float | None) -> None:
    rows = crowd([(1, 5, 10), (2, 5, 20)])
    rows[3] = (*rows[3][:2], missing, rows[3][3])
    with pytest.raises(SchemaError, match=r"interactions, row 3: rating is null \(1 such rows\)"):
        build_samples(table(rows), SplitConfig(), ABOVE_3)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([], SplitConfig(), r"0 samples of 0 users leave the train and valid and test split empty"),
        (crowd([(1, 5, 10), (2, 5, 20)], 5), SplitConfig(), r"leave the valid split empty.*8:1:1.*use more users"),
        (crowd([(1, 5, 10), (2, 5, 10)]), SplitConfig(), r"0 samples of 0 users.*\(30 samples had the timestamp"),
        (crowd([(1, 5, 10), (2, 5, 20)]), SplitConfig(method="time"), r"train and valid split empty.*longer time"),
    ],
)
def test_an_empty_split_says_what_to_do(rows: list[Row], config: SplitConfig, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        build_samples(table(rows), config, ABOVE_3)


def test_zero_ratios_are_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        SplitConfig(ratios=(9, 1, 0))


def leak_tables(as_of: int, timestamp: int, user: int = 2) -> tuple[pa.Table, pa.Table]:
    samples = [(1, 50), (user, timestamp), (3, 50)]
    histories = [{"user_id": u, "as_of": as_of if u == 2 else 1, "items": [], "ratings": []} for u in (3, 2, 1)]
    rows = [
        {
            "user_id": u,
            "item_id": 1,
            "label": 1.0,
            "timestamp": t,
            "history": [],
            "history_ratings": [],
            "history_labels": [],
            "split": "train",
        }
        for u, t in samples
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES), pa.Table.from_pylist(histories, schema=HISTORIES)


@pytest.mark.parametrize("as_of", [40, 41])
def test_a_leak_names_user_and_both_timestamps(as_of: int) -> None:
    with pytest.raises(LeakageError, match=rf"row 1: user 2 .* timestamp 40, .* up to {as_of} \(1 such samples\)"):
        refuse_leaks(*leak_tables(as_of, timestamp=40))


def test_later_samples_pass_the_leak_check() -> None:
    refuse_leaks(*leak_tables(as_of=39, timestamp=40))


@pytest.mark.parametrize("user", [0, 9])
def test_users_of_whom_nothing_was_read_have_no_text_to_leak(user: int) -> None:
    refuse_leaks(*leak_tables(as_of=50, timestamp=40, user=user))
    samples, histories = leak_tables(as_of=1, timestamp=40)
    refuse_leaks(samples, histories.slice(0, 0))


def oracle(
    rows: list[Row], config: SplitConfig, positive_above: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples (without split) and histories, one user and one behaviour at a time."""
    samples: list[dict[str, Any]] = []
    histories: list[dict[str, Any]] = []
    for user, group in groupby(sorted(rows, key=lambda r: (r[0], r[3], r[1])), key=lambda r: r[0]):
        behaviours = [row[1:] for row in group]
        n = min((len(behaviours) + 1) // 2, config.llm_history)
        as_of = behaviours[n - 1][2]
        histories.append(
            {
                "user_id": user,
                "as_of": as_of,
                "items": [item for item, _, _ in behaviours[:n]],
                "ratings": [rating for _, rating, _ in behaviours[:n]],
                "passed": [],
            }
        )
        for item, rating, timestamp in behaviours[n:]:
            if timestamp > as_of:
                past = [b for b in behaviours if b[2] < timestamp][-config.history_length :]
                samples.append(
                    {
                        "user_id": user,
                        "item_id": item,
                        "label": float(rating > positive_above),
                        "timestamp": timestamp,
                        "history": [item for item, _, _ in past],
                        "history_ratings": [rating for _, rating, _ in past],
                        "history_labels": [float(rating > positive_above) for _, rating, _ in past],
                    }
                )
    return samples, histories


@st.composite
def logs(draw: st.DrawFn) -> list[Row]:
    """Few users and few moments, so that ties within a user and between users are common; rows in any order."""
    n_users = draw(st.integers(3, 12))
    key = st.tuples(st.integers(1, n_users), st.integers(0, 8), st.integers(1, 12))
    keys = draw(st.lists(key, min_size=10, max_size=80, unique=True))
    ratings = draw(st.lists(st.sampled_from([1.0, 2.5, 3.0, 3.5, 5.0]), min_size=len(keys), max_size=len(keys)))
    return [(user, item, rating, time) for (user, item, time), rating in zip(keys, ratings, strict=True)]


configs = st.builds(
    SplitConfig,
    method=st.sampled_from(["user", "time"]),
    ratios=st.sampled_from([(8, 1, 1), (1, 1, 1), (2, 1, 1)]),
    history_length=st.integers(1, 6),
    llm_history=st.integers(1, 6),
    seed=st.integers(0, 5),
)


@settings(max_examples=300)
@given(logs(), configs)
def test_builder_agrees_with_the_oracle_and_never_leaks(rows: list[Row], config: SplitConfig) -> None:
    try:
        tables = build_samples(table(rows), config, ABOVE_3)
    except SchemaError:
        assume(False)
        return
    samples, histories = oracle(rows, config, positive_above=3)
    assert tables.samples.drop_columns("split").to_pylist() == samples
    assert tables.histories.to_pylist() == histories

    as_of = {row["user_id"]: row["as_of"] for row in histories}
    moments: dict[tuple[int, int], list[int]] = {(user, item): [] for user, item, _, _ in rows}
    for user, item, _, time in sorted(rows, key=lambda r: r[3]):
        moments[user, item].append(time)
    users: dict[str, set[int]] = {name: set() for name in SPLITS}
    times: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row in tables.samples.to_pylist():
        assert row["timestamp"] > as_of[row["user_id"]]
        # Each item of the history was seen by this user at some strictly earlier moment.
        assert all(bisect_right(moments[row["user_id"], item], row["timestamp"] - 1) for item in row["history"])
        users[row["split"]].add(row["user_id"])
        times[row["split"]].append(row["timestamp"])
    if config.method == "user":
        assert sum(map(len, users.values())) == len(set().union(*users.values()))
        n, total = sum(map(len, users.values())), sum(config.ratios)
        assert len(users["train"]) == n * config.ratios[0] // total
    else:
        assert max(times["train"]) < min(times["valid"])
        assert max(times["valid"]) < min(times["test"])


@settings(max_examples=50)
@given(logs(), configs, st.randoms(use_true_random=False))
def test_row_order_of_the_log_does_not_matter(rows: list[Row], config: SplitConfig, random: Any) -> None:
    try:
        tables = build_samples(table(rows), config, ABOVE_3)
    except SchemaError:
        assume(False)
        return
    shuffled = random.sample(rows, len(rows))
    again = build_samples(table(shuffled), config, ABOVE_3)
    assert again.samples.equals(tables.samples)
    assert again.histories.equals(tables.histories)


@settings(max_examples=100)
@given(logs(), configs, st.data())
def test_one_shifted_timestamp_is_caught(rows: list[Row], config: SplitConfig, data: st.DataObject) -> None:
    try:
        tables = build_samples(table(rows), config, ABOVE_3)
    except SchemaError:
        assume(False)
        return
    row = data.draw(st.integers(0, tables.samples.num_rows - 1))
    user = tables.samples["user_id"][row].as_py()
    as_of = dict(zip(*(tables.histories[c].to_pylist() for c in ("user_id", "as_of")), strict=True))[user]
    times = tables.samples["timestamp"].to_numpy().copy()
    times[row] = as_of
    leaky = tables.samples.set_column(3, "timestamp", pa.array(times))
    with pytest.raises(LeakageError, match=rf"row {row}: user {user} "):
        refuse_leaks(leaky, tables.histories)


def test_long_tables_are_gathered_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(crowd([(item, 5, item * 10) for item in range(1, 8)]))
    whole = build_samples(rows, SplitConfig(), ABOVE_3)
    monkeypatch.setattr("owlrec.sources.splits._LISTS_PER_CHUNK", 7)
    parts = build_samples(rows, SplitConfig(), ABOVE_3)
    assert parts.samples["history"].num_chunks > 1
    assert parts.samples.equals(whole.samples)


def test_movielens_100k_samples() -> None:
    interactions = MovieLens100KSource(type="movielens-100k").load().interactions
    counts = build_samples(interactions, SplitConfig(), ABOVE_3).counts
    rows = list(zip(*(interactions[c].to_pylist() for c in RATED.names), strict=True))
    samples, histories = oracle(rows, SplitConfig(), positive_above=3)
    assert counts["samples"] == len(samples) == 76_329
    assert counts["read_by_llm"] == sum(len(h["items"]) for h in histories) == 22_723
    assert counts["ties_dropped"] == 100_000 - 76_329 - 22_723
    assert sum(counts[f"positives_{name}"] for name in SPLITS) == sum(s["label"] for s in samples)


def test_last_behaviors_are_those_of_a_sample_that_would_come_next() -> None:
    rows = [(2, 7, 4.0, 30), (1, 5, 1.0, 10), (1, 9, 2.0, 30), (1, 8, 3.0, 30), (1, 6, 5.0, 20)]
    found = last_behaviors(with_outcomes(table(rows), ABOVE_3, "rows"), 3)
    assert found.to_pylist() == [
        {"id": 1, "times": [20, 30, 30], "items": [6, 8, 9], "ratings": [5.0, 3.0, 2.0], "labels": [1.0, 0.0, 0.0]},
        {"id": 2, "times": [30], "items": [7], "ratings": [4.0], "labels": [1.0]},
    ]
    assert last_behaviors(with_outcomes(table([]), ABOVE_3, "rows"), 3).num_rows == 0
