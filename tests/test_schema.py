"""The tables' contracts: ids, shards, types, keys and time units."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec import schema
from owlrec.errors import SchemaError
from owlrec.ids import by_shard, shard_of, stable_id


@given(st.integers(0, 10**18 - 1))
def test_canonical_integers_keep_their_value(n: int) -> None:
    assert stable_id(str(n)) == n


@given(st.text(min_size=1))
def test_ids_are_stable_and_fit_63_bits(raw: str) -> None:
    assert stable_id(raw) == stable_id(raw)
    assert 0 <= stable_id(raw) < 2**63


def test_leading_zeros_and_non_ascii_digits_are_other_ids() -> None:
    assert len({stable_id(raw) for raw in ("7", "07", "007", "٧")}) == 4


def test_shards_cover_all_ids_evenly_even_with_a_stride() -> None:
    counts = np.bincount(shard_of(np.arange(0, 64_000, 64), 8), minlength=8)
    assert counts.sum() == 1000
    assert counts.min() > 80
    assert counts.max() < 180


def _interactions(**columns: list) -> pa.Table:
    base = {
        "user_id": [1],
        "item_id": [2],
        "rating": [3.0],
        "timestamp": [1_000_000_000_000],
        "label": [0.0],
        "split": [None],
    }
    n = len(columns.get("user_id", [1]))
    return pa.table({name: columns.get(name, values[:1] * n) for name, values in base.items()})


def test_conform_orders_and_types_and_keeps_further_columns() -> None:
    table = pa.table({"title": ["t"], "extra": ["x"], "raw_id": [7], "item_id": [2]})
    conformed = schema.conform(table, schema.ITEMS, name="t")
    assert conformed.column_names == ["item_id", "raw_id", "title", "extra"]
    assert conformed.schema.field("raw_id").type == pa.string()


def test_missing_column_is_named() -> None:
    with pytest.raises(SchemaError, match=r"data\.csv: column 'rating' is missing; the table has user_id"):
        schema.conform(_interactions().drop_columns(["rating"]), schema.INTERACTIONS, name="data.csv")


def test_wrong_type_names_row_and_value() -> None:
    with pytest.raises(SchemaError, match=r"data\.csv, row 1: column 'item_id' holds 'abc'"):
        schema.conform(
            _interactions(user_id=[1, 1], item_id=["2", "abc"], rating=[1.0, 1.0], timestamp=[1, 2]),
            schema.INTERACTIONS,
            name="data.csv",
        )


@pytest.mark.parametrize(("timestamp", "problem"), [(881_250_949, "seconds"), (881_250_949_000_000, "micro")])
def test_wrong_time_unit_is_detected(timestamp: int, problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        schema.check_milliseconds(pa.chunked_array([[timestamp]]), name="ratings")
    schema.check_milliseconds(pa.chunked_array([[881_250_949_000]]), name="ratings")


@given(st.lists(st.integers(-(2**62), 2**62), max_size=60), st.sampled_from([1, 2, 16]))
def test_every_position_belongs_to_its_shard(ids: list[int], n_shards: int) -> None:
    array = np.array(ids, dtype=np.int64)
    groups = list(by_shard(array, n_shards))
    assert sorted(np.concatenate([np.zeros(0, int), *(at for _, at in groups)]).tolist()) == list(range(len(ids)))
    assert len({number for number, _ in groups}) == len(groups)
    for number, at in groups:
        assert (shard_of(array[at], n_shards) == number).all()
