"""One shard of users moved on: new events into their short terms, whose short term is due, and what to ask about it.

Reads one shard at a time, so that memory holds the users of one and, of the others, only who is due.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.prompting.rows import Prompt
from owlrec.prompting.streaming import streaming_prompt, streaming_system
from owlrec.releases.interface import KnowledgeStore
from owlrec.scenario import Scenario
from owlrec.sources.catalog import ItemCatalog
from owlrec.streaming.config import StreamingConfig
from owlrec.streaming.drift import drifts, priorities, sum_vectors
from owlrec.streaming.events import Events
from owlrec.streaming.partitions import (
    Behaviour,
    Reason,
    UserState,
    as_of_after,
    bootstrap,
    due_at,
    take_in,
    why_due,
)
from owlrec.streaming.tables import PreparedTables

# What the freezing of a partition needs once its answer is there.
PARTITIONS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("reason", pa.string()),  # length, age or drift
        ("drift", pa.float32()),
        ("vector_sum", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Sources:
    """What the users of a refresh are judged by: the tables, the parent release, the config."""

    config: StreamingConfig
    scenario: Scenario
    tables: PreparedTables
    catalog: ItemCatalog
    store: KnowledgeStore

    def item_vectors(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See drift.Gather."""
        return self.store.vectors("item", ids)


@dataclass(frozen=True)
class Due:
    """A user whose short term is to be frozen."""

    user_id: int
    reason: Reason
    drift: float
    priority: float


def advance(sources: Sources, users: Sequence[UserState], events: Events, horizon: int | None) -> list[UserState]:
    """All users of a shard with their new events, ascending by id.

    users: those of the shard whom an earlier refresh has met. events: new ones of this shard, in canonical order.
    horizon: see partitions.take_in.
    """
    ids, starts = np.unique(events.user, return_index=True)
    found = {u.user_id: u for u in users}
    found |= _bootstrap(sources, np.array([i for i in ids.tolist() if i not in found], dtype=np.int64), horizon)
    bounds = [*starts.tolist(), len(events)]
    for id_, start, end in zip(ids.tolist(), bounds[:-1], bounds[1:], strict=True):
        found[id_] = take_in(found[id_], _behaviours(events.take(np.arange(start, end))), horizon)
    return [found[id_] for id_ in sorted(found)]


def assess(sources: Sources, users: Sequence[UserState], clock: int) -> tuple[list[Due], int | None]:
    """Whose short term is due, and when the next one will be by its age alone (ms, None: never).

    A short term of which no item has a title is not due: there would be nothing to quote.
    """
    unread = [u for u in users if u.short]
    if not unread:
        return [], None
    items, ratings, lengths = _columns(unread)
    sums, weights = sum_vectors(items, ratings, lengths, sources.item_vectors)
    read = np.zeros_like(sums)
    for row, user in enumerate(unread):
        if len(user.interest) == sums.shape[1]:
            read[row] = user.interest
    drift = drifts(sums, weights, read, np.array([u.weight for u in unread]))
    worth = priorities(drift, lengths)
    titled = np.array([bool(title) for title in sources.catalog.titles(items)])
    quotable = np.logical_or.reduceat(titled, np.cumsum(lengths) - lengths)
    due, waits = [], []
    for row, user in enumerate(unread):
        if not quotable[row]:
            continue
        if reason := why_due(user, float(drift[row]), clock, sources.config):
            due.append(Due(user.user_id, reason, float(drift[row]), float(worth[row])))
        else:
            waits.append(due_at(user, sources.config))
    return due, min((moment for moment in waits if moment is not None), default=None)


def freeze_partitions(sources: Sources, users: Sequence[UserState], due: Sequence[Due]) -> pa.Table:
    """The partitions (PARTITIONS) of `users`, aligned with `due`."""
    sums, weights = sum_vectors(*_columns(users), sources.item_vectors)
    columns = [
        [u.user_id for u in users],
        [d.reason for d in due],
        [d.drift for d in due],
        list(sums),
        weights,
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PARTITIONS, strict=True)], schema=PARTITIONS)


def write_prompts(sources: Sources, users: Sequence[UserState], count_tokens: Callable[[str], int]) -> Iterator[Prompt]:
    """What to ask about the short term of each of `users`, beside what the parent release says of them."""
    system = streaming_system(sources.scenario)
    earlier = sources.store.own_knowledge("user", [u.user_id for u in users])
    for user, knowledge in zip(users, earlier, strict=True):
        titles = sources.catalog.titles(np.array([b.item for b in user.short], dtype=np.int64))
        quoted = [(title, b.rating) for title, b in zip(titles, user.short, strict=True) if title]
        text, facts = streaming_prompt(
            sources.scenario, knowledge.text if knowledge else "", quoted, sources.config, count_tokens
        )
        as_of = max(as_of_after(user), knowledge.as_of if knowledge else 0)
        yield Prompt("user", user.user_id, as_of, system, text, facts)


def _bootstrap(sources: Sources, ids: np.ndarray, horizon: int | None) -> dict[int, UserState]:
    """Users whom no refresh has met, by id."""
    if not len(ids):
        return {}
    done = sources.tables.interactions(ids)
    done = done.take(np.argsort(done.user, kind="stable"))
    histories = {row["user_id"]: row for row in sources.tables.histories(ids).to_pylist()}
    nothing: dict[str, Any] = {"as_of": None, "items": [], "ratings": []}
    rows = [histories.get(id_, nothing) for id_ in ids.tolist()]
    items = np.array([i for row in rows for i in row["items"]], dtype=np.int64)
    graded = [row["ratings"] or [None] * len(row["items"]) for row in rows]
    ratings = np.array([r for given in graded for r in given], dtype=np.float32)  # None becomes NaN
    lengths = np.array([len(row["items"]) for row in rows])
    sums, weights = sum_vectors(items, ratings, lengths, sources.item_vectors)
    found = {}
    for number, (id_, row) in enumerate(zip(ids.tolist(), rows, strict=True)):
        start, end = np.searchsorted(done.user, [id_, id_ + 1])
        user = bootstrap(id_, row["as_of"], _behaviours(done.take(np.arange(start, end))), horizon)
        found[id_] = replace(user, interest=sums[number], weight=float(weights[number]))
    return found


def _behaviours(events: Events) -> list[Behaviour]:
    ratings = [None if np.isnan(rating) else rating for rating in events.rating.tolist()]
    return list(map(Behaviour, events.time.tolist(), events.item.tolist(), ratings))


def _columns(users: Sequence[UserState]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, ratings (NaN: none) and lengths of the short terms, one after another."""
    flat = [b for user in users for b in user.short]
    return (
        np.array([b.item for b in flat], dtype=np.int64),
        np.array([np.nan if b.rating is None else b.rating for b in flat], dtype=np.float32),
        np.array([len(user.short) for user in users], dtype=np.int64),
    )
