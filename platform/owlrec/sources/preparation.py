"""`prepare`, from a source to the workspace's tables, in three stages of the runner.

`ingest` reads fragments of the source and checks them row by row, `shuffle` brings the rows of each user together and
refuses what is wrong, `tables` writes. Only then is the earlier run's output touched.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import Kind, rows_of, shard_of
from owlrec.runner import Result, Stage, Work
from owlrec.schema import INTERACTIONS
from owlrec.shards import Artifact, Card, Shard, in_threads
from owlrec.sources.outcomes import EVENT_CODE, SPLIT, Labels, answered, with_outcomes
from owlrec.sources.raw import (
    CARRIED,
    ENTITIES,
    TABLE_NAMES,
    Fragment,
    Fragments,
    Piece,
    Place,
    TableName,
    no_rows,
    refuse_orphans,
    refuse_repeated_ids,
    refuse_repeated_interactions,
    with_raw_ids,
)
from owlrec.sources.splits import (
    SPLITS,
    Behaviors,
    Samples,
    SplitConfig,
    SplitValues,
    Texts,
    for_histories,
    histories,
    refuse_empty,
    refuse_one_label,
    sample_counts,
    sample_rows,
    split_counts,
    split_thresholds,
)
from owlrec.storage import FileEntry, Storage, fingerprint
from owlrec.workspace import Workspace, read_tombstones, shard_file, shards_for

# --------------------------------------------------------------------------------------------------------------- ingest
# Stage 1 of `prepare`: fragments of the source, validated row by row, as files by bucket.
#
# A shard is a group of fragments. The assignment of fragments to groups is stored, and a group with only
# unchanged fragments keeps its number, so if a source grows by some files, only those are read.


# -------------------------------------------------------------------------------------------------------------- buckets
# Rows of a table by bucket: one file whose batches are fetched one at a time by ranged reads.
#
# A bucket is the low bits of an id's hash, like a shard, so a bucket is a set of whole shards (or a shard of
# whole buckets). This is the shuffle of `prepare`: writers sort rows by bucket once, readers fetch their
# own batch of every file, and nothing passes through a driver or Ray's object store.
#
# A file is one Arrow stream (LZ4) per batch, followed by the offsets of their starts and of the end, as int64. Arrow's
# own file format would take several more reads to find a batch.


MAX_BUCKETS = 1 << 14  # their numbers sort as 16-bit integers
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_buckets(storage: Storage, path: str, table: pa.Table, key: str, n_buckets: int) -> FileEntry:
    """Writes a table with one batch per bucket of its ids; rows keep their order within one."""
    order, bounds = bucket_order(table[key].to_numpy(), n_buckets)
    table = table.combine_chunks().take(pa.array(order))
    parts = (table.slice(begin, end - begin) for begin, end in pairwise(bounds))
    return write_batches(storage, path, parts, table.schema)


def bucket_order(ids: np.ndarray, n_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `ids` by bucket, int64 [n], in order within one; and the start of each bucket, [n_buckets + 1]."""
    buckets = shard_of(ids, n_buckets).astype(np.uint16)
    order = np.argsort(buckets, kind="stable")  # a radix sort, for 16-bit integers
    bounds = np.zeros(n_buckets + 1, dtype=np.int64)
    np.cumsum(np.bincount(buckets, minlength=n_buckets), out=bounds[1:])
    return order, bounds


def write_batches(storage: Storage, path: str, parts: Iterable[pa.Table], schema: pa.Schema) -> FileEntry:
    """Writes tables of one schema as one batch each."""
    begins = [0]
    with storage.writer(path) as file:
        for part in parts:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, schema, options=_OPTIONS) as writer:
                writer.write_table(part.combine_chunks())
            file.write(sink.getvalue())
            begins.append(file.tell())
        file.write(np.array(begins, dtype="<i8").tobytes())
    assert file.entry is not None
    return file.entry


def read_batches(storage: Storage, path: str, numbers: Sequence[int], n_batches: int) -> list[pa.Table]:
    """Some batches of a file that has `n_batches`, by ranged reads. Raises WorkspaceError if it is missing."""
    entry, size = storage.entry(path), 8 * (n_batches + 1)
    if entry is None:
        raise WorkspaceError(f"{storage.path(path)} does not exist. Run `prepare` again.")
    begins = np.frombuffer(storage.read_range(path, entry.bytes - size, size), dtype="<i8")
    if len(numbers) == n_batches:
        data = storage.read_range(path, 0, int(begins[-1]))
        pieces = [data[begin:end] for begin, end in pairwise(begins)]
    else:
        pieces = [storage.read_range(path, int(begins[n]), int(begins[n + 1] - begins[n])) for n in numbers]
    return [pa.ipc.open_stream(piece).read_all() for piece in pieces]


# --------------------------------------------------------------------------------------------------------------- ingest


KIND = "fragments"
GROUP_ROWS = 1 << 21
GROUP_BYTES = 128 << 20
BUCKET_INTERACTIONS = 1 << 20  # maximum in one bucket
BUCKET_ITEMS = 1 << 18
_SLACK = 4  # growth factor of a source before its buckets are redone and all of it is read again


class Grouping(BaseModel):
    """Fragments by group, and the number of buckets: groups.json."""

    user_buckets: int
    item_buckets: int
    groups: dict[int, list[dict[str, Any]]] = {}  # Fragment.json by group

    def inputs(self) -> dict[Shard, str]:
        """Digest of each group, for the runner."""
        return {
            Shard(KIND, number): fingerprint(
                self.user_buckets, self.item_buckets, [fragment["digest"] for fragment in group]
            )
            for number, group in sorted(self.groups.items())
        }

    def fragments(self, number: int) -> list[Fragment]:
        """The fragments of a group."""
        return [Fragment.from_json(values) for values in self.groups[number]]


def grouped(fragments: Sequence[Fragment], earlier: Grouping | None) -> Grouping:
    """Groups of fragments of one table, of about GROUP_ROWS each; unchanged groups of an earlier run stay."""
    rows = dict.fromkeys(("", *TABLE_NAMES), 0)
    for fragment in fragments:
        rows[fragment.table] += fragment.rows
    user_buckets = min(MAX_BUCKETS, shards_for(max(1, rows["interactions"] + rows[""]), BUCKET_INTERACTIONS))
    item_buckets = min(MAX_BUCKETS, shards_for(max(1, rows["items"]), BUCKET_ITEMS))
    result = Grouping(user_buckets=user_buckets, item_buckets=item_buckets)
    left = {fragment.digest: fragment for fragment in fragments}
    if earlier is not None:
        result.user_buckets = _kept(user_buckets, earlier.user_buckets)
        result.item_buckets = _kept(item_buckets, earlier.item_buckets)
        for number, known in earlier.groups.items():
            digests = [values["digest"] for values in known]
            if all(digest in left for digest in digests):
                result.groups[number] = known
                for digest in digests:
                    del left[digest]
    number = max(result.groups, default=-1) + 1
    group: list[Fragment] = []
    for fragment in left.values():
        if group and (
            group[0].table != fragment.table
            or sum(f.rows for f in group) + fragment.rows > GROUP_ROWS
            or sum(f.bytes for f in group) + fragment.bytes > GROUP_BYTES
        ):
            result.groups[number] = [f.json() for f in group]
            number, group = number + 1, []
        group.append(fragment)
    if group:
        result.groups[number] = [f.json() for f in group]
    return result


def _kept(wanted: int, earlier: int) -> int:
    return earlier if wanted // _SLACK <= earlier <= wanted * _SLACK else wanted


def read_grouping(workspace: Workspace, folder: str) -> Grouping | None:
    """Grouping of an earlier run, None if there was none."""
    try:
        return Grouping.model_validate_json(workspace.read_bytes(f"{folder}/groups.json"))
    except (WorkspaceError, ValueError):
        return None


@dataclass
class Ingest(Stage):
    """Reads groups of fragments: one file by bucket per table."""

    source: Fragments
    folder: str
    grouping: Grouping
    labels: Labels

    name = "ingest"

    def run(self, work: Work) -> Result:
        """See Stage."""
        tables: dict[TableName, list[Piece]] = {}
        for fragment in self.grouping.fragments(work.shard.number):
            for piece in self.source.read(fragment):
                tables.setdefault(piece.table, []).append(piece)
        files: dict[str, FileEntry] = {}
        counts: dict[str, int] = {}
        gone = read_tombstones(work.workspace)
        for name, pieces in tables.items():
            data = [self._labeled(piece) if name == "interactions" else piece.data for piece in pieces]
            if name != "items":
                data = [gone.without(table) for table in data]
            table = pa.concat_tables(data)
            counts[name] = table.num_rows
            path = bucket_file(name, work.shard.number)
            buckets = self.grouping.item_buckets if name == "items" else self.grouping.user_buckets
            files[path] = write_buckets(work.workspace, f"{self.folder}/{path}", table, _key(name), buckets)
        rows = sum(counts[name] for name in tables)
        return Result(files, rows_in=rows, rows_out=rows, counts=counts)

    def _labeled(self, piece: Piece) -> pa.Table:
        table = with_outcomes(piece.data, self.labels, piece.name, piece.first_row)
        events = [pa.field(EVENT_CODE, pa.uint8())] if EVENT_CODE in table.column_names else []
        schema = pa.schema([*INTERACTIONS, *events])
        rows = table.select(schema.names).cast(schema)
        for name in (name for name in table.column_names if name.startswith(CARRIED)):
            column = name.removeprefix(CARRIED)
            kind = "label" if column in self.labels.tasks else "interactions"
            rows = rows.append_column(f"{kind}/{column}", table[name])
        return rows


def bucket_file(table: str, group: int) -> str:
    """Path of a group's rows of a table, relative to the artifact."""
    return f"{table}/{shard_file(group, '.arrow')}"


def _key(table: TableName) -> str:
    return ENTITIES[table][0] if table in ENTITIES else "user_id"


@dataclass(frozen=True)
class Groups:
    """Ingested files of a table, and positions of their rows in the source."""

    source: Fragments
    folder: str
    grouping: Grouping
    table: TableName
    numbers: Sequence[int]  # groups with a file of the table
    rows: int

    @property
    def schema(self) -> pa.Schema:
        """The table's columns, if no group has rows of it."""
        return ENTITIES[self.table][1] if self.table in ENTITIES else INTERACTIONS

    @property
    def paths(self) -> list[str]:
        """The files, relative to the workspace."""
        return [f"{self.folder}/{bucket_file(self.table, number)}" for number in self.numbers]

    @property
    def n_buckets(self) -> int:
        """Number of buckets in the files."""
        return self.grouping.item_buckets if self.table == "items" else self.grouping.user_buckets

    def place(self, workspace: Workspace, number: int, bucket: int, row: int) -> Place:
        """Position in the source of a row from a bucket of a group's file: only for errors, since it reads the group
        again.
        """
        gone = read_tombstones(workspace)
        for fragment in self.grouping.fragments(number):
            for piece in self.source.read(fragment):
                if piece.table == self.table:
                    ids = piece.data[_key(self.table)].to_numpy()
                    kept = np.flatnonzero(~gone.among(ids)) if self.table != "items" else np.arange(len(ids))
                    order, bounds = bucket_order(ids[kept], self.n_buckets)
                    rows = kept[order[bounds[bucket] : bounds[bucket + 1]]]
                    if row < len(rows):
                        at = int(rows[row])
                        raw = self.source.raw_ids(piece, at) if self.table == "interactions" else ("", "")
                        return Place(piece.name, piece.first_row + at, *raw)
                    row -= len(rows)
        raise IndexError(row)


# -------------------------------------------------------------------------------------------------------------- shuffle
# Stage 2 of `prepare`: gathers, validates and sorts all rows of some users, or of some items.
#
# A task is a bucket or, if there are fewer shards than buckets, the buckets of one shard. It reads its batch of
# every ingested file and writes one file with one batch per shard. All remaining checks happen here, before the
# first table is changed.


@dataclass(frozen=True)
class Tasks:
    """Distribution of a kind's shards among tasks: task t makes the shards t, t + n, ... of n_shards."""

    kind: Kind
    n_buckets: int
    n_shards: int

    def __len__(self) -> int:
        return min(self.n_buckets, self.n_shards)

    def buckets(self, task: int) -> range:
        """The buckets that a task reads."""
        return range(task, self.n_buckets, len(self))

    def shards(self, task: int) -> range:
        """The shards that a task makes."""
        return range(task, self.n_shards, len(self))

    def order(self, ids: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a task's ids by shard, in order within one, and the start of each of its shards."""
        place = (shard_of(ids, self.n_shards) - task) // len(self)
        n = len(self.shards(task))
        order = np.argsort(place.astype(np.uint16) if n <= 1 << 16 else place, kind="stable")
        return order, np.r_[0, np.cumsum(np.bincount(place, minlength=n))]


@dataclass
class Shuffle(Stage):
    """Sorts buckets. Items come first, because interactions are checked against them."""

    folder: str
    groups: Mapping[TableName, Groups]
    tasks: Mapping[Kind, Tasks]
    split: SplitConfig
    labels: Labels
    drop_orphans: bool
    names: Mapping[str, str]  # names of tables in errors
    _item_ids: np.ndarray | None = field(default=None, repr=False)

    name = "shuffle"

    def run(self, work: Work) -> Result:
        """See Stage."""
        return self._items(work) if work.shard.kind == "item" else self._users(work)

    def _items(self, work: Work) -> Result:
        task = work.shard.number
        items, where = self._read(work.workspace, "items", self.tasks["item"].buckets(task))
        refuse_repeated_ids(items, "item_id", where)
        items = _by_id(items, "item_id")
        files = self._write(work, "items", items, "item_id")
        path, ids = shuffled_file("item-ids", task), items.select(["item_id"])
        files[path] = work.workspace.write_arrow(f"{self.folder}/{path}", ids, ids.schema)
        return Result(files, items.num_rows, items.num_rows, counts={"items": items.num_rows})

    def _users(self, work: Work) -> Result:
        buckets = self.tasks["user"].buckets(work.shard.number)
        interactions, where = self._read(work.workspace, "interactions", buckets)
        users, where_user = self._read(work.workspace, "users", buckets)
        user, item, time = (interactions[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
        if not self.groups["users"].source.has_users:
            users = with_raw_ids(pc.unique(interactions["user_id"]), users)
            where_user = lambda row: Place(self.names["users"], row)  # noqa: E731 - a row of no file
        refuse_repeated_ids(users, "user_id", where_user)
        users = _by_id(users, "user_id")

        order = np.lexsort((item, time, user))
        replied = np.zeros(len(order), dtype=bool)
        if self.labels.events:
            replied = answered(user, item, time, interactions["label"].to_numpy())
            order = order[~replied[order]]
        refuse_repeated_interactions(interactions, where, order)
        orphan_item = rows_of(self._known_items(work.workspace), item) < 0
        orphan_user = rows_of(users["user_id"].to_numpy(), user) < 0
        rows_in, n_replied = interactions.num_rows, int(replied.sum())
        if self.drop_orphans:
            order = order[~(orphan_item | orphan_user)[order]]
        else:
            refuse_orphans(orphan_user, orphan_item, where, self.names)
        interactions = interactions.take(pa.array(order))

        files = self._write(work, "users", users, "user_id")
        files |= self._write(work, "interactions", interactions, "user_id")
        behaviors = Behaviors.of(interactions)
        samples = Samples.of(behaviors, self.split)
        values = SplitValues.of(behaviors, samples, self.split).table()
        path = shuffled_file("split", work.shard.number)
        files[path] = work.workspace.write_arrow(f"{self.folder}/{path}", values, values.schema)
        orphans = rows_in - n_replied - len(order)
        counts = {"all_users": users.num_rows, "orphans_dropped": orphans}
        counts |= {"impressions_answered": n_replied} if self.labels.events else {}
        counts |= sample_counts(behaviors, samples, Texts.of(behaviors, self.split))
        return Result(files, rows_in, len(order), rows_in - len(order), counts)

    def _read(
        self, workspace: Workspace, table: TableName, buckets: Sequence[int]
    ) -> tuple[pa.Table, Callable[[int], Place]]:
        """Rows of some buckets, in source order within one, and a function for their source positions."""
        groups = self.groups[table]
        rows = [
            (number, bucket, batch)
            for number, path in zip(groups.numbers, groups.paths, strict=True)
            for bucket, batch in zip(buckets, read_batches(workspace, path, buckets, groups.n_buckets), strict=True)
        ]

        def where(row: int) -> Place:
            for number, bucket, batch in rows:
                if row < batch.num_rows:
                    return groups.place(workspace, number, bucket, row)
                row -= batch.num_rows
            raise IndexError(row)

        if not rows:
            return groups.schema.empty_table(), where
        return pa.concat_tables([batch for _, _, batch in rows]).combine_chunks(), where

    def _write(self, work: Work, table: TableName, rows: pa.Table, key: str) -> dict:
        """Writes rows in shard order, one batch per shard."""
        tasks, task = self.tasks[work.shard.kind], work.shard.number  # type: ignore[index]
        order, bounds = tasks.order(rows[key].to_numpy(), task)
        rows = rows.take(pa.array(order))
        parts = (rows.slice(begin, end - begin) for begin, end in pairwise(bounds))
        path = shuffled_file(table, task)
        return {path: write_batches(work.workspace, f"{self.folder}/{path}", parts, rows.schema)}

    def _known_items(self, workspace: Workspace) -> np.ndarray:
        """Ids of all items, ascending: read once per worker, 80 MB for 10^7."""
        if self._item_ids is None:
            self._item_ids = shuffled_items(workspace, self.folder, self.tasks["item"])
        return self._item_ids

    def close(self) -> None:
        """See Stage."""
        self._item_ids = None


def shuffled_items(workspace: Workspace, folder: str, tasks: Tasks) -> np.ndarray:
    """Ids of all items, ascending: int64."""
    paths = [f"{folder}/{shuffled_file('item-ids', task)}" for task in range(len(tasks))]
    return np.sort(np.concatenate([workspace.map_arrow(path)["item_id"].to_numpy() for path in paths]))


def shuffled_file(table: str, task: int) -> str:
    """Path of a task's rows of a table, relative to the artifact."""
    return f"{table}/{shard_file(task, '.arrow')}"


def read_shuffled(workspace: Workspace, folder: str, table: str, tasks: Tasks, task: int) -> list[pa.Table]:
    """A task's shards of a shuffled table, in the order of `tasks.shards`."""
    n = len(tasks.shards(task))
    return read_batches(workspace, f"{folder}/{shuffled_file(table, task)}", range(n), n)


def _by_id(table: pa.Table, key: str) -> pa.Table:
    return table.take(pa.array(np.argsort(table[key].to_numpy(), kind="stable")))


# ---------------------------------------------------------------------------------------------------------- preparation
# The three stages of `prepare`: `ingest` reads fragments of the source, `shuffle` groups the rows of each user
# and refuses invalid data, `tables` writes. Only then is the earlier run's output changed.


# ------------------------------------------------------------------------------------------------------------- prepared
# Stage 3 of `prepare`: the tables that all later stages read, shard by shard, each file in ascending order of id.


TABLES = "tables"
USER_TABLES = ("users", "interactions", "histories", "samples")


@dataclass
class WriteTables(Stage):
    """Writes the shards of a task."""

    shuffled: str  # the folder of stage 2
    tasks: Mapping[Kind, Tasks]
    split: SplitConfig
    labels: Labels
    thresholds: tuple[int, int]

    name = "tables"
    folder = TABLES
    _catalog: np.ndarray | None = field(default=None, repr=False)

    def run(self, work: Work) -> Result:
        """See Stage."""
        kind, workspace = work.shard.kind, work.workspace
        tasks = self.tasks[kind]  # type: ignore[index]
        names = ("users", "interactions") if kind == "user" else ("items",)
        shuffled = [read_shuffled(workspace, self.shuffled, name, tasks, work.shard.number) for name in names]

        def write(shard: tuple[Any, ...]) -> tuple[dict[str, FileEntry], Counter[str]]:
            number, *rows = shard
            tables = self._user_tables(catalog, *rows) if kind == "user" else {"items": rows[0]}
            drawn: Counter[str] = Counter()
            if self.labels.negatives and kind == "user":
                negatives = tables["samples"].filter(pc.equal(tables["samples"]["label"], 0))
                drawn.update({n["values"]: n["counts"] for n in pc.value_counts(negatives["split"]).to_pylist()})
            files = {f"{name}/{shard_file(number)}": table for name, table in tables.items()}
            entries = {path: workspace.write_parquet(f"{TABLES}/{path}", table) for path, table in files.items()}
            return entries, drawn

        catalog = self._items(workspace) if self.labels.negatives else np.zeros(0, dtype=np.int64)
        work.check()
        # In threads: each file waits for its disk or its store.
        written = in_threads(write, list(zip(tasks.shards(work.shard.number), *shuffled, strict=True)))
        rows = sum(table.num_rows for table in shuffled[0])
        drawn = sum((shard_counts for _, shard_counts in written), Counter[str]())
        counts = {f"drawn_{split}": n for split, n in drawn.items()}
        return Result({path: e for files, _ in written for path, e in files.items()}, rows, rows, counts=counts)

    def _items(self, workspace: Workspace) -> np.ndarray:
        if self._catalog is None:
            self._catalog = shuffled_items(workspace, self.shuffled, self.tasks["item"])
        return self._catalog

    def close(self) -> None:
        """See Stage."""
        self._catalog = None

    def _user_tables(self, catalog: np.ndarray, users: pa.Table, interactions: pa.Table) -> dict[str, pa.Table]:
        behaviors = Behaviors.of(interactions)
        samples = Samples.of(behaviors, self.split)
        own = interactions.select([name for name in interactions.column_names if "/" in name])  # of samples alone
        rows = sample_rows(behaviors, samples, self.split, np.array(self.thresholds), self.labels, catalog, own)
        read = histories(behaviors, Texts.of(behaviors, self.split))
        interactions = for_histories(interactions.drop_columns(own.column_names), self.split)
        return {"users": users, "interactions": interactions, "histories": read, "samples": rows}


def table_files(workspace: Workspace) -> dict[str, FileEntry]:
    """Files of the prepared tables, by path such as users/00000012.parquet, with their digests: the inputs of a shard
    that reads some of them.
    """
    cards = Artifact(workspace, TABLES).cards("item", "user")
    return {path: entry for card in cards.values() for path, entry in card.files.items()}


# ---------------------------------------------------------------------------------------------------------- preparation


# Runs a stage over shards of these inputs. The caller decides how; it receives a name for the progress bar and the
# approximate number of rows.
Make = Callable[[Stage, Mapping[Shard, str], str, int], dict[str, Card]]


@dataclass
class Preparation:
    """Prepares one source for one workspace."""

    workspace: Workspace
    source: Fragments
    split: SplitConfig
    labels: Labels
    shard_rows: int  # approximate users or items per shard, if the workspace has no number of shards yet

    @property
    def rows(self) -> int:
        """Approximate number of interactions."""
        return sum(fragment.rows for fragment in self.source.fragments if fragment.table in ("interactions", ""))

    @property
    def made_of(self) -> str:
        """Digest of everything that the tables depend on."""
        digests = sorted(fragment.digest for fragment in self.source.fragments)
        return fingerprint(self.source.meaning, digests, self.source.drop_orphans, self.split, self.labels)

    @property
    def whole(self) -> bool:
        """Whether every shard of the tables exists as it was written."""
        expected = self.workspace.n_shards("item") + len(USER_TABLES) * self.workspace.n_shards("user")
        return len(table_files(self.workspace)) == expected

    def run(self, make: Make, before_writing: Callable[[], None]) -> tuple[dict[str, int], str]:
        """Makes the tables; returns counts and a fingerprint of their content.

        before_writing: called when nothing can be refused any more. Raises SourceError or SchemaError with file and
        row if the source breaks the contract.
        """
        if self.split.method == "column" and SPLIT not in self.source.outcomes:
            raise SchemaError(
                f"{self.source.names['interactions']}: split.method is column, but the interactions have no "
                f"column '{SPLIT}'. Map one under source.columns.interactions, or use another method."
            )
        self._make = make
        folder = self._folder
        grouping = grouped(self.source.fragments, read_grouping(self.workspace, folder))
        self.workspace.write_bytes(f"{folder}/groups.json", grouping.model_dump_json().encode())
        groups = self._ingest(folder, grouping)
        tasks = self._tasks(groups)
        shuffle, counts, cards = self._shuffle(groups, tasks)
        values = [
            SplitValues.from_table(self.workspace.map_arrow(f"{shuffle.folder}/{shuffled_file('split', task)}"))
            for task in range(len(tasks["user"]))
        ]
        thresholds = split_thresholds(values, self.split)
        counts |= split_counts(values, thresholds)
        refuse_empty(counts, self.split)
        refuse_one_label(counts, self.labels)
        before_writing()
        self.workspace.fix_shards({kind: tasks[kind].n_shards for kind in tasks})
        for split, drawn in self._write(shuffle, (int(thresholds[0]), int(thresholds[1])), cards).items():
            counts[f"samples_{split}"] += drawn
        if not self.source.drop_orphans:
            counts.pop("orphans_dropped")
        files = table_files(self.workspace)
        return counts | dict(self.source.counts), fingerprint({path: entry.sha256 for path, entry in files.items()})

    @property
    def _folder(self) -> str:
        return f"ingest/{fingerprint(self.source.meaning, self.labels)[:16]}"

    def _ingest(self, folder: str, grouping: Grouping) -> dict[TableName, Groups]:
        inputs = grouping.inputs()
        cards = self._make(Ingest(self.source, folder, grouping, self.labels), inputs, "reading the source", self.rows)
        groups: dict[TableName, Groups] = {}
        for table in TABLE_NAMES:
            numbers = [shard.number for shard in inputs if table in cards[shard.name].counts]
            rows = sum(int(cards[shard.name].counts.get(table, 0)) for shard in inputs)
            if rows == 0 and (table != "users" or self.source.has_users):
                raise no_rows(self.source.names[table])
            groups[table] = Groups(self.source, folder, grouping, table, numbers, rows)
        return groups

    def _tasks(self, groups: Mapping[TableName, Groups]) -> dict[Kind, Tasks]:
        """Distribution of shards: numbers are the workspace's, or follow from the rows if it is new."""
        users = (
            groups["users"].rows if self.source.has_users else _estimated_users(self.workspace, groups["interactions"])
        )
        fixed, per_shard = self.workspace.layout.shards, self.shard_rows
        grouping = groups["items"].grouping
        return {
            "item": Tasks(
                "item", grouping.item_buckets, fixed.get("item") or shards_for(groups["items"].rows, per_shard)
            ),
            "user": Tasks("user", grouping.user_buckets, fixed.get("user") or shards_for(users, per_shard)),
        }

    def _shuffle(
        self, groups: Mapping[TableName, Groups], tasks: Mapping[Kind, Tasks]
    ) -> tuple[Shuffle, dict[str, int], dict[str, Card]]:
        """The stage, its counts and its cards."""
        folder = f"shuffled/{fingerprint(self.made_of, list(tasks.values()))[:16]}"
        stage = Shuffle(folder, groups, tasks, self.split, self.labels, self.source.drop_orphans, self.source.names)
        cards: dict[str, Card] = {}
        kinds: dict[Kind, str] = {"item": "checking items", "user": "shuffling rows by user"}
        for kind, about in kinds.items():
            inputs = {Shard(kind, task): folder for task in range(len(tasks[kind]))}
            cards |= self._make(stage, inputs, about, groups["items"].rows if kind == "item" else self.rows)
        counts: dict[str, int] = {}
        for card in cards.values():
            for name, count in card.counts.items():
                counts[name] = counts.get(name, 0) + int(count)
        if counts["interactions"] == 0:
            raise no_rows(self.source.names["interactions"])
        return stage, counts, cards

    def _write(self, shuffle: Shuffle, thresholds: tuple[int, int], cards: Mapping[str, Card]) -> dict[str, int]:
        """Writes the tables; returns the number of sampled negatives by split."""
        stage = WriteTables(shuffle.folder, shuffle.tasks, self.split, shuffle.labels, thresholds)
        settings = (stage.split, stage.thresholds, stage.tasks, stage.labels)
        files = {name: {path: entry.sha256 for path, entry in card.files.items()} for name, card in cards.items()}
        # Sampled negatives depend on the existing items.
        catalog = [read for name, read in files.items() if name.startswith("item/")] if stage.labels.negatives else None
        inputs = {Shard.from_name(name): fingerprint(read, *settings, catalog) for name, read in files.items()}
        artifact = Artifact(self.workspace, TABLES)
        for name in set(artifact.cards()) - {shard.name for shard in inputs}:
            artifact.forget(Shard.from_name(name))  # from a run with more tasks
        written = self._make(stage, inputs, "writing tables", self.rows).values()
        return {split: sum(int(card.counts.get(f"drawn_{split}", 0)) for card in written) for split in SPLITS}

    def tidy(self) -> None:
        """Removes data that only an unfinished run would read again: shuffled rows and outdated groups."""
        self.workspace.delete_dir("shuffled")
        for name in self.workspace.names("ingest"):
            if f"ingest/{name}" != self._folder:
                self.workspace.delete_dir("ingest", name)
        grouping = read_grouping(self.workspace, self._folder)
        current = {shard_file(number, ".arrow") for number in grouping.groups} if grouping else set()
        for table in TABLE_NAMES:
            for name in set(self.workspace.names(self._folder, table)) - current:
                self.workspace.delete_file(f"{self._folder}/{table}/{name}")


def _estimated_users(workspace: Workspace, groups: Groups) -> int:
    """Estimate from one bucket, which is a sample of the users by their hash; exact if there is only one."""
    batches = [read_batches(workspace, path, [0], groups.n_buckets)[0] for path in groups.paths]
    return len(pa.concat_tables(batches)["user_id"].unique()) * groups.n_buckets
