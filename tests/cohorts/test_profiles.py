"""Who stands for a cohort, what its prompt quotes, and when an earlier profile stays."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.profiles import PROFILES, CandidateReader, ProfileConfig, build_profiles, keep_settled
from owlrec.scenario import get_scenario
from owlrec.schema import COHORTS, HISTORIES
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

CONFIG = ProfileConfig(representatives=2, titles=3, opposite=2)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Five users in two parts. Users 1 to 3 are of cohort a, at .3, .1 and .2; 4 and 5 of an attribute group."""
    workspace = Workspace(tmp_path)
    ages = {1: "23", 2: "25", 3: "31", 4: "44", 5: "47"}
    behaviours = {
        1: ([9], [5.0]),
        2: ([10, 11, 12], [5.0, 4.0, 1.0]),
        3: ([10, 13], [4.0, 2.0]),
        4: ([], []),
        5: ([14], [5.0]),
    }
    cohort = {1: ("a", 0.3), 2: ("a", 0.1), 3: ("a", 0.2), 4: ("g", None), 5: ("g", None)}
    for part, ids in (("00000000.parquet", [1, 2, 4]), ("00000001.parquet", [3, 5])):
        users = pa.table(
            {"user_id": ids, "raw_id": [str(i) for i in ids], "gender": ["F"] * len(ids), "age": [ages[i] for i in ids]}
        )
        rows = [{"user_id": i, "as_of": 100 + i, "items": behaviours[i][0], "ratings": behaviours[i][1]} for i in ids]
        members = [
            {
                "kind": "user",
                "id": i,
                "cohort": cohort[i][0],
                "facet": "liked",
                "source": "collaborative",
                "distance": cohort[i][1],
            }
            for i in ids
        ]
        workspace.write_parquet(f"tables/users/{part}", users)
        workspace.write_parquet(f"tables/histories/{part}", pa.Table.from_pylist(rows, schema=HISTORIES))
        workspace.write_parquet(f"c/user/{part}", pa.Table.from_pylist(members, schema=COHORTS))
    return workspace


def profiles(workspace: Workspace) -> dict[str, dict]:
    reader = CandidateReader(workspace, "c", get_scenario("movies"), CONFIG)
    for part in workspace.names("c", "user"):
        reader("user", part)
    items = pa.table({"item_id": list(range(9, 15)), "title": [f"Film {i}" for i in range(9, 15)]})
    table = build_profiles(workspace, "c", "user", {"a": 3, "g": 2}, ItemCatalog(items), CONFIG)
    return {row["cohort"]: row for row in table.to_pylist()}


def test_the_nearest_members_stand_for_a_cohort(workspace: Workspace) -> None:
    found = profiles(workspace)["a"]
    assert found["representatives"] == [2, 3]
    assert found["titles"] == ["Film 10", "Film 11"]  # both like film 10; user 1, who likes film 9, is too far
    assert found["opposite"] == ["Film 12", "Film 13"]
    assert found["attributes"] == ["age 20-29", "age 30-39", "gender F"]  # half of two have each age
    assert found["as_of"] == 103
    assert found["size"] == 3


def test_the_longest_history_stands_for_an_attribute_group(workspace: Workspace) -> None:
    found = profiles(workspace)["g"]
    assert found["titles"] == ["Film 14"]
    assert found["attributes"] == ["age 40-49", "gender F"]


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
    table, n = keep_settled(new, old, {"a": stayed}, ProfileConfig(settled_share=0.3))
    assert n == kept
    assert table["as_of"].to_pylist() == [1 if kept else 2]


def test_a_cohort_without_an_earlier_profile_is_new() -> None:
    new = pa.Table.from_pylist([profile(["x"], 5)], schema=PROFILES)
    assert keep_settled(new, PROFILES.empty_table(), {}, CONFIG) == (new, 0)


def test_best_keeps_the_least_of_each_cohort_whatever_the_order() -> None:
    from owlrec.cohorts.profiles import _best

    names = pa.chunked_array([["b", "a", "b", "a", "b"]])
    rank = np.array([3, 2, 1, 1, 2], np.float32)
    assert sorted(_best(names, rank, np.arange(5), 1).tolist()) == [2, 3]
    assert sorted(_best(names, rank, np.arange(5), 2).tolist()) == [1, 2, 3, 4]
