import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from owlrec.ids import rows_of, run_starts

SMALL = st.lists(st.integers(-3, 3), max_size=12)


@given(st.sets(st.integers(-9, 9)), SMALL)
def test_rows_are_those_that_a_list_finds(ids: set[int], wanted: list[int]) -> None:
    ascending = sorted(ids)
    rows = rows_of(np.array(ascending, np.int64), np.array(wanted, np.int64))
    assert rows.tolist() == [ascending.index(i) if i in ids else -1 for i in wanted]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12))
def test_a_run_starts_at_the_first_row_with_its_keys(pairs: list[tuple[int, int]]) -> None:
    ordered = sorted(pairs)
    one, other = np.array(ordered, np.int64).reshape(-1, 2).T
    assert run_starts(one, other).tolist() == [ordered.index(pair) for pair in ordered]
