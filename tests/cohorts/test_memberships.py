"""Memberships as a release wants them, and members' vectors as training wants them."""

import numpy as np
import pyarrow as pa

from owlrec.cohorts.memberships import member_vectors, memberships
from owlrec.schema import COHORTS, MEMBERSHIPS, stable_id


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
    held = {10: [1, 0], 20: [0, 1]}
    gathered: list[list[int]] = []

    def gather(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gathered.append(ids.tolist())
        vectors = np.array([held.get(i, [0, 0]) for i in ids.tolist()], np.float16)
        return vectors, np.array([i in held for i in ids.tolist()])

    vectors = member_vectors(members, gather)
    np.testing.assert_allclose(vectors, [[1, 0], [0.7071, 0.7071], [0, 0], [0, 1]], atol=1e-4)
    assert gathered == [[10, 20, 99]]  # each once
