"""Who stands for a cohort, what its prompt quotes, and when an earlier profile stays."""

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.cohort_model import (
    LATEST,
    PROFILES,
    ProfileSettings,
    _first,
    add_members,
    best_candidates,
    build_profiles,
    count_members,
    cut_moments,
    distinct_texts,
    item_candidates,
    keep_settled,
    user_candidates,
)
from owlrec.scenario import get_scenario
from owlrec.schema import COHORTS, HISTORIES
from owlrec.sources.splits import Every, ItemCatalog

MOVIES = get_scenario("movies")
SETTINGS = ProfileSettings(representatives=2, titles=3, opposite=2)


def candidates(numbers: list[int]) -> pa.Table:
    """Of some of five users. 1 to 3 are of cohort a, at .3, .1 and .2; 4 and 5 of an attribute group."""
    ages = {1: "23", 2: "25", 3: "31", 4: "44", 5: "47"}
    behaviors = {
        1: ([9], [5.0]),
        2: ([10, 11, 12], [5.0, 4.0, 1.0]),
        3: ([10, 13], [4.0, 2.0]),
        5: ([14], [5.0]),
    }
    cohort = {1: ("a", 0.3), 2: ("a", 0.1), 3: ("a", 0.2), 4: ("g", None), 5: ("g", None)}
    users = pa.table({"user_id": numbers, "gender": ["F"] * len(numbers), "age": [ages[i] for i in numbers]})
    rows = [
        {"user_id": i, "as_of": 100 + i, "items": behaviors[i][0], "ratings": behaviors[i][1]}
        for i in numbers
        if i in behaviors
    ]
    members = [
        {
            "kind": "user",
            "id": i,
            "as_of": 0,
            "cohort": cohort[i][0],
            "facet": "liked",
            "source": "collaborative",
            "distance": cohort[i][1],
        }
        for i in numbers
    ]
    tables = (pa.Table.from_pylist(members, schema=COHORTS), users, pa.Table.from_pylist(rows, schema=HISTORIES))
    return user_candidates(*tables, get_scenario("movies"), SETTINGS.representatives)


def profiles() -> dict[str, dict]:
    items = pa.table({"item_id": list(range(9, 15)), "title": [f"Film {i}" for i in range(9, 15)]})
    best = best_candidates([candidates([1, 2, 4]), candidates([3, 5])], SETTINGS.representatives)
    table = build_profiles(best, {"a": 3, "g": 2}, "user", ItemCatalog(items).titles, SETTINGS)
    assert table["id"].to_pylist() == sorted(table["id"].to_pylist())
    return {row["cohort"]: row for row in table.to_pylist()}


def test_the_nearest_members_stand_for_a_cohort() -> None:
    row = profiles()["a"]
    assert row["representatives"] == [2, 3]
    assert row["titles"] == ["Film 10", "Film 11"]  # both like film 10; user 1, who likes film 9, is too far
    assert row["opposite"] == ["Film 12", "Film 13"]
    assert row["attributes"] == ["age 20-29", "age 30-39", "gender F"]  # half of two have each age
    assert row["as_of"] == 103
    assert row["size"] == 3


def test_the_longest_history_stands_for_an_attribute_group() -> None:
    row = profiles()["g"]
    assert row["titles"] == ["Film 14"]
    assert row["attributes"] == ["age 40-49", "gender F"]


def profile(titles: list[str], size: int, **other: object) -> dict:
    row = {name: None for name in PROFILES.names}
    return {**row, "id": 1, "cohort": "a", "titles": titles, "size": size, **other}


@pytest.mark.parametrize(
    ("titles", "stayed", "kept"),
    [
        (["x", "y", "z", "q"], 40, 1),  # the same
        (["x", "y", "z", "q", "r"], 40, 1),  # a fifth of the titles is new
        (["x", "y", "s", "t"], 40, 0),  # of six titles together two are common
        (["x", "y", "z", "q"], 36, 1),  # 36 of 44 members together stayed
        (["x", "y", "z", "q"], 30, 0),  # 30 of 50
    ],
)
def test_a_profile_stays_while_members_and_titles_do(titles: list[str], stayed: int, kept: int) -> None:
    old = pa.Table.from_pylist([profile(["x", "y", "z", "q"], 40, as_of=1)], schema=PROFILES)
    new = pa.Table.from_pylist([profile(titles, 40, as_of=2)], schema=PROFILES)
    table, n = keep_settled(new, old, {"a": stayed}, ProfileSettings(settled_share=0.3))
    assert n == kept
    assert table["as_of"].to_pylist() == [1 if kept else 2]


def test_a_cohort_without_an_earlier_profile_is_new() -> None:
    new = pa.Table.from_pylist([profile(["x"], 5)], schema=PROFILES)
    assert keep_settled(new, PROFILES.empty_table(), {}, SETTINGS) == (new, 0)


def test_best_keeps_the_least_of_each_cohort_whatever_the_order() -> None:
    keys, rank = np.array([1, 0, 1, 0, 1]), np.array([3, 2, 1, 1, 2], np.float32)
    assert sorted(_first(keys, rank, np.arange(5), 1).tolist()) == [2, 3]
    assert sorted(_first(keys, rank, np.arange(5), 2).tolist()) == [1, 2, 3, 4]


def test_a_disliked_cohort_quotes_dislikes_first() -> None:
    member = {"kind": "user", "id": 1, "as_of": 7, "cohort": "d", "facet": "disliked", "source": "", "distance": 0.1}
    history = {"user_id": 1, "as_of": 7, "items": [5, 6, 7], "ratings": [1.0, 5.0, 2.0]}
    tables = (
        pa.Table.from_pylist([member], schema=COHORTS),
        pa.table({"user_id": [1]}),
        pa.Table.from_pylist([history], schema=HISTORIES),
    )
    row = user_candidates(*tables, get_scenario("movies"), 1).to_pylist()[0]
    assert (row["chosen"], row["opposite"], row["as_of"]) == ([5, 7], [6], 7)


def test_a_text_as_of_a_cut_quotes_who_was_a_member_and_what_they_had_done_by_then() -> None:
    keys = [("c", 1, 5), ("other", 1, 20), ("c", 2, 5), ("c", 3, 30)]
    members = [
        {"kind": "user", "id": i, "as_of": as_of, "cohort": c, "facet": "liked", "source": "", "distance": 0.1}
        for c, i, as_of in keys
    ]
    histories = [
        {"user_id": i, "as_of": as_of, "items": [i, as_of], "ratings": [5.0, 5.0], "passed": []}
        for i, as_of in ((1, 5), (1, 20), (2, 5), (2, 25), (3, 30))
    ]
    tables = (pa.Table.from_pylist(members, COHORTS), pa.table({"user_id": [1, 2, 3]}))
    chosen = user_candidates(*tables, pa.Table.from_pylist(histories, HISTORIES), MOVIES, 9, {"half": 10, "now": 99})
    rows = {(r["cut"], r["cohort"], r["id"]): (r["as_of"], r["chosen"]) for r in chosen.to_pylist()}
    assert rows == {
        ("half", "c", 1): (5, [1, 5]),
        ("half", "c", 2): (5, [2, 5]),
        ("now", "other", 1): (20, [1, 20]),
        ("now", "c", 2): (25, [2, 25]),
        ("now", "c", 3): (30, [3, 30]),
    }
    best = best_candidates([chosen], 9)
    texts = build_profiles(best, {"c": 2, "other": 1}, "user", lambda ids: [f"{i}" for i in ids.tolist()], SETTINGS)
    assert {(r["cohort"], r["cut"]): r["as_of"] for r in texts.to_pylist()} == {
        ("c", "half"): 5,
        ("c", "now"): 30,  # the newest thing that it quotes
        ("other", "now"): 20,
    }


def test_the_half_of_a_cohort_is_when_half_of_the_users_have_a_text() -> None:
    rows = [{"user_id": i, "as_of": as_of, "items": [], "ratings": [], "passed": []} for i, as_of in
            ((1, 10), (1, 90), (2, 20), (3, 30), (4, 40), (4, 41))]  # fmt: skip
    histories = pa.Table.from_pylist(rows, HISTORIES)
    assert cut_moments(histories, ("half", "now")) == {"half": 20, **LATEST}
    day = 24 * 3_600_000
    late = histories.set_column(1, "as_of", pa.array([day // 2, 3 * day, day, day, day, 2 * day + 1]))
    assert list(cut_moments(late, (Every(every="1d"),)).values())[:-1] == [day, 2 * day]


def test_of_two_texts_of_one_moment_the_later_cut_stays() -> None:
    rows = [profile([cut], 1, as_of=as_of, cut=cut) for cut, as_of in (("now", 5), ("half", 5), ("1d 7", 3))]
    kept = distinct_texts(pa.Table.from_pylist(rows, PROFILES), {"1d 7": 3, "half": 5, **LATEST})
    assert [(r["cut"], r["as_of"]) for r in kept.to_pylist()] == [("1d 7", 3), ("now", 5)]


def test_an_item_stands_for_itself() -> None:
    member = {"kind": "item", "id": 3, "cohort": "i", "facet": "", "source": "collaborative", "distance": 0.1}
    items = pa.table({"item_id": [2, 3], "genres": [["War"], ["Drama", "War"]], "year": ["1990", "1991"]})
    table = item_candidates(pa.Table.from_pylist([member], schema=COHORTS), items, get_scenario("movies"), 1)
    row = table.to_pylist()[0]
    assert (row["chosen"], row["attributes"]) == ([3], ["genres Drama", "genres War", "year 1991"])


def test_members_are_counted_and_those_who_stayed() -> None:
    now = pa.table({"id": [1, 2, 3, 4], "cohort": ["a", "a", "b", "b"]})
    before = pa.table({"id": [1, 2, 3, 5], "cohort": ["a", "b", "b", "b"]})
    total = add_members([count_members(now, before), count_members(now.slice(3), None)])
    assert {r["cohort"]: (r["members"], r["stayed"]) for r in total.to_pylist()} == {"a": (2, 1), "b": (3, 1)}
