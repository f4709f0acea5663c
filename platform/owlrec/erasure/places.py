"""Where a workspace may keep a user: which files are read for their rows, and what is removed whole.

Files of shards of users are read only where the number is that of a user's shard, now or before a reshard; tables that
are not sharded by user are read as far as their ids. What cannot be read row by row is removed and made again by the
stage that wrote it: shuffled rows, what cohorts were built from, encoded samples, retrieval pools, reports.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from owlrec.erasure.rows import Users, of_users
from owlrec.schema import shard_of
from owlrec.workspace import Workspace

_NUMBERED = re.compile(r".*/(\d{8,})\.(?:parquet|arrow)")
_CHUNK = 16  # files of one step, after which a killed run goes on
# What other parts of the erasure know how to treat, and what holds nobody.
_NOT_HERE = ("releases", "forgotten", "claims", "stages")
_WHOLE = (  # what goes, and the stage that makes it again
    (re.compile(r"shuffled/.*"), "shuffled rows", "prepare"),
    (re.compile(r"pools/.*"), "retrieval pools", "publish"),
    (re.compile(r"cohorts/[^/]+/user-[^/]*(vectors|groups|candidates|members|samples)/.*"), "cohort drafts", "cohorts"),
    (re.compile(r"ctr/[^/]+/samples/.*"), "encoded samples", "train_ctr"),
    (re.compile(r"reports/.*"), "reports", "evaluate"),
)
_OTHERS = re.compile(r".*/(?:items?|cohort|item-[^/]*|[^/]*-item|[^/]*-cohort|prompts)/\d{8,}\.(?:parquet|arrow)")
_LOGS = re.compile(r"logs/.*")


@dataclass(frozen=True)
class Removal:
    """Files that are removed whole."""

    files: list[str]
    bytes: int
    again: str  # the stage that makes them again


def files_to_read(workspace: Workspace, paths: Iterable[str], users: Users) -> dict[str, list[list[str]]]:
    """Of a workspace's files those that may hold rows of the users, by the first folder of their path, in chunks."""
    numbers = shard_numbers(workspace, users)
    places: dict[str, list[str]] = {}
    known = set(paths)
    for path in sorted(known):
        place = path.partition("/")[0]
        if place in _NOT_HERE or any(pattern.fullmatch(path) for pattern, _, _ in _WHOLE):
            continue
        if path.startswith("tables/interactions/") and path.replace("interactions", "samples") in known:
            continue  # done with its samples
        if path.startswith("tables/erasing/") or not _may_hold(path, numbers):
            continue
        places.setdefault(place, []).append(path)
    return {place: [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)] for place, files in places.items()}


def files_to_remove(workspace: Workspace, sizes: Mapping[str, int]) -> dict[str, Removal]:
    """By what they are, the files that go whole. sizes: of all files by path."""
    found: dict[str, Removal] = {}
    for pattern, about, stage in _WHOLE:
        files = [path for path in sizes if pattern.fullmatch(path)]
        if files:
            found[about] = Removal(files, sum(sizes[path] for path in files), stage)
    return found


def shard_numbers(workspace: Workspace, users: Users) -> set[int]:
    """The numbers that shards of the users have, or had when there were fewer."""
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
    return not of_users(path) or int(match[1]) in numbers
