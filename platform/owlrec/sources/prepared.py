"""Stage 3 of `prepare`: the tables that all later stages read, shard by shard, every file ascending by id."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.runner import Result, Stage, Work
from owlrec.schema import Kind
from owlrec.shards import Artifact, in_threads
from owlrec.sources.outcomes import Labels
from owlrec.sources.shuffle import Tasks, read_shuffled, shuffled_items
from owlrec.sources.splits import Behaviors, Samples, SplitConfig, Texts, for_histories, histories, sample_rows
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
    labels: Labels
    thresholds: tuple[int, int]

    name = "tables"
    folder = FOLDER
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
                of_zero = tables["samples"].filter(pc.equal(tables["samples"]["label"], 0))
                drawn.update({n["values"]: n["counts"] for n in pc.value_counts(of_zero["split"]).to_pylist()})
            files = {f"{name}/{shard_file(number)}": table for name, table in tables.items()}
            entries = {path: workspace.write_parquet(f"{FOLDER}/{path}", table) for path, table in files.items()}
            return entries, drawn

        catalog = self._items(workspace) if self.labels.negatives else np.zeros(0, dtype=np.int64)
        work.check()
        # In threads: each file waits for its disk or its store.
        written = in_threads(write, list(zip(tasks.shards(work.shard.number), *shuffled, strict=True)))
        rows = sum(table.num_rows for table in shuffled[0])
        drawn = sum((of_shard for _, of_shard in written), Counter[str]())
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
    """The files of the prepared tables, by path such as users/00000012.parquet, with their digests: what a shard that
    reads some of them is made from.
    """
    cards = Artifact(workspace, FOLDER).cards("item", "user")
    return {path: entry for card in cards.values() for path, entry in card.files.items()}
