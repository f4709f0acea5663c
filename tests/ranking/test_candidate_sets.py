"""The set that a sample's behaviors are retrieved for: of one moment, of one size, whatever else is drawn."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.ranking.behavior_retrieval import SET_SIZE, with_candidates
from owlrec.schema import SAMPLES

CATALOG = np.arange(100, 400)


def samples(*rows: tuple[int, int, int], history: tuple[int, ...] = ()) -> pa.Table:
    """Of (user, item, moment)."""
    usual: dict[str, Any] = {"label": 1.0, "split": "train", "history": list(history)}
    usual |= {"history_ratings": None, "history_labels": [1.0] * len(history)}
    return pa.Table.from_pylist(
        [{"user_id": u, "item_id": i, "timestamp": t, **usual} for u, i, t in rows], schema=SAMPLES
    )


def sets(table: pa.Table, logged: pa.Table | None = None, catalog: np.ndarray = CATALOG) -> list[set[int]]:
    candidates = with_candidates(table, table if logged is None else logged, catalog)["candidates"].to_pylist()
    assert all(one == sorted(set(one)) for one in candidates)
    return [set(one) for one in candidates]


def test_samples_of_one_moment_share_their_set_and_others_do_not() -> None:
    first, second, later, other = sets(samples((1, 101, 5), (1, 102, 5), (1, 103, 6), (2, 101, 5)))
    assert first == second >= {101, 102}
    assert len({frozenset(one) for one in (first, later, other)}) == 3
    assert 103 in later
    assert [len(one) for one in (first, later, other)] == [SET_SIZE] * 3
    assert (first | later | other) <= set(CATALOG.tolist())


def test_the_rest_of_a_moment_counts_though_it_was_not_drawn() -> None:
    log = samples(*((1, 100 + i, 5) for i in range(SET_SIZE)), (1, 300, 6))
    (alone,) = sets(log.slice(3, 1), log)
    assert alone == set(range(100, 100 + SET_SIZE))


def test_of_a_long_list_each_keeps_itself_and_the_same_others() -> None:
    log = samples(*((1, 100 + i, 5) for i in range(30)))
    candidates = sets(log)
    assert all(len(one) == SET_SIZE and 100 + i in one for i, one in enumerate(candidates))
    common = set.intersection(*candidates)
    assert len(common) == SET_SIZE - 1
    assert sum(one - common == {100 + i} for i, one in enumerate(candidates)) == 30 - len(common)


def test_what_the_user_has_met_is_not_added() -> None:
    met = tuple(range(100, 130))
    (candidates,) = sets(samples((1, 130, 5), history=met), catalog=np.arange(100, 150))
    assert not candidates & set(met)
    assert 130 in candidates
    (candidates,) = sets(samples((1, 102, 5), history=(100, 101)), catalog=np.arange(100, 104))
    assert candidates in ({102}, {102, 103})


@pytest.mark.parametrize("history", [None, ()])
def test_an_empty_history_leaves_all_to_be_drawn(history: tuple[int, ...] | None) -> None:
    table = samples((1, 101, 5))
    table = table.set_column(table.column_names.index("history"), "history", pa.array([history], pa.list_(pa.int64())))
    assert len(sets(table)[0]) == SET_SIZE


@given(st.permutations(range(12)), st.integers(-(2**62), 2**62))
def test_neither_order_nor_company_changes_a_set(order: list[int], start: int) -> None:
    table = samples(*((user, 100 + 7 * i, start + i % 3) for i, user in enumerate([1, 1, 1, -2] * 3)))
    expected = sets(table)
    assert sets(table.take(pa.array(order)), table) == [expected[i] for i in order]
    assert sets(table.slice(4, 1), table.take(pa.array(order))) == expected[4:5]


def test_no_samples_have_no_sets() -> None:
    assert with_candidates(samples(), samples(), CATALOG)["candidates"].to_pylist() == []
