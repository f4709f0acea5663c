"""Stage 2 of `prepare`: gathers, validates and sorts all rows of some users, or of some items.

A task is a bucket or, if there are fewer shards than buckets, the buckets of one shard. It reads its batch of
every ingested file and writes one file with one batch per shard. All remaining checks happen here, before the
first table is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.ids import Kind, shard_of
from owlrec.ordered import rows_of
from owlrec.runner import Result, Stage, Work
from owlrec.sources.ingest import Groups, read_batches, write_batches
from owlrec.sources.outcomes import Labels, answered
from owlrec.sources.raw import (
    Place,
    TableName,
    refuse_orphans,
    refuse_repeated_ids,
    refuse_repeated_interactions,
    with_raw_ids,
)
from owlrec.sources.splits import Behaviors, Samples, SplitConfig, SplitValues, Texts, sample_counts
from owlrec.workspace import Workspace, shard_file


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
