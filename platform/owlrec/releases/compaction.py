"""Keeps chains short and disks free: `compact` merges the current chain into a full release, `prune` removes old ones.

Merging copies rows as they stand in the files, in key order, so that neither the length of the chain nor the number of
texts shows in memory, and the new file's pages are full. Prune never writes the pointer: it could undo a swap that
happens meanwhile. The names of what it removed stay in the pointer's history, where a roll-back passes over them.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from owlrec.decoding.release_pools import FOLDER as POOLS
from owlrec.errors import ReleaseError
from owlrec.releases.chain import ChainedStore
from owlrec.releases.lmdb_store import DATABASES, KEY_BYTES, LmdbStore
from owlrec.releases.lmdb_writer import LmdbWriter
from owlrec.releases.manifest import MANIFEST, ReleaseManifest
from owlrec.releases.publishing import ReleaseInfo, build_release
from owlrec.releases.release import chain, current_release, list_releases, make_current, open_release, pointer_history
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

_ROWS_AT_ONCE = 20_000  # about 20 MB of texts


def compact(
    workspace: Workspace, on_rows: Callable[[int], None] | None = None, *, cache: Path | None = None
) -> ReleaseManifest:
    """Merges the current release and all that it is read on top of into one full release, and makes that current.

    Lookups answer the same before and after. Does nothing where the current release is full already; a second call
    after a kill uses what the first one finished.
    on_rows: called with the number of rows just written. cache: see open_release.
    Returns the manifest of the release that is current then. Raises ReleaseError where nothing was published, a part is
    damaged, or another release became current meanwhile: that one stays current.
    """
    with open_release(workspace, cache=cache) as release:
        store, newest = release.store, release.manifest
        if not isinstance(store, ChainedStore):
            return newest
        info = ReleaseInfo(
            fingerprint=fingerprint("compaction", [m.fingerprint for m in release.chain]),
            model=newest.model,
            encoder=newest.encoder,
            parent=newest.name,
        )
        parts = store.parts

        def fill(writer: LmdbWriter) -> None:
            for database in DATABASES:
                rows = merged_rows(parts, database)
                while batch := list(islice(rows, _ROWS_AT_ONCE)):
                    writer.add_rows(database, batch, name=newest.name)
                    if on_rows:
                        on_rows(len(batch))

        quantisers = release.quantisers()
        compacted = build_release(workspace, info, fill, base=release.chain, quantisers=quantisers, cache=cache)
    if (now := current_release(workspace)) != newest.name:
        raise ReleaseError(
            f"release {now} became current while {newest.name} was being compacted, and stays so. "
            f"Run `owlrec compact` again; {compacted.name} is left to `owlrec prune`."
        )
    make_current(workspace, compacted.name)
    return compacted


def merged_rows(parts: Sequence[LmdbStore], database: str) -> Iterator[tuple[bytes, bytes]]:
    """The rows that a chain of stores, newest first, answers with: keys and values, ascending by key.

    All partitions of an id come from the newest store that has the id.
    """
    streams = [_aged(part, database, age) for age, part in enumerate(parts)]
    merged = heapq.merge(*streams, key=itemgetter(0, 1))
    for _, same_id in groupby(merged, key=lambda row: row[0][:KEY_BYTES]):
        rows = list(same_id)
        newest = min(age for _, age, _ in rows)
        yield from ((key, value) for key, age, value in rows if age == newest)


def _aged(part: LmdbStore, database: str, age: int) -> Iterator[tuple[bytes, int, bytes]]:
    return ((key, age, value) for key, value in part.items(database))


def prune(workspace: Workspace, keep: int = 3, min_age_s: float = 3600.0) -> list[str]:
    """Removes releases that nobody needs any more, and their retrieval pools; gives their names, sorted.

    What stays: the current release, the newest `keep` of the pointer's history that still exist (the current one is the
    first of them), releases younger than `min_age_s`, and whatever one of these is read on top of. A reader that has a
    removed release open goes on reading it, on a local disk: the files go when it closes them. On a network disk give
    readers a `min_age_s` that they need to change over.
    Raises ReleaseError where a manifest cannot be read or none is current: what is needed is unknown then.
    """
    releases = {m.name: m for m in list_releases(workspace)}
    if not releases:
        return []
    swaps = dict.fromkeys(name for name in reversed(pointer_history(workspace)) if name in releases)
    now = datetime.now(UTC)
    young = [n for n, m in releases.items() if (now - datetime.fromisoformat(m.created)).total_seconds() < min_age_s]
    stay = _in_force(workspace) | _with_parents(releases, [*islice(swaps, keep), *young])
    removed = []
    for name in sorted(releases.keys() - stay):
        if name in _in_force(workspace):  # since a roll-back or a delta that came meanwhile
            continue
        workspace.delete_dir(POOLS, name)
        # First the manifest, so that a half-removed folder passes for no release; the next publish clears it away.
        workspace.delete_file(f"releases/{name}/{MANIFEST}")
        workspace.delete_dir("releases", name)
        removed.append(name)
    return removed


def _in_force(workspace: Workspace) -> set[str]:
    current = current_release(workspace)
    if current is None:
        raise ReleaseError(
            f"{workspace.path('releases')}: no release is current, so nobody knows which ones are needed. "
            f"Make one current first: `owlrec rollback --to`."
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
