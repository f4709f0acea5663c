"""Subsets: deterministic users, then the items they touched."""

import numpy as np
import pyarrow as pa

from owlrec.ids import shard_of
from owlrec.sources.raw import RawTables, keep_subset

T = 1_700_000_000_000


def raw(pairs: list[tuple[int, int]], n_users: int, n_items: int) -> RawTables:
    return RawTables(
        users=pa.table({"user_id": list(range(1, n_users + 1))}),
        items=pa.table({"item_id": list(range(1, n_items + 1))}),
        interactions=pa.table(
            {"user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs], "timestamp": [T] * len(pairs)}
        ),
        digest="d",
    )


def test_no_limit_changes_nothing() -> None:
    whole = raw([(1, 1)], 2, 2)
    assert keep_subset(whole, max_users=None, max_items=None) is whole


def test_users_are_those_of_the_smallest_hash_and_items_those_they_touched() -> None:
    whole = raw([(u, u % 7 + 1) for u in range(1, 101)], 100, 50)
    expected = sorted(range(1, 101), key=lambda u: int(shard_of(np.array([u]), 1 << 62)[0]))[:10]
    part = keep_subset(whole, max_users=10, max_items=None)
    assert part.users["user_id"].to_pylist() == sorted(expected)
    assert set(part.items["item_id"].to_pylist()) == {u % 7 + 1 for u in expected}
    assert part.interactions["user_id"].to_pylist() == sorted(expected)


def test_more_users_keep_the_earlier_ones() -> None:
    whole = raw([(u, 1) for u in range(1, 101)], 100, 1)
    ten, twenty = (set(keep_subset(whole, max_users=n, max_items=None).users["user_id"].to_pylist()) for n in (10, 20))
    assert ten < twenty


def test_most_frequent_items_stay_and_users_without_interactions_go() -> None:
    whole = raw([(1, 3), (2, 3), (1, 2), (3, 2), (4, 1), (5, 4)], 6, 5)
    part = keep_subset(whole, max_users=None, max_items=3)
    assert part.items["item_id"].to_pylist() == [1, 2, 3]  # 1 and 4 are equally frequent: the smaller id stays
    assert part.users["user_id"].to_pylist() == [1, 2, 3, 4]
    assert part.interactions.num_rows == 5


def test_limits_beyond_the_data_keep_all_that_interacted() -> None:
    part = keep_subset(raw([(1, 1), (2, 2)], 3, 3), max_users=99, max_items=99)
    assert part.users["user_id"].to_pylist() == [1, 2]
    assert part.items["item_id"].to_pylist() == [1, 2]
