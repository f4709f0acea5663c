"""The whole stage on planted tastes: who ends up together, sizes, new members, a second run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.building import build_cohorts, make_latest, previous_of, read_profiles
from owlrec.cohorts.clustering import ClusterConfig
from owlrec.cohorts.collaborative import CollaborativeConfig
from owlrec.cohorts.memberships import CohortNames, iterate_memberships
from owlrec.cohorts.model import CohortsConfig
from owlrec.errors import SchemaError
from owlrec.scenario import get_scenario
from owlrec.schema import HISTORIES
from owlrec.workspace import Workspace

MOVIES = get_scenario("movies")
SIZES = ClusterConfig(mean_size=15, min_size=4, max_size=25)
CONFIG = CohortsConfig(collaborative=CollaborativeConfig(factors=4), users=SIZES, items=SIZES)
TASTES, ITEMS_A_TASTE = 4, 20


def serially(work: Callable[[str], Any], parts: Sequence[str]) -> Mapping[str, Any]:
    return {part: work(part) for part in parts}


def prepare(
    workspace: Workspace, histories: Mapping[int, list[int]], dislikes: Mapping[int, list[int]] | None = None
) -> None:
    """Users by id with what they liked and disliked; items 0 to 79, of which each score is one taste."""
    dislikes = dislikes or {}
    n = TASTES * ITEMS_A_TASTE
    items = pa.table(
        {
            "item_id": range(n),
            "raw_id": map(str, range(n)),
            "title": [f"Film {i}" for i in range(n)],
            "genres": [["Drama"]] * n,
        }
    )
    users = pa.table(
        {"user_id": list(histories), "raw_id": [str(u) for u in histories], "gender": ["F"] * len(histories)}
    )
    rows = [
        {
            "user_id": u,
            "as_of": 10,
            "items": liked + dislikes.get(u, []),
            "ratings": [5.0] * len(liked) + [1.0] * len(dislikes.get(u, [])),
        }
        for u, liked in histories.items()
        if liked or dislikes.get(u)
    ]
    workspace.write_table("users", users, key="user_id", n_shards=4)
    workspace.write_table("histories", pa.Table.from_pylist(rows, schema=HISTORIES), key="user_id", n_shards=4)
    workspace.write_table("items", items, key="item_id", n_shards=2)


def planted(n: int, seed: int = 0) -> dict[int, list[int]]:
    """User u has taste u modulo 4, and eight of its films."""
    rng = np.random.default_rng(seed)
    return {u: (ITEMS_A_TASTE * (u % TASTES) + rng.choice(ITEMS_A_TASTE, 8, replace=False)).tolist() for u in range(n)}


def names(workspace: Workspace, folder: str, kind: str, ids: Sequence[int]) -> list[list[str]]:
    return CohortNames(workspace, folder)(kind, ids)


def test_cohorts_hold_one_taste_and_keep_to_their_sizes(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    found = build_cohorts(workspace, "c", CONFIG, MOVIES, serially)
    of = {u: n[0] for u, n in enumerate(names(workspace, "c", "user", range(160)))}
    pure = [len({u % TASTES for u, name in of.items() if name == cohort}) == 1 for cohort in set(of.values())]
    assert np.mean(pure) > 0.8
    sizes = Counter(of.values())
    assert max(sizes.values()) <= 25
    assert min(sizes.values()) >= 4
    assert found["user_cohorts"] == len(sizes)
    assert sum(t.num_rows for t in iterate_memberships(workspace, "c")) == 160 + 80
    for row in read_profiles(workspace, "c").to_pylist():
        assert row["titles"], row


def test_dislikes_make_cohorts_of_their_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    liked = planted(80)
    prepare(workspace, liked, {u: [(20 + i) % 80 for i in items[:4]] for u, items in liked.items()})
    build_cohorts(workspace, "c", CONFIG, MOVIES, serially)
    both = names(workspace, "c", "user", range(80))
    assert all(len(n) == 2 for n in both)
    assert all(n[0].startswith("user-liked-") and n[1].startswith("user-disliked-") for n in both)


def test_identical_users_are_cut_into_rings_of_the_largest_size(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, {u: [1, 2, 3, 4] for u in range(60)})
    build_cohorts(workspace, "c", CONFIG, MOVIES, serially)
    sizes = Counter(n[0] for n in names(workspace, "c", "user", range(60)))
    assert sorted(sizes) == ["user-liked-000000", "user-liked-000000.1", "user-liked-000000.2"]
    assert set(sizes.values()) == {20}


def test_users_without_history_share_an_attribute_cohort(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(80) | {100 + u: [] for u in range(6)})
    build_cohorts(workspace, "c", CONFIG, MOVIES, serially)
    assert names(workspace, "c", "user", range(100, 106)) == [["user-gender=F"]] * 6
    profile = next(r for r in read_profiles(workspace, "c").to_pylist() if r["cohort"] == "user-gender=F")
    assert (profile["size"], profile["titles"], profile["attributes"]) == (6, [], ["gender F"])


def test_a_second_run_keeps_names_and_profiles(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    build_cohorts(workspace, "a", CONFIG, MOVIES, serially)
    make_latest(workspace, "a")
    assert previous_of(workspace, "b") == "a"
    prepare(workspace, planted(160) | {u: items for u, items in planted(168).items() if u >= 160})
    found = build_cohorts(workspace, "b", CONFIG, MOVIES, serially, "a")
    make_latest(workspace, "b")
    before, after = (names(workspace, folder, "user", range(160)) for folder in "ab")
    assert np.mean([a == b for a, b in zip(before, after, strict=True)]) > 0.7
    assert found["settled"] > 0
    assert previous_of(workspace, "b") == "a"  # a run that is repeated goes on from where it did before
    assert previous_of(workspace, "c") == "b"


def test_more_cohorts_than_users_are_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(40))
    config = CONFIG.model_copy(update={"users": SIZES.model_copy(update={"k": 41})})
    with pytest.raises(SchemaError, match="k is 41, but only 40"):
        build_cohorts(workspace, "c", config, MOVIES, serially)
