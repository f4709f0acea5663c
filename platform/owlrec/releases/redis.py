"""Releases in Redis or Valkey, for clusters without a shared disk: pushed part by part, read by pipelined multi-gets.

It is a copy of a workspace's releases, each under its own prefix:

    {namespace}:r:{release}:manifest            the release's manifest, written after all its parts
    {namespace}:r:{release}:part:{p}            written after all rows of a part; a later push resumes there
    {namespace}:r:{release}:{database}:{key}    one row; key and value as in owlrec.releases.format
    {namespace}:r:{release}:ids:{kind}:{p}      the ids with knowledge of a part, ascending, as little-endian int64
    {namespace}:pushing:{release}               during a push: no prune removes its rows
    {namespace}:forgotten, …:mark               the workspace's tombstones (Tombstones.to_bytes, .mark)
    {namespace}:current                         the pointer (storage.pack_history), switched last

A delta has its own rows under its own prefix and is read on top of its parent, as on disk. If a release loses its
manifest because Redis lost its data, it is unavailable, rather than reporting ids as unknown.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from pydantic import ValidationError

from owlrec.errors import ReleaseError, StoreUnavailableError
from owlrec.releases.format import (
    DATABASES,
    LAST_PARTITION,
    ChainedStore,
    ReleaseManifest,
    RowStore,
    chain,
    encode_keys,
    speaking,
)
from owlrec.releases.release import Release, current_release, open_part, read_part_ids, record_event
from owlrec.storage import pack_history, unpack_history
from owlrec.workspace import Tombstones, Workspace, read_tombstones

NAMESPACE = "owlrec"
_KEYS_PER_GET = 256  # a longer MGET would block a single-threaded server
_ROWS_PER_PIPELINE = 2_000  # about 2 MB of texts
_KEYS_PER_UNLINK = 1_000
_LEASE_S = 600


def connect(url: str, *, timeout_s: float = 1.0) -> Any:
    """Client for the server at `url` (redis://, rediss:// or unix://).

    timeout_s: for connecting and for each response, so a hanging server is noticed at once.
    Raises ReleaseError without the redis package, or for an invalid URL.
    """
    try:
        import redis
    except ImportError:
        raise ReleaseError("Redis needs the redis package: pip install 'owlrec[redis]'.") from None
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, health_check_interval=15
        )
    except ValueError as error:
        shown = url.partition("@")[2] or url
        raise ReleaseError(f"'{shown}' is not a Redis URL ({error}). Write redis://HOST:PORT/DB.") from None


class RedisStore(RowStore):
    """Reads the rows of one release; threads may share it."""

    remote = True

    def __init__(self, client: Any, manifest: ReleaseManifest, namespace: str = NAMESPACE) -> None:
        """client: from `connect`; it stays open when the store is closed."""
        super().__init__(
            f"release {manifest.name} in Redis",
            dim=manifest.dim,
            counts=manifest.knowledge,
            partitions=manifest.partitions,
            code_sizes={kind: entry.sizes for kind, entry in manifest.semantic_ids.items()},
        )
        self._client = client
        self._manifest = manifest
        self._prefix = release_prefix(namespace, manifest.name)

    def values(
        self, database: str, kind: str, ids: Sequence[int] | np.ndarray, partition: int = 0
    ) -> list[bytes | None]:
        """See RowStore.values."""
        keys = encode_keys(kind, np.asarray(ids, dtype=np.int64), partition)
        if not getattr(self._manifest, database):
            return [None] * len(keys)
        prefix = row_prefix(self._prefix, database)
        return self._get([prefix + key for key in keys])

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        end = -1 if limit is None else 8 * limit - 1
        if limit == 0:
            return np.zeros(0, dtype=np.int64)
        with explained():
            pipeline = self._client.pipeline(transaction=False)
            for part in range(len(self._manifest.parts)):
                pipeline.getrange(f"{self._prefix}:ids:{kind}:{part}", 0, end)
            pieces = [np.frombuffer(data, dtype="<i8") for data in pipeline.execute()]
        return np.sort(np.concatenate(pieces)).astype(np.int64)[:limit]

    def close(self) -> None:
        """See KnowledgeStore.close: nothing to free, since other releases use the same connections."""

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        sentinel = f"{self._prefix}:part:0"
        values: list[bytes | None] = []
        with explained():
            if len(keys) <= _KEYS_PER_GET:
                answers = [self._client.mget([*keys, sentinel])]
            else:
                pipeline = self._client.pipeline(transaction=False)
                for start in range(0, len(keys), _KEYS_PER_GET):
                    pipeline.mget([*keys[start : start + _KEYS_PER_GET], sentinel])
                answers = pipeline.execute()
        for answer in answers:
            if answer[-1] is None:
                raise StoreUnavailableError(
                    f"release {self._manifest.name} is missing from Redis: Redis lost its data, or the release "
                    "was pruned. Run `owlrec release push`."
                )
            values += answer[:-1]
        return values


class RedisReleases:
    """Releases on a server, as followed by `owlrec.serving.served`."""

    remote = True

    def __init__(self, url: str, namespace: str = NAMESPACE, *, timeout_s: float = 1.0) -> None:
        """See `connect`."""
        self.client = connect(url, timeout_s=timeout_s)
        self.namespace = namespace

    def history(self) -> list[str]:
        """Previously current releases, oldest first, the current one last. Raises ReleaseError for a damaged
        pointer."""
        with explained():
            raw = self.client.get(f"{self.namespace}:current")
        if raw is None:
            return []
        try:
            return unpack_history(raw)
        except (ValueError, KeyError, TypeError) as error:
            raise ReleaseError(
                f"the key {self.namespace}:current is not a pointer ({error}). Delete it and run `owlrec release push` "
                "again."
            ) from None

    def current(self) -> str | None:
        """Name of the current release; None if nothing has been pushed."""
        history = self.history()
        return history[-1] if history else None

    def manifest(self, name: str) -> ReleaseManifest | None:
        """Manifest of a complete release; None if there is none. Raises ReleaseError if it is unreadable."""
        with explained():
            raw = self.client.get(f"{release_prefix(self.namespace, name)}:manifest")
        try:
            return None if raw is None else ReleaseManifest.model_validate_json(raw)
        except ValidationError as error:
            raise ReleaseError(
                f"release {name} in Redis: its manifest is unreadable ({error}). Run `owlrec release push --replace`."
            ) from None

    def chain(self, name: str) -> list[ReleaseManifest]:
        """Manifests of a release and its parents, newest first.

        Raises ReleaseError if one is missing.
        """
        manifests: list[ReleaseManifest] = []
        step: str | None = name
        while step is not None:
            manifest = self.manifest(step)
            if manifest is None:
                raise ReleaseError(
                    f"Redis has no release '{step}'. Run `owlrec release push` from the workspace that has it."
                )
            manifests.append(manifest)
            step = manifest.parent if manifest.delta else None
        return manifests

    def open(self, name: str) -> Release:
        """Opens a release with all its parents. Raises ReleaseError if one is missing."""
        manifests = self.chain(name)
        newest, layers = manifests[0], [RedisStore(self.client, m, self.namespace) for m in manifests]
        store = ChainedStore(layers, dim=newest.dim, totals=newest.totals) if newest.delta else layers[0]
        return Release(store, manifests, tombstones=self.tombstones())  # its codebooks stay with the workspace

    def tombstones(self) -> Tombstones:
        """Forgotten users, according to the last push or `owlrec forget`."""
        with explained():
            raw = self.client.get(f"{self.namespace}:forgotten")
        return Tombstones.from_bytes(raw) if raw else Tombstones()

    def forgotten(self) -> str:
        """See ReleaseSource.forgotten."""
        with explained():
            return (self.client.get(f"{self.namespace}:forgotten:mark") or b"").decode()


# Pushing


def push(
    workspace: Workspace,
    releases: RedisReleases,
    name: str | None = None,
    *,
    keep: int = 3,
    replace: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> str:
    """Makes release `name` of a workspace, or its current one, current in Redis; returns its name.

    Parts already in Redis are not written again, unless `replace`. Afterwards all releases except the newest `keep` of
    the pointer's history and their parents are removed from Redis. on_rows: called with the number of
    rows just written. Raises ReleaseError if there is nothing to push, it cannot be read, or its rows vanish during
    the push; StoreUnavailableError if Redis does not respond.
    """
    name = name or current_release(workspace)
    if name is None:
        raise ReleaseError(f"{workspace.path('releases')}: nothing has been published. Run the publish stage first.")
    push_tombstones(workspace, releases)
    for manifest in reversed(chain(workspace, name)):  # oldest first, so a delta always has its parent
        if replace or releases.manifest(manifest.name) is None:
            _write_release(workspace, releases, manifest, replace, on_rows)
    history = releases.history()
    if not history or history[-1] != name:
        _write_pointer(releases, [*history, name])
        record_event(workspace, "push", name)
    prune_redis(releases, keep=keep)
    return name


def roll_back_redis(releases: RedisReleases, to: str | None = None) -> str:
    """Makes the previously current release, or release `to`, current again; returns its name.

    Raises ReleaseError if there is nothing to go back to, or one of its parents is missing.
    """
    history = releases.history()
    if to is None:
        earlier = [n for n in history if n != history[-1] and releases.manifest(n) is not None]
        if not earlier:
            raise ReleaseError("Redis has no previous release. Push one: `owlrec release push --release`.")
        to = earlier[-1]
    releases.chain(to)
    _write_pointer(releases, history[: len(history) - history[::-1].index(to)] if to in history else [*history, to])
    return to


def prune_redis(releases: RedisReleases, *, keep: int = 3) -> list[str]:
    """Removes releases, complete or not, except the newest `keep` of the pointer's history, their parents,
    and those being pushed; returns the removed names.

    Readers of a removed release get an error, so keep as many as may still be open: a server switches
    within seconds.
    """
    needed: set[str] = set()
    for name in list(dict.fromkeys(reversed(releases.history())))[:keep]:
        if releases.manifest(name) is not None:
            needed.update(m.name for m in releases.chain(name))
    prefix = release_prefix(releases.namespace, "").encode()
    removed: set[str] = set()
    with explained():
        keys = releases.client.scan_iter(match=prefix + b"*", count=_KEYS_PER_UNLINK)
        while batch := list(islice(keys, _KEYS_PER_UNLINK)):
            named = [(key[len(prefix) :].split(b":", 1)[0].decode(), key) for key in batch]
            gone = sorted({name for name, _ in named} - needed)
            gone = [name for name in gone if not releases.client.exists(_lease(releases, name))]
            # The manifest first, so that nobody opens a half-removed release.
            first = [f"{release_prefix(releases.namespace, name)}:manifest".encode() for name in gone]
            doomed = [*first, *(key for name, key in named if name in gone)]
            if doomed:
                releases.client.unlink(*doomed)
            removed.update(gone)
    return sorted(removed)


def push_tombstones(workspace: Workspace, releases: RedisReleases) -> None:
    """Updates the forgotten users in Redis at once. Raises StoreUnavailableError if it does not respond."""
    if len(gone := read_tombstones(workspace)):
        with explained():
            name = f"{releases.namespace}:forgotten"
            releases.client.mset({name: gone.to_bytes(), f"{name}:mark": gone.mark})


def forget_in_redis(releases: RedisReleases, ids: np.ndarray) -> int:
    """Removes all rows of some users (int64 [n]) from all releases in Redis; returns their number."""
    prefix, removed = release_prefix(releases.namespace, "").encode(), 0
    with explained():
        client = releases.client
        manifests = [key[len(prefix) : -len(b":manifest")].decode() for key in client.scan_iter(prefix + b"*:manifest")]
        for release in manifests:
            manifest, start = releases.manifest(release), release_prefix(releases.namespace, release)
            for batch in np.array_split(ids, max(1, -(-len(ids) // _KEYS_PER_UNLINK))):
                keys = [row_prefix(start, name) + key for name in DATABASES for key in encode_keys("user", batch)]
                older = range(1, LAST_PARTITION + 1) if manifest and manifest.partitions.get("user") else ()
                keys += [row_prefix(start, "vectors") + key for p in older for key in encode_keys("user", batch, p)]
                removed += client.unlink(*keys)
            for part in range(len(manifest.parts)) if manifest else ():
                path = f"{start}:ids:user:{part}"
                listed = np.frombuffer(client.get(path) or b"", dtype="<i8")
                if np.isin(listed, ids).any():
                    client.set(path, listed[~np.isin(listed, ids)].tobytes())
    return removed


def release_prefix(namespace: str, name: str) -> str:
    """Prefix of all keys of a release."""
    return f"{namespace}:r:{name}"


def row_prefix(prefix: str, database: str) -> bytes:
    """Prefix of a row's key; the rest is as in LMDB."""
    return f"{prefix}:{database}:".encode()


@contextmanager
def explained() -> Iterator[None]:
    """Converts errors of the redis package to StoreUnavailableError."""
    import redis

    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StoreUnavailableError(f"Redis does not respond: {type(error).__name__}: {error}") from error


def _write_release(
    workspace: Workspace,
    releases: RedisReleases,
    manifest: ReleaseManifest,
    replace: bool,
    on_rows: Callable[[int], None] | None,
) -> None:
    gone = read_tombstones(workspace)
    client, prefix, lease = (
        releases.client,
        release_prefix(releases.namespace, manifest.name),
        _lease(releases, manifest.name),
    )
    parts = range(len(manifest.parts))
    with explained():
        client.set(lease, "", ex=_LEASE_S)
        for part in parts:
            if not replace and client.exists(f"{prefix}:part:{part}"):
                continue
            for rows in _batches(workspace, manifest, part, prefix, gone):
                _set_all(releases, rows)
                client.expire(lease, _LEASE_S)
                if on_rows:
                    on_rows(len(rows))
            for kind in manifest.knowledge:
                ids = read_part_ids(workspace, manifest, part, kind)
                ids = ids[~gone.among(ids)] if kind == "user" else ids
                client.set(f"{prefix}:ids:{kind}:{part}", ids.astype("<i8").tobytes())
            client.set(f"{prefix}:part:{part}", sum(manifest.parts[part].rows.values()))
        present = client.exists(*(f"{prefix}:part:{part}" for part in parts))
        if present != len(parts):
            raise ReleaseError(
                f"release {manifest.name}: Redis lost {len(parts) - present} of its {len(parts)} parts during "
                "the push. Give it more memory and turn off eviction (maxmemory-policy noeviction), then push "
                "again."
            )
        client.set(f"{prefix}:manifest", manifest.model_dump_json())
        client.delete(lease)


def _batches(
    workspace: Workspace, manifest: ReleaseManifest, part: int, prefix: str, gone: Tombstones
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Rows of a part by their keys in Redis, without those of forgotten users."""
    with open_part(workspace, manifest, part) as file:
        for database in DATABASES:
            start = row_prefix(prefix, database)
            rows = file.items(database)
            while batch := list(islice(rows, _ROWS_PER_PIPELINE)):
                kept = speaking([key for key, _ in batch], gone)
                yield [(start + key, value) for (key, value), keep in zip(batch, kept, strict=True) if keep]


def _set_all(releases: RedisReleases, rows: Iterable[tuple[bytes, bytes]]) -> None:
    pipeline = releases.client.pipeline(transaction=False)
    for key, value in rows:
        pipeline.set(key, value)
    pipeline.execute()


def _lease(releases: RedisReleases, name: str) -> str:
    return f"{releases.namespace}:pushing:{name}"


def _write_pointer(releases: RedisReleases, history: list[str]) -> None:
    with explained():
        releases.client.set(f"{releases.namespace}:current", pack_history(history))
