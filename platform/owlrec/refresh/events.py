"""The log of new interactions: Parquet files that others append, and the rules for accepting their rows.

A stream delivers events late, twice, out of order and broken. A refresh reads new and grown files and
splits their rows by a hash of the user, like `prepare`; a shard of users puts its own into one canonical order, so
nothing depends on the order of arrival. An event of an unknown user, of an unknown item or from the future stays
with its shard until the tables know its id, its moment has come or it is too old: it is checked again and reported
once. Events are refused row by row, with the reason.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from owlrec.config import Config
from owlrec.errors import SourceError
from owlrec.ids import EVENTS as EVENT_NAMES
from owlrec.ids import rows_of, run_starts, shard_of
from owlrec.runner import Result, Stage, Work
from owlrec.schema import DEAD_LETTERS, INTERACTIONS, MILLISECONDS, conform
from owlrec.shards import Card, Shard, in_threads
from owlrec.sources.outcomes import PASSED_OVER, Labels, taken
from owlrec.sources.preparation import MAX_BUCKETS, Grouping, bucket_file, grouped, read_batches, write_buckets
from owlrec.sources.raw import Fragment, TableName
from owlrec.sources.tabular import SourceFile, fragments_of, input_files, to_milliseconds
from owlrec.workspace import Workspace, read_tombstones

# --------------------------------------------------------------------------------------------------------------- config
# The recipe's section `streaming`: source of new events, and rules for updating a user's text.


MS_PER_DAY = 86_400_000
FUTURE_MS = 300_000  # clocks differ by minutes; later times come from a broken one


class RefreshConfig(Config):
    """Location and acceptance rules of the log, and rules for updating texts."""

    events: str | None = None  # a folder or a file of Parquet, on any store; None = `events` in the workspace
    max_lateness_days: float = Field(3.0, ge=0)  # behind the newest event of the log; older events are refused
    # Whose ids in no table are taken in, else refused. Such a user gets a text of their own; such an item counts as a
    # behavior, but has neither a title to quote nor a vector.
    admit: tuple[Literal["users", "items"], ...] = ()
    freeze_behaviors: int = Field(6, ge=1)  # unread ones that trigger a new text
    freeze_days: float = Field(7.0, gt=0)  # between the oldest unread behavior and the newest event of all
    partitions: int = Field(4, ge=1, le=256)  # kept vectors per user, newest first; 256: what a release has room for
    # Calls about users, one per partition; None: no limit. Calls about items are not included.
    budget_calls: int | None = Field(None, ge=0)

    @property
    def max_lateness_ms(self) -> int:
        """max_lateness_days in milliseconds."""
        return round(self.max_lateness_days * MS_PER_DAY)

    @property
    def freeze_ms(self) -> int:
        """freeze_days in milliseconds."""
        return round(self.freeze_days * MS_PER_DAY)


# --------------------------------------------------------------------------------------------------------------- events


ITEMS = "items"  # folder of the log with rows of the items table: see refresh.items
EVENTS = pa.schema([INTERACTIONS.field(name) for name in ("user_id", "item_id", "rating", "timestamp")])
REFUSED = EVENTS.append(pa.field("error", pa.string()))
_KEY = ["user_id", "item_id", "timestamp", "error"]
_REASONS = {
    "NullField": "user_id, item_id or timestamp is null: write events with all three",
    "NotMilliseconds": "timestamp {timestamp} is not in milliseconds since 1970 (UTC): convert it",
    "UnclearOutcome": "its label or event does not occur in the prepared tables: correct it",
    "TooLate": "timestamp {timestamp} is more than streaming.max_lateness_days older than the newest event of the log",
    "FromTheFuture": "timestamp {timestamp} is in the future: correct the source's clock",
    "UnknownUser": "the users table does not have this user: run `prepare` with it, or add users to streaming.admit",
    "UnknownItem": "the items table has no item {item_id}: run `prepare` with it, or add items to streaming.admit",
}


@dataclass(frozen=True)
class Events:
    """Interactions as columns: user, item and time (ms) int64 [n], rating float32 [n] (NaN: none)."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table) -> "Events":
        """From a table of EVENTS with nulls only among the ratings. A rating that is not finite becomes none."""
        rating = table["rating"].to_numpy().astype(np.float32)
        rating[~np.isfinite(rating)] = np.nan
        return cls(table["user_id"].to_numpy(), table["item_id"].to_numpy(), rating, table["timestamp"].to_numpy())

    @classmethod
    def join(cls, parts: Iterable["Events"]) -> "Events":
        """All events of several."""
        parts = [cls.from_table(EVENTS.empty_table()), *parts]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("user", "item", "rating", "time")))

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Events":
        """The events at `rows` (indices or a mask)."""
        return Events(self.user[rows], self.item[rows], self.rating[rows], self.time[rows])

    def refused(self, error: str) -> pa.Table:
        """These events as a table of REFUSED."""
        rating = pa.array(self.rating, from_pandas=True)
        return pa.table([self.user, self.item, rating, self.time, pa.repeat(error, len(self))], schema=REFUSED)


def canonical(events: Events) -> Events:
    """By user, time and item, each (user, item, time) once; among several ratings the highest stays."""
    grade = np.where(np.isnan(events.rating), -np.inf, events.rating)
    events = events.take(np.lexsort((-grade, events.item, events.time, events.user)))
    return events.take(~_repeats(events))


def are_among(events: Events, known: Events) -> np.ndarray:
    """Events (each once) whose (user, item, time) is among `known`: bool [n]."""
    both = Events.join([known, events])
    new = np.arange(len(both)) >= len(known)
    order = np.lexsort((new, both.item, both.time, both.user))
    among = np.zeros(len(both), dtype=bool)
    among[order] = _repeats(both.take(order))
    return among[len(known) :]


def _repeats(events: Events) -> np.ndarray:
    """Events of a sorted sequence with the same key as the previous one."""
    return run_starts(events.user, events.item, events.time) < np.arange(len(events))


# The log


class LogFile(BaseModel):
    """A file of the log as last read."""

    bytes: int
    e_tag: str
    rows: int
    newest: int | None = None  # ms: its largest timestamp

    def same(self, file: SourceFile) -> bool:
        """Whether the file is unchanged since then."""
        return (self.bytes, self.e_tag) == (file.bytes, file.e_tag)


@dataclass(frozen=True)
class Log:
    """The current log, and the state that an earlier refresh read."""

    path: str
    table: TableName  # interactions or items
    files: Mapping[str, SourceFile]  # by name, relative to the path
    known: Mapping[str, LogFile]

    @classmethod
    def events(cls, workspace: Workspace, config: RefreshConfig, known: Mapping[str, LogFile]) -> "Log":
        """The log of events, without its folder `items`."""
        log = cls._open(config.events or workspace.path("events"), "interactions", known)
        return replace(log, files={name: f for name, f in log.files.items() if not name.startswith(f"{ITEMS}/")})

    @classmethod
    def items(cls, workspace: Workspace, config: RefreshConfig, known: Mapping[str, LogFile]) -> "Log":
        """The log of items: the folder `items` in that of events."""
        return cls._open(f"{(config.events or workspace.path('events')).rstrip('/')}/{ITEMS}", "items", known)

    @classmethod
    def _open(cls, path: str, table: TableName, known: Mapping[str, LogFile]) -> "Log":
        """Lists the Parquet files of a log, without hidden ones."""
        try:
            files = [file for file in input_files(path) if file.path.endswith(".parquet")]
        except SourceError:  # no files
            files = []
        base = path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())
        names = [file.path.removeprefix(base).strip("/") or file.path.rpartition("/")[2] for file in files]
        return cls(path, table, dict(zip(names, files, strict=True)), known)

    @property
    def unread(self) -> dict[str, SourceFile]:
        """New or rewritten files."""
        return {n: f for n, f in self.files.items() if n not in self.known or not self.known[n].same(f)}

    @property
    def kept(self) -> dict[str, LogFile]:
        """State of the other files."""
        return {n: self.known[n] for n, f in self.files.items() if n in self.known and self.known[n].same(f)}

    def read(self, rows: Mapping[str, int], newest: Mapping[str, int]) -> dict[str, LogFile]:
        """State after the unread files are also read. rows, newest (ms): by the path of a file."""
        unread = {
            name: LogFile(bytes=f.bytes, e_tag=f.e_tag, rows=rows[f.path], newest=newest.get(f.path))
            for name, f in self.unread.items()
        }
        return self.kept | unread

    def check_watermark(self, newest: int | None, watermark: int | None, restart: str) -> None:
        """Refuses a log without events, and one that ends before already read events (SourceError).

        newest: of the unread files. restart: the folder to delete in order to start over.
        """
        moments = [newest, *(file.newest for file in self.kept.values())]
        newest = max((moment for moment in moments if moment is not None), default=None)
        if watermark is None and newest is None:
            raise SourceError(
                f"{self.path}: there are no events. Add Parquet files with the columns "
                f"{', '.join(EVENTS.names)} (ms since 1970, UTC) and never change them; or set another folder "
                "in streaming.events."
            )
        if watermark is not None and (newest is None or newest < watermark):
            ends = "is empty" if newest is None else f"ends at {_moment(newest)}"
            raise SourceError(
                f"{self.path}: the log {ends}, but events up to {_moment(watermark)} were already read: it has "
                "lost events, or it is a different log. Restore its files or correct streaming.events; to "
                f"start over, delete {restart}."
            )

    def fragments(self) -> tuple[list[Fragment], dict[str, int]]:
        """Row groups of the unread files, and the rows of each file by its path. Raises SourceError."""
        files = list(self.unread.values())
        footers = in_threads(_footer, files)
        fragments = [
            f for file, footer in zip(files, footers, strict=True) for f in fragments_of(self.table, file, footer)
        ]
        return fragments, {file.path: footer.num_rows for file, footer in zip(files, footers, strict=True)}


def _footer(file: SourceFile) -> pq.FileMetaData:
    with open_parquet(file) as parquet:
        return parquet.metadata


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """Opens a file of the log. Raises SourceError if it cannot be read."""
    try:
        with file.open() as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            f"{file.path}: cannot be read as Parquet ({error}). Remove it. Write log files under a temporary "
            "name and rename them when complete."
        ) from error


# Reading it


@dataclass
class ReadEvents(Stage):
    """Reads groups of row groups: a file of usable events by bucket of users, and dead letters for the others."""

    folder: str
    grouping: Grouping
    known: Mapping[str, int]  # rows of a file read by an earlier refresh, by path
    horizon: int | None  # ms: older events are too late; new rows become dead letters
    n_shards: int
    labels: Labels

    name = "events"

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        passed = 0
        usable, dead, newest = [EVENTS.empty_table()], [REFUSED.empty_table()], dict[str, int]()
        for fragment in self.grouping.fragments(work.shard.number):
            table = _read(fragment)
            # Not left out, since a row's position shows whether it is new.
            gone = read_tombstones(work.workspace).among(table["user_id"].fill_null(-1).to_numpy())
            good, late, broken = sort_out(table, self.horizon, self.labels)
            good = good & ~gone
            if len(valid := table["timestamp"].filter(pa.array(good | late))):
                newest[fragment.path] = max(pc.max(valid).as_py(), newest.get(fragment.path, 0))
            new = ~gone & (fragment.first_row + np.arange(table.num_rows) >= self.known.get(fragment.path, 0))
            dead.append(broken.filter(pa.array(new & pc.is_valid(broken["error"]).to_numpy())))
            kept = table.filter(pa.array(good))
            chosen = taken_in(kept, self.labels)
            passed += kept.num_rows - int(chosen.sum())
            usable.append(kept.filter(pa.array(chosen)).select(EVENTS.names))
        events, letters = pa.concat_tables(usable), dead_letters(pa.concat_tables(dead))
        path = bucket_file("events", work.shard.number)
        files = {
            path: write_buckets(work.workspace, f"{self.folder}/{path}", events, "user_id", self.grouping.user_buckets)
        }
        if letters.num_rows:
            path = f"dead/{work.shard.file()}"
            files[path] = work.workspace.write_parquet(f"{self.folder}/{path}", letters)
        holds = np.zeros(self.n_shards, dtype=bool)
        holds[shard_of(events["user_id"].to_numpy(), self.n_shards)] = True
        counts: dict[str, float | int | str] = {
            "newest": json.dumps(newest),
            "passed_over": passed,
            "shards": base64.b64encode(np.packbits(holds).tobytes()).decode(),
            **count_errors(letters),
        }
        return Result(files, events.num_rows + letters.num_rows, events.num_rows, letters.num_rows, counts)


def event_groups(fragments: Sequence[Fragment], n_shards: int) -> Grouping:
    """Grouping of fragments: a bucket is a shard of users if there are not too many."""
    return grouped(fragments, None).model_copy(update={"user_buckets": min(n_shards, MAX_BUCKETS)})


def _read(fragment: Fragment) -> pa.Table:
    path = fragment.path
    with open_parquet(SourceFile(path, fragment.bytes, "")) as parquet:
        columns = [c for c in (*EVENTS.names, "label", "event") if c in parquet.schema_arrow.names]
        table = parquet.read_row_groups(list(range(*fragment.groups)), columns)
    if "rating" not in table.column_names:  # implicit feedback
        table = table.append_column("rating", pa.nulls(table.num_rows, pa.float32()))
    if "timestamp" in table.column_names:
        at = table.column_names.index("timestamp")
        table = table.set_column(at, "timestamp", to_milliseconds(table["timestamp"], "ms", name=path))
    return conform(table, EVENTS, name=path, first_row=fragment.first_row)


def sort_out(table: pa.Table, horizon: int | None, labels: Labels) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Usable rows, late rows, and all rows as REFUSED, with a null `error` if usable."""
    unclear = unclear_outcomes(table, labels)
    null = np.zeros(table.num_rows, dtype=bool)
    for column in ("user_id", "item_id", "timestamp"):
        null |= pc.is_null(table[column]).to_numpy()
    time = table["timestamp"].fill_null(0).to_numpy()
    wrong_unit = ~null & ((time < MILLISECONDS.start) | (time >= MILLISECONDS.stop))
    unclear &= ~null & ~wrong_unit
    late = ~null & ~wrong_unit & ~unclear & (time < (horizon or 0))
    error = np.full(table.num_rows, None, dtype=object)
    reasons = ((null, "NullField"), (wrong_unit, "NotMilliseconds"), (unclear, "UnclearOutcome"), (late, "TooLate"))
    for mask, name in reasons:
        error[mask] = name
    rows = table.select(EVENTS.names).append_column("error", pa.array(error, pa.string())).cast(REFUSED)
    return ~null & ~wrong_unit & ~unclear & ~late, late, rows


def unclear_outcomes(table: pa.Table, labels: Labels) -> np.ndarray:
    """Events without a clear result, if the label rule needs one: bool [n]."""
    if labels.rule != "column":
        return np.zeros(table.num_rows, dtype=bool)
    if labels.events:
        known = pc.is_in(table["event"], value_set=pa.array(EVENT_NAMES)) if "event" in table.column_names else None
        return ~known.to_numpy() if known else np.ones(table.num_rows, dtype=bool)
    if "label" not in table.column_names:
        return np.ones(table.num_rows, dtype=bool)
    label = table["label"].cast(pa.float32()).to_numpy()
    return ~((label >= 0) & (label <= 1))


def taken_in(table: pa.Table, labels: Labels) -> np.ndarray:
    """Events that their user took, bool [n]: passed-over ones are not read as behaviors."""
    if labels.rule != "column":
        return np.ones(table.num_rows, dtype=bool)
    if labels.events:
        return pc.not_equal(table["event"], PASSED_OVER).to_numpy()
    rating = table["rating"].cast(pa.float32()).to_numpy()
    return taken(rating, table["label"].cast(pa.float32()).to_numpy())


@dataclass(frozen=True)
class Buckets:
    """Output of ReadEvents, for the shards of users."""

    folder: str
    n_buckets: int
    n_shards: int
    newest_by_group: dict[int, int]
    newest_by_file: dict[str, int]
    _holds: dict[int, bytes] = field(repr=False)  # by group: one bit per shard with events

    @classmethod
    def of(cls, folder: str, n_shards: int, cards: Iterable[Card]) -> "Buckets":
        """From the stage's cards."""
        by_group, by_file, holds = {}, dict[str, int](), {}
        for card in cards:
            group, newest = Shard.from_name(card.shard).number, json.loads(str(card.counts["newest"]))
            by_group[group] = max(newest.values(), default=0)
            by_file |= {path: max(moment, by_file.get(path, 0)) for path, moment in newest.items()}
            holds[group] = base64.b64decode(str(card.counts["shards"]))
        return cls(folder, min(n_shards, MAX_BUCKETS), n_shards, by_group, by_file, holds)

    @property
    def newest(self) -> int | None:
        """Largest timestamp read."""
        return max(self.newest_by_file.values(), default=None)

    def shards(self) -> list[int]:
        """Shards with events, ascending."""
        bits = np.zeros(-(-self.n_shards // 8), dtype=np.uint8)
        for holds in self._holds.values():
            bits |= np.frombuffer(holds, dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(bits)[: self.n_shards]).tolist()

    def read(self, workspace: Workspace, shard: int) -> Events:
        """Events of one shard, in log order."""
        groups = [g for g, holds in self._holds.items() if holds[shard >> 3] >> (7 - (shard & 7)) & 1]
        bucket = [shard & (self.n_buckets - 1)]
        tables = [EVENTS.empty_table()]
        for group in groups:
            tables += read_batches(workspace, self._path(group), bucket, self.n_buckets)
        events = Events.from_table(pa.concat_tables(tables))
        return events.take(shard_of(events.user, self.n_shards) == shard)

    def newest_until(self, workspace: Workspace, limit: int) -> int | None:
        """Largest timestamp (ms) up to `limit`. Reads only groups with later ones, which come from broken clocks."""
        moments = []
        for group, newest in self.newest_by_group.items():
            if newest > limit:
                batches = read_batches(workspace, self._path(group), range(self.n_buckets), self.n_buckets)
                times = np.concatenate([batch["timestamp"].to_numpy() for batch in batches])
                newest = int(times[times <= limit].max(initial=0))
            moments.append(newest)
        return max(moments, default=0) or None

    def _path(self, group: int) -> str:
        return f"{self.folder}/{bucket_file('events', group)}"


# What is taken in


def split_future(events: Events, now: int) -> tuple[Events, pa.Table]:
    """Events up to now (ms), and those from the future as REFUSED."""
    future = events.time > now + FUTURE_MS
    return events.take(~future), events.take(future).refused("FromTheFuture")


def admit(
    events: Events, known: Events, users: np.ndarray, items: np.ndarray, config: RefreshConfig
) -> tuple[Events, pa.Table]:
    """New events (each once), and refused ones as REFUSED.

    known: accepted before. users, items: the known ids, ascending.
    """
    events = events.take(~are_among(events, known))
    refused = []
    for column, ids, error in (("user", users, "UnknownUser"), ("item", items, "UnknownItem")):
        if f"{column}s" not in config.admit:
            there = rows_of(ids, getattr(events, column)) >= 0
            refused.append(events.take(~there).refused(error))
            events = events.take(there)
    return events, pa.concat_tables([REFUSED.empty_table(), *refused])


def new_refusals(refused: pa.Table, before: pa.Table) -> pa.Table:
    """Those of `refused` that were not already refused for the same reason, in canonical order."""
    new = refused.join(before.select(_KEY), keys=_KEY, join_type="left anti").select(REFUSED.names).cast(REFUSED)
    return new.take(pc.sort_indices(new, sort_keys=[(name, "ascending") for name in _KEY]))


def dead_letters(refused: pa.Table) -> pa.Table:
    """Refused events (REFUSED) as schema.DEAD_LETTERS, in their order."""
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


def count_errors(letters: pa.Table) -> dict[str, int]:
    """Number of dead letters in total and by error, for a card."""
    by_error = {f"refused_{v['values']}": v["counts"] for v in pc.value_counts(letters["error"]).to_pylist()}
    return {"refused": letters.num_rows, **by_error}


def _moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC ({milliseconds})"
