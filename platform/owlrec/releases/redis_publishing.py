"""Copies releases from a workspace to Redis or Valkey: rows first, then the manifest, and the pointer last.

The workspace stays where releases are made and verified; Redis is where a cluster without a shared disk reads them. A
push that dies leaves rows without a manifest, which are no release; the next push of that release writes them again.
One process at a time should push to a namespace: two leave whole releases, but the pointer may miss one swap.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from owlrec.errors import ReleaseError
from owlrec.releases.lmdb_store import DATABASES, LmdbStore
from owlrec.releases.manifest import ReleaseManifest
from owlrec.releases.redis_store import IDS_A_CHUNK, RedisReleases, explained, release_prefix, row_prefix
from owlrec.releases.release import back_to, chain, current_release, open_parts, pointer_to
from owlrec.workspace import Workspace

_ROWS_A_PIPELINE = 2_000  # about 2 MB of texts


def push(
    workspace: Workspace,
    releases: RedisReleases,
    name: str | None = None,
    *,
    keep: int = 3,
    replace: bool = False,
    on_rows: Callable[[int], None] | None = None,
    cache: Path | None = None,
) -> str:
    """Makes release `name` of a workspace, or its current one, current in Redis; gives its name.

    Parts of its chain that Redis holds already are not written again, unless `replace`. Then all releases but the
    newest `keep` of the pointer's history, and what these are read on top of, are removed from Redis.
    on_rows: called with the number of rows just written. cache: see open_release.
    Raises ReleaseError where there is nothing to push or it cannot be read, StoreUnavailableError where Redis does not
    answer.
    """
    name = name or current_release(workspace)
    if name is None:
        raise ReleaseError(f"{workspace.path('releases')}: nothing was published yet. Run the publish stage first.")
    manifests = chain(workspace, name)
    lacking = [m for m in manifests if replace or releases.manifest(m.name) is None]
    for manifest in reversed(lacking):  # oldest first: a delta never stands without its parent
        [part] = open_parts(workspace, [manifest], verify=False, cache=cache)
        with part:
            _write(releases, manifest, part, on_rows)
    _switch(releases, name)
    prune_redis(releases, keep=keep)
    return name


def roll_back_redis(releases: RedisReleases, to: str | None = None) -> str:
    """Makes the release that was current before, or release `to`, current again; gives its name.

    Raises ReleaseError where there is nothing to go back to, or a part of it is gone.
    """
    history = releases.history()
    if to is None:
        earlier = [n for n in history if n != history[-1] and releases.manifest(n) is not None]
        if not earlier:
            raise ReleaseError("Redis holds no release that was current before. Push one: `owlrec push --release`.")
        to = earlier[-1]
    releases.chain(to)
    _write_pointer(releases, back_to(history, to))
    return to


def prune_redis(releases: RedisReleases, *, keep: int = 3) -> list[str]:
    """Removes releases, whole or not, that neither the newest `keep` of the pointer's history are nor are needed by
    them; gives their names.

    Readers of a removed release get misses, so keep as many as may still be open: a server changes over within seconds.
    """
    needed: set[str] = set()
    for name in list(dict.fromkeys(reversed(releases.history())))[:keep]:
        if releases.manifest(name) is not None:
            needed.update(m.name for m in releases.chain(name))
    prefix = release_prefix(releases.namespace, "").encode()
    removed = set()
    with explained():
        for key in releases.client.scan_iter(match=prefix + b"*", count=1000):
            name = key[len(prefix) :].split(b":", 1)[0].decode()
            if name not in needed:
                # The manifest goes with the rest: a release half removed is known to nobody's pointer.
                releases.client.unlink(key)
                removed.add(name)
    return sorted(removed)


def _write(
    releases: RedisReleases, manifest: ReleaseManifest, part: LmdbStore, on_rows: Callable[[int], None] | None
) -> None:
    client, prefix = releases.client, release_prefix(releases.namespace, manifest.name)
    with explained():
        client.delete(f"{prefix}:manifest")
        for database in DATABASES:
            start = row_prefix(prefix, database)
            rows = ((start + key, value) for key, value in part.items(database))
            while batch := list(islice(rows, _ROWS_A_PIPELINE)):
                _set_all(releases, batch)
                if on_rows:
                    on_rows(len(batch))
        _set_all(releases, _id_chunks(manifest, part, prefix))
        client.set(f"{prefix}:manifest", manifest.model_dump_json())


def _id_chunks(manifest: ReleaseManifest, part: LmdbStore, prefix: str) -> Iterator[tuple[bytes, bytes]]:
    for kind in manifest.knowledge:
        ids = part.ids(kind)
        for number, start in enumerate(range(0, len(ids), IDS_A_CHUNK)):
            chunk = np.asarray(ids[start : start + IDS_A_CHUNK], "<i8")
            yield f"{prefix}:ids:{kind}:{number}".encode(), chunk.tobytes()


def _set_all(releases: RedisReleases, rows: Iterable[tuple[bytes, bytes]]) -> None:
    pipeline = releases.client.pipeline(transaction=False)
    for key, value in rows:
        pipeline.set(key, value)
    pipeline.execute()


def _switch(releases: RedisReleases, name: str) -> None:
    history = releases.history()
    if not history or history[-1] != name:
        _write_pointer(releases, [*history, name])


def _write_pointer(releases: RedisReleases, history: list[str]) -> None:
    with explained():
        releases.client.set(f"{releases.namespace}:current", json.dumps(pointer_to(history)))
