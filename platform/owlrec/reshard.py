"""Doubles the number of shards: splits every shard's file in two by the next bit of the hash, without LLM calls.

The runner first writes both halves of every shard to a temporary folder, while readers continue. Then they are moved
into place, file by file; workspace.json gets the new numbers last. A plan in the workspace records the work, so a
killed run resumes, whether it was still writing or already replacing.
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
# Folders with shards of users, items or cohorts. Releases and ingested fragments have other numbers; the
# state of refreshes, except for changed items, is split when it is read.
_ROOTS = ("tables", "cohorts", "knowledge", "vectors", "soft-labels", ITEM_UPDATES)
_DEPTH = 3
_SLASH = "--"  # replaces slashes in the runner's kinds, which are folder names
_KIND_OF: dict[str, Kind] = {"prompts": "cohort"}  # for artifacts whose shards are not named by their kind


class ReshardPlan(BaseModel):
    """reshard/plan.json: the work of a reshard."""

    shards: dict[Kind, int]  # old numbers
    work: list[str]  # names of the runner's shards: an artifact's folder, then one of its own shards

    @property
    def id(self) -> str:
        """Digest of the inputs of all its work."""
        return fingerprint(self)


def reshard(
    workspace: Workspace,
    kinds: Sequence[Kind] = (),
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> dict[Kind, int]:
    """Doubles the number of shards of some kinds (default: all); returns the new numbers.

    Raises WorkspaceError if nothing was prepared, another plan is unfinished, or `prepare` is running.
    """
    with claimed(workspace, "claims/prepare", "prepare or reshard"):
        plan = _unfinished(workspace, kinds) or _new_plan(workspace, kinds)
        new_counts: dict[Kind, int] = {kind: 2 * n for kind, n in plan.shards.items()}
        if any(workspace.n_shards(kind) != n for kind, n in new_counts.items()):  # otherwise only cleanup was left
            inputs = {Shard.from_name(name): plan.id for name in plan.work}
            run_stage(workspace, Split(plan.shards), inputs, pool, on_card)
            run_stage(workspace, Place(plan.shards), inputs, pool, on_card)
            workspace.grow_shards(new_counts)
        workspace.delete_file(f"{_FOLDER}/plan.json")  # before the files it names; leftovers are harmless
        workspace.delete_dir(_FOLDER)
        return new_counts


def _unfinished(workspace: Workspace, kinds: Sequence[Kind]) -> ReshardPlan | None:
    path = f"{_FOLDER}/plan.json"
    if workspace.entry(path) is None:
        workspace.delete_dir(_FOLDER)
        return None
    plan = ReshardPlan.model_validate(workspace.read_json(path))
    if kinds and set(kinds) != set(plan.shards):
        raise WorkspaceError(
            f"{workspace.path(path)}: a reshard of {', '.join(plan.shards)} is unfinished. Run it again first."
        )
    return plan


def _new_plan(workspace: Workspace, kinds: Sequence[Kind]) -> ReshardPlan:
    fixed = workspace.layout.shards
    chosen = {kind: workspace.n_shards(kind) for kind in kinds or [kind for kind in KINDS if kind in fixed]}
    if not chosen:
        workspace.n_shards("user")  # raises if nothing was prepared
    names = []
    for root in _ROOTS:
        for folder in _artifacts(workspace, root, _DEPTH):
            shards = [Shard.from_name(name) for name in Artifact(workspace, folder).cards()]
            flat = folder.replace("/", _SLASH)
            names += [f"{flat}{_SLASH}{shard.name}" for shard in shards if _kind(shard.kind) in chosen]
    plan = ReshardPlan(shards=chosen, work=names)
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
    """Kind of the ids in an artifact's shards, such as user for knowledge-user."""
    return _KIND_OF.get(name, name.rpartition("-")[2])


def _of(shard: Shard) -> tuple[str, Shard]:
    """The artifact's folder and its own shard, from the runner's shard."""
    folder, _, kind = shard.kind.rpartition(_SLASH)
    return folder.replace(_SLASH, "/"), Shard(kind, shard.number)


@dataclass
class Split(Stage):
    """Writes both halves of a card's files to the temporary folder."""

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
            raise WorkspaceError(
                f"{work.workspace.path(folder)}: shard {shard.name} has changed since the reshard started. Run it "
                "again."
            )
        # Kept with the halves: once they are in place, the artifact's own card is no longer valid.
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
    """Samples whose histories point to the same interactions in one half."""
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
    """Moves both halves to their final place and writes their cards."""

    shards: dict[Kind, int]

    name = "place"
    folder = f"{_FOLDER}/place"

    def run(self, work: Work) -> Result:
        """See Stage."""
        workspace, (folder, shard) = work.workspace, _of(work.shard)
        split = Artifact(workspace, Split.folder).card(work.shard)
        if split is None:
            raise WorkspaceError(
                f"{workspace.path(_FOLDER)} is missing halves of {work.shard.name}. Restore the workspace."
            )
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
        if {number % n for number in numbers.values()} != {shard.number}:  # cards of several shards, as for tables
            files |= {path.removeprefix(f"{folder}/"): entry for path, entry in placed.items()}
            artifact.finish(before.model_copy(update={"files": files}))
            return Result({}, split.rows_in, split.rows_in)
        # The card of the upper half first: until the lower one's is written, everything can be repeated.
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
                "counts": before.counts if half == shard.number else {},  # only once, so that sums stay correct
            }
            artifact.finish(before.model_copy(update=update))
        return Result({}, split.rows_in, split.rows_in)
