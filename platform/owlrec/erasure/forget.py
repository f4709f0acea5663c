"""Forgets users: writes tombstones, which hide them at once, then erases their data from each place.

    forgotten/<run>/tombstones.bin    see owlrec.workspace
    forgotten/<run>/plan.json         the files to read, in chunks
    forgotten/<run>/cards/            finished chunks and their numbers of removed rows
    forgotten/<run>/cohorts.json      cohorts whose texts depend on these users alone
    forgotten/<run>/releases.json     releases that contained the users
    forgotten/<run>/copies.json       files that nodes must remove from their caches (erasure.copies)
    forgotten/<run>/report.json       written last; contains no ids

A killed run continues when it is repeated with the same users: every step finds its finished work. Run it while no
stage is running: a stage that started before the tombstones were written may write a user's rows again. Repeating the
command then finds and removes those, too.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from owlrec.erasure.erased_rows import (
    Rewritten,
    Users,
    erase,
    erase_cohorts,
    erase_lines,
    hide_values,
    is_users_file,
    quoting_cohorts,
    update_cards,
)
from owlrec.errors import WorkspaceError
from owlrec.ids import shard_of, stable_id
from owlrec.machine import NodeCache
from owlrec.refresh.state import CLAIM
from owlrec.refresh.state import REFRESH_FOLDER as REFRESH
from owlrec.releases.redis import RedisReleases, forget_in_redis, push_tombstones
from owlrec.releases.release import current_release
from owlrec.releases.retention import find_rows, rebuild_without_forgotten, remove_releases
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.shards import Card, Shard, claimed, forget_stages
from owlrec.storage import FileEntry, Storage
from owlrec.workspace import TOMBSTONES, Workspace, write_tombstones

# --------------------------------------------------------------------------------------------------------------- places
# Places that may hold a user: files to read for their rows, and files to remove completely.
#
# Files sharded by user are read only if their number is that of a user's shard, now or before a reshard; only the ids
# of other tables are read. Files that cannot be read row by row are removed and rebuilt
# by the stage that wrote them: shuffled rows, inputs of cohorts, encoded samples, reports.


_NUMBERED = re.compile(r".*/(\d{8,})\.(?:parquet|arrow)")
_CHUNK = 16  # files per step; a killed run resumes after the last one
# Handled by other parts of the erasure, or without user data.
_NOT_HERE = ("releases", "forgotten", "claims", "stages")
_WHOLE = (  # what to remove, and the stage that rebuilds it
    (re.compile(r"shuffled/.*"), "shuffled rows", "prepare"),
    (re.compile(r"cohorts/[^/]+/user-[^/]*(vectors|groups|candidates|members|samples)/.*"), "cohort drafts", "cohorts"),
    (re.compile(r"ctr/[^/]+/samples/.*"), "encoded samples", "train_ctr"),
    (re.compile(r"reports/.*"), "reports", "evaluate"),
)
_OTHERS = re.compile(r".*/(?:items?|cohort|item-[^/]*|[^/]*-item|[^/]*-cohort|prompts)/\d{8,}\.(?:parquet|arrow)")
_LOGS = re.compile(r"logs/.*")


@dataclass(frozen=True)
class Removal:
    """Files to remove completely."""

    files: list[str]
    bytes: int
    again: str  # the stage that rebuilds them


def files_to_read(workspace: Workspace, paths: Iterable[str], users: Users) -> dict[str, list[list[str]]]:
    """A workspace's files that may have rows of the users, by the first folder of their path, in chunks."""
    numbers = shard_numbers(workspace, users)
    places: dict[str, list[str]] = {}
    known = set(paths)
    for path in sorted(known):
        place = path.partition("/")[0]
        if place in _NOT_HERE or any(pattern.fullmatch(path) for pattern, _, _ in _WHOLE):
            continue
        if path.startswith("tables/interactions/") and path.replace("interactions", "samples") in known:
            continue  # handled with its samples
        if path.startswith("tables/erasing/") or not _may_hold(path, numbers):
            continue
        places.setdefault(place, []).append(path)
    return {place: [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)] for place, files in places.items()}


def files_to_remove(workspace: Workspace, sizes: Mapping[str, int]) -> dict[str, Removal]:
    """Files to remove completely, by what they are. sizes: of all files by path."""
    removals: dict[str, Removal] = {}
    for pattern, about, stage in _WHOLE:
        files = [path for path in sizes if pattern.fullmatch(path)]
        if files:
            removals[about] = Removal(files, sum(sizes[path] for path in files), stage)
    return removals


def shard_numbers(workspace: Workspace, users: Users) -> set[int]:
    """Numbers of the users' shards, now or when there were fewer shards."""
    n, numbers = workspace.layout.shards.get("user", 1), set[int]()
    while n:
        numbers |= set(shard_of(users.ids, n).tolist())
        n //= 2
    return numbers


def _may_hold(path: str, numbers: set[int]) -> bool:
    if _LOGS.fullmatch(path):
        return True
    if not path.endswith((".parquet", ".arrow")) or _OTHERS.fullmatch(path):
        return False
    match = _NUMBERED.fullmatch(path)
    if match is None or path.startswith(("ingest/", "events/")):
        return True
    return not is_users_file(path) or int(match[1]) in numbers


# --------------------------------------------------------------------------------------------------------------- copies
# Copies of erased files in the caches of nodes.
#
# An erasure cannot reach another machine's disk. It writes the hashed names of the files that it replaced or removed,
# and each server's process evicts its own node's copies as soon as nobody has them open.


_FILE = "copies.json"


def write_copies(workspace: Workspace, run: str, paths: Iterable[str]) -> None:
    """Lists the files whose copies must be removed. run: the folder of the erasure."""
    workspace.write_json(f"{run}/{_FILE}", sorted({workspace.copy_name(path) for path in paths}))


class ErasedCopies:
    """Copies in a workspace that a node has yet to evict."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._done = workspace, set[str]()

    def evict(self) -> int:
        """Evicts the copies of new erasures; returns how many stay because they are open."""
        workspace, left = self._workspace, 0
        if workspace.local:
            return 0
        for run in set(workspace.names(TOMBSTONES)) - {"key"} - self._done:
            path = f"{TOMBSTONES}/{run}/{_FILE}"
            if workspace.entry(path) is None:
                continue
            held = NodeCache.default().evict(set(workspace.read_json(path)))[1]
            left += held
            if not held:
                self._done.add(run)
        return left


# ----------------------------------------------------------------------------------------------------------- forgetting


_NOTE = (
    "CTR models, the LLM ranker and cohorts have no parameters for single users. The models listed under "
    "`models` were trained on these users' rows; --drop-models deletes them, and the next run retrains them."
)


class ErasedPlace(BaseModel):
    """One line of the report."""

    place: str
    done: str  # rows removed, files removed, ...
    files: int = 0
    rows: int = 0
    bytes: int = 0
    again: str = ""  # the stage that rebuilds it


class Report(BaseModel):
    """Report of an erasure. Contains no ids."""

    users: int
    unknown: int  # users without any data
    finished: float = 0  # seconds since 1970
    places: list[ErasedPlace] = []
    models: list[str] = []  # folders of models trained on rows of these users
    note: str = _NOTE


def forget(
    workspace: Workspace,
    raw_ids: Iterable[str],
    *,
    redis: RedisReleases | None = None,
    drop_models: bool = False,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> Report:
    """Forgets users by their raw ids and returns a report. An unknown user is counted and stays excluded.

    redis: where releases were pushed to. pool: where files are read, by default in this process; on_card: see
    run_stage. Raises WorkspaceError if `prepare`, a refresh or another erasure is running, or a reshard is
    unfinished; PointerHeld if the current release contains a user and a HOLD keeps it. The users are hidden even then.
    """
    users = _users(raw_ids)
    run = write_tombstones(workspace, users.ids)
    if redis is not None:
        push_tombstones(workspace, redis)
    with claimed(workspace, "claims/prepare", "prepare, reshard or forget"), claimed(workspace, CLAIM, "refresh"):
        if workspace.exists("reshard", "plan.json"):
            raise WorkspaceError(f"{workspace.path('reshard')}: a reshard is unfinished. Run `owlrec reshard` first.")
        return _Erasure(workspace, users, run, redis, drop_models).carry_out(pool, on_card)


def _users(raw_ids: Iterable[str]) -> Users:
    raw = frozenset(raw_ids)
    return Users(np.unique(np.array([stable_id(name) for name in raw], dtype=np.int64)), raw)


class EraseRows(Stage):
    """Chunks of files from which the users' rows are removed."""

    name = "forget"

    def __init__(self, folder: str, chunks: Mapping[str, Sequence[Sequence[str]]], users: Users) -> None:
        """chunks: of each place's files."""
        self.folder, self.chunks, self.users = folder, chunks, users

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        done: list[Rewritten] = []
        for path in self.chunks[work.shard.kind][work.shard.number]:
            if work.workspace.entry(path) is not None:
                done += erase(work.workspace, path, self.users)
        lines = [{**asdict(r), "entry": r.entry.model_dump(), "places": sorted(r.places)} for r in done]
        rows = sum(r.rows for r in done)
        return Result({}, rows_in=rows, rows_dead=rows, counts={"rewritten": json.dumps(lines)})


class _Erasure:
    """One run of an erasure."""

    def __init__(
        self, workspace: Workspace, users: Users, run: str, redis: RedisReleases | None, drop_models: bool
    ) -> None:
        self.workspace, self.users, self.run = workspace, users, run
        self.redis, self.drop_models = redis, drop_models
        self.places: list[ErasedPlace] = []
        self.changed: list[str] = []  # replaced or removed files

    def carry_out(self, pool: Pool | None, on_card: Callable[[Card], None] | None) -> Report:
        workspace, trained = self.workspace, False
        if workspace.entry(f"{self.run}/report.json") is not None:  # from an earlier, finished run: check again
            trained = bool(workspace.read_json(f"{self.run}/report.json")["models"])
            for name in ("report.json", "plan.json", "cohorts.json", "releases.json", "copies.json"):
                workspace.delete_file(f"{self.run}/{name}")
            workspace.delete_dir(self.run, "cards")
        self._hide_values()
        rewritten = self._erase_rows(pool, on_card)
        listing = list(workspace.entries())
        update_cards(workspace, listing, rewritten, shard_numbers(workspace, self.users))
        _update_logs(workspace, rewritten)
        cohorts = self._erase_cohorts(listing)
        user_places = {place for r in rewritten for place in r.places} | self._erase_releases(cohorts, pool)
        if any(r.rows for r in rewritten if not r.path.startswith("logs/")) or user_places:
            self._remove_whole()
        self._erase_redis()
        self._erase_outside()
        trained |= any(r.path.startswith("tables/samples/") for r in rewritten)
        report = Report(
            users=len(self.users.ids),
            unknown=len(self.users.ids) - len(user_places),
            finished=time.time(),
            places=self.places,
            models=self._models() if trained else [],
        )
        workspace.write_json(f"{self.run}/report.json", report.model_dump())
        return report

    def _hide_values(self) -> None:
        files, values = hide_values(self.workspace, self.users)
        if files:
            self.places.append(ErasedPlace(place="ctr, models", done="profile values hidden", files=files, rows=values))

    def _erase_rows(self, pool: Pool | None, on_card: Callable[[Card], None] | None) -> list[Rewritten]:
        workspace, path = self.workspace, f"{self.run}/plan.json"
        if workspace.entry(path) is None:
            workspace.write_json(path, files_to_read(workspace, workspace.entries(), self.users))
        chunks: dict[str, list[list[str]]] = workspace.read_json(path)
        stage = EraseRows(self.run, chunks, self.users)
        inputs = {Shard(place, n): self.run for place, place_chunks in chunks.items() for n in range(len(place_chunks))}
        cards = run_stage(workspace, stage, inputs, pool, on_card)
        rewritten: list[Rewritten] = []
        for place in chunks:
            own = [
                _rewritten(line)
                for name, card in cards.items()
                if Shard.from_name(name).kind == place
                for line in json.loads(str(card.counts["rewritten"]))
            ]
            rewritten += own
            self.changed += [r.path for r in own]
            what = "lines removed" if place == "logs" else "rows removed"
            self._note(place, what, len(own), sum(r.rows for r in own), sum(r.bytes for r in own))
        return rewritten

    def _erase_cohorts(self, listing: Sequence[str]) -> list[int]:
        """Removes the users' traces from cohorts; returns the ids of the cohorts that lost their texts."""
        workspace, path = self.workspace, f"{self.run}/cohorts.json"
        if workspace.entry(path) is None:
            workspace.write_json(path, quoting_cohorts(workspace, self.users))
        cohorts: list[int] = workspace.read_json(path)
        done = erase_cohorts(workspace, cohorts, self.users, listing)
        update_cards(workspace, listing, done, set())
        self.changed += [r.path for r in done]
        size, again = sum(r.bytes for r in done), "cohorts" if cohorts else ""
        self._note("cohorts' texts", "profiles and texts rewritten", len(done), sum(r.rows for r in done), size, again)
        if cohorts:
            forget_stages(workspace, ["cohorts"])
        return cohorts

    def _erase_releases(self, cohorts: Sequence[int], pool: Pool | None) -> set[int]:
        """Removes the releases that contain the users; returns the places of the users found."""
        workspace, path = self.workspace, f"{self.run}/releases.json"
        current = current_release(workspace)
        if current is None:
            return set()
        # Checked again even if an interrupted run has done so: another release may have become current since.
        held = find_rows(workspace, "user", self.users.ids)
        others = find_rows(workspace, "cohort", np.array(cohorts, dtype=np.int64))
        plan: dict[str, Any] = {"releases": [], "rows": 0, "places": []}
        if workspace.entry(path) is not None:
            plan = workspace.read_json(path)
        plan["releases"] = sorted({*plan["releases"], *held.releases, *others.releases})
        plan["rows"] = max(plan["rows"], held.rows + others.rows)
        places = np.flatnonzero(np.isin(self.users.ids, list(held.ids))).tolist()
        plan["places"] = sorted({*plan["places"], *places})
        workspace.write_json(path, plan)
        if not plan["releases"]:
            return set()
        if current in plan["releases"]:
            name = rebuild_without_forgotten(workspace, cohorts, pool=pool).name
            self._note("releases", f"rebuilt as {name}", 1)
        files = {
            f"releases/{name}/{file}": entry
            for name in plan["releases"]
            for file, entry in workspace.entries("releases", name).items()
        }
        self.changed += files
        remove_releases(workspace, plan["releases"])
        self._note(
            "releases", f"removed {', '.join(plan['releases'])}", len(files), plan["rows"],
            sum(entry.bytes for entry in files.values()),
        )  # fmt: skip
        return set(plan["places"])

    def _remove_whole(self) -> None:
        workspace = self.workspace
        entries = workspace.entries()
        for about, removal in files_to_remove(workspace, {p: e.bytes for p, e in entries.items()}).items():
            for path in removal.files:
                workspace.delete_file(path)
            self.changed += removal.files
            self._note(about, "removed", len(removal.files), 0, removal.bytes, removal.again)
            if about == "reports":
                forget_stages(workspace, ["evaluate"])

    def _erase_redis(self) -> None:
        if self.redis is not None:
            self._note("redis", "rows removed", 0, forget_in_redis(self.redis, self.users.ids))

    def _erase_outside(self) -> None:
        """Removes data on this machine outside the workspace."""
        workspace = self.workspace
        if not workspace.local:
            logs = Storage(workspace.log_path("forget").parent)
            lines = [line for path in logs.entries() for line in erase_lines(logs, path, self.users)]
            self._note("logs of this machine", "lines removed", len(lines), sum(line.rows for line in lines))
            write_copies(workspace, self.run, self.changed)
            evicted, held = NodeCache.default().evict({workspace.copy_name(path) for path in self.changed})
            self._note("node cache", "copies removed", evicted)
            self._note("node cache", "copies that a process holds open", held)
        else:
            scratch = Path(workspace.path(".scratch"))
            files = [*_unfinished_files(workspace), *(scratch.iterdir() if scratch.is_dir() else ())]
            for file in files:
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            self._note("unfinished files", "removed", len(files))

    def _models(self) -> list[str]:
        """Folders of trained models; removed if the caller asks for it."""
        workspace = self.workspace
        made = (("ctr", "result.json"), ("models", "model.json"), ("ranking", "ranker.json"))
        folders = sorted(
            {
                f"{root}/{path.partition('/')[0]}"
                for root, card in made
                for path in workspace.entries(root)
                if path.endswith(f"/{card}")
            }
        )
        if self.drop_models and folders:
            for folder in folders:
                workspace.delete_dir(folder)
            forget_stages(workspace, ["train_ctr", "evaluate", "export_ctr", "tune_ranker"])
            self._note("models", "removed", len(folders), again="train_ctr")
        return folders

    def _note(self, place: str, done: str, files: int, rows: int = 0, size: int = 0, again: str = "") -> None:
        if files or rows:
            self.places.append(ErasedPlace(place=place, done=done, files=files, rows=rows, bytes=size, again=again))


def _rewritten(line: dict[str, Any]) -> Rewritten:
    return Rewritten(**{**line, "entry": FileEntry(**line["entry"]), "places": frozenset(line["places"])})


def _update_logs(workspace: Workspace, rewritten: Iterable[Rewritten]) -> None:
    """Records rewritten log files as already read by refreshes."""
    events = {r.path.removeprefix("events/"): r for r in rewritten if r.path.startswith("events/")}
    for name in workspace.names(REFRESH) if events else ():
        for path in (f"{REFRESH}/{name}/state.json", f"{REFRESH}/{name}/plan.json"):
            if workspace.entry(path) is None:
                continue
            content, changed = workspace.read_json(path), False
            for file, known in content.get("log", {}).items():
                if (new := events.get(file)) is not None and known["e_tag"] == new.before:
                    known |= {"bytes": new.entry.bytes, "e_tag": new.entry.e_tag, "rows": new.left}
                    changed = True
            if changed:
                workspace.write_json(path, content)


def _unfinished_files(workspace: Workspace) -> list[Path]:
    """Temporary files left by killed writers."""
    files = []
    for folder, _, names in os.walk(workspace.path()):
        files += [Path(folder, name) for name in names if name.startswith(".") and name.endswith(".tmp")]
    return files
