"""The log of new interactions: Parquet files that others only ever add to, and what of it a refresh may take in.

A stream brings events late, twice, out of order and broken. Events are put into one canonical order, so that nothing
depends on the one they came in; an event at or after `watermark - max_lateness` is considered, whatever file it stands
in; and what cannot be taken in is refused, row by row, with its reason. How many rows of each file were read is
remembered: only a row that is new to the log can be too late, older ones were taken in at their time.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from owlrec.config import Config
from owlrec.errors import SourceError
from owlrec.ordered import run_starts
from owlrec.schema import INTERACTIONS, MILLISECONDS, conform
from owlrec.sources.tabular import to_milliseconds
from owlrec.workspace import Workspace

MS_PER_DAY = 86_400_000
REFUSED = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("error", pa.string())]
)


class EventsConfig(Config):
    """Where the log is, and what of it is taken in."""

    events: str | None = None  # a folder or a file of Parquet; None = `events` in the workspace
    max_lateness_days: float = Field(3.0, ge=0)  # behind the newest event taken in; what is older is refused
    max_future_s: float = Field(300.0, ge=0)  # clocks differ by minutes; what is later comes from a broken one
    # create: a user who stands in no table gets a text of their own; an item that stands in none counts as a
    # behaviour, but has neither a title to quote nor a vector.
    unknown_users: Literal["create", "refuse"] = "refuse"
    unknown_items: Literal["create", "refuse"] = "refuse"

    @property
    def max_lateness_ms(self) -> int:
        """max_lateness_days in milliseconds."""
        return round(self.max_lateness_days * MS_PER_DAY)


@dataclass(frozen=True)
class Events:
    """Interactions as columns: user, item and time (ms) int64 [n], rating float32 [n] (NaN: none)."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table) -> "Events":
        """Of a table of schema.INTERACTIONS with nulls among the ratings only. A rating that is no number is none."""
        rating = table["rating"].to_numpy().astype(np.float32)
        rating[~np.isfinite(rating)] = np.nan
        return cls(table["user_id"].to_numpy(), table["item_id"].to_numpy(), rating, table["timestamp"].to_numpy())

    @classmethod
    def join(cls, parts: Iterable["Events"]) -> "Events":
        """All events of several."""
        parts = [cls.from_table(INTERACTIONS.empty_table()), *parts]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("user", "item", "rating", "time")))

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Events":
        """The events at `rows` (indices or a mask)."""
        return Events(self.user[rows], self.item[rows], self.rating[rows], self.time[rows])

    def digest(self) -> str:
        """SHA-256 (hex) of all events in their order."""
        return hashlib.sha256(b"".join(c.tobytes() for c in (self.user, self.item, self.rating, self.time))).hexdigest()

    def refused(self, error: str) -> pa.Table:
        """These events as a table of REFUSED."""
        return pa.table([self.user, self.item, self.time, pa.repeat(error, len(self))], schema=REFUSED)


def canonical(events: Events) -> Events:
    """By user, time and item, each (user, item, time) once; of several ratings the highest stays."""
    worth = np.where(np.isnan(events.rating), -np.inf, events.rating)
    events = events.take(np.lexsort((-worth, events.item, events.time, events.user)))
    return events.take(~_repeats(events))


def are_among(events: Events, known: Events) -> np.ndarray:
    """Which events (each once) have a (user, item, time) that stands among `known`: bool [n]."""
    both = Events.join([known, events])
    new = np.arange(len(both)) >= len(known)
    order = np.lexsort((new, both.item, both.time, both.user))
    found = np.zeros(len(both), dtype=bool)
    found[order] = _repeats(both.take(order))
    return found[len(known) :]


def _repeats(events: Events) -> np.ndarray:
    """Which events of a sorted sequence have the key of the one before them."""
    return run_starts(events.user, events.item, events.time) < np.arange(len(events))


@dataclass(frozen=True)
class LogRead:
    """What a look at the log found."""

    events: Events  # at or after the horizon, in canonical order
    refused: pa.Table  # REFUSED: rows new to the log that no later refresh can take in either
    files: dict[str, int]  # rows by file
    newest: int | None  # the largest timestamp in the log
    duplicates: int


def open_log(workspace: Workspace, config: EventsConfig) -> Workspace:
    """The place of the log."""
    return Workspace(config.events or f"{workspace.root.rstrip('/')}/events")


def read_log(log: Workspace, horizon: int | None, known: Mapping[str, int]) -> LogRead:
    """Reads what is at or after `horizon` (ms; None: everything).

    known: rows by file at the refresh before; what stands behind them is new. A file without new rows whose newest
    event is older than the horizon is not read at all.
    Raises SourceError for a file that cannot be read, SchemaError for one that lacks a column.
    """
    events, refused, files, newest = [], [REFUSED.empty_table()], {}, []
    for name, path in _log_files(log).items():
        try:
            with log.filesystem.open_input_file(path) as source:
                file = pq.ParquetFile(source)
                files[name] = int(file.metadata.num_rows)
                latest = _latest(file)
                if known.get(name) == files[name] and latest is not None and horizon is not None and latest < horizon:
                    newest.append(latest)
                    continue
                table = _conformed(file, path)
        except (pa.ArrowInvalid, OSError) as error:
            raise SourceError(
                f"{path}: cannot be read as Parquet ({error}). Write a file of the log under another name and rename "
                "it when it is whole; remove what is broken."
            ) from error
        usable, late, broken = _sort_out(table, horizon)
        if len(valid := table["timestamp"].filter(pa.array(usable | late))):
            newest.append(pc.max(valid).as_py())
        new = np.arange(table.num_rows) >= known.get(name, 0)
        refused += [broken.filter(pa.array(new & pc.is_valid(broken["error"]).to_numpy()))]
        events.append(Events.from_table(table.filter(pa.array(usable))))
    joined = Events.join(events)
    kept = canonical(joined)
    return LogRead(kept, pa.concat_tables(refused), files, max(newest, default=None), len(joined) - len(kept))


def check_watermark(log: Workspace, newest: int | None, watermark: int | None, restart: str) -> None:
    """Refuses a log without events, and one that ends before what was taken in already (SourceError).

    restart: the folder to delete in order to begin anew.
    """
    if watermark is None and newest is None:
        raise SourceError(
            f"{log.path()}: no events are there. Put Parquet files with the columns {', '.join(INTERACTIONS.names)} "
            "(ms since 1970, UTC) into it, and only ever add to them; or name another place in streaming.events."
        )
    if watermark is not None and (newest is None or newest < watermark):
        ends = "is empty" if newest is None else f"ends at {_moment(newest)}"
        raise SourceError(
            f"{log.path()}: the log {ends}, but events up to {_moment(watermark)} were taken in: it has lost events, "
            f"or it is another log. Put its files back or correct streaming.events; to begin anew, delete {restart}."
        )


def _log_files(log: Workspace) -> dict[str, str]:
    """Path by name of all Parquet files, sorted by name; hidden ones are left out."""
    root = log.path()
    info = log.filesystem.get_file_info(root)
    if info.type == pafs.FileType.File:
        return {info.base_name: root}
    found = {}
    for entry in log.filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True)):
        name = entry.path.removeprefix(root).strip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if entry.type == pafs.FileType.File and name.endswith(".parquet") and not hidden:
            found[name] = entry.path
    return dict(sorted(found.items()))


def _conformed(file: pq.ParquetFile, path: str) -> pa.Table:
    table = file.read([c for c in INTERACTIONS.names if c in file.schema_arrow.names])
    if "rating" not in table.column_names:  # implicit feedback
        table = table.append_column("rating", pa.nulls(table.num_rows, pa.float32()))
    if "timestamp" in table.column_names:
        at = table.column_names.index("timestamp")
        table = table.set_column(at, "timestamp", to_milliseconds(table["timestamp"], "ms", name=path))
    return conform(table, INTERACTIONS, name=path)


def _latest(file: pq.ParquetFile) -> int | None:
    """The largest timestamp by the file's own statistics, None where it has none."""
    found = []
    for group in range(file.metadata.num_row_groups):
        columns = map(file.metadata.row_group(group).column, range(file.metadata.num_columns))
        statistics = next((c.statistics for c in columns if c.path_in_schema == "timestamp"), None)
        if statistics is None or not statistics.has_min_max or not isinstance(statistics.max, int):
            return None
        found.append(statistics.max)
    return max(found, default=None)


def _sort_out(table: pa.Table, horizon: int | None) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Which rows can be used, which are too late, and all rows as REFUSED, their `error` null where they are usable."""
    null = np.zeros(table.num_rows, dtype=bool)
    for column in ("user_id", "item_id", "timestamp"):
        null |= pc.is_null(table[column]).to_numpy()
    time = table["timestamp"].fill_null(0).to_numpy()
    wrong_unit = ~null & ((time < MILLISECONDS.start) | (time >= MILLISECONDS.stop))
    late = ~null & ~wrong_unit & (time < (horizon or 0))
    error = np.full(table.num_rows, None, dtype=object)
    for mask, name in ((null, "NullField"), (wrong_unit, "NotMilliseconds"), (late, "TooLate")):
        error[mask] = name
    rows = table.select(["user_id", "item_id", "timestamp"]).append_column("error", pa.array(error, pa.string()))
    return ~null & ~wrong_unit & ~late, late, rows.cast(REFUSED)


def _moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC ({milliseconds})"
