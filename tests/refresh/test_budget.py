"""What the budget chooses: the greatest priorities, ties by the smaller id, in whatever shards and order they stand."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owlrec.refresh import interests as budget
from owlrec.refresh.interests import DUE, Cut, budget_cut, rank_digits
from owlrec.shards import Card, Shard
from owlrec.workspace import Workspace


def due(ids: Sequence[int], priorities: Sequence[float]) -> pa.Table:
    """A partition of each id; those of an id that occurs again are its next ones."""
    n = len(ids)
    parts = [list(ids[:at]).count(id_) for at, id_ in enumerate(ids)]
    columns = [pa.array(ids, pa.int64()), parts, [0] * n, ["age"] * n, np.zeros(n, np.float32), priorities]
    return pa.table(columns, schema=DUE)


def chosen(workspace: Workspace, shards: Sequence[pa.Table], calls: int | None) -> list[int]:
    """The ids that the budget admits, over all shards."""
    cards = {}
    for number, table in enumerate(shards):
        shard = Shard("user", number)
        workspace.write_parquet(f"f/due/{shard.file()}", table)
        bins = json.dumps(Counter(rank_digits(table)[:, 0].tolist()))
        counts = {"due": table.num_rows, "bins": bins}
        cards[shard.name] = Card(stage="interests", shard=shard.name, fingerprint="", counts=counts)
    cut = budget_cut(workspace, "f", cards, calls)
    return sorted(i for table in shards for i in table.filter(pa.array(cut.admits(table)))["user_id"].to_pylist())


@pytest.mark.parametrize(
    ("calls", "ids"), [(None, [3, 5, 7, 9]), (0, []), (1, [9]), (2, [3, 9]), (3, [3, 5, 9]), (8, [3, 5, 7, 9])]
)
def test_budget_goes_to_the_greatest_priority_and_ties_to_the_smaller_id(
    workspace: Workspace, calls: int | None, ids: list[int]
) -> None:
    assert chosen(workspace, [due([7, 5], [0.5, 0.5]), due([9, 3], [2.0, 0.5]), due([], [])], calls) == ids


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([0.0, -0.0, 1e-300, 0.5, 1.0, 1.0 + 2**-52]) | st.floats(0, 50),
        max_size=12,
    ),
    st.integers(0, 13),
    st.sampled_from([1, 2, 1 << 20]),
)
def test_budget_agrees_with_a_sort(
    workspace: Workspace, candidates: dict[int, float], calls: int, at_once: int
) -> None:
    tables = [due(list(candidates)[n::3], list(candidates.values())[n::3]) for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_AT_ONCE", at_once)
        ids = chosen(workspace, tables, calls)
    assert ids == sorted(sorted(candidates, key=lambda i: (-candidates[i], i))[:calls])


def test_only_shards_of_the_last_bin_are_read(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    read = Workspace.read_parquet
    monkeypatch.setattr(Workspace, "read_parquet", lambda w, path: (files.append(path), read(w, path))[1])
    assert chosen(workspace, [due([1], [4.0]), due([2, 3], [1.0, 9.0]), due([4], [0.1])], 3) == [1, 2, 3]
    assert files == ["f/due/user/00000001.parquet"]
    assert Cut(1.0, 2, 0).admits(due([2, 3, 1], [1.0, 1.0, 0.9])).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("calls", "ids"),
    [(1, [4]), (2, [4, 4]), (3, [4, 4, 6]), (4, [4, 4, 4, 6]), (5, [4, 4, 4, 6, 6])],
)
def test_budget_may_end_within_a_users_partitions(workspace: Workspace, calls: int, ids: list[int]) -> None:
    """User 4's are worth 3, 2 and 1, user 6's 1.5 and nothing, as are those of user 8."""
    tables = [due([4, 4, 4], [3.0, 2.0, 1.0]), due([6, 6], [1.5, 0.0]), due([8, 8], [0.0, 0.0])]
    assert chosen(workspace, tables, calls) == ids
    assert chosen(workspace, tables, 6) == [4, 4, 4, 6, 6, 8]
