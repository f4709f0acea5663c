"""Stage 3 of `prepare`: the tables that all later stages read, shard by shard, every file ascending by id."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.runner import Result, Stage, Work
from owlrec.schema import Kind
from owlrec.shards import Artifact, in_threads
from owlrec.sources.shuffle import Tasks, behaviors_of, read_shuffled
from owlrec.sources.splits import Samples, SplitConfig, histories, refuse_leaks, sample_rows
from owlrec.storage import FileEntry
from owlrec.workspace import Workspace, shard_file

FOLDER = "tables"
USER_TABLES = ("users", "interactions", "histories", "samples")


@dataclass
class WriteTables(Stage):
    """Writes the shards of a task."""

    shuffled: str  # the folder of stage 2
    tasks: Mapping[Kind, Tasks]
    split: SplitConfig
    positive_above: float
    thresholds: tuple[int, int]

    name = "tables"
    folder = FOLDER

    def run(self, work: Work) -> Result:
        """See Stage."""
        kind, workspace = work.shard.kind, work.workspace
        tasks = self.tasks[kind]  # type: ignore[index]
        names = ("users", "interactions") if kind == "user" else ("items",)
        shuffled = [read_shuffled(workspace, self.shuffled, name, tasks, work.shard.number) for name in names]

        def write(shard: tuple[Any, ...]) -> dict[str, FileEntry]:
            number, *rows = shard
            tables = self._user_tables(*rows) if kind == "user" else {"items": rows[0]}
            files = {f"{name}/{shard_file(number)}": table for name, table in tables.items()}
            return {path: workspace.write_parquet(f"{FOLDER}/{path}", table) for path, table in files.items()}

        work.check()
        # In threads: each file waits for its disk or its store.
        written = in_threads(write, list(zip(tasks.shards(work.shard.number), *shuffled, strict=True)))
        rows = sum(table.num_rows for table in shuffled[0])
        return Result({path: entry for files in written for path, entry in files.items()}, rows, rows)

    def _user_tables(self, users: pa.Table, interactions: pa.Table) -> dict[str, pa.Table]:
        behaviors = behaviors_of(interactions)
        samples = Samples.of(behaviors, self.split, self.positive_above)
        rows = sample_rows(behaviors, samples, self.split, np.array(self.thresholds))
        read = histories(behaviors, samples)
        refuse_leaks(rows, read)
        return {"users": users, "interactions": interactions, "histories": read, "samples": rows}


def table_files(workspace: Workspace) -> dict[str, FileEntry]:
    """The files of the prepared tables, by path such as users/00000012.parquet, with their digests: what a shard that
    reads some of them is made from.
    """
    cards = Artifact(workspace, FOLDER).cards("item", "user")
    return {path: entry for card in cards.values() for path, entry in card.files.items()}
