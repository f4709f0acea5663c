"""Which events are taken in, and what is said of those that are not.

An event of an unknown user, of an unknown item or from the future may be taken in by a later refresh, once the tables
know its id or its moment has come. Until it is too old it is looked at each time, and reported once.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.ordered import rows_of
from owlrec.schema import DEAD_LETTERS
from owlrec.streaming.events import REFUSED, Events, EventsConfig, are_among

_REASONS = {
    "NullField": "user_id, item_id or timestamp is null: write events with all three",
    "NotMilliseconds": "timestamp {timestamp} is not in milliseconds since 1970 (UTC): convert it",
    "TooLate": "timestamp {timestamp} is more than streaming.max_lateness_days older than the newest event taken in",
    "FromTheFuture": "timestamp {timestamp} lies in the future: mend the clock that it comes from",
    "UnknownUser": "the users table has no such user: run `prepare` with them, or set streaming.unknown_users",
    "UnknownItem": "the items table has no item {item_id}: run `prepare` with it, or set streaming.unknown_items",
}


def part_future(events: Events, now: int, config: EventsConfig) -> tuple[Events, pa.Table]:
    """The events up to now (ms), and those from the future as events.REFUSED."""
    future = events.time > now + round(1000 * config.max_future_s)
    return events.take(~future), events.take(future).refused("FromTheFuture")


def admit(
    events: Events, known: Events, users: np.ndarray, items: np.ndarray, config: EventsConfig
) -> tuple[Events, pa.Table]:
    """The events (each once) that are new, and those that are refused as events.REFUSED.

    known: what was taken in before. users, items: the known ids, ascending.
    """
    events = events.take(~are_among(events, known))
    refused = []
    for column, ids, rule, error in (
        ("user", users, config.unknown_users, "UnknownUser"),
        ("item", items, config.unknown_items, "UnknownItem"),
    ):
        if rule == "refuse":
            # Unlike np.isin this does not sort ten million ids for each shard.
            there = rows_of(ids, getattr(events, column)) >= 0
            refused.append(events.take(~there).refused(error))
            events = events.take(there)
    return events, pa.concat_tables([REFUSED.empty_table(), *refused])


def new_refusals(refused: pa.Table, before: pa.Table) -> pa.Table:
    """Those of `refused` that were not refused before for the same reason, in canonical order."""
    new = refused.join(before, keys=REFUSED.names, join_type="left anti").select(REFUSED.names).cast(REFUSED)
    return new.take(pc.sort_indices(new, sort_keys=[(name, "ascending") for name in REFUSED.names]))


def dead_letters(refused: pa.Table) -> pa.Table:
    """Refused events (events.REFUSED) as schema.DEAD_LETTERS, in their order."""
    messages = [
        f"event of user {row['user_id']} with item {row['item_id']}: {_REASONS[row['error']].format(**row)}."
        for row in refused.to_pylist()
    ]
    n = refused.num_rows
    columns = {
        "kind": pa.repeat("user", n),
        "id": refused["user_id"],
        "as_of": refused["timestamp"],
        "stage": pa.repeat("refresh", n),
        "error": refused["error"],
        "message": pa.array(messages, pa.string()),
        "attempts": pa.array(np.ones(n, dtype=np.int32)),
    }
    return pa.table(columns, schema=DEAD_LETTERS)
