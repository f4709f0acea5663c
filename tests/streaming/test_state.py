"""A state's files: users come back as they were, and its manifest says which shards need to be opened."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from streaming_world import START  # type: ignore[import-not-found]

from owlrec.streaming.partitions import Behaviour, UserState
from owlrec.streaming.state import State, StateShard, from_table, read_keys, read_users, to_table
from owlrec.workspace import Workspace

USERS = [
    UserState(
        3, START, 2, 5, (Behaviour(START, 7, None), Behaviour(START + 1, 8, 4.5)), ((START - 1, 9),),
        np.array([0.25, 1.0], np.float32), 9.5,
    ),
    UserState(4),
]  # fmt: skip


def test_users_come_back_as_they_were() -> None:
    back = from_table(to_table(USERS))
    assert back == USERS
    assert [u.interest.tolist() for u in back] == [[0.25, 1.0], []]


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
                    Behaviour,
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
    workspace.write_parquet("s/part.parquet", to_table(USERS))
    return State(n_shards=4, shards={2: StateShard(file="s/part.parquet", users=2, encoder="minilm")})


def test_interests_of_another_encoder_are_forgotten(workspace: Workspace) -> None:
    state = saved(workspace)
    assert read_users(workspace, state, 2, "minilm")[0].weight == 9.5
    other = read_users(workspace, state, 2, "other")[0]
    assert (other.weight, len(other.interest), other.short) == (0.0, 0, USERS[0].short)
    assert read_users(workspace, state, 1, "minilm") == []


def test_keys_are_those_of_the_short_term_and_of_what_was_seen(workspace: Workspace) -> None:
    users, keys = read_keys(workspace, saved(workspace), 2)
    assert users.tolist() == [3, 4]
    assert sorted(zip(keys.user.tolist(), keys.time.tolist(), keys.item.tolist(), strict=True)) == [
        (3, START - 1, 9),
        (3, START, 7),
        (3, START + 1, 8),
    ]
    users, keys = read_keys(workspace, saved(workspace), 0)
    assert (len(users), len(keys)) == (0, 0)


def test_shards_are_opened_where_somebody_waits_or_is_due() -> None:
    shard = StateShard(file="f", users=1, encoder="e")
    state = State(
        n_shards=9,
        shards={
            0: shard,
            1: shard.model_copy(update={"waiting": 1}),
            2: shard.model_copy(update={"due_at": 10}),
            3: shard.model_copy(update={"due_at": 11}),
        },
    )
    assert state.due_shards(10) == {1, 2}
    assert State.model_validate_json(state.model_dump_json()) == state
