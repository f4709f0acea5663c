"""The sample builder: hand-worked cases, a brute-force oracle in plain Python, and the laws that no input may break."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.errors import SchemaError
from owlrec.schema import INTERACTIONS, newest
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.splits import SPLITS, Every, SplitConfig, SplitTables, build_samples, last_behaviors

Row = tuple[int, int, Any, int]  # user, item, rating, timestamp
RATED = pa.schema([field for field in INTERACTIONS if field.name not in ("label", "split", "weight")])
ABOVE_3 = Labels(rule="rating_above", rating_above=3)
HOUR = 3_600_000  # ms
DRAWN = Labels(rule="positives_only", rating_above=3, negatives=1)


def kar(**more: Any) -> SplitConfig:
    return SplitConfig(cuts=("kar",), **more)


def table(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * 4
    return pa.table(dict(zip(RATED.names, map(list, columns), strict=True)), schema=RATED)


def crowd(behaviors: list[tuple[int, Any, int]], n_users: int = 30) -> list[Row]:
    """`n_users` users, numbered from 1, who all did the same (item, rating, timestamp)."""
    return [(user, *behavior) for user in range(1, n_users + 1) for behavior in behaviors]


def user_rows(tables: SplitTables, user: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One user's samples, without user_id and split, and history row."""
    samples = [row for row in tables.samples.to_pylist() if row.pop("user_id") == user and row.pop("split")]
    (history,) = (row for row in tables.histories.to_pylist() if row["user_id"] == user)
    return samples, history


def test_hand_worked_user() -> None:
    # N = 5, so the LLM reads 3; item 12 comes before 13 at moment 30 because its id is smaller.
    rows = crowd([(14, 4.0, 50), (13, 3.0, 30), (10, 5.0, 10), (11, 1.0, 20), (12, 3.5, 30)])
    samples, history = user_rows(build_samples(table(rows), kar(history_length=3), ABOVE_3), user=7)
    assert history == {"user_id": 7, "as_of": 30, "items": [10, 11, 12], "ratings": [5.0, 1.0, 3.5], "passed": []}
    # Item 13 has the moment of the last behavior read: no sample, but part of item 14's past.
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
    samples, _ = user_rows(build_samples(table(rows), kar(), ABOVE_3), user=1)
    assert [(s["item_id"], s["history"], s["label"]) for s in samples] == [(3, [1, 2], 0.0), (4, [1, 2], 1.0)]


def test_the_llm_reads_at_most_its_limit() -> None:
    rows = crowd([(item, 5, item * 10) for item in range(1, 101)])
    tables = build_samples(table(rows), kar(), ABOVE_3)
    samples, history = user_rows(tables, user=1)
    assert history["items"] == list(range(1, 31))
    assert history["as_of"] == 300
    assert [s["item_id"] for s in samples] == list(range(31, 101))
    assert samples[-1]["history"] == list(range(90, 100))


def test_one_behavior_gives_a_history_and_no_sample() -> None:
    rows = [*crowd([(1, 5, 10), (2, 5, 20)]), (99, 1, 5, 10)]
    tables = build_samples(table(rows), kar(), ABOVE_3)
    samples, history = user_rows(tables, user=99)
    assert samples == []
    assert history == {"user_id": 99, "as_of": 10, "items": [1], "ratings": [5.0], "passed": []}
    assert tables.counts["users_without_samples"] == 1


def test_counts_add_up() -> None:
    rows = crowd([(1, 5, 10), (2, 2, 10), (3, 5, 20), (4, 5, 30)], n_users=20)
    assert build_samples(table(rows), kar(), ABOVE_3).counts == {
        "interactions": 80,
        "users": 20,
        "users_without_samples": 0,
        "texts": 20,
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
    assert build_samples(table(tied), kar(), ABOVE_3).counts["ties_dropped"] == 20


@pytest.mark.parametrize(("n_users", "expected"), [(10, [8, 1, 1]), (943, [754, 94, 95]), (25, [20, 2, 3])])
def test_users_are_cut_exactly(n_users: int, expected: list[int]) -> None:
    tables = build_samples(table(crowd([(1, 5, 10), (2, 5, 20)], n_users)), kar(), ABOVE_3)
    assert [tables.counts[f"samples_{name}"] for name in SPLITS] == expected


def test_seed_changes_who_is_in_which_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(crowd([(1, 5, 10), (2, 5, 20)], 200))
    splits = []
    for seed in (0, 0, 1):
        monkeypatch.setattr("owlrec.sources.splits.SPLIT_SEED", seed)
        splits.append(build_samples(rows, kar(), ABOVE_3).samples["split"].to_pylist())
    assert splits[0] == splits[1] != splits[2]


def test_time_split_puts_equal_timestamps_on_one_side() -> None:
    # Position 16 of the 20 samples lies amid the moment 108, all of which therefore goes to valid.
    moments = [*range(101, 108), *[108] * 10, 109, 110, 111]
    rows = [row for user, moment in enumerate(moments) for row in ((user, 1, 5.0, 10), (user, 2, 5.0, moment))]
    samples = build_samples(table(rows), kar(method="time"), ABOVE_3).samples.to_pylist()
    assert {name: sorted(s["timestamp"] for s in samples if s["split"] == name) for name in SPLITS} == {
        "train": list(range(101, 108)),
        "valid": [108] * 10 + [109],
        "test": [110, 111],
    }


def test_a_predefined_split_is_read_from_its_column() -> None:
    rows = table(crowd([(item, 5, 10 * item) for item in range(1, 7)], 3))
    names = pa.array(["valid", "train", "test", "train", "test", "valid"] * 3)
    samples = build_samples(rows.append_column("split", names), kar(method="column"), ABOVE_3).samples
    assert samples["item_id"].to_pylist() == [4, 5, 6] * 3  # the first half is the LLM's, whatever its split
    assert samples["split"].to_pylist() == ["train", "test", "valid"] * 3


def test_positives_without_ratings_are_quoted_without_one() -> None:
    rows = crowd([(1, None, 10), (2, None, 20)])
    samples, history = user_rows(build_samples(table(rows), kar(), DRAWN), user=1)
    assert history["ratings"] == [None]
    assert samples[0]["label"] == 1.0


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_single_missing_ratings_are_refused(missing: float | None) -> None:
    rows = crowd([(1, 5, 10), (2, 5, 20)])
    rows[3] = (*rows[3][:2], missing, rows[3][3])
    with pytest.raises(SchemaError, match=r"interactions, row 3: rating is null \(1 such rows\)"):
        build_samples(table(rows), kar(), ABOVE_3)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([], kar(), r"0 samples of 0 users leave the train and valid and test split empty"),
        (crowd([(1, 5, 10), (2, 5, 20)], 5), kar(), r"leave the valid split empty.*8:1:1.*use more users"),
        (crowd([(1, 5, 10), (2, 5, 10)]), kar(), r"0 samples of 0 users.*\(30 samples have the timestamp"),
        (crowd([(1, 5, 10), (2, 5, 20)]), kar(method="time"), r"train and valid split empty.*longer period"),
    ],
)
def test_an_empty_split_says_what_to_do(rows: list[Row], config: SplitConfig, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        build_samples(table(rows), config, ABOVE_3)


def test_zero_ratios_are_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        SplitConfig(ratios=(9, 1, 0))


def test_by_default_every_behavior_is_a_sample_and_texts_are_as_of_half_and_now() -> None:
    rows = crowd([(item, 5 - item % 2 * 4, item * 10) for item in range(1, 11)])
    tables = build_samples(table(rows), SplitConfig(llm_history=3), ABOVE_3)
    histories = [row for row in tables.histories.to_pylist() if row["user_id"] == 4]
    assert [(h["as_of"], h["items"]) for h in histories] == [(30, [1, 2, 3]), (100, [8, 9, 10])]
    samples = [row for row in tables.samples.to_pylist() if row["user_id"] == 4]
    assert [(s["item_id"], len(s["history"])) for s in samples] == [(item, item - 1) for item in range(1, 11)]
    assert {name: tables.counts[name] for name in ("texts", "read_by_llm")} == {"texts": 60, "read_by_llm": 180}


def test_a_published_text_quotes_the_newest_behaviors_of_long_histories() -> None:
    rows = crowd([(item, 5 - item % 2 * 4, item * 1000) for item in range(1, 151)])
    histories = build_samples(table(rows), SplitConfig(), ABOVE_3).histories
    published = newest(histories, "user_id").to_pylist()
    assert len(published) == 30
    assert {(h["as_of"], h["items"][0], h["items"][-1]) for h in published} == {(150_000, 121, 150)}


def test_cuts_at_multiples_of_a_period_quote_what_is_earlier() -> None:
    times = [1, 2, 24, 30, 100]  # hours; a behavior at the cut itself comes after it
    rows = crowd([(item, 5 - item % 2 * 4, hours * HOUR) for item, hours in enumerate(times)])
    config = SplitConfig(cuts=({"every": "1d"},), llm_history=3)  # type: ignore[arg-type]
    histories = build_samples(table(rows), config, ABOVE_3).histories.to_pylist()
    day = 24 * HOUR
    assert [(h["as_of"], h["items"]) for h in histories if h["user_id"] == 1] == [
        (day, [0, 1]),
        (2 * day, [1, 2, 3]),  # no cut follows while nothing happens, and none after the last behavior
    ]


@pytest.mark.parametrize("cut", ["half", "kar", {"every": "1w"}])
def test_one_cut_needs_no_list(cut: Any) -> None:
    assert len(SplitConfig(cuts=cut).cuts) == 1


@pytest.mark.parametrize("cuts", [[], ["half", "half"], ["half", "kar"], ["whole"], {"every": "30"}, {"every": "0d"}])
def test_odd_cuts_are_refused(cuts: Any) -> None:
    with pytest.raises(ValidationError):
        SplitConfig(cuts=cuts)


def test_items_of_a_split_by_item_are_in_one_split_each() -> None:
    rows = [(user, item, 5 - user % 2 * 4, user * 10 + item) for user in range(1, 9) for item in range(200)]
    samples = build_samples(table(rows), SplitConfig(method="item"), ABOVE_3).samples
    split_of = {pair for pair in zip(samples["item_id"].to_pylist(), samples["split"].to_pylist(), strict=True)}
    assert len(split_of) == 200
    assert sorted(Counter(split for _, split in split_of).values()) == [20, 20, 160]


def cuts_of(behaviors: list[Any], config: SplitConfig) -> dict[int, int]:
    """as_of -> how many of a user's behaviors the text of that moment may quote."""
    moments = [time for _, _, time in behaviors]
    cuts: dict[int, int] = {}
    for cut in config.cuts:
        if cut in ("half", "kar"):
            n = min((len(moments) + 1) // 2, config.llm_history)
            cuts[moments[n - 1]] = max(n, cuts.get(moments[n - 1], 0))
        elif cut == "now":
            cuts[moments[-1]] = len(moments)
        elif isinstance(cut, Every):
            multiples = range(cut.period_ms, moments[-1], cut.period_ms)
            counts = {moment: sum(time < moment for time in moments) for moment in multiples}
            for moment, n in counts.items():
                if n and n > counts.get(moment - cut.period_ms, 0):
                    cuts[moment] = max(n, cuts.get(moment, 0))
    return dict(sorted(cuts.items()))


def oracle(
    rows: list[Row], config: SplitConfig, positive_above: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples (without split) and histories, one user and one behavior at a time."""
    samples: list[dict[str, Any]] = []
    histories: list[dict[str, Any]] = []
    for user, group in groupby(sorted(rows, key=lambda r: (r[0], r[3], r[1])), key=lambda r: r[0]):
        behaviors = [row[1:] for row in group]
        for as_of, n in cuts_of(behaviors, config).items():
            quoted = behaviors[max(0, n - config.llm_history) : n]
            histories.append(
                {
                    "user_id": user,
                    "as_of": as_of,
                    "items": [item for item, _, _ in quoted],
                    "ratings": [rating for _, rating, _ in quoted],
                    "passed": [],
                }
            )
        half = min((len(behaviors) + 1) // 2, config.llm_history) if "kar" in config.cuts else 0
        for item, rating, timestamp in behaviors[half:]:
            if half == 0 or timestamp > behaviors[half - 1][2]:
                past = [b for b in behaviors if b[2] < timestamp][-config.history_length :]
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
    key = st.tuples(st.integers(1, n_users), st.integers(0, 8), st.integers(1, 12).map(lambda hours: hours * HOUR))
    keys = draw(st.lists(key, min_size=10, max_size=80, unique=True))
    ratings = draw(st.lists(st.sampled_from([1.0, 2.5, 3.0, 3.5, 5.0]), min_size=len(keys), max_size=len(keys)))
    return [(user, item, rating, time) for (user, item, time), rating in zip(keys, ratings, strict=True)]


CUTS = ("now", {"every": "2h"}, {"every": "1h"})
configs = st.builds(
    SplitConfig,
    cuts=st.builds(
        lambda first, others: (*first, *others),
        st.sampled_from([("half",), ("kar",)]),
        st.lists(st.sampled_from(CUTS), unique_by=str),
    )
    | st.lists(st.sampled_from(CUTS), min_size=1, unique_by=str).map(tuple),
    method=st.sampled_from(["user", "time"]),
    ratios=st.sampled_from([(8, 1, 1), (1, 1, 1), (2, 1, 1)]),
    history_length=st.integers(1, 6),
    llm_history=st.integers(1, 6),
)


@settings(max_examples=300)
@given(logs(), configs)
def test_builder_agrees_with_the_oracle(rows: list[Row], config: SplitConfig) -> None:
    try:
        tables = build_samples(table(rows), config, ABOVE_3)
    except SchemaError:
        assume(False)
        return
    samples, histories = oracle(rows, config, positive_above=3)
    assert tables.samples.drop_columns("split").to_pylist() == samples
    assert tables.histories.to_pylist() == histories

    moments: dict[tuple[int, int], list[int]] = {(user, item): [] for user, item, _, _ in rows}
    for user, item, _, time in sorted(rows, key=lambda r: r[3]):
        moments[user, item].append(time)
    users: dict[str, set[int]] = {name: set() for name in SPLITS}
    times: dict[str, list[int]] = {name: [] for name in SPLITS}
    for row in tables.samples.to_pylist():
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


def test_long_tables_are_gathered_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(crowd([(item, 5, item * 10) for item in range(1, 8)]))
    whole = build_samples(rows, kar(), ABOVE_3)
    monkeypatch.setattr("owlrec.sources.splits._LISTS_PER_CHUNK", 7)
    parts = build_samples(rows, kar(), ABOVE_3)
    assert parts.samples["history"].num_chunks > 1
    assert parts.samples.equals(whole.samples)


def test_movielens_100k_samples() -> None:
    interactions = MovieLens100KSource(type="movielens-100k").load().interactions
    counts = build_samples(interactions, kar(), ABOVE_3).counts
    rows = list(zip(*(interactions[c].to_pylist() for c in RATED.names), strict=True))
    samples, histories = oracle(rows, kar(), positive_above=3)
    assert counts["samples"] == len(samples) == 76_329
    assert counts["read_by_llm"] == sum(len(h["items"]) for h in histories) == 22_723
    assert counts["ties_dropped"] == 100_000 - 76_329 - 22_723
    assert sum(counts[f"positives_{name}"] for name in SPLITS) == sum(s["label"] for s in samples)


def test_last_behaviors_are_those_of_a_sample_that_would_come_next() -> None:
    rows = [(2, 7, 4.0, 30), (1, 5, 1.0, 10), (1, 9, 2.0, 30), (1, 8, 3.0, 30), (1, 6, 5.0, 20)]
    behaviors = last_behaviors(with_outcomes(table(rows), ABOVE_3, "rows"), 3)
    assert behaviors.to_pylist() == [
        {"id": 1, "times": [20, 30, 30], "items": [6, 8, 9], "ratings": [5.0, 3.0, 2.0], "labels": [1.0, 0.0, 0.0],
         "events": [0, 0, 0]},
        {"id": 2, "times": [30], "items": [7], "ratings": [4.0], "labels": [1.0], "events": [0]},
    ]  # fmt: skip
    log = with_outcomes(table(rows), ABOVE_3, "rows").append_column("event", pa.array([1, 2, 3, 4, 5], pa.uint8()))
    assert last_behaviors(log, 3)["events"].to_pylist() == [[5, 4, 3], [1]]
    assert last_behaviors(with_outcomes(table([]), ABOVE_3, "rows"), 3).num_rows == 0
