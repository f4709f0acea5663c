"""A state's files: users come back as they were, and its manifest says which shards need to be opened."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refresh_world import START  # type: ignore[import-not-found]

from owlrec.errors import WorkspaceError
from owlrec.ids import shard_of
from owlrec.refresh.events import REFUSED
from owlrec.refresh.state import (
    Behavior,
    ShardState,
    State,
    UserState,
    from_table,
    known_keys,
    read_state,
    to_table,
    write_state,
)
from owlrec.workspace import Workspace

USERS = [
    UserState(
        3, START, 2, 5, (Behavior(START, 7, None), Behavior(START + 1, 8, 4.5)), ((START - 1, 9),),
        np.array([[0.25, 1.0], [0, 2]], np.float32),
    ),
    UserState(4),
]  # fmt: skip

LATER = pa.table([[4], [7], [None], [START], ["UnknownItem"]], schema=REFUSED)


def test_users_come_back_as_they_were() -> None:
    back = from_table(to_table(USERS))
    assert back == USERS
    assert [u.interest.tolist() for u in back] == [[[0.25, 1.0], [0, 2]], []]


@given(
    st.lists(
        st.builds(
            UserState,
            st.integers(0, 2**62),
            st.integers(0, 2**42),
            st.integers(0, 99),
            st.integers(0, 99),
            st.lists(
                st.builds(
                    Behavior,
                    st.integers(0, 2**42),
                    st.integers(-(2**62), 2**62),
                    st.none() | st.sampled_from([1.0, 4.5]),
                ),
                max_size=4,
            ).map(tuple),
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4).map(tuple),
        ),
        max_size=5,
    )
)
def test_any_users_come_back_as_they_were(users: list[UserState]) -> None:
    assert from_table(to_table(users)) == users


def saved(workspace: Workspace) -> State:
    workspace.fix_shards({"user": 1})
    workspace.write_parquet("s/users.parquet", to_table(USERS))
    shard = ShardState(file="s/users.parquet", users=2, encoder="minilm", deferred="s/deferred.parquet")
    workspace.write_parquet("s/deferred.parquet", LATER)
    return State(name="s", n_shards=1, shards={0: shard})


def test_interests_of_another_encoder_are_forgotten(workspace: Workspace) -> None:
    state = saved(workspace)
    assert state.read_users(workspace, 0, "minilm")[0].interest.shape == (2, 2)
    other = state.read_users(workspace, 0, "other")[0]
    assert (other.interest.size, other.short) == (0, USERS[0].short)
    assert state.read_users(workspace, 1, "minilm") == []
    assert state.read_deferred(workspace, 1).num_rows == 0


def test_split_shards_share_the_files_and_not_the_users(workspace: Workspace) -> None:
    state = saved(workspace).split(4)
    homes = shard_of(np.array([3, 4]), 4).tolist()
    for number in range(4):
        users = [u.user_id for u in state.read_users(workspace, number, "minilm")]
        assert users == [u for u, home in zip((3, 4), homes, strict=True) if home == number]
        assert state.read_deferred(workspace, number).num_rows == (homes[1] == number)


def test_keys_are_those_of_the_short_term_and_of_what_was_seen() -> None:
    keys = known_keys(USERS)
    assert sorted(zip(keys.user.tolist(), keys.time.tolist(), keys.item.tolist(), strict=True)) == [
        (3, START - 1, 9),
        (3, START, 7),
        (3, START + 1, 8),
    ]
    assert len(known_keys([])) == 0


def test_shards_are_opened_where_somebody_waits_or_is_due() -> None:
    shard = ShardState(file="f", users=1, encoder="e")
    changes = ({}, {"waiting": 1}, {"due_at": 10}, {"due_at": 11}, {"deferred": "d"}, {"deferred": "d", "retry_at": 20})
    shards = {n: shard.model_copy(update=update) for n, update in enumerate(changes)}
    state = State(n_shards=8, shards=shards, admitted_by="tables")
    assert state.due_shards(10) == {1, 2}
    assert state.retried_shards("tables", 19) == set()
    assert state.retried_shards("tables", 20) == {5}
    assert state.retried_shards("other tables", 19) == {4, 5}
    assert State.model_validate_json(state.model_dump_json()) == state


def test_damaged_state_is_named_with_the_remedy(workspace: Workspace) -> None:
    state = saved(workspace)
    write_state(workspace, state, "")
    assert read_state(workspace) == state
    workspace.write_json("refresh/s/state.json", {"watermark": "soon"})
    with pytest.raises(WorkspaceError, match=r"Delete .*refresh"):
        read_state(workspace)
