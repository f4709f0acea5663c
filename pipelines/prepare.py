"""Raw data to the tables that all later stages read, split in time, with an as_of for every user.

Three stages of the runner: `ingest` reads fragments of the source, `shuffle` brings the rows of each user together and
refuses what is wrong, `tables` writes. Only then is the earlier run's output touched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from owlrec.claims import claimed
from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.runner import Pool, Stage, run_stage
from owlrec.schema import Kind
from owlrec.shards import Artifact, Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages
from owlrec.sources.buckets import read_batches
from owlrec.sources.ingest import Grouping, Groups, Ingest, grouped, read_grouping, refuse_partly_rated
from owlrec.sources.prepared import FOLDER, USER_TABLES, WriteTables, table_files
from owlrec.sources.raw import TABLE_NAMES, Fragments, TableName, no_rows
from owlrec.sources.shuffle import Shuffle, Tasks, shuffled_file
from owlrec.sources.splits import (
    SPLITS,
    SplitValues,
    refuse_empty,
    refuse_one_label,
    split_counts,
    split_thresholds,
)
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file, shards_for
from pipelines.session import ray_session
from pipelines.stage import from_stage, main

HERE_ROWS = 3_000_000  # interactions of a source that is prepared in this process, in some ten seconds
_CLAIM = "claims/prepare"


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Reads the source, builds samples and histories, writes five tables.

    The card's fingerprint is of the tables' content. Raises SourceError or SchemaError, naming file and row, where the
    source breaks the contract: the tables of an earlier run stay then. Raises WorkspaceError where another `prepare`
    is at this workspace.
    """
    stage_header("prepare", f"{recipe.source.type} to tables")
    source = recipe.source.open()
    made_of = fingerprint(
        source.meaning,
        sorted(fragment.digest for fragment in source.fragments),
        source.drop_orphans,
        recipe.split,
        recipe.domain.positive_above,
    )
    done = finished_stage(workspace, "prepare")
    if done is not None and done.counts.get("made_of") == made_of and _whole(workspace):
        note("done already, nothing to do")
        return done
    with claimed(workspace, _CLAIM, "prepare"):
        return _Preparation(recipe, workspace, source, made_of).run()


def _whole(workspace: Workspace) -> bool:
    expected = workspace.n_shards("item") + len(USER_TABLES) * workspace.n_shards("user")
    return len(table_files(workspace)) == expected


@dataclass
class _Preparation:
    recipe: Recipe
    workspace: Workspace
    source: Fragments
    made_of: str

    def run(self) -> Card:
        """All three stages. See `run`."""
        watch = Stopwatch()
        folder = f"ingest/{fingerprint(self.source.meaning)[:16]}"
        grouping = grouped(self.source.fragments, read_grouping(self.workspace, folder))
        self.workspace.write_bytes(f"{folder}/groups.json", grouping.model_dump_json().encode())
        rows = sum(fragment.rows for fragment in self.source.fragments if fragment.table in ("interactions", ""))
        with self._pool(rows) as pool:
            groups = self._ingest(folder, grouping, pool)
            tasks = self._tasks(groups)
            shuffle, counts, cards = self._shuffle(groups, tasks, pool)
            values = [
                SplitValues.of_table(self.workspace.map_arrow(f"{shuffle.folder}/{shuffled_file('split', task)}"))
                for task in range(len(tasks["user"]))
            ]
            thresholds = split_thresholds(values, self.recipe.split)
            counts |= split_counts(values, thresholds)
            refuse_empty(counts, self.recipe.split)
            refuse_one_label(counts, self.recipe.domain.positive_above)
            self.workspace.fix_shards({kind: tasks[kind].n_shards for kind in tasks})
            self._write(shuffle, thresholds, cards, pool)
        counts |= self.source.counts
        if not self.source.drop_orphans:
            counts.pop("orphans_dropped")
        items, users = counts.pop("items"), counts.pop("all_users")
        note(f"{users:,} users, {items:,} items, {counts['interactions']:,} interactions")
        note(", ".join(f"{counts[f'samples_{s}']:,} {s} samples" for s in SPLITS))
        files = table_files(self.workspace)
        card = finish_stage(
            self.workspace,
            "prepare",
            fingerprint({path: entry.sha256 for path, entry in files.items()}),
            counts={"items": items, **counts, "made_of": self.made_of},
            outputs={name: f"{FOLDER}/{name}" for name in ("items", *USER_TABLES)},
            seconds=watch.seconds,
        )
        self._tidy(folder, grouping)
        return card

    def _ingest(self, folder: str, grouping: Grouping, pool: Pool) -> dict[TableName, Groups]:
        inputs = grouping.inputs()
        cards = self._stage(Ingest(self.source, folder, grouping), inputs, pool, "reading the source")
        refuse_partly_rated(grouping, cards)
        groups: dict[TableName, Groups] = {}
        for table in TABLE_NAMES:
            numbers = [shard.number for shard in inputs if table in cards[shard.name].counts]
            rows = sum(int(cards[shard.name].counts.get(table, 0)) for shard in inputs)
            if rows == 0 and (table != "users" or self.source.has_users):
                raise no_rows(self.source.names[table])
            groups[table] = Groups(self.source, folder, grouping, table, numbers, rows)
        return groups

    def _tasks(self, groups: Mapping[TableName, Groups]) -> dict[Kind, Tasks]:
        """How shards are made: their numbers are those of the workspace, or follow from the rows where it is new."""
        users = groups["users"].rows if self.source.has_users else self._estimated_users(groups["interactions"])
        fixed, per_shard = self.workspace.layout.shards, self.recipe.shard_rows
        grouping = groups["items"].grouping
        return {
            "item": Tasks(
                "item", grouping.item_buckets, fixed.get("item") or shards_for(groups["items"].rows, per_shard)
            ),
            "user": Tasks("user", grouping.user_buckets, fixed.get("user") or shards_for(users, per_shard)),
        }

    def _estimated_users(self, groups: Groups) -> int:
        """From one bucket, which is a sample of the users by their hash; all of them where there is but one."""
        batches = [read_batches(self.workspace, path, [0], groups.n_buckets)[0] for path in groups.paths]
        return len(pa.concat_tables(batches)["user_id"].unique()) * groups.n_buckets

    def _shuffle(
        self, groups: Mapping[TableName, Groups], tasks: Mapping[Kind, Tasks], pool: Pool
    ) -> tuple[Shuffle, dict[str, int], dict[str, Card]]:
        """The stage, its counts and its cards."""
        split, positive_above = self.recipe.split, self.recipe.domain.positive_above
        folder = f"shuffled/{fingerprint(self.made_of, list(tasks.values()))[:16]}"
        stage = Shuffle(folder, groups, tasks, split, positive_above, self.source.drop_orphans, self.source.names)
        cards: dict[str, Card] = {}
        kinds: dict[Kind, str] = {"item": "checking items", "user": "bringing users together"}
        for kind, about in kinds.items():
            inputs = {Shard(kind, task): folder for task in range(len(tasks[kind]))}
            few = kind == "item" and groups["items"].rows <= HERE_ROWS
            cards |= self._stage(stage, inputs, Pool() if few else pool, about)
        counts: dict[str, int] = {}
        for card in cards.values():
            for name, count in card.counts.items():
                counts[name] = counts.get(name, 0) + int(count)
        if counts["interactions"] == 0:
            raise no_rows(self.source.names["interactions"])
        return stage, counts, cards

    def _write(self, shuffle: Shuffle, thresholds: np.ndarray, cards: Mapping[str, Card], pool: Pool) -> None:
        stage = WriteTables(
            shuffle.folder, shuffle.tasks, self.recipe.split, shuffle.positive_above, tuple(thresholds.tolist())
        )
        inputs = {
            Shard.of_name(name): fingerprint(
                {path: entry.sha256 for path, entry in card.files.items()}, stage.split, stage.thresholds, stage.tasks
            )
            for name, card in cards.items()
        }
        forget_stages(self.workspace, from_stage("prepare"))
        artifact = Artifact(self.workspace, FOLDER)
        for name in set(artifact.cards()) - {shard.name for shard in inputs}:
            artifact.forget(Shard.of_name(name))  # of a time when there were more tasks
        self._stage(stage, inputs, pool, "writing tables")

    def _stage(self, stage: Stage, inputs: Mapping[Shard, str], pool: Pool, about: str) -> dict[str, Card]:
        with nullcontext(None) if pool.here else progress(about, None) as advance:
            return run_stage(
                self.workspace,
                stage,
                inputs,
                pool,
                on_card=(lambda card: advance(card.rows_in)) if advance else None,
            )

    @contextmanager
    def _pool(self, rows: int) -> Iterator[Pool]:
        if rows <= HERE_ROWS:
            yield Pool()
            return
        log = str(self.workspace.log_path("prepare"))
        with ray_session(self.recipe.ray, self.workspace.log_path("ray")):
            yield Pool(here=False, max_workers=1 << 10, log_path=log)

    def _tidy(self, folder: str, grouping: Grouping) -> None:
        """Removes what only an unfinished run would read again: shuffled rows, and fragments that are no longer so."""
        self.workspace.delete_dir("shuffled")
        for name in self.workspace.names("ingest"):
            if name != folder.rpartition("/")[2]:
                self.workspace.delete_dir("ingest", name)
        for table in TABLE_NAMES:
            current = {shard_file(number, ".arrow") for number in grouping.groups}
            for name in set(self.workspace.names(folder, table)) - current:
                self.workspace.delete_file(f"{folder}/{table}/{name}")


if __name__ == "__main__":
    main(run, __doc__ or "")
