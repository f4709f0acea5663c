"""Stage 3 of `prepare`: the tables that all later stages read, shard by shard, every file ascending by id."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from owlrec.runner import Result, Stage, Work
from owlrec.schema import Kind
from owlrec.shards import Artifact
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
        task = work.shard.number
        files: dict[str, FileEntry] = {}
        rows = 0
        work.check()
        for place, shard in enumerate(self.tasks[work.shard.kind].shards(task)):  # type: ignore[index]
            tables = (self._user_tables if work.shard.kind == "user" else self._items)(work, task, place)
            for name, table in tables.items():
                path = f"{name}/{shard_file(shard)}"
                files[path] = work.workspace.write_parquet(f"{FOLDER}/{path}", table)
            rows += len(next(iter(tables.values())))
        return Result(files, rows, rows)

    def _items(self, work: Work, task: int, place: int) -> dict:
        return {"items": read_shuffled(work.workspace, self.shuffled, "items", task, place)}

    def _user_tables(self, work: Work, task: int, place: int) -> dict:
        users, interactions = (
            read_shuffled(work.workspace, self.shuffled, name, task, place) for name in ("users", "interactions")
        )
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
