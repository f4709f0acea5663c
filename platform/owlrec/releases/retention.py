"""Retention: `compact` merges the current chain of deltas into a full release, `prune` removes old releases.

Merging copies rows in stored form, part by part and in key order, so memory use does not depend on the length of the
chain or the number of texts, and the new files' pages are full. Prune never writes the pointer, since it could
undo a concurrent swap. The names of removed releases stay in the pointer's history, where a roll-back skips
them.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter

import numpy as np

from owlrec.errors import ReleaseError
from owlrec.ids import Kind, shard_of
from owlrec.releases.build import BUILDS, PART_IDS, ReleaseInfo, build_release, whole_release
from owlrec.releases.format import (
    DATABASES,
    KEY_BYTES,
    MANIFEST,
    ReleaseManifest,
    chain,
    decode_keys,
    encode_keys,
    list_releases,
)
from owlrec.releases.lmdb import LmdbFile
from owlrec.releases.parts import PartWriter
from owlrec.releases.release import (
    check_files,
    current_release,
    make_current,
    open_part,
    pointer,
    pointer_history,
    read_codebooks,
    record_event,
)
from owlrec.runner import Pool
from owlrec.shards import Artifact, Card
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, read_tombstones, shards_for

_ROWS_AT_ONCE = 20_000  # about 20 MB of texts
_ABANDONED_AFTER_S = 24 * 3600.0  # a build finishes a part every few minutes


@dataclass(frozen=True)
class ChainRows:
    """The rows of a chain as seen by lookups."""

    chain: Sequence[ReleaseManifest]  # newest first
    without: frozenset[bytes] = frozenset()  # keys of rows to leave out

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """See ReleaseRows.write."""
        with ExitStack() as opened:
            layers = []
            for manifest in self.chain:
                files = [
                    opened.enter_context(open_part(workspace, manifest, number))
                    for number in _related(part, n_parts, len(manifest.parts))
                ]
                layers.append((files, len(manifest.parts) < n_parts))
            for database in DATABASES:
                streams = [_layer(files, database, (part, n_parts) if wider else None) for files, wider in layers]
                rows = merged_rows(streams)
                while batch := list(islice(rows, _ROWS_AT_ONCE)):
                    batch = [row for row in batch if row[0] not in self.without] if self.without else batch
                    writer.add_rows(database, [key for key, _ in batch], [value for _, value in batch])


def compact(
    workspace: Workspace, *, pool: Pool | None = None, on_card: Callable[[Card], None] | None = None
) -> ReleaseManifest:
    """Merges the current release and its parents into one full release, and makes it current.

    Lookups give the same answers before and after. Does nothing if the current release is already full; a second call
    after a kill resumes with the finished parts of the first.
    pool, on_card: see publish_rows.
    Returns the manifest of the then current release. Raises ReleaseError if nothing has been published, a file is
    damaged, or another release became current meanwhile, which then stays current; PointerHeld on a HOLD.
    """
    current = current_release(workspace)
    if current is None:
        raise ReleaseError(f"{workspace.path('releases')}: nothing has been published. Run the publish stage first.")
    manifests = chain(workspace, current)
    newest = manifests[0]
    if not newest.delta:
        return newest
    pointer(workspace).refuse_hold()
    if workspace.local:
        for manifest in manifests:
            check_files(workspace, manifest, hashed=True)
    return _merged(workspace, manifests, frozenset(), (), pool, on_card)


def _merged(
    workspace: Workspace,
    manifests: Sequence[ReleaseManifest],
    without: frozenset[bytes],
    forgotten: tuple[str, ...],
    pool: Pool | None,
    on_card: Callable[[Card], None] | None,
) -> ReleaseManifest:
    """Merges a chain into one current release. forgotten: names it must not contain."""
    newest = manifests[0]
    info = ReleaseInfo(
        fingerprint=fingerprint("compaction", [m.fingerprint for m in manifests], *forgotten),
        model=newest.model,
        encoder=newest.encoder,
        parent=newest.name,
    )
    compacted = whole_release(workspace, info) or build_release(
        workspace,
        info,
        ChainRows(manifests, without),
        shards_for(max(newest.totals.values(), default=0), PART_IDS),
        base=manifests,
        quantizers=read_codebooks(workspace, manifests[-1]),
        pool=pool,
        on_card=on_card,
    )
    make_current(workspace, compacted.name, expected=newest.name)
    return compacted


def merged_rows(layers: Iterable[Iterator[tuple[bytes, bytes]]]) -> Iterator[tuple[bytes, bytes]]:
    """Rows of several layers combined, newest first and each ascending by key; ascending.

    All partitions of an id come from the newest layer that has the id.
    """
    aged = [_aged(rows, age) for age, rows in enumerate(layers)]
    merged = heapq.merge(*aged, key=itemgetter(0, 1))
    for _, same_id in groupby(merged, key=lambda row: row[0][:KEY_BYTES]):
        rows = list(same_id)
        newest = min(age for _, age, _ in rows)
        yield from ((key, value) for key, age, value in rows if age == newest)


def _aged(rows: Iterator[tuple[bytes, bytes]], age: int) -> Iterator[tuple[bytes, int, bytes]]:
    return ((key, age, value) for key, value in rows)


def _related(part: int, n_parts: int, n_others: int) -> Iterable[int]:
    """Parts of a release of `n_others` that share ids with one of `n_parts`."""
    return range(part, n_others, n_parts) if n_others > n_parts else (part & (n_others - 1),)


def _layer(
    files: Sequence[LmdbFile], database: str, only_part: tuple[int, int] | None
) -> Iterator[tuple[bytes, bytes]]:
    """Rows of one release's files, ascending; only_part: a part and the number of parts, to skip other ids."""
    rows = heapq.merge(*(file.items(database) for file in files), key=itemgetter(0))
    if only_part is None:
        yield from rows
        return
    part, n_parts = only_part
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        mine = shard_of(decode_keys([key for key, _ in batch])[1], n_parts) == part
        yield from (row for row, keep in zip(batch, mine.tolist(), strict=True) if keep)


@dataclass(frozen=True)
class UserRows:
    """Releases' rows of some users or cohorts."""

    releases: list[str]  # with such a row, or with a parent that has one
    rows: int
    ids: frozenset[int]  # ids with a row


def find_rows(workspace: Workspace, kind: Kind, ids: np.ndarray) -> UserRows:
    """Looks up some ids (int64 [n]) in every release, including forgotten users."""
    manifests = {m.name: m for m in list_releases(workspace)}
    holding, rows, known = set[str](), 0, set[int]()
    for manifest in manifests.values():
        homes = shard_of(ids, len(manifest.parts))
        for part in np.unique(homes).tolist():
            mine = ids[homes == part]
            keys = encode_keys(kind, mine)
            with open_part(workspace, manifest, part) as file:
                for database in DATABASES:
                    there = [value is not None for value in file.get_many(database, keys)]
                    rows += sum(there)
                    known |= set(mine[there].tolist())
                    holding |= {manifest.name} if any(there) else set()
    dependent = [name for name in manifests if {m.name for m in _chain_of(manifests, name)} & holding]
    return UserRows(dependent, rows, frozenset(known))


def rebuild_without_forgotten(
    workspace: Workspace,
    cohorts: Sequence[int] = (),
    *,
    pool: Pool | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> ReleaseManifest:
    """Merges the current release and its parents into a full one without forgotten users and
    without the texts of some cohorts; makes it current. Lookups of all other ids give the same answers.

    pool, on_card: see publish_rows. Raises the errors of `compact`.
    """
    current = current_release(workspace)
    assert current is not None
    pointer(workspace).refuse_hold()
    without = frozenset(encode_keys("cohort", np.array(cohorts, dtype=np.int64)))
    named = (read_tombstones(workspace).mark, *map(str, sorted(cohorts)))
    return _merged(workspace, chain(workspace, current), without, named, pool, on_card)


def remove_releases(workspace: Workspace, names: Sequence[str]) -> None:
    """Removes releases and all unfinished builds. The current release must not need any of them."""
    for name in names:
        workspace.delete_file(f"releases/{name}/{MANIFEST}")
        workspace.delete_dir("releases", name)
        record_event(workspace, "remove", name)
    for file in workspace.names(BUILDS):
        name = str(workspace.read_json(f"{BUILDS}/{file}")["name"])
        workspace.delete_file(f"{BUILDS}/{file}")
        if not workspace.exists("releases", name, MANIFEST):
            workspace.delete_dir("releases", name)


def _chain_of(manifests: Mapping[str, ReleaseManifest], name: str) -> Iterator[ReleaseManifest]:
    step: str | None = name
    while step and (manifest := manifests.get(step)):
        yield manifest
        step = manifest.parent if manifest.delta else None


def prune(workspace: Workspace, keep: int = 3, min_age_s: float = 3600.0) -> list[str]:
    """Removes unneeded releases and builds abandoned for a day; returns the sorted names.

    Kept are the current release, the newest `keep` existing ones in the pointer's history (including the current
    one), releases younger than `min_age_s`, and all their parents. On a local disk, a reader with an open
    removed release continues to read it: its files disappear when it closes them. Copies in nodes' caches
    are evicted when space is needed.
    Raises ReleaseError if a manifest is unreadable or no release is current, because the needed ones are then unknown.
    """
    removed = _remove_abandoned(workspace)
    releases = {m.name: m for m in list_releases(workspace)}
    if not releases:
        return removed
    swaps = dict.fromkeys(name for name in reversed(pointer_history(workspace)) if name in releases)
    now = datetime.now(UTC)
    young = [n for n, m in releases.items() if (now - datetime.fromisoformat(m.created)).total_seconds() < min_age_s]
    stay = _needed_now(workspace) | _with_parents(releases, [*islice(swaps, keep), *young])
    for name in sorted(releases.keys() - stay):
        if name in _needed_now(workspace):  # after a concurrent roll-back or delta
            continue
        # The manifest first, so a half-removed folder does not count as a release.
        workspace.delete_file(f"releases/{name}/{MANIFEST}")
        workspace.delete_dir("releases", name)
        record_event(workspace, "remove", name)
        removed.append(name)
    removed.sort()
    return removed


def _remove_abandoned(workspace: Workspace) -> list[str]:
    """Removes folders without a manifest and without progress for a day, and half-removed ones."""
    folders = workspace.names("releases")  # first, since a build's file is written before its folder
    builds = {str(workspace.read_json(f"{BUILDS}/{f}")["name"]): f"{BUILDS}/{f}" for f in workspace.names(BUILDS)}
    removed = []
    for name in folders:
        folder = f"releases/{name}"
        if not workspace.names(folder):  # a file
            continue
        if workspace.exists(folder, MANIFEST):
            if name in builds:  # killed between its last two steps
                workspace.delete_file(builds[name])
            continue
        if name in builds:
            begun = workspace.entry(builds[name])
            cards = Artifact(workspace, folder).cards()
            moments = [begun.modified if begun else 0.0, *(card.finished for card in cards.values())]
            if time.time() - max(moments) < _ABANDONED_AFTER_S:
                continue
            workspace.delete_file(builds[name])
        workspace.delete_dir(folder)
        removed.append(name)
    return removed


def _needed_now(workspace: Workspace) -> set[str]:
    current = current_release(workspace)
    if current is None:
        raise ReleaseError(
            f"{workspace.path('releases')}: no release is current, so the needed ones are unknown. Make one "
            "current first: `owlrec release rollback --to`."
        )
    return {m.name for m in chain(workspace, current)}


def _with_parents(releases: dict[str, ReleaseManifest], names: Iterable[str]) -> set[str]:
    needed: set[str] = set()
    for name in names:
        step: str | None = name
        while step in releases and step not in needed:
            needed.add(step)
            step = releases[step].parent if releases[step].delta else None
    return needed
