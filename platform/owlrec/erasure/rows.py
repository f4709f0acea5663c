"""Files without the rows of some users: Parquet, Arrow, the bucket files of a shuffle, lines of a log.

A file that holds none of the users is read as far as its ids and left alone. One that does is written again under its
name, in the same format; nothing else in it changes.
"""

import json
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.schema import Kind
from owlrec.sources.buckets import read_batches, write_batches
from owlrec.sources.splits import in_histories
from owlrec.storage import FileEntry, Storage
from owlrec.workspace import Workspace, table_file

_ABOUT = b"interactions"
_KEYS = ("user_id", "id", "raw_id", "kind")


@dataclass(frozen=True)
class Users:
    """Whom to erase: users, or cohorts that tell of nobody else. Never written to a file."""

    ids: np.ndarray  # int64 [n], distinct
    raw: frozenset[str]  # the same by their raw ids
    kind: Kind = "user"

    def rows(self, table: pa.Table, own: bool = False) -> np.ndarray:
        """Which rows of a table are about one of the users, bool [n]: by user_id; else by id or raw_id, where `kind`
        says that a row is of a user, or where there is no such column and all rows are (own).
        """
        names = table.column_names
        if "user_id" in names:
            return self._among(table["user_id"])
        found = np.zeros(len(table), dtype=bool)
        if "kind" in names or own:
            for name in ("id", "raw_id"):
                found |= self._among(table[name]) if name in names else False
        if "kind" in names:
            found &= pc.equal(table["kind"], self.kind).fill_null(False).to_numpy()
        return found

    def places(self, table: pa.Table) -> frozenset[int]:
        """Which users the rows of a table are about, by their places among `ids`."""
        column = next((table[name] for name in ("user_id", "id") if name in table.column_names), None)
        if column is None or not pa.types.is_integer(column.type):
            return frozenset()
        return frozenset(np.flatnonzero(np.isin(self.ids, column.drop_null().to_numpy())).tolist())

    def _among(self, column: pa.ChunkedArray) -> np.ndarray:
        if pa.types.is_integer(column.type):
            wanted = pa.array(self.ids, pa.int64())
            column = column.cast(pa.int64(), safe=False)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            wanted = pa.array(sorted(self.raw), column.type)
        else:
            return np.zeros(len(column), dtype=bool)
        found: np.ndarray = pc.is_in(column, value_set=wanted).to_numpy()
        return found

    @property
    def words(self) -> re.Pattern[bytes]:
        """A pattern of their ids as words of a text."""
        names = sorted({*map(str, self.ids.tolist()), *self.raw}, key=len, reverse=True)
        return re.compile(rb"(?<![\w-])(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")(?![\w-])")


@dataclass(frozen=True)
class Rewritten:
    """A file that held rows of the users, and the one in its place."""

    path: str
    rows: int  # that were removed
    bytes: int  # by which it shrank
    left: int  # rows that stay
    before: str  # e_tag
    entry: FileEntry
    found: frozenset[int] = frozenset()  # which of the users, by their places


def erase(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    """Removes the users' rows from a file; none where it holds none. Of samples, the interactions are done as well.

    Raises WorkspaceError where the file cannot be read or written.
    """
    if path.startswith("tables/samples/"):
        return _erase_samples(workspace, int(path[-16:-8]), users)
    if path.startswith(("ingest/", "refresh/")) and path.endswith(".arrow"):
        return _erase_batches(workspace, path, users)
    if path.endswith((".parquet", ".arrow")):
        return _erase_table(workspace, path, users)
    return erase_lines(workspace, path, users)


def of_users(path: str) -> bool:
    """Whether the shards of a file's folder are of users."""
    folder = path.rpartition("/")[0].rpartition("/")[2]
    return folder in ("user", "users", "interactions", "histories", "samples") or folder.endswith("-user")


def _erase_table(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    if path.endswith(".parquet"):
        keys = [name for name in _KEYS if name in workspace.parquet_file(path).schema_arrow.names]
        if not keys or not users.rows(workspace.read_parquet(path, keys), of_users(path)).any():
            return []
        table = workspace.read_parquet(path)
    else:
        table = pa.ipc.open_file(workspace.open_input(path)).read_all()
    gone = users.rows(table, of_users(path))
    return [_replace(workspace, path, table, gone, users)] if gone.any() else []


def _replace(
    workspace: Workspace, path: str, table: pa.Table, gone: np.ndarray, users: Users | None = None
) -> Rewritten:
    found = users.places(table.filter(pa.array(gone))) if users else frozenset()
    before, kept = workspace.entry(path), table.filter(pa.array(~gone)).combine_chunks()
    assert before is not None
    if path.endswith(".parquet"):
        entry = workspace.write_parquet(path, kept)
    else:
        entry = workspace.write_arrow(path, kept, kept.schema)
    return Rewritten(path, int(gone.sum()), before.bytes - entry.bytes, len(kept), before.e_tag, entry, found)


# Samples refer to rows of interactions by their places, which move: neither file may be replaced without the other.


def _erase_samples(workspace: Workspace, number: int, users: Users) -> list[Rewritten]:
    """The new samples are first written aside, with the places of the interactions that go: a run that is killed leaves
    what the next one needs to finish.
    """
    done = _replace_samples(workspace, number)
    samples = workspace.read_parquet(table_file("samples", number))
    rows = users.rows(workspace.read_parquet(table_file("interactions", number), ["user_id"]))
    gone = users.rows(samples)
    if not gone.any() and not rows.any():
        return done
    before = np.r_[0, np.cumsum(users.rows(in_histories(workspace, number, ["user_id"])))]
    kept = samples.filter(pa.array(~gone))
    for column in ("history_start", "history_end"):
        at, places = kept.column_names.index(column), kept[column].to_numpy()
        kept = kept.set_column(at, kept.schema.field(at), pa.array(places - before[places], pa.int32()))
    about = json.dumps({"of": len(rows), "gone": np.flatnonzero(rows).tolist()})
    workspace.write_parquet(_aside(number), kept.replace_schema_metadata({_ABOUT: about}))
    return [*done, *_replace_samples(workspace, number)]


def _replace_samples(workspace: Workspace, number: int) -> list[Rewritten]:
    if workspace.entry(_aside(number)) is None:
        return []
    changed, samples = [], workspace.read_parquet(_aside(number))
    about = json.loads(samples.schema.metadata[_ABOUT])
    path = table_file("interactions", number)
    interactions = workspace.read_parquet(path)
    if about["gone"] and len(interactions) == about["of"]:
        gone = np.zeros(len(interactions), dtype=bool)
        gone[about["gone"]] = True
        changed.append(_replace(workspace, path, interactions, gone))
    path = table_file("samples", number)
    before, rows = workspace.entry(path), workspace.count_rows(path)
    assert before is not None
    entry = workspace.write_parquet(path, samples.replace_schema_metadata(None))
    workspace.delete_file(_aside(number))
    removed = rows - len(samples)
    return [*changed, Rewritten(path, removed, before.bytes - entry.bytes, len(samples), before.e_tag, entry)]


def _aside(number: int) -> str:
    return f"tables/erasing/{number:08d}.parquet"


def _erase_batches(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    """A bucket file (sources.buckets) keeps its number of batches."""
    before = workspace.entry(path)
    assert before is not None
    end = int(np.frombuffer(workspace.read_range(path, before.bytes - 8, 8), "<i8")[0])
    n = (before.bytes - end) // 8 - 1
    batches = read_batches(workspace, path, range(n), n)
    gone = [users.rows(batch) for batch in batches]
    removed = sum(int(rows.sum()) for rows in gone)
    if not removed:
        return []
    kept = [batch.filter(pa.array(~rows)) for batch, rows in zip(batches, gone, strict=True)]
    entry = write_batches(workspace, path, kept, batches[0].schema)
    left, found = sum(map(len, kept)), frozenset().union(*map(users.places, batches))
    return [Rewritten(path, removed, before.bytes - entry.bytes, left, before.e_tag, entry, found)]


def erase_lines(storage: Storage, path: str, users: Users) -> list[Rewritten]:
    """A text without the lines that name a user."""
    data, e_tag = storage.read_tagged(path)
    lines, words = data.splitlines(keepends=True), users.words
    kept = [line for line in lines if not words.search(line)]
    if len(kept) == len(lines):
        return []
    entry = storage.write_bytes(path, b"".join(kept))
    return [Rewritten(path, len(lines) - len(kept), len(data) - entry.bytes, len(kept), e_tag, entry)]
