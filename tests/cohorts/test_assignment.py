"""The router: who gets a collaborative cohort, who an attribute group, and that new members need no clustering."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.building import route, vector_array, vector_rows
from owlrec.cohorts.clustering import Codebook
from owlrec.cohorts.cohort_model import CohortModel
from owlrec.errors import WorkspaceError
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace

MOVIES = get_scenario("movies")
BOOK = Codebook(np.eye(2, dtype=np.float32), np.array([4, 7]), 9)
GROUPS = {"user": {(("gender", "F"),)}}


def model(**changes: object) -> CohortModel:
    fields = {"books": {"user-liked": BOOK, "user-disliked": BOOK}, "groups": GROUPS}
    return CohortModel(**(fields | changes))  # type: ignore[arg-type]


def vectors(ids: list[int], liked: list[list[float] | None], disliked: list[list[float] | None]) -> pa.Table:
    def column(values: list[list[float] | None]) -> pa.Array:
        return vector_array(
            np.array([v or [0, 0] for v in values], np.float32), np.array([v is not None for v in values])
        )

    as_of = pa.array([10 * i for i in ids], pa.int64())
    return pa.table(
        {"id": pa.array(ids, pa.int64()), "as_of": as_of, "liked": column(liked), "disliked": column(disliked)}
    )


def routed(
    table: pa.Table, users: Sequence[dict[str, object]] = (), **changes: object
) -> dict[tuple[int, str], tuple[str, str]]:
    rows = route(model(**changes), "user", table, lambda: pa.Table.from_pylist(list(users)), MOVIES)
    return {(r["id"], r["facet"]): (r["cohort"], r["source"]) for r in rows.to_pylist()}


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
        (10, "liked"): ("user-gender=F", "attribute"),  # those of her age are too few
        (11, "liked"): ("user-all", "global"),
        (11, "disliked"): ("user-disliked-000004", "collaborative"),
        (12, "liked"): ("user-all", "global"),  # not in the users table at all
    }


def test_a_user_is_routed_as_of_each_history_and_by_attributes_as_of_ever() -> None:
    table = vectors([10, 10, 11, 11], [None, [1.0, 0.0], None, None], [None, None, None, [0.0, 1.0]])
    table = table.set_column(1, "as_of", pa.array([5, 9, 5, 9], pa.int64()))
    rows = route(model(), "user", table, lambda: pa.table({"user_id": pa.array([], pa.int64())}), MOVIES).to_pylist()
    assert [(r["id"], r["as_of"], r["cohort"]) for r in rows] == [
        (10, 0, "user-all"),
        (10, 9, "user-liked-000004"),
        (11, 0, "user-all"),
        (11, 9, "user-disliked-000007"),
    ]


def test_vectors_and_their_nulls_survive_the_table() -> None:
    values, known = np.array([[1, 2], [0, 0], [3, 4]], np.float32), np.array([True, False, True])
    rows, vectors = vector_rows(pa.chunked_array([vector_array(values, known)]))
    assert rows.tolist() == [0, 2]
    np.testing.assert_array_equal(vectors, values[known])
    sliced = pa.chunked_array([vector_array(values, known)]).slice(1)
    np.testing.assert_array_equal(vector_rows(sliced)[1], values[2:])


def test_the_model_survives_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    cells = np.array([[0, 1], [1, 0]], np.float32)
    before = model(books={"user-liked": BOOK, "item": Codebook(BOOK.centroids, BOOK.numbers, 9, cells)})
    before.save(workspace, "c")
    after = CohortModel.load(workspace, "c")
    assert after.groups == before.groups
    assert after.books["user-liked"].next_number == 9
    np.testing.assert_array_equal(after.books["user-liked"].numbers, [4, 7])
    assert after.books["user-liked"].cells is None
    np.testing.assert_array_equal(after.books["item"].cells, cells)
    (tmp_path / "c" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WorkspaceError, match="damaged"):
        CohortModel.load(workspace, "c")
