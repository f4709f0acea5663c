"""One user's interests as LIBER keeps them (arXiv 2411.14713): what the LLM has read, and a short term still unread.

New behaviors gather in the short term. It is frozen, all of it, when it is long enough, old enough, or when it drifts
from what was read before: into one partition, or into several where it is longer than a prompt. Only then the LLM reads
it, one partition after another. The clock is the newest event of the log,
never the machine's, so that the same events always freeze the same partitions. An answer that fails loses nothing: the
short term stays, and is asked about again once it has grown by a smallest partition, since the same question would fail
again.
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
FREEZE_DRIFT = 0.6  # cosine distance between what is unread and what was read: films of two genres are about so far
FREEZE_MIN_BEHAVIORS = 3  # fewer are an accident, not a drift
STATE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("text_as_of", pa.int64()),
        ("n_partitions", pa.int32()),
        ("held", pa.int32()),
        ("times", pa.list_(pa.int64())),  # of the short term, as are items and ratings
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
        """What tells it from the user's other behaviors."""
        return self.time, self.item


def no_interest() -> np.ndarray:
    """Of a user of whom nothing was read."""
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class UserState:
    """What is remembered of one user."""

    user_id: int
    text_as_of: int = 0  # ms: the newest behavior that the LLM has read; 0 for none
    n_partitions: int = 0  # frozen and read so far
    held: int = 0  # behaviors in the short term when an answer about it failed; 0: none did
    short: tuple[Behavior, ...] = ()  # unread, sorted
    # Keys of behaviors that left the short term and might still arrive again, sorted.
    seen: tuple[tuple[int, int], ...] = ()
    # Of all items read (drift.sum_vectors): float32 [2, d], [0, 0] for none.
    interest: np.ndarray = field(default_factory=no_interest, compare=False)


def bootstrap(user_id: int, as_of: int | None, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """The state of a user whom no refresh has met: read up to `as_of` (None: not at all), the later behaviors unread.

    behaviors: all that the tables hold of the user. horizon: see `take_in`.
    """
    behaviors = sorted(behaviors)
    unread = tuple(b for b in behaviors if as_of is None or b.time > as_of)
    seen = tuple(b.key for b in behaviors[: len(behaviors) - len(unread)])
    return UserState(user_id, text_as_of=as_of or 0, short=unread, seen=_within(seen, horizon))


def take_in(state: UserState, behaviors: Iterable[Behavior], horizon: int | None) -> UserState:
    """`state` with new behaviors in its short term; those that it has seen are left out.

    horizon: ms; no older event will ever be considered again, so what was seen before it is forgotten. None: none was.
    """
    known = {b.key for b in state.short} | set(state.seen)
    new = {b.key: b for b in behaviors if b.key not in known}
    short = tuple(sorted([*state.short, *new.values()]))
    return replace(state, short=short, seen=_within(state.seen, horizon))


def why_due(state: UserState, drift: float, clock: int, config: RefreshConfig) -> Reason:
    """Why the short term is to be frozen now, "" where it is not.

    drift: see refresh.drift. clock: ms, the newest event of all users.
    """
    n = len(state.short)
    if n == 0 or (state.held and n < state.held + FREEZE_MIN_BEHAVIORS):
        return ""
    if n >= config.freeze_behaviours:
        return "length"
    if clock - state.short[0].time >= config.freeze_ms:
        return "age"
    return "drift" if n >= FREEZE_MIN_BEHAVIORS and drift >= FREEZE_DRIFT else ""


def due_at(state: UserState, config: RefreshConfig) -> int | None:
    """When the short term will be old enough if nothing else happens (ms); None where it never will."""
    waits = state.held and len(state.short) < state.held + FREEZE_MIN_BEHAVIORS
    return None if waits or not state.short else state.short[0].time + config.freeze_ms


def next_as_of(behaviors: Iterable[Behavior], before: int) -> int:
    """The as_of (ms) of a text that reads a partition after a text of `before`: the newest behavior that it quotes.

    Later than `before` in any case, so that no two texts of a user have one moment: a partition of late behaviors, or
    the next one of the same moment, comes a millisecond after.
    """
    return max([before + 1, *(b.time for b in behaviors)])


def freeze(state: UserState, n: int, as_of: int, interest: np.ndarray, horizon: int | None) -> UserState:
    """The state once the LLM has read the first `n` behaviors of the short term.

    as_of: of what it wrote. interest: of the items, as UserState has it. horizon: see `take_in`.
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
    """The state once an answer about the short term has failed."""
    return replace(state, held=len(state.short))


def add_interest(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two interests, either of which may be empty."""
    return one + other if one.shape == other.shape else (one if one.size else other)


def as_interest(values: np.ndarray) -> np.ndarray:
    """An interest that was written flat: float32 [2, d]."""
    return values.astype(np.float32).reshape(2, -1) if len(values) else no_interest()


def _within(keys: Sequence[tuple[int, int]], horizon: int | None) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(k for k in keys if horizon is None or k[0] >= horizon))


def behaviors(events: Events) -> list[Behavior]:
    """Events of one user as behaviors, in their order."""
    ratings = [None if np.isnan(rating) else rating for rating in events.rating.tolist()]
    return list(map(Behavior, events.time.tolist(), events.item.tolist(), ratings))


def known_keys(users: Iterable[UserState]) -> Events:
    """All behaviors that the users still know, without ratings."""
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
    """The users of a table of STATE; without `interests`, nothing is known of what they liked."""
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
    """A list column's values, one list after another, and the lists' lengths."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------------------------------------------ behaviors
# The last behaviors of users with new events, as the next release keeps them: scores follow what users did, whether or
# not their texts are renewed.


def renewed_behaviors(users: Sequence[UserState], parent: Release) -> pa.Table:
    """The rows of these users (schema.BEHAVIORS): what the parent release holds of them and their unread behaviors,
    each once, by time and item, as many as the release keeps. Empty where it keeps none.

    The parent's row of a behavior stays: it knows the label.
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
    new["label"] = 1  # events that were passed over are not read
    both = np.concatenate([known, new])
    kept = both[np.unique(both[["time", "item"]], return_index=True)[1]]  # the first of each, by time and item
    return kept[-length:]
