"""What the log brings to a refresh: the events that are new, by shard of the state, and those that are refused.

Looks only at the keys of what users have done; the users themselves are opened later, when it is known what there is
to do.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.schema import shard_of
from owlrec.streaming.admission import admit, dead_letters, new_refusals, part_future
from owlrec.streaming.config import StreamingConfig
from owlrec.streaming.events import Events, check_watermark, open_log, read_log
from owlrec.streaming.journal import ROOT
from owlrec.streaming.state import State, read_keys, read_refused
from owlrec.streaming.tables import PreparedTables
from owlrec.workspace import Workspace


@dataclass(frozen=True)
class News:
    """A look at the log."""

    admitted: dict[int, Events]  # new events by shard, each in canonical order
    refused: pa.Table  # events.REFUSED: what a later refresh may take in
    dead: pa.Table  # schema.DEAD_LETTERS: what is refused for good or for the first time
    files: dict[str, int]  # rows of each of the log's files
    counts: dict[str, int]

    def __bool__(self) -> bool:
        return bool(self.admitted) or self.dead.num_rows > 0

    @property
    def newest(self) -> int | None:
        """The largest timestamp (ms) among the new events."""
        return max((int(events.time.max()) for events in self.admitted.values()), default=None)


def find_news(
    workspace: Workspace,
    config: StreamingConfig,
    tables: PreparedTables,
    state: State,
    watermark: int | None,
    now: int,
) -> News:
    """Reads the log from the watermark on (ms, None: all of it), late events included.

    Raises SourceError where the log cannot be read, has no events at first, or ends before the watermark.
    """
    log = open_log(workspace, config)
    horizon = None if watermark is None else watermark - config.max_lateness_ms
    read = read_log(log, horizon, state.log)
    check_watermark(log, read.newest, watermark, workspace.path(ROOT))
    events, future = part_future(read.events, now, config)
    admitted, refused = {}, [future]
    for shard, part in _by_shard(events, state.n_shards):
        users, known = read_keys(workspace, state, shard)
        strangers = np.setdiff1d(part.user, users)
        known = Events.join([known, tables.interactions(strangers)])
        users = np.union1d(users, tables.known_users(strangers))
        new, turned_away = admit(part, known, users, tables.known_items(), config)
        refused.append(turned_away)
        if len(new):
            admitted[shard] = new
    later = pa.concat_tables(refused)
    dead = dead_letters(new_refusals(pa.concat_tables([read.refused, later]), read_refused(workspace, state)))
    counts = {
        "events_read": len(read.events) + read.duplicates,
        "events_twice": read.duplicates,
        "events_new": sum(map(len, admitted.values())),
        "users_with_news": sum(len(np.unique(part.user)) for part in admitted.values()),
        "refused": dead.num_rows,
    }
    counts |= {f"refused_{v['values']}": v["counts"] for v in pc.value_counts(dead["error"]).to_pylist()}
    return News(admitted, later, dead, read.files, counts)


def _by_shard(events: Events, n_shards: int) -> list[tuple[int, Events]]:
    """The events of each shard that has any, ascending by shard, their order kept."""
    shards = shard_of(events.user, n_shards)
    order = np.argsort(shards, kind="stable")
    numbers, starts = np.unique(shards[order], return_index=True)
    rows = np.split(order, starts[1:])
    return [(int(number), events.take(at)) for number, at in zip(numbers, rows, strict=False)]
