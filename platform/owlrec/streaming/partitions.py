"""One user's interests as LIBER keeps them (arXiv 2411.14713): what the LLM has read, and a short term still unread.

New behaviours gather in the short term. It is frozen into a partition, all of it, when it is long enough, old enough,
or when it drifts from what was read before: only then the LLM reads it. The clock is the newest event taken in, never
the machine's, so that the same events always freeze the same partitions. An answer that fails loses nothing: the short
term stays, and is asked about again once it has grown by a smallest partition, since the same question would fail
again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from owlrec.config import Config
from owlrec.streaming.events import MS_PER_DAY

Reason = Literal["", "length", "age", "drift"]


class FreezeConfig(Config):
    """When a user's short term becomes a partition, and how many partitions' vectors are kept."""

    freeze_behaviours: int = Field(6, ge=1)  # about what streaming.partition_tokens holds
    freeze_days: float = Field(7.0, gt=0)  # between the oldest unread behaviour and the newest event of all
    freeze_drift: float = Field(0.6, ge=0, le=2)  # cosine distance between what is unread and what was read
    freeze_min_behaviours: int = Field(3, ge=1)  # fewer are an accident, not a drift
    partitions: int = Field(4, ge=1, le=256)  # kept vectors a user, newest first; 256: what a release has room for

    @property
    def freeze_ms(self) -> int:
        """freeze_days in milliseconds."""
        return round(self.freeze_days * MS_PER_DAY)


class Behaviour(NamedTuple):
    """One interaction; sorts by time, then by item."""

    time: int  # ms since 1970, UTC
    item: int
    rating: float | None

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from the user's other behaviours."""
        return self.time, self.item


@dataclass(frozen=True)
class UserState:
    """What is remembered of one user."""

    user_id: int
    text_as_of: int = 0  # ms: the newest behaviour that the LLM has read; 0 for none
    n_partitions: int = 0  # frozen and read so far
    held: int = 0  # behaviours in the short term when an answer about it failed; 0: none did
    short: tuple[Behaviour, ...] = ()  # unread, sorted
    # Keys of behaviours that left the short term and might still arrive again, sorted.
    seen: tuple[tuple[int, int], ...] = ()
    # Weighted sum of the vectors of all items read, float32 [d], and the sum of the weights; empty and 0 for none.
    interest: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32), compare=False)
    weight: float = 0.0


def bootstrap(user_id: int, as_of: int | None, behaviours: Iterable[Behaviour], horizon: int | None) -> UserState:
    """The state of a user whom no refresh has met: read up to `as_of` (None: not at all), the later behaviours unread.

    behaviours: all that the tables hold of the user. horizon: see `take_in`.
    """
    behaviours = sorted(behaviours)
    unread = tuple(b for b in behaviours if as_of is None or b.time > as_of)
    seen = tuple(b.key for b in behaviours[: len(behaviours) - len(unread)])
    return UserState(user_id, text_as_of=as_of or 0, short=unread, seen=_within(seen, horizon))


def take_in(state: UserState, behaviours: Iterable[Behaviour], horizon: int | None) -> UserState:
    """`state` with new behaviours in its short term; those that it has seen are left out.

    horizon: ms; no older event will ever be considered again, so what was seen before it is forgotten. None: none was.
    """
    known = {b.key for b in state.short} | set(state.seen)
    new = {b.key: b for b in behaviours if b.key not in known}
    short = tuple(sorted([*state.short, *new.values()]))
    return replace(state, short=short, seen=_within(state.seen, horizon))


def why_due(state: UserState, drift: float, clock: int, config: FreezeConfig) -> Reason:
    """Why the short term is to be frozen now, "" where it is not.

    drift: see streaming.drift. clock: ms, the newest event of all users.
    """
    n = len(state.short)
    if n == 0 or (state.held and n < state.held + config.freeze_min_behaviours):
        return ""
    if n >= config.freeze_behaviours:
        return "length"
    if clock - state.short[0].time >= config.freeze_ms:
        return "age"
    return "drift" if n >= config.freeze_min_behaviours and drift >= config.freeze_drift else ""


def due_at(state: UserState, config: FreezeConfig) -> int | None:
    """When the short term will be old enough if nothing else happens (ms); None where it never will."""
    waits = state.held and len(state.short) < state.held + config.freeze_min_behaviours
    return None if waits or not state.short else state.short[0].time + config.freeze_ms


def as_of_after(state: UserState) -> int:
    """The newest behaviour that a text has read once it has read the short term, too."""
    return max([state.text_as_of, *(b.time for b in state.short)])


def freeze(state: UserState, vector_sum: np.ndarray, weight: float, horizon: int | None) -> UserState:
    """The state once the LLM has read the short term.

    vector_sum, weight: of the short term's items, as UserState.interest has them. horizon: see `take_in`.
    """
    return replace(
        state,
        text_as_of=as_of_after(state),
        n_partitions=state.n_partitions + 1,
        held=0,
        short=(),
        seen=_within([*state.seen, *(b.key for b in state.short)], horizon),
        interest=add_interest(state.interest, vector_sum),
        weight=state.weight + weight,
    )


def hold(state: UserState) -> UserState:
    """The state once an answer about the short term has failed."""
    return replace(state, held=len(state.short))


def add_interest(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two interests, either of which may be empty."""
    return one + other if len(one) == len(other) else (one if len(one) else other)


def _within(keys: Sequence[tuple[int, int]], horizon: int | None) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(k for k in keys if horizon is None or k[0] >= horizon))
