"""The three stages of `prepare`: `ingest` reads fragments of the source, `shuffle` groups the rows of each user
and refuses invalid data, `tables` writes. Only then is the earlier run's output changed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.errors import SchemaError
from owlrec.ids import Kind
from owlrec.runner import Result, Stage, Work
from owlrec.shards import Artifact, Card, Shard, in_threads
from owlrec.sources.ingest import Grouping, Groups, Ingest, grouped, read_batches, read_grouping
from owlrec.sources.outcomes import SPLIT, Labels
from owlrec.sources.raw import TABLE_NAMES, Fragments, TableName, no_rows
from owlrec.sources.shuffle import Shuffle, Tasks, read_shuffled, shuffled_file, shuffled_items
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
    sample_rows,
    split_counts,
    split_thresholds,
)
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import Workspace, shard_file, shards_for

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
        rows = sample_rows(behaviors, samples, self.split, np.array(self.thresholds), self.labels, catalog)
        read = histories(behaviors, Texts.of(behaviors, self.split))
        interactions = for_histories(interactions, self.split)
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
