"""One user's interests as in LIBER (arXiv 2411.14713): behaviors read by the LLM, and an unread short term.

New behaviors gather in the short term. All of it freezes when it is long enough, old enough, or when it drifts
from earlier behaviors: into one partition, or into several if it is longer than a prompt. Only then does the LLM read
it, one partition after another. The clock is the newest event of the log, never the machine's, so the same events
always freeze the same partitions. A failed answer loses nothing: the short term stays and is retried once it has grown
by the size of a minimum partition, since the same prompt would fail again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from owlrec.ids import BEHAVIOR
from owlrec.refresh.events import Events, RefreshConfig
from owlrec.releases.release import Release
from owlrec.schema import BEHAVIORS

Reason = Literal["", "length", "age", "drift"]
FREEZE_DRIFT = 0.6  # cosine distance between unread and read behaviors; about that between two film genres
FREEZE_MIN_BEHAVIORS = 3  # fewer are chance, not drift
STATE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("text_as_of", pa.int64()),
        ("n_partitions", pa.int32()),
        ("held", pa.int32()),
        ("times", pa.list_(pa.int64())),  # of the short term, like items and ratings
        ("items", pa.list_(pa.int64())),
        ("ratings", pa.list_(pa.float32())),
        ("seen_times", pa.list_(pa.int64())),
        ("seen_items", pa.list_(pa.int64())),
        ("interest", pa.list_(pa.float32())),
    ]
)


class Behavior(NamedTuple):
    """One interaction; sorts by time, then by item."""

    time: int  # ms since 1970, UTC
    item: int
    rating: float | None

    @property
    def key(self) -> tuple[int, int]:
        """Key that distinguishes it from the user's other behaviors."""
        return self.time, self.item


def no_interest() -> np.ndarray:
    """Interest of a user without read behaviors."""
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class UserState:
    """Stored state of one user."""

    user_id: int
    text_as_of: int = 0  # ms: newest behavior that the LLM has read; 0 for none
    n_partitions: int = 0  # frozen and read so far
    held: int = 0  # length of the short term at its last failed answer; 0: no failure
    short: tuple[Behavior, ...] = ()  # unread, sorted
    # Keys of behaviors that left the short term and may still arrive again, sorted.
    seen: tuple[tuple[int, int], ...] = ()
    # Over all read items (drift.sum_vectors): float32 [2, d], [0, 0] for none.
    interest: np.ndarray = field(default_factory=no_interest, compare=False)


def bootstrap(user_id: int, as_of: int | None, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """State of a user that no refresh has seen: read up to `as_of` (None: not at all), with later behaviors unread.

    behaviors: all of the user's in the tables. horizon: see `take_in`.
    """
    behaviors = sorted(behaviors)
    unread = tuple(b for b in behaviors if as_of is None or b.time > as_of)
    seen = tuple(b.key for b in behaviors[: len(behaviors) - len(unread)])
    return UserState(user_id, text_as_of=as_of or 0, short=unread, seen=_within(seen, horizon))


def take_in(state: UserState, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """`state` with new behaviors in its short term; known ones are skipped.

    horizon: ms; older events will never be considered again, so their keys are dropped. None: keep all.
    """
    known = {b.key for b in state.short} | set(state.seen)
    new = {b.key: b for b in behaviors if b.key not in known}
    short = tuple(sorted([*state.short, *new.values()]))
    return replace(state, short=short, seen=_within(state.seen, horizon))


def due_reason(state: UserState, drift: float, clock: int, config: RefreshConfig) -> Reason:
    """Reason to freeze the short term now, "" if there is none.

    drift: see refresh.drift. clock: ms, the newest event of all users.
    """
    n = len(state.short)
    if n == 0 or (state.held and n < state.held + FREEZE_MIN_BEHAVIORS):
        return ""
    if n >= config.freeze_behaviors:
        return "length"
    if clock - state.short[0].time >= config.freeze_ms:
        return "age"
    return "drift" if n >= FREEZE_MIN_BEHAVIORS and drift >= FREEZE_DRIFT else ""


def due_at(state: UserState, config: RefreshConfig) -> int | None:
    """When the short term becomes old enough if nothing else happens (ms); None for never."""
    waits = state.held and len(state.short) < state.held + FREEZE_MIN_BEHAVIORS
    return None if waits or not state.short else state.short[0].time + config.freeze_ms


def next_as_of(behaviors: Iterable[Behavior], before: int) -> int:
    """as_of (ms) of a text that reads a partition after a text of `before`: the newest quoted behavior.

    It is always later than `before`, so no two texts of a user have the same moment: a partition of late behaviors, or
    the next one of the same moment, gets one millisecond more.
    """
    return max([before + 1, *(b.time for b in behaviors)])


def freeze(state: UserState, n: int, as_of: int, interest: np.ndarray, horizon: int | None) -> UserState:
    """State after the LLM has read the first `n` behaviors of the short term.

    as_of: of the new text. interest: of the items, as in UserState. horizon: see `take_in`.
    """
    return replace(
        state,
        text_as_of=as_of,
        n_partitions=state.n_partitions + 1,
        held=0,
        short=state.short[n:],
        seen=_within([*state.seen, *(b.key for b in state.short[:n])], horizon),
        interest=add_interest(state.interest, interest),
    )


def hold(state: UserState) -> UserState:
    """State after a failed answer about the short term."""
    return replace(state, held=len(state.short))


def add_interest(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two interests, either of which may be empty."""
    return one + other if one.shape == other.shape else (one if one.size else other)


def as_interest(values: np.ndarray) -> np.ndarray:
    """An interest from its flat form: float32 [2, d]."""
    return values.astype(np.float32).reshape(2, -1) if len(values) else no_interest()


def _within(keys: Sequence[tuple[int, int]], horizon: int | None) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(k for k in keys if horizon is None or k[0] >= horizon))


def behaviors(events: Events) -> list[Behavior]:
    """Events of one user as behaviors, in order."""
    ratings = [None if np.isnan(rating) else rating for rating in events.rating.tolist()]
    return list(map(Behavior, events.time.tolist(), events.item.tolist(), ratings))


def known_keys(users: Iterable[UserState]) -> Events:
    """All behaviors that the users' states know, without ratings."""
    keys = [(u.user_id, *key) for u in users for key in (*(b.key for b in u.short), *u.seen)]
    user, time, item = np.array(keys, dtype=np.int64).reshape(-1, 3).T
    return Events(user, item, np.full(len(user), np.nan, dtype=np.float32), time)


# As a table


def to_table(users: Sequence[UserState]) -> pa.Table:
    """A table of STATE, in the order of `users`."""
    columns = [
        [u.user_id for u in users],
        [u.text_as_of for u in users],
        [u.n_partitions for u in users],
        [u.held for u in users],
        [[b.time for b in u.short] for u in users],
        [[b.item for b in u.short] for u in users],
        [[b.rating for b in u.short] for u in users],
        [[time for time, _ in u.seen] for u in users],
        [[item for _, item in u.seen] for u in users],
        [u.interest.reshape(-1) for u in users],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, STATE, strict=True)], schema=STATE)


def from_table(table: pa.Table, *, interests: bool = True) -> list[UserState]:
    """Users from a table of STATE; without `interests`, nothing is known about their likes."""
    values, lengths = _flat(table, "interest")
    bounds = np.r_[0, np.cumsum(lengths)]
    users = []
    for row, fields in enumerate(table.drop_columns(["interest"]).to_pylist()):
        interest = as_interest(values[bounds[row] : bounds[row + 1]] if interests else values[:0])
        users.append(
            UserState(
                user_id=fields["user_id"],
                text_as_of=fields["text_as_of"],
                n_partitions=fields["n_partitions"],
                held=fields["held"],
                short=tuple(map(Behavior, fields["times"], fields["items"], fields["ratings"])),
                seen=tuple(zip(fields["seen_times"], fields["seen_items"], strict=True)),
                interest=interest,
            )
        )
    return users


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column's values, concatenated, and the lists' lengths."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------------------------------------------ behaviors
# Latest behaviors of users with new events for the next release: scores follow users' actions, whether or
# not their texts change.


def renewed_behaviors(users: Sequence[UserState], parent: Release) -> pa.Table:
    """Rows of these users (schema.BEHAVIORS): the parent release's and their unread behaviors,
    each once, by time and item, up to the release's limit. Empty if the release keeps none.

    The parent's row of a behavior takes precedence, because it has the label.
    """
    length = parent.manifest.history_length
    if not length or not users:
        return BEHAVIORS.empty_table()
    earlier = parent.store.behaviors([user.user_id for user in users])
    rows = [_last(user, before, length) for user, before in zip(users, earlier, strict=True)]
    columns = [pa.array([user.user_id for user in users], pa.int64())]
    for column, name in zip(list(BEHAVIORS)[1:], BEHAVIOR.names or (), strict=True):
        values = [row[name] for row in rows]
        lists = [pa.array(v, column.type.value_type, from_pandas=name == "rating") for v in values]
        offsets = pa.array(np.r_[0, np.cumsum([len(v) for v in values])].astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, pa.concat_arrays(lists)))
    return pa.table(columns, schema=BEHAVIORS)


def _last(user: UserState, before: np.ndarray | None, length: int) -> np.ndarray:
    known = np.zeros(0, dtype=BEHAVIOR) if before is None else before
    new = np.zeros(len(user.short), dtype=BEHAVIOR)
    for name in ("time", "item", "rating"):
        new[name] = np.array([getattr(b, name) for b in user.short], dtype=BEHAVIOR[name])  # None becomes NaN
    new["label"] = 1  # passed-over events are not read
    both = np.concatenate([known, new])
    kept = both[np.unique(both[["time", "item"]], return_index=True)[1]]  # the first of each, by time and item
    return kept[-length:]
