"""Memberships as a release wants them, and members' vectors as training wants them."""

import numpy as np
import pyarrow as pa

from owlrec.cohorts.memberships import member_vectors, memberships
from owlrec.schema import COHORTS, MEMBERSHIPS, stable_id, vectors_schema


def row(id_: int, cohort: str, facet: str = "liked", kind: str = "user") -> dict:
    return {"kind": kind, "id": id_, "cohort": cohort, "facet": facet, "source": "collaborative", "distance": 0.1}


def test_the_liked_cohort_comes_first() -> None:
    table = pa.Table.from_pylist(
        [row(7, "d", "disliked"), row(3, "a"), row(7, "b"), row(5, "i", "", "item")], schema=COHORTS
    )
    assert memberships(table).to_pylist() == [
        {"kind": "item", "id": 5, "cohorts": [stable_id("i")]},
        {"kind": "user", "id": 3, "cohorts": [stable_id("a")]},
        {"kind": "user", "id": 7, "cohorts": [stable_id("b"), stable_id("d")]},
    ]
    assert memberships(COHORTS.empty_table()).num_rows == 0


def test_a_member_has_the_mean_of_its_cohorts() -> None:
    members = pa.Table.from_pylist(
        [
            {"kind": "user", "id": 1, "cohorts": [10]},
            {"kind": "user", "id": 2, "cohorts": [10, 20]},
            {"kind": "user", "id": 3, "cohorts": [99]},
            {"kind": "user", "id": 4, "cohorts": [99, 20]},
        ],
        schema=MEMBERSHIPS,
    )
    vectors = pa.Table.from_pylist(
        [
            {"kind": "cohort", "id": 20, "vector": [np.float16(0), np.float16(1)], "codes": []},
            {"kind": "cohort", "id": 10, "vector": [np.float16(1), np.float16(0)], "codes": []},
        ],
        schema=vectors_schema(2),
    )
    found = member_vectors(members, vectors)
    assert found["id"].to_pylist() == [1, 2, 4]
    np.testing.assert_allclose(
        np.array(found["vector"].to_pylist(), float), [[1, 0], [0.7071, 0.7071], [0, 1]], atol=1e-3
    )
    assert member_vectors(members, vectors.slice(0, 0)).num_rows == 0
