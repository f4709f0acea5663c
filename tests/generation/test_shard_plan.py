"""The shard plan: every row counted once, whatever the chunks, by a pure function of cohort and id."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.errors import SchemaError
from owlrec.generation.shard_plan import consecutive_ids, shard_sizes
from owlrec.schema import shard_of


def cut(ids, cohorts, size):
    return lambda: ((ids[i : i + size], cohorts[i : i + size]) for i in range(0, len(ids), size))


def brute_force(ids, cohorts, shard_rows):
    """Shard of each row, by walking the cohorts one after another."""
    sizes, first, count, shard, filled = Counter(cohorts), {}, {}, -1, shard_rows
    for cohort in sorted(sizes):
        if filled + sizes[cohort] <= shard_rows:
            filled += sizes[cohort]
        else:
            shard, filled = shard + 1, sizes[cohort]
        first[cohort], count[cohort] = shard, max(1, -(-sizes[cohort] // shard_rows))
        shard += count[cohort] - 1
    return [first[c] + int(shard_of(np.array([i]), count[c])[0]) for i, c in zip(ids, cohorts, strict=True)]


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 12)), max_size=80),
    shard_rows=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_every_row_is_counted_once_in_the_shard_of_a_brute_force(rows, shard_rows, sizes):
    ids, cohorts = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    found, again = (shard_sizes(cut(ids, cohorts, size), shard_rows) for size in sizes)
    expected = brute_force(ids.tolist(), cohorts.tolist(), shard_rows)
    assert found.shards(ids, cohorts).tolist() == expected
    assert found.rows.tolist() == [expected.count(shard) for shard in range(len(found.rows))]
    assert found.rows.sum() == len(rows)
    assert np.array_equal(found.rows, again.rows)
    assert np.array_equal(found.first, again.first)


def test_small_cohorts_share_shards_in_order_and_large_ones_stand_alone():
    cohorts = np.repeat([0, 1, 2, 4, 5], [3, 4, 5, 25, 2])
    found = shard_sizes(cut(np.arange(len(cohorts)), cohorts, 7), 10)
    assert found.first.tolist() == [0, 0, 1, 0, 2, 5]
    assert found.count.tolist() == [1, 1, 1, 0, 3, 1]
    assert found.rows[[0, 1, 5]].tolist() == [7, 5, 2]
    assert found.rows[2:5].sum() == 25


def test_many_tiny_cohorts_make_few_shards():
    ids = np.arange(300_000)
    found = shard_sizes(cut(ids, ids % 100_000, 65_536), 1000)
    assert len(found.rows) == 301  # 333 cohorts of three rows each
    assert found.rows.max() <= 1000


def test_without_cohorts_shards_are_those_of_the_tables():
    found = shard_sizes(consecutive_ids(200_000), 1000)
    assert found.rows.tolist() == np.bincount(shard_of(np.arange(200_000), 200)).tolist()
    assert found.spread == (found.rows.min(), np.median(found.rows), found.rows.max())
    assert len(shard_sizes(consecutive_ids(0), 1000).rows) == 0


def test_mistakes_in_the_rows_of_a_shard_plan_are_refused():
    ids, ones = np.arange(3), np.ones(3, dtype=np.int64)
    for wrong in (-ones, ones * 2**40):
        with pytest.raises(SchemaError, match="numbered from 0"):
            shard_sizes(cut(ids, wrong, 2), 10)
    found = shard_sizes(cut(ids, ones, 2), 10)
    for unknown in (0 * ones, 2 * ones, -ones):
        with pytest.raises(SchemaError, match="no shard"):
            found.shards(ids, unknown)
    with pytest.raises(ValueError, match="shard_rows is 0"):
        shard_sizes(cut(ids, ones, 2), 0)
    once = iter([(ids, ones)])
    with pytest.raises(ValueError, match="3 rows at first and 0"):
        shard_sizes(lambda: once, 10)
