"""Removes some users' rows from files: Parquet, Arrow, the bucket files of a shuffle, lines of a log.

Only the ids of a file are read first; a file without the users stays untouched. Other files are rewritten under their
name, in the same format, without any other change.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from owlrec.cohorts.cohort_model import banded
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind, by_shard, shard_of
from owlrec.shards import Artifact, Card, Shard
from owlrec.sources.preparation import read_batches, write_batches
from owlrec.sources.splits import ItemCatalog, in_histories
from owlrec.storage import FileEntry, Storage
from owlrec.workspace import Workspace, table_file

_ABOUT = b"interactions"
_KEYS = ("user_id", "id", "raw_id", "kind")


@dataclass(frozen=True)
class Users:
    """Users to erase, or cohorts that depend on them alone. Never written to a file."""

    ids: np.ndarray  # int64 [n], distinct
    raw: frozenset[str]  # the same by their raw ids
    kind: Kind = "user"

    def rows(self, table: pa.Table, own: bool = False) -> np.ndarray:
        """Rows of a table about one of the users, bool [n]: by user_id; otherwise by id or raw_id, if `kind`
        marks a user's row, or if there is no such column and all rows are users' (own).
        """
        names = table.column_names
        if "user_id" in names:
            return self._among(table["user_id"])
        theirs = np.zeros(len(table), dtype=bool)
        if "kind" in names or own:
            for name in ("id", "raw_id"):
                theirs |= self._among(table[name]) if name in names else False
        if "kind" in names:
            theirs &= pc.equal(table["kind"], self.kind).fill_null(False).to_numpy()
        return theirs

    def places(self, table: pa.Table) -> frozenset[int]:
        """The users of a table's rows, as positions in `ids`."""
        column = next((table[name] for name in ("user_id", "id") if name in table.column_names), None)
        if column is None or not pa.types.is_integer(column.type):
            return frozenset()
        return frozenset(np.flatnonzero(np.isin(self.ids, column.drop_null().to_numpy())).tolist())

    def _among(self, column: pa.ChunkedArray) -> np.ndarray:
        if pa.types.is_integer(column.type):
            wanted = pa.array(self.ids, pa.int64())
            column = column.cast(pa.int64(), safe=False)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            wanted = pa.array(sorted(self.raw), column.type)
        else:
            return np.zeros(len(column), dtype=bool)
        theirs: np.ndarray = pc.is_in(column, value_set=wanted).to_numpy()
        return theirs

    @property
    def words(self) -> re.Pattern[bytes]:
        """Pattern that matches their ids as words in a text."""
        names = sorted({*map(str, self.ids.tolist()), *self.raw}, key=len, reverse=True)
        return re.compile(rb"(?<![\w-])(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")(?![\w-])")


@dataclass(frozen=True)
class Rewritten:
    """A file with rows of the users, and its replacement."""

    path: str
    rows: int  # removed
    bytes: int  # decrease in size
    left: int  # remaining rows
    before: str  # e_tag
    entry: FileEntry
    places: frozenset[int] = frozenset()  # users found, by position


def erase(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    """Removes the users' rows from a file; returns nothing if it has none. For samples, also handles the interactions.

    Raises WorkspaceError if the file cannot be read or written.
    """
    if path.startswith("tables/samples/"):
        return _erase_samples(workspace, int(path[-16:-8]), users)
    if path.startswith(("ingest/", "refresh/")) and path.endswith(".arrow"):
        return _erase_batches(workspace, path, users)
    if path.endswith((".parquet", ".arrow")):
        return _erase_table(workspace, path, users)
    return erase_lines(workspace, path, users)


def is_users_file(path: str) -> bool:
    """Whether the shards of a file's folder are sharded by user."""
    folder = path.rpartition("/")[0].rpartition("/")[2]
    return folder in ("user", "users", "interactions", "histories", "samples") or folder.endswith("-user")


def _erase_table(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    if path.endswith(".parquet"):
        keys = [name for name in _KEYS if name in workspace.parquet_file(path).schema_arrow.names]
        if not keys or not users.rows(workspace.read_parquet(path, keys), is_users_file(path)).any():
            return []
        table = workspace.read_parquet(path)
    else:
        table = pa.ipc.open_file(workspace.open_input(path)).read_all()
    gone = users.rows(table, is_users_file(path))
    return [_replace(workspace, path, table, gone, users)] if gone.any() else []


def _replace(
    workspace: Workspace, path: str, table: pa.Table, gone: np.ndarray, users: Users | None = None
) -> Rewritten:
    places = users.places(table.filter(pa.array(gone))) if users else frozenset()
    before, kept = workspace.entry(path), table.filter(pa.array(~gone)).combine_chunks()
    assert before is not None
    if path.endswith(".parquet"):
        entry = workspace.write_parquet(path, kept)
    else:
        entry = workspace.write_arrow(path, kept, kept.schema)
    return Rewritten(path, int(gone.sum()), before.bytes - entry.bytes, len(kept), before.e_tag, entry, places)


# Samples refer to positions of interactions, which change: the two files must be replaced together.


def _erase_samples(workspace: Workspace, number: int, users: Users) -> list[Rewritten]:
    """Writes the new samples to a temporary file first, with the positions of the removed interactions, so that the
    next run can finish after a kill.
    """
    done = _replace_samples(workspace, number)
    samples = workspace.read_parquet(table_file("samples", number))
    rows = users.rows(workspace.read_parquet(table_file("interactions", number), ["user_id"]))
    gone = users.rows(samples)
    if not gone.any() and not rows.any():
        return done
    before = np.r_[0, np.cumsum(users.rows(in_histories(workspace, number, ["user_id"])))]
    kept = samples.filter(pa.array(~gone))
    for column in ("history_start", "history_end"):
        at, places = kept.column_names.index(column), kept[column].to_numpy()
        kept = kept.set_column(at, kept.schema.field(at), pa.array(places - before[places], pa.int32()))
    about = json.dumps({"of": len(rows), "gone": np.flatnonzero(rows).tolist()})
    workspace.write_parquet(_kept_samples(number), kept.replace_schema_metadata({_ABOUT: about}))
    return [*done, *_replace_samples(workspace, number)]


def _replace_samples(workspace: Workspace, number: int) -> list[Rewritten]:
    if workspace.entry(_kept_samples(number)) is None:
        return []
    changed, samples = [], workspace.read_parquet(_kept_samples(number))
    about = json.loads(samples.schema.metadata[_ABOUT])
    path = table_file("interactions", number)
    interactions = workspace.read_parquet(path)
    if about["gone"] and len(interactions) == about["of"]:
        gone = np.zeros(len(interactions), dtype=bool)
        gone[about["gone"]] = True
        changed.append(_replace(workspace, path, interactions, gone))
    path = table_file("samples", number)
    before, rows = workspace.entry(path), workspace.count_rows(path)
    assert before is not None
    entry = workspace.write_parquet(path, samples.replace_schema_metadata(None))
    workspace.delete_file(_kept_samples(number))
    removed = rows - len(samples)
    return [*changed, Rewritten(path, removed, before.bytes - entry.bytes, len(samples), before.e_tag, entry)]


def _kept_samples(number: int) -> str:
    return f"tables/erasing/{number:08d}.parquet"


def _erase_batches(workspace: Workspace, path: str, users: Users) -> list[Rewritten]:
    """A bucket file (sources.preparation) keeps its number of batches."""
    before = workspace.entry(path)
    assert before is not None
    end = int(np.frombuffer(workspace.read_range(path, before.bytes - 8, 8), "<i8")[0])
    n = (before.bytes - end) // 8 - 1
    batches = read_batches(workspace, path, range(n), n)
    gone = [users.rows(batch) for batch in batches]
    removed = sum(int(rows.sum()) for rows in gone)
    if not removed:
        return []
    kept = [batch.filter(pa.array(~rows)) for batch, rows in zip(batches, gone, strict=True)]
    entry = write_batches(workspace, path, kept, batches[0].schema)
    left, places = sum(map(len, kept)), frozenset().union(*map(users.places, batches))
    return [Rewritten(path, removed, before.bytes - entry.bytes, left, before.e_tag, entry, places)]


def erase_lines(storage: Storage, path: str, users: Users) -> list[Rewritten]:
    """A text without the lines that name a user."""
    data, e_tag = storage.read_tagged(path)
    lines, words = data.splitlines(keepends=True), users.words
    kept = [line for line in lines if not words.search(line)]
    if len(kept) == len(lines):
        return []
    entry = storage.write_bytes(path, b"".join(kept))
    return [Rewritten(path, len(lines) - len(kept), len(data) - entry.bytes, len(kept), e_tag, entry)]


# ---------------------------------------------------------------------------------------------------------------- cards
# Cards of rewritten files: a shard without a forgotten user is still done, with other digests.


_CARD = re.compile(r"(.+)/cards/.+/(\d{8,})\.json")
_NUMBER = re.compile(r".*/(\d{8,})\.\w+")


def update_cards(workspace: Workspace, paths: Sequence[str], rewritten: Iterable[Rewritten], numbers: set[int]) -> None:
    """Rewrites the cards of rewritten files with the new digests and row counts.

    paths: of all files of the workspace. numbers: possible shards of the users (places.shard_numbers). Cards that
    are already up to date stay untouched.
    """
    cards: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        if match := _CARD.fullmatch(path):
            cards.setdefault(match[1], []).append((int(match[2]), path))
    by_artifact: dict[str, dict[str, Rewritten]] = {}
    for file in rewritten:
        roots = [root for root in cards if file.path.startswith(f"{root}/")]
        if roots:
            root = max(roots, key=len)
            by_artifact.setdefault(root, {})[file.path[len(root) + 1 :]] = file
    for root, files in by_artifact.items():
        # A card of several shards has the number that one of them had with fewer shards.
        own = {int(match[1]) for path in files if (match := _NUMBER.fullmatch(f"/{path}"))}
        for number, path in cards[root]:
            if number in numbers | own:
                _update(workspace, root, path, files)


def _update(workspace: Workspace, root: str, path: str, files: dict[str, Rewritten]) -> None:
    try:
        card = Card.model_validate_json(workspace.read_bytes(path))
    except (ValidationError, WorkspaceError):  # truncated, or removed since it was listed
        return
    changed = {p: f for p, f in files.items() if p in card.files and card.files[p].sha256 != f.entry.sha256}
    if not changed:
        return
    tables = {p for p in card.files if not p.startswith("dead/")}
    dead = sum(file.rows for p, file in changed.items() if p.startswith("dead/"))
    # If there are several tables, rows are counted in the users' table.
    out = sum(f.rows for p, f in changed.items() if p in tables and (len(tables) == 1 or p.startswith("users/")))
    update = {
        "files": card.files | {p: file.entry for p, file in changed.items()},
        "rows_in": max(0, card.rows_in - out - dead),
        "rows_out": max(0, card.rows_out - out),
        "rows_dead": max(0, card.rows_dead - dead),
    }
    Artifact(workspace, root).finish(card.model_copy(update=update))


# ------------------------------------------------------------------------------------------------------------- profiles
# Profile values that only forgotten users had, in the vocabularies of CTR models.
#
# A vocabulary lists every value seen in training; a value that nobody else has would identify its user. It is replaced
# with a random word, so all other values keep their codes.


_FILE = "vocabularies.parquet"
_PREFIX = "values/"


def hide_values(workspace: Workspace, users: Users) -> tuple[int, int]:
    """Hides the values of users who are still in the users table; returns the number of rewritten files and of hidden
    values.
    """
    files = [f"{root}/{path}" for root in ("ctr", "models") for path in workspace.entries(root) if path.endswith(_FILE)]
    fields = {column for path in files for column, _ in _user_fields(workspace, path)}
    if not fields:
        return 0, 0
    own = _own_values(workspace, users, fields)
    for number in workspace.table_shards("users") if any(own.values()) else ():
        table = _table(workspace, number, fields)
        others = table.filter(pa.array(~users.rows(table)))
        for field in [name for name, values in own.items() if values and name in others.column_names]:
            own[field] -= _texts(others[field])
        if not any(own.values()):
            break
    changed = [n for path in files if any(own.values()) and (n := _rewrite(workspace, path, own))]
    return len(changed), sum(changed)


def _user_fields(workspace: Workspace, path: str) -> list[tuple[str, str]]:
    """Columns of users that a model reads by a vocabulary, and the names of these."""
    table = workspace.read_parquet(path)
    (schema,) = table.filter(pc.equal(table["field"], "fields"))["value"].drop_null().to_pylist()
    fields = [field for field in json.loads(schema)["users"] if field["type"] == "categorical" and not field["hash"]]
    return [(field["column"], field["table"]) for field in fields]


def _table(workspace: Workspace, number: int, fields: set[str]) -> pa.Table:
    path = table_file("users", number)
    names = workspace.parquet_file(path).schema_arrow.names
    return workspace.read_parquet(path, ["user_id", *(name for name in names if name in fields - {"user_id"})])


def _texts(column: pa.ChunkedArray) -> set[str]:
    flat = pc.list_flatten(column) if pa.types.is_nested(column.type) else column
    return set(pc.unique(flat.cast(pa.string()).drop_null()).to_pylist())


def _own_values(workspace: Workspace, users: Users, fields: set[str]) -> dict[str, set[str]]:
    """The users' values, by field."""
    values: dict[str, set[str]] = {field: set() for field in fields}
    for number, _ in by_shard(users.ids, workspace.n_shards("user")):
        table = _table(workspace, number, fields)
        mine = table.filter(pa.array(users.rows(table)))
        for field in fields & set(mine.column_names):
            values[field] |= _texts(mine[field])
    return values


def _rewrite(workspace: Workspace, path: str, hidden: dict[str, set[str]]) -> int:
    table = workspace.read_parquet(path)
    fields, values = table["field"].to_pylist(), table["value"].to_pylist()
    gone: dict[str, set[str]] = {}
    for column, name in _user_fields(workspace, path):
        gone.setdefault(_PREFIX + name, set()).update(hidden.get(column, ()))
    rows = [n for n, (field, value) in enumerate(zip(fields, values, strict=True)) if value in gone.get(field, ())]
    if rows:
        new = np.array(values, dtype=object)
        new[rows] = [f"forgotten-{secrets.token_hex(8)}" for _ in rows]
        at = table.column_names.index("value")
        workspace.write_parquet(path, table.set_column(at, "value", pa.array(new, pa.string())))
    return len(rows)


# -------------------------------------------------------------------------------------------------------------- cohorts
# Cohorts whose texts quote a forgotten user.
#
# A cohort's profile names its representatives and quotes what they have in common, so its text usually stays valid
# without one of them. If it quotes something that no other representative has, the profile, the
# prompt, the text and its vector are removed, and the next run writes them again from the remaining members.


_ROOT = "cohorts"


def quoting_cohorts(workspace: Workspace, users: Users) -> list[int]:
    """Ids of the cohorts whose profiles, in any folder of cohorts, quote something only these users have."""
    others = _Others(workspace)
    cohorts = set[int]()
    for path in _profiles(workspace):
        for row in _naming(workspace.read_parquet(path), users).to_pylist():
            left = np.setdiff1d(np.array(row["representatives"], dtype=np.int64), users.ids)
            if row["kind"] == "user" and not others.have(left, row):
                cohorts.add(row["id"])
    return sorted(cohorts)


def erase_cohorts(workspace: Workspace, cohorts: Sequence[int], users: Users, paths: Iterable[str]) -> list[Rewritten]:
    """Removes some cohorts' data from their folders, texts and vectors, and the users from all other profiles.

    paths: of all files of the workspace. Cards of removed prompts are removed, too, so the next run rebuilds them.
    """
    gone = Users(np.array(cohorts, dtype=np.int64), frozenset(), "cohort")
    numbers = _numbers(workspace, gone.ids)
    done: list[Rewritten] = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        kind, number = folder.rpartition("/")[2], name.partition(".")[0]
        if number.isdigit() and int(number) in numbers and (kind == "cohort" or kind.endswith("-cohort")):
            done += erase(workspace, path, gone) if path.startswith(("knowledge/", "vectors/")) else []
    for path in _profiles(workspace):  # last, because they define the work
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
    """Profiles of users' cohorts that name one of the users."""
    lists = profiles["representatives"].combine_chunks()
    named = np.isin(lists.flatten().to_numpy(), users.ids)
    rows = np.zeros(len(profiles), dtype=bool)
    rows[pc.list_parent_indices(lists).to_numpy()[named]] = True
    return profiles.filter(pa.array(rows & pc.equal(profiles["kind"], "user").to_numpy()))


def _numbers(workspace: Workspace, ids: np.ndarray) -> set[int]:
    """Numbers of these cohorts' shards, now or before a reshard."""
    n, numbers = workspace.layout.shards.get("cohort", 1), set[int]()
    while n:
        numbers |= set(shard_of(ids, n).tolist())
        n //= 2
    return numbers


class _Others:
    """Values of the other representatives."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @cached_property
    def _catalog(self) -> ItemCatalog:
        return ItemCatalog.load(self._workspace)

    def have(self, ids: np.ndarray, profile: Mapping[str, Any]) -> bool:
        """Whether some users (int64 [n]) together have every attribute and every title quoted in a profile."""
        attributes, items = set[str](), list[int]()
        for number, at in by_shard(ids, self._workspace.n_shards("user")):
            mine = pa.array(ids[at])
            users = self._workspace.read_shard("users", number)
            for row in users.filter(pc.is_in(users["user_id"], mine)).to_pylist():
                attributes |= {f"{name} {banded(str(value))}" for name, value in row.items() if value is not None}
            histories = self._workspace.read_shard("histories", number, ["user_id", "items"])
            own_items = histories.filter(pc.is_in(histories["user_id"], mine))["items"]
            items += [item for row in own_items.to_pylist() for item in row or ()]
        titles = set(self._catalog.titles(np.array(items, dtype=np.int64))) if items else set()
        return set(profile["attributes"]) <= attributes and {*profile["titles"], *profile["opposite"]} <= titles
