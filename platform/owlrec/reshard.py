"""Twice as many shards: every file of a shard is split in two by the next bit of the hash. No model is asked.

Both halves of every shard are first written aside, by the runner, while readers go on. Then they are put in place,
file by file; workspace.json says the new numbers last. A plan in the workspace says what is being done, so that a run
that was killed goes on where it was, whether it was still writing or already replacing.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec.errors import WorkspaceError
from owlrec.ids import KINDS, Kind, shard_of
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.shards import Artifact, Card, Shard, claimed, in_threads
from owlrec.sources.splits import in_histories
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, shard_file

_FOLDER = "reshard"
_NUMBERED = re.compile(r"(.*)/(\d{8,})(\.parquet|\.arrow)")
# Where artifacts with shards of users, items or cohorts lie. Releases and ingested fragments have other numbers; the
# state of refreshes, but for the items that they changed, is split as it is read.
_ROOTS = ("tables", "cohorts", "knowledge", "vectors", "soft-labels", ITEM_UPDATES)
_DEPTH = 3
_SLASH = "--"  # in the runner's kinds, which are names of folders
_KIND_OF: dict[str, Kind] = {"prompts": "cohort"}  # where an artifact's shards are not named by their kind


class Plan(BaseModel):
    """reshard/plan.json: what is being done."""

    shards: dict[Kind, int]  # how many there were
    work: list[str]  # names of the runner's shards: an artifact's folder, then one of its own shards

    @property
    def id(self) -> str:
        """The digest that all of its work is made from."""
        return fingerprint(self)


def reshard(
    workspace: Workspace,
    kinds: Sequence[Kind] = (),
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> dict[Kind, int]:
    """Doubles the number of shards of some kinds (default: all); returns the new numbers.

    Raises WorkspaceError where nothing was prepared, another plan is unfinished, or `prepare` is running.
    """
    with claimed(workspace, "claims/prepare", "prepare or reshard"):
        plan = _unfinished(workspace, kinds) or _new_plan(workspace, kinds)
        doubled: dict[Kind, int] = {kind: 2 * n for kind, n in plan.shards.items()}
        if any(workspace.n_shards(kind) != n for kind, n in doubled.items()):  # else only tidying was left to do
            inputs = {Shard.of_name(name): plan.id for name in plan.work}
            run_stage(workspace, Split(plan.shards), inputs, pool, on_card)
            run_stage(workspace, Place(plan.shards), inputs, pool, on_card)
            workspace.grow_shards(doubled)
        workspace.delete_file(f"{_FOLDER}/plan.json")  # before what it speaks of: what is left is in nobody's way
        workspace.delete_dir(_FOLDER)
        return doubled


def _unfinished(workspace: Workspace, kinds: Sequence[Kind]) -> Plan | None:
    path = f"{_FOLDER}/plan.json"
    if workspace.entry(path) is None:
        workspace.delete_dir(_FOLDER)
        return None
    plan = Plan.model_validate(workspace.read_json(path))
    if kinds and set(kinds) != set(plan.shards):
        raise WorkspaceError(
            f"{workspace.path(path)}: a reshard of {', '.join(plan.shards)} is not finished. Run it again first."
        )
    return plan


def _new_plan(workspace: Workspace, kinds: Sequence[Kind]) -> Plan:
    fixed = workspace.layout.shards
    chosen = {kind: workspace.n_shards(kind) for kind in kinds or [kind for kind in KINDS if kind in fixed]}
    if not chosen:
        workspace.n_shards("user")  # says that nothing was prepared
    names = []
    for root in _ROOTS:
        for folder in _artifacts(workspace, root, _DEPTH):
            shards = [Shard.of_name(name) for name in Artifact(workspace, folder).cards()]
            flat = folder.replace("/", _SLASH)
            names += [f"{flat}{_SLASH}{shard.name}" for shard in shards if _kind(shard.kind) in chosen]
    plan = Plan(shards=chosen, work=names)
    workspace.write_json(f"{_FOLDER}/plan.json", plan.model_dump())
    return plan


def _artifacts(workspace: Workspace, folder: str, depth: int) -> Iterator[str]:
    names = workspace.names(folder)
    if "cards" in names:
        yield folder
    elif depth:
        for name in names:
            if "." not in name:
                yield from _artifacts(workspace, f"{folder}/{name}", depth - 1)


def _kind(name: str) -> str:
    """The kind of the ids in an artifact's shards, such as user of knowledge-user."""
    return _KIND_OF.get(name, name.rpartition("-")[2])


def _of(shard: Shard) -> tuple[str, Shard]:
    """The artifact's folder and its own shard, of a shard of the runner's."""
    folder, _, kind = shard.kind.rpartition(_SLASH)
    return folder.replace(_SLASH, "/"), Shard(kind, shard.number)


@dataclass
class Split(Stage):
    """Writes both halves of a card's files aside."""

    shards: dict[Kind, int]

    name = "split"
    folder = f"{_FOLDER}/split"

    def run(self, work: Work) -> Result:
        """See Stage."""
        folder, shard = _of(work.shard)
        kind = _kind(shard.kind)
        n = self.shards[kind]  # type: ignore[index]
        files: dict[str, FileEntry] = {}
        rows: dict[str, int] = {}
        card = Artifact(work.workspace, folder).card(shard)
        if card is None:
            raise WorkspaceError(f"{work.workspace.path(folder)}: shard {shard.name} has changed since. Run it again.")
        # Kept beside the halves: once they are put in place, the artifact's own card no longer holds.
        path = work.shard.file(".json")
        files[path] = work.workspace.write_bytes(f"{self.folder}/{path}", card.model_dump_json().encode())
        for path in card.files:
            if match := _NUMBERED.fullmatch(path):
                name, number, suffix = match[1], int(match[2]), match[3]
                table = _read(work.workspace, f"{folder}/{path}")
                key = "id" if "id" in table.column_names else f"{kind}_id"
                high = shard_of(table[key].to_numpy(), 2 * n) != number
                for half, kept in ((number, ~high), (number + n, high)):
                    part = table.filter(pa.array(kept))
                    if name == "samples":
                        part = _moved(work.workspace, number, part, half, 2 * n)
                    target = f"{folder}/{name}/{shard_file(half, suffix)}"
                    files[target] = _write(work.workspace, f"{self.folder}/{target}", part)
                    rows[target] = part.num_rows
        return Result(files, sum(rows.values()), sum(rows.values()), counts=rows)


def _moved(workspace: Workspace, number: int, samples: pa.Table, half: int, n_shards: int) -> pa.Table:
    """Samples whose histories stand where they do among the interactions of one half."""
    users = in_histories(workspace, number, ["user_id"])["user_id"].to_numpy()
    before = np.r_[0, np.cumsum(shard_of(users, n_shards) == half)].astype(np.int32)
    for column in ("history_start", "history_end"):
        place = samples.column_names.index(column)
        samples = samples.set_column(place, column, pa.array(before[samples[column].to_numpy()]))
    return samples


def _read(workspace: Workspace, path: str) -> pa.Table:
    return workspace.map_arrow(path) if path.endswith(".arrow") else workspace.read_parquet(path)


def _write(workspace: Workspace, path: str, table: pa.Table) -> FileEntry:
    if path.endswith(".arrow"):
        return workspace.write_arrow(path, table, table.schema)
    return workspace.write_parquet(path, table)


@dataclass
class Place(Stage):
    """Puts both halves where readers look for them, and writes their cards."""

    shards: dict[Kind, int]

    name = "place"
    folder = f"{_FOLDER}/place"

    def run(self, work: Work) -> Result:
        """See Stage."""
        workspace, (folder, shard) = work.workspace, _of(work.shard)
        split = Artifact(workspace, Split.folder).card(work.shard)
        if split is None:
            raise WorkspaceError(f"{workspace.path(_FOLDER)} lacks halves of {work.shard.name}. Restore the workspace.")
        work.check()
        n = self.shards[_kind(shard.kind)]  # type: ignore[index]
        own_card = work.shard.file(".json")
        before = Card.model_validate(workspace.read_json(f"{Split.folder}/{own_card}"))
        numbers = {path: int(Path(path).stem) for path in split.files if path != own_card}

        def put(path: str) -> FileEntry:
            return workspace.write_bytes(path, workspace.read_bytes(f"{Split.folder}/{path}"))

        placed = dict(zip(numbers, in_threads(put, list(numbers)), strict=True))
        artifact = Artifact(workspace, folder)
        files = {path: entry for path, entry in before.files.items() if not _NUMBERED.fullmatch(path)}
        if {number % n for number in numbers.values()} != {shard.number}:  # of several shards, as those of tables are
            files |= {path.removeprefix(f"{folder}/"): entry for path, entry in placed.items()}
            artifact.finish(before.model_copy(update={"files": files}))
            return Result({}, split.rows_in, split.rows_in)
        # The card of the upper half first: until the lower one's is written, all of it can be done again.
        for half, kept in ((shard.number + n, {}), (shard.number, files)):
            own = {path.removeprefix(f"{folder}/"): path for path, number in numbers.items() if number == half}
            rows = {name: int(split.counts[path]) for name, path in own.items()}
            dead = sum(count for name, count in rows.items() if name.startswith("dead/"))
            out = next((count for name, count in rows.items() if not name.startswith("dead/")), 0)
            update = {
                "shard": Shard(shard.kind, half).name,
                "files": kept | {name: placed[path] for name, path in own.items()},
                "rows_in": out + dead,
                "rows_out": out,
                "rows_dead": dead,
                "counts": before.counts if half == shard.number else {},  # once, so that sums stay
            }
            artifact.finish(before.model_copy(update=update))
        return Result({}, split.rows_in, split.rows_in)
