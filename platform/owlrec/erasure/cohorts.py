"""Cohorts whose texts quote somebody who is forgotten.

A cohort's profile names its representatives and quotes what they have in common, so that their texts go on without one
of them. Where it quotes something that none of the others has, it tells of that one alone: then the profile, the
prompt, the text and its vector go, and the next run writes them again from those who are left.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.cohorts.attributes import banded
from owlrec.erasure.rows import Rewritten, Users, erase
from owlrec.schema import by_shard, shard_of
from owlrec.shards import Artifact, Shard
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

_ROOT = "cohorts"


def quoting_cohorts(workspace: Workspace, users: Users) -> list[int]:
    """The ids of the cohorts whose profiles, in any folder of cohorts, quote what only these users have."""
    others = _Others(workspace)
    found = set[int]()
    for path in _profiles(workspace):
        for row in _naming(workspace.read_parquet(path), users).to_pylist():
            left = np.setdiff1d(np.array(row["representatives"], dtype=np.int64), users.ids)
            if row["kind"] == "user" and not others.have(left, row):
                found.add(row["id"])
    return sorted(found)


def erase_cohorts(workspace: Workspace, cohorts: Sequence[int], users: Users, paths: Iterable[str]) -> list[Rewritten]:
    """Removes what stands of some cohorts in their folders, texts and vectors, and the users from the other profiles.

    paths: of all files of the workspace. The cards of prompts that were lost go, too: the next run makes them again.
    """
    gone = Users(np.array(cohorts, dtype=np.int64), frozenset(), "cohort")
    numbers = _numbers(workspace, gone.ids)
    done: list[Rewritten] = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        kind, number = folder.rpartition("/")[2], name.partition(".")[0]
        if number.isdigit() and int(number) in numbers and (kind == "cohort" or kind.endswith("-cohort")):
            done += erase(workspace, path, gone) if path.startswith(("knowledge/", "vectors/")) else []
    for path in _profiles(workspace):  # last: they say what is to be done
        folder, _, name = path.rpartition("/profiles/")
        prompts = f"{folder}/prompts/{name}"
        lost = erase(workspace, prompts, gone) if workspace.entry(prompts) is not None else []
        if lost:
            Artifact(workspace, folder).forget(Shard("prompts", int(name.partition(".")[0])))
        done += [*lost, *_without(workspace, path, gone, users)]
    return done


def _without(workspace: Workspace, path: str, cohorts: Users, users: Users) -> list[Rewritten]:
    table, before = workspace.read_parquet(path), workspace.entry(path)
    named = _naming(table, users)
    assert before is not None
    if not len(named):
        return []
    kept = table.filter(pa.array(~np.isin(table["id"].to_numpy(), cohorts.ids)))
    lists = [[r for r in row if r not in set(users.ids.tolist())] for row in kept["representatives"].to_pylist()]
    at = kept.column_names.index("representatives")
    kept = kept.set_column(at, kept.schema.field(at), pa.array(lists, kept.schema.field(at).type))
    entry = workspace.write_parquet(path, kept)
    return [Rewritten(path, len(table) - len(kept), before.bytes - entry.bytes, len(kept), before.e_tag, entry)]


def _profiles(workspace: Workspace) -> list[str]:
    folders = [f"{_ROOT}/{name}/profiles" for name in workspace.names(_ROOT)]
    return [f"{folder}/{name}" for folder in folders for name in workspace.names(folder)]


def _naming(profiles: pa.Table, users: Users) -> pa.Table:
    """The profiles of users' cohorts that name one of the users."""
    lists = profiles["representatives"].combine_chunks()
    named = np.isin(lists.flatten().to_numpy(), users.ids)
    rows = np.zeros(len(profiles), dtype=bool)
    rows[pc.list_parent_indices(lists).to_numpy()[named]] = True
    return profiles.filter(pa.array(rows & pc.equal(profiles["kind"], "user").to_numpy()))


def _numbers(workspace: Workspace, ids: np.ndarray) -> set[int]:
    """The numbers that shards of these cohorts have, or had before a reshard."""
    n, numbers = workspace.layout.shards.get("cohort", 1), set[int]()
    while n:
        numbers |= set(shard_of(ids, n).tolist())
        n //= 2
    return numbers


class _Others:
    """What the other representatives have."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @cached_property
    def _catalog(self) -> ItemCatalog:
        return ItemCatalog.load(self._workspace)

    def have(self, ids: np.ndarray, profile: Mapping[str, Any]) -> bool:
        """Whether some users (int64 [n]) together have every attribute and every title that a profile quotes."""
        attributes, items = set[str](), list[int]()
        for number, at in by_shard(ids, self._workspace.n_shards("user")):
            mine = pa.array(ids[at])
            users = self._workspace.read_shard("users", number)
            for row in users.filter(pc.is_in(users["user_id"], mine)).to_pylist():
                attributes |= {f"{name} {banded(str(value))}" for name, value in row.items() if value is not None}
            histories = self._workspace.read_shard("histories", number, ["user_id", "items"])
            of_mine = histories.filter(pc.is_in(histories["user_id"], mine))["items"]
            items += [item for row in of_mine.to_pylist() for item in row or ()]
        titles = set(self._catalog.titles(np.array(items, dtype=np.int64))) if items else set()
        return set(profile["attributes"]) <= attributes and {*profile["titles"], *profile["opposite"]} <= titles
