"""The rules of one user's state, by hand and as a law: no behavior is lost or doubled, however events are split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.refresh.events import RefreshConfig
from owlrec.refresh.state import Behavior, UserState, bootstrap, due_at, due_reason, freeze, hold, next_as_of, take_in

DAY = 86_400_000
NOTHING = np.zeros((0, 0), dtype=np.float32)


def behaviors(*times: int) -> tuple[Behavior, ...]:
    return tuple(Behavior(time, 100 + time % 7, 4.0) for time in times)


def state(*times: int, **fields: object) -> UserState:
    return UserState(1, short=behaviors(*times), **fields)  # type: ignore[arg-type]


def test_bootstrap_parts_what_was_read_from_what_came_later() -> None:
    user = bootstrap(7, 20, [Behavior(30, 3, None), Behavior(10, 1, 5.0), Behavior(20, 2, 4.0)], horizon=15)
    assert user.short == (Behavior(30, 3, None),)
    assert user.seen == ((20, 2),)  # (10, 1) can never be considered again
    assert (user.text_as_of, user.n_partitions, user.held) == (20, 0, 0)


def test_user_whom_nobody_has_read_is_all_short_term() -> None:
    user = bootstrap(7, None, [Behavior(10, 1, 5.0)], horizon=None)
    assert (user.short, user.seen, user.text_as_of) == ((Behavior(10, 1, 5.0),), (), 0)


def test_new_behaviors_are_sorted_in_and_known_ones_left_out() -> None:
    user = UserState(1, short=(Behavior(20, 2, 1.0),), seen=((10, 9), (30, 9)))
    new = [Behavior(20, 1, 3.0), Behavior(20, 2, 5.0), Behavior(30, 9, 5.0), Behavior(5, 5, None)]
    moved = take_in(user, new, horizon=20)
    assert moved.short == (Behavior(5, 5, None), Behavior(20, 1, 3.0), Behavior(20, 2, 1.0))
    assert moved.seen == ((30, 9),)


@pytest.mark.parametrize(
    ("user", "drift", "clock", "reason"),
    [
        (state(), 2.0, 10 * DAY, ""),
        (state(*range(6)), 0.0, 6, "length"),
        (state(*range(5)), 0.0, 6, ""),
        (state(*range(5)), 0.6, 6, "drift"),
        (state(*range(5)), 0.59, 6, ""),
        (state(1, 2, 3), 0.6, 8, "drift"),
        (state(1, 2), 2.0, 8, ""),  # two behaviors are no drift
        (state(1), 0.0, 1 + 7 * DAY, "age"),
        (state(1), 0.0, 7 * DAY, ""),
        (state(*range(8), held=8), 2.0, 9 * DAY, ""),  # the answer about these failed
        (state(*range(10), held=8), 2.0, 9 * DAY, ""),
        (state(*range(11), held=8), 0.0, 11, "length"),
    ],
)
def test_when_a_short_term_is_due(user: UserState, drift: float, clock: int, reason: str) -> None:
    assert due_reason(user, drift, clock, RefreshConfig()) == reason


def test_due_by_age_is_known_beforehand() -> None:
    config = RefreshConfig(freeze_days=2)
    assert due_at(state(5, 9), config) == 5 + 2 * DAY
    assert due_at(state(), config) is None
    assert due_at(state(5, held=1), config) is None
    assert due_reason(state(5, 9), 0.0, 5 + 2 * DAY, config) == "age"


def test_freezing_reads_a_partition_and_leaves_the_rest() -> None:
    user = state(10, 20, 30, text_as_of=5, interest=np.array([[1, 0], [0, 0]], np.float32), held=1)
    frozen = freeze(user, 2, 20, np.array([[0.5, 1], [2, 0]], np.float32), horizon=15)
    assert frozen.short == behaviors(30)
    assert frozen.seen == ((20, behaviors(20)[0].item),)
    assert (frozen.text_as_of, frozen.n_partitions, frozen.held) == (20, 1, 0)
    assert frozen.interest.tolist() == [[1.5, 1.0], [2.0, 0.0]]


def test_each_text_of_a_user_has_a_moment_of_its_own_not_before_what_it_quotes() -> None:
    assert next_as_of(behaviors(10, 60), before=50) == 60
    assert next_as_of(behaviors(10), before=50) == 51  # late ones
    assert next_as_of(behaviors(50, 50), before=50) == 51  # those of one moment that fill two partitions


def test_interest_begins_with_the_first_vectors() -> None:
    assert freeze(state(1), 1, 1, np.array([[1.0], [0.0]], np.float32), None).interest.tolist() == [[1.0], [0.0]]
    kept = freeze(state(1, interest=np.array([[2.0], [3.0]], np.float32)), 1, 1, NOTHING, None)
    assert kept.interest.tolist() == [[2.0], [3.0]]


def test_failed_answer_keeps_everything() -> None:
    held = hold(state(1, 2, 3))
    assert (held.short, held.held) == (behaviors(1, 2, 3), 3)


LATENESS = 50
Key = tuple[int, int]  # time, item


@settings(max_examples=200)
@given(
    rounds=st.lists(
        st.tuples(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 3)), max_size=8), st.sampled_from("-fh")),
        max_size=8,
    ),
    read=st.sets(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=4),
    unread=st.sets(st.tuples(st.integers(21, 40), st.integers(0, 3)), max_size=4),
    reads=st.integers(1, 8),
)
def test_no_behavior_is_lost_or_doubled(
    rounds: list[tuple[list[Key], str]], read: set[Key], unread: set[Key], reads: int
) -> None:
    """Rounds bring events in any split, late and repeated; some freeze a part, in some an answer fails."""
    watermark = max((time for time, _ in read | unread), default=0)
    user = bootstrap(1, 20, [Behavior(t, i, None) for t, i in read | unread], watermark - LATENESS)
    accepted, frozen = set(read | unread), list(read)
    for offered, outcome in rounds:
        in_time = {key for key in offered if key[0] >= watermark - LATENESS}
        # What a refresh before has taken in and forgotten lies before the horizon, so it is not offered again.
        accepted |= in_time
        watermark = max([watermark, *(time for time, _ in in_time)])
        user = take_in(user, [Behavior(t, i, None) for t, i in sorted(in_time)], watermark - LATENESS)
        if outcome == "f" and user.short:
            n = min(reads, len(user.short))
            frozen += [b.key for b in user.short[:n]]
            as_of = next_as_of(user.short[:n], user.text_as_of)
            user = freeze(user, n, as_of, NOTHING, watermark - LATENESS)
        elif outcome == "h":
            user = hold(user)
    everything = sorted(frozen + [b.key for b in user.short])
    assert everything == sorted(accepted)
    assert list(user.short) == sorted(user.short)
    assert all(time >= watermark - LATENESS for time, _ in user.seen)


@given(st.permutations([Behavior(t, i, None) for t in range(3) for i in range(3)]), st.integers(0, 9))
def test_order_and_split_of_events_do_not_matter_to_the_short_term(events: list[Behavior], cut: int) -> None:
    whole = take_in(UserState(1), events, None)
    parts = take_in(take_in(UserState(1), events[:cut], None), events[cut:], None)
    assert whole == parts == take_in(UserState(1), sorted(events), None)
