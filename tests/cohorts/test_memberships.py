"""Memberships as a release wants them; tests/encoding/test_members.py has the vectors that training reads."""

from typing import Any

import pyarrow as pa

from owlrec.cohorts.cohort_model import memberships
from owlrec.ids import stable_id
from owlrec.releases.format import by_facet
from owlrec.schema import COHORTS


def row(id_: int, cohort: str, facet: str = "liked", kind: str = "user", as_of: int = 9) -> dict[str, Any]:
    keys = {"kind": kind, "id": id_, "as_of": as_of, "cohort": cohort, "facet": facet}
    return {**keys, "source": "collaborative", "distance": 0.1}


def test_the_liked_cohort_comes_first() -> None:
    table = pa.Table.from_pylist(
        [row(7, "d", "disliked"), row(3, "a"), row(7, "b"), row(5, "i", "", "item")], schema=COHORTS
    )
    assert memberships(table).to_pylist() == [
        {"kind": "item", "id": 5, "cohorts": [stable_id("i")], "as_of": 9},
        {"kind": "user", "id": 3, "cohorts": [stable_id("a")], "as_of": 9},
        {"kind": "user", "id": 7, "cohorts": [stable_id("b"), stable_id("d")], "as_of": 9},
    ]
    assert memberships(COHORTS.empty_table()).num_rows == 0


def test_memberships_of_two_moments_stay_apart() -> None:
    table = pa.Table.from_pylist(
        [row(7, "b", as_of=20), row(7, "d", "disliked", as_of=20), row(7, "a", as_of=10)], COHORTS
    )
    assert [(r["as_of"], r["cohorts"]) for r in memberships(table).to_pylist()] == [
        (10, [stable_id("a")]),
        (20, [stable_id("b"), stable_id("d")]),
    ]


def test_a_release_marks_what_was_disliked_by_the_complement() -> None:
    rows = [row(1, "war", "disliked"), row(1, "love"), row(2, "war", "disliked"), row(3, "war", "", "item")]
    cohorts = memberships(pa.Table.from_pylist(rows, COHORTS), marked=True)["cohorts"].to_pylist()
    war, love = stable_id("war"), stable_id("love")
    assert cohorts == [[war], [love, ~war], [~war]]
    assert list(map(by_facet, cohorts)) == [((war,), ()), ((love,), (war,)), ((), (war,))]
