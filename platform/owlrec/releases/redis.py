"""Releases in Redis or Valkey, for clusters without a shared disk: pushed part by part, read by pipelined multi-gets.

It is a copy of a workspace's releases, each under a prefix of its own:

    {namespace}:r:{release}:manifest            the release's manifest, written after all its parts
    {namespace}:r:{release}:part:{p}            written after all rows of a part; a later push goes on from there
    {namespace}:r:{release}:{database}:{key}    one row; key and value as in owlrec.releases.format
    {namespace}:r:{release}:ids:{kind}:{p}      the ids with knowledge of a part, ascending, as little-endian int64
    {namespace}:pushing:{release}               while a push writes it: no prune takes its rows
    {namespace}:forgotten, …:mark               the workspace's tombstones (Tombstones.to_bytes, .mark)
    {namespace}:current                         JSON {"release", "history"}, switched last

A delta has its own rows under its own prefix and is read on top of its parent, as on disk. A release that loses its
manifest, because Redis lost its data, is unavailable: nobody is told that nothing is known of an id.
"""

import json
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
from owlrec.releases.release import Release, current_release, open_part, read_part_ids
from owlrec.workspace import Tombstones, Workspace, read_tombstones

NAMESPACE = "owlrec"
_HISTORY = 100  # swaps remembered
_KEYS_PER_GET = 256  # a longer MGET keeps a single-threaded server from everybody else
_ROWS_PER_PIPELINE = 2_000  # about 2 MB of texts
_KEYS_PER_UNLINK = 1_000
_LEASE_S = 600


def connect(url: str, *, timeout_s: float = 1.0) -> Any:
    """A client of the server at `url` (redis://, rediss:// or unix://).

    timeout_s: for connecting and for each answer, so that a server that hangs is noticed at once.
    Raises ReleaseError without the redis package, or for a URL that it cannot read.
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
        """client: as `connect` makes it; it stays open when the store is closed."""
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
        """See KnowledgeStore.close: nothing is held, other releases use the same connections."""

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
                    f"release {self._manifest.name} is gone from Redis: it lost its data, or the release was pruned. "
                    "Run `owlrec release push`."
                )
            values += answer[:-1]
        return values


class RedisReleases:
    """The releases that a server holds: what `owlrec.serving.served` follows."""

    def __init__(self, url: str, namespace: str = NAMESPACE, *, timeout_s: float = 1.0) -> None:
        """See `connect`."""
        self.client = connect(url, timeout_s=timeout_s)
        self.namespace = namespace

    def history(self) -> list[str]:
        """What was current, oldest first, the current release last. Raises ReleaseError for a damaged pointer."""
        with explained():
            raw = self.client.get(f"{self.namespace}:current")
        if raw is None:
            return []
        try:
            content = json.loads(raw)
            history = [str(name) for name in content["history"]]
            if not history or history[-1] != content["release"]:
                raise ValueError("'history' does not end with 'release'")
        except (ValueError, KeyError, TypeError) as error:
            raise ReleaseError(
                f"the key {self.namespace}:current is not a pointer ({error}). Delete it and run `owlrec release push` "
                "again."
            ) from None
        return history

    def current(self) -> str | None:
        """The name of the current release; None where nothing was pushed yet."""
        history = self.history()
        return history[-1] if history else None

    def manifest(self, name: str) -> ReleaseManifest | None:
        """The manifest of a complete release; None where there is none. Raises ReleaseError where it is unreadable."""
        with explained():
            raw = self.client.get(f"{release_prefix(self.namespace, name)}:manifest")
        try:
            return None if raw is None else ReleaseManifest.model_validate_json(raw)
        except ValidationError as error:
            raise ReleaseError(
                f"release {name} in Redis: its manifest is unreadable ({error}). Run `owlrec release push --replace`."
            ) from None

    def chain(self, name: str) -> list[ReleaseManifest]:
        """The manifests of a release and of what it is read on top of, newest first.

        Raises ReleaseError where one is missing.
        """
        manifests: list[ReleaseManifest] = []
        step: str | None = name
        while step is not None:
            manifest = self.manifest(step)
            if manifest is None:
                raise ReleaseError(
                    f"Redis holds no release '{step}'. Run `owlrec release push` for the workspace that has it."
                )
            manifests.append(manifest)
            step = manifest.parent if manifest.delta else None
        return manifests

    def open(self, name: str) -> Release:
        """Opens a release with all that it is read on top of. Raises ReleaseError where a layer is missing."""
        manifests = self.chain(name)
        newest, layers = manifests[0], [RedisStore(self.client, m, self.namespace) for m in manifests]
        store = ChainedStore(layers, dim=newest.dim, totals=newest.totals) if newest.delta else layers[0]
        return Release(store, manifests, tombstones=self.tombstones())  # its codebooks stay with the workspace

    def tombstones(self) -> Tombstones:
        """Who is forgotten, as the last push or `owlrec forget` said."""
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
    """Makes release `name` of a workspace, or its current one, current in Redis; gives its name.

    Parts that Redis holds already are not written again, unless `replace`. Then all releases but the newest `keep` of
    the pointer's history, and what these are read on top of, are removed from Redis. on_rows: called with the number of
    rows just written. Raises ReleaseError where there is nothing to push, it cannot be read, or its rows vanish while
    it is pushed; StoreUnavailableError where Redis does not answer.
    """
    name = name or current_release(workspace)
    if name is None:
        raise ReleaseError(f"{workspace.path('releases')}: nothing was published yet. Run the publish stage first.")
    push_tombstones(workspace, releases)
    for manifest in reversed(chain(workspace, name)):  # oldest first: a delta is never there without its parent
        if replace or releases.manifest(manifest.name) is None:
            _write_release(workspace, releases, manifest, replace, on_rows)
    history = releases.history()
    if not history or history[-1] != name:
        _write_pointer(releases, [*history, name])
    prune_redis(releases, keep=keep)
    return name


def roll_back_redis(releases: RedisReleases, to: str | None = None) -> str:
    """Makes the release that was current before, or release `to`, current again; gives its name.

    Raises ReleaseError where there is nothing to go back to, or a layer of it is gone.
    """
    history = releases.history()
    if to is None:
        earlier = [n for n in history if n != history[-1] and releases.manifest(n) is not None]
        if not earlier:
            raise ReleaseError(
                "Redis holds no release that was current before. Push one: `owlrec release push --release`."
            )
        to = earlier[-1]
    releases.chain(to)
    _write_pointer(releases, history[: len(history) - history[::-1].index(to)] if to in history else [*history, to])
    return to


def prune_redis(releases: RedisReleases, *, keep: int = 3) -> list[str]:
    """Removes releases, whole or not, that neither are the newest `keep` of the pointer's history, nor are needed by
    them, nor are being pushed; gives their names.

    Readers of a removed release are told that it is gone, so keep as many as may still be open: a server changes over
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
            # First the manifest, so that nobody opens a release that is half removed.
            first = [f"{release_prefix(releases.namespace, name)}:manifest".encode() for name in gone]
            doomed = [*first, *(key for name, key in named if name in gone)]
            if doomed:
                releases.client.unlink(*doomed)
            removed.update(gone)
    return sorted(removed)


def push_tombstones(workspace: Workspace, releases: RedisReleases) -> None:
    """Has Redis know at once who is forgotten. Raises StoreUnavailableError where it does not answer."""
    if len(gone := read_tombstones(workspace)):
        with explained():
            name = f"{releases.namespace}:forgotten"
            releases.client.mset({name: gone.to_bytes(), f"{name}:mark": gone.mark})


def forget_in_redis(releases: RedisReleases, ids: np.ndarray) -> int:
    """Removes all rows of some users (int64 [n]) from all releases that Redis holds; how many there were."""
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
    """The prefix of all keys of a release."""
    return f"{namespace}:r:{name}"


def row_prefix(prefix: str, database: str) -> bytes:
    """The start of a row's key; the rest is as in LMDB."""
    return f"{prefix}:{database}:".encode()


@contextmanager
def explained() -> Iterator[None]:
    """Turns what the redis package raises into StoreUnavailableError."""
    import redis

    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StoreUnavailableError(f"Redis does not answer: {type(error).__name__}: {error}") from error


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
                f"release {manifest.name}: Redis lost {len(parts) - present} of its {len(parts)} parts while they were "
                "pushed. Give it more memory and no eviction (maxmemory-policy noeviction), then push again."
            )
        client.set(f"{prefix}:manifest", manifest.model_dump_json())
        client.delete(lease)


def _batches(
    workspace: Workspace, manifest: ReleaseManifest, part: int, prefix: str, gone: Tombstones
) -> Iterator[list[tuple[bytes, bytes]]]:
    """The rows of a part by their keys in Redis, without those of users who are gone."""
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
    content = {"release": history[-1], "history": history[-_HISTORY:]}
    with explained():
        releases.client.set(f"{releases.namespace}:current", json.dumps(content))
