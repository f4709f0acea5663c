"""The router: who gets a collaborative cohort, who an attribute group, and that new members need no clustering."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.assignment import Router, liked_mask, route, vector_array, vector_rows
from owlrec.cohorts.clustering import Codebook
from owlrec.cohorts.collaborative import ItemFactors
from owlrec.cohorts.model import CohortModel, Rings, open_model
from owlrec.errors import WorkspaceError
from owlrec.scenario import get_scenario
from owlrec.schema import HISTORIES
from owlrec.workspace import Workspace

MOVIES = get_scenario("movies")
BOOK = Codebook(np.eye(2, dtype=np.float32), np.array([4, 7]), 9)
GROUPS = {"user": {(("gender", "F"),): 6, (("gender", "F"), ("age", "20-29")): 2}}


def model(**changes: object) -> CohortModel:
    factors = ItemFactors(np.array([1, 2]), np.eye(2, dtype=np.float32))
    fields = {
        "factors": factors,
        "books": {"user-liked": BOOK, "user-disliked": BOOK},
        "groups": GROUPS,
        "min_group": 5,
    }
    return CohortModel(**(fields | changes))  # type: ignore[arg-type]


def vectors(ids: list[int], liked: list[list[float] | None], disliked: list[list[float] | None]) -> pa.Table:
    def column(values: list[list[float] | None]) -> pa.Array:
        return vector_array(
            np.array([v or [0, 0] for v in values], np.float32), np.array([v is not None for v in values])
        )

    return pa.table({"id": pa.array(ids, pa.int64()), "liked": column(liked), "disliked": column(disliked)})


def routed(
    table: pa.Table, users: Sequence[dict[str, object]] = (), **changes: object
) -> dict[tuple[int, str], tuple[str, str]]:
    found = route(model(**changes), "user", table, lambda: pa.Table.from_pylist(list(users)), MOVIES)
    return {(r["id"], r["facet"]): (r["cohort"], r["source"]) for r in found.to_pylist()}


def test_enough_history_is_collaborative_by_likes_and_by_dislikes() -> None:
    table = vectors([10, 11], [[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], None])
    assert routed(table) == {
        (10, "liked"): ("user-liked-000004", "collaborative"),
        (10, "disliked"): ("user-disliked-000007", "collaborative"),
        (11, "liked"): ("user-liked-000007", "collaborative"),
    }


def test_too_little_history_falls_back_to_attributes_then_to_all() -> None:
    users = [{"user_id": 10, "gender": "F", "age": "23"}, {"user_id": 11, "gender": "M", "age": "23"}]
    table = vectors([10, 11, 12], [None, None, None], [None, [1.0, 0.0], None])
    assert routed(table, users) == {
        (10, "liked"): ("user-gender=F", "attribute"),  # two share gender and age, six the gender, five are needed
        (11, "liked"): ("user-all", "global"),
        (11, "disliked"): ("user-disliked-000004", "collaborative"),
        (12, "liked"): ("user-all", "global"),  # not in the users table at all
    }


def test_members_beyond_a_ring_are_named_after_it() -> None:
    rings = {"user-liked": {4: Rings(np.array([0.2], np.float32), np.array([0]))}}
    table = vectors([1, 2], [[1.0, 0.0], [0.8, 0.6]], [None, None])
    table = table.set_column(1, "liked", vector_array(np.array([[1, 0], [0.75, 0.66]], np.float32), np.ones(2, bool)))
    assert [c for c, _ in routed(table, rings=rings).values()] == ["user-liked-000004", "user-liked-000004.1"]


def test_vectors_and_their_nulls_survive_the_table() -> None:
    values, known = np.array([[1, 2], [0, 0], [3, 4]], np.float32), np.array([True, False, True])
    rows, found = vector_rows(pa.chunked_array([vector_array(values, known)]))
    assert rows.tolist() == [0, 2]
    np.testing.assert_array_equal(found, values[known])
    sliced = pa.chunked_array([vector_array(values, known)]).slice(1)
    np.testing.assert_array_equal(vector_rows(sliced)[1], values[2:])


def test_a_behaviour_without_a_rating_is_liked() -> None:
    rows = [
        {"user_id": 1, "as_of": 1, "items": [1, 2], "ratings": [3.0, 4.0]},
        {"user_id": 2, "as_of": 1, "items": [3], "ratings": [None]},
    ]
    assert liked_mask(pa.Table.from_pylist(rows, schema=HISTORIES), 3).tolist() == [False, True, True]


def test_the_model_survives_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    before = model(rings={"user-liked": {4: Rings(np.array([0.2], np.float32), np.array([3]))}})
    before.save(workspace, "c")
    after = open_model(workspace, "c")
    assert after.groups == before.groups
    assert after.books["user-liked"].next_number == 9
    np.testing.assert_array_equal(after.books["user-liked"].numbers, [4, 7])
    assert after.rings["user-liked"][4].id.tolist() == [3]
    (tmp_path / "c" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WorkspaceError, match="damaged"):
        CohortModel.load(workspace, "c")


def test_a_second_run_counts_who_stayed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for folder, liked in (("a", [[1.0, 0.0], [1.0, 0.0]]), ("b", [[1.0, 0.0], [0.0, 1.0]])):
        model().save(workspace, folder)
        workspace.write_parquet(f"{folder}/vectors/user/00000000.parquet", vectors([1, 2], liked, [None, None]))  # type: ignore[arg-type]
    Router(workspace, "a", MOVIES)("user", "00000000.parquet")
    found = Router(workspace, "b", MOVIES, previous="a")("user", "00000000.parquet")
    assert found == {"sizes": {"user-liked-000004": 1, "user-liked-000007": 1}, "stayed": {"user-liked-000004": 1}}
