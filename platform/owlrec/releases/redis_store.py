"""The cluster's store: releases in Redis or Valkey, each under a prefix of its own, read by pipelined multi-gets.

What stands there is a copy of a workspace's releases (owlrec.releases.redis_publishing), row by row as LMDB holds them:

    {namespace}:r:{release}:manifest            the release's manifest, written after all its rows
    {namespace}:r:{release}:{database}:{key}    one row; key and value as in owlrec.releases.lmdb_store
    {namespace}:r:{release}:ids:{kind}:{n}      the n-th hundred thousand ids with knowledge, as little-endian int64
    {namespace}:current                         JSON {"release", "history"}, switched last

A delta's rows stand under its own prefix and are read on top of its parent's, as on disk.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from owlrec.errors import ReleaseError, StoreUnavailableError
from owlrec.releases.chain import ChainedStore
from owlrec.releases.lmdb_store import RowStore, encode_key
from owlrec.releases.manifest import ReleaseManifest
from owlrec.releases.release import Release, history_in

NAMESPACE = "owlrec"
IDS_A_CHUNK = 100_000
_KEYS_A_GET = 256  # a longer MGET keeps a single-threaded server from everybody else


def connect(url: str, *, timeout_s: float = 1.0) -> Any:
    """A client of the server at `url` (redis://, rediss:// or unix://).

    timeout_s: for connecting and for each answer, so that a server that hangs is found out at once.
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
        raise ReleaseError(f"'{shown}' is no Redis URL ({error}). Write redis://HOST:PORT/DB.") from None


class RedisStore(RowStore):
    """Reads the rows of one release; threads may share it."""

    remote = True

    def __init__(self, client: Any, manifest: ReleaseManifest, namespace: str = NAMESPACE) -> None:
        """client: as `connect` makes it; it stays open when the store is closed."""
        sizes = {kind: entry.sizes for kind, entry in manifest.semantic_ids.items()}
        super().__init__(f"release {manifest.name} in Redis", manifest.knowledge, sizes)
        self._client = client
        self._manifest = manifest
        self._prefix = release_prefix(namespace, manifest.name)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        found = np.zeros((len(ids), n, self._manifest.dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        slots = range(n if self._manifest.partitions else 1)
        places = [(row, slot) for row in range(len(ids)) for slot in slots]
        values = self._rows("vectors", [encode_key(kind, int(ids[row]), slot) for row, slot in places])
        for place, value in zip(places, values, strict=True):
            if value is not None:
                found[place], mask[place] = np.frombuffer(value, dtype=np.float16), True
        return found, mask

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        n = self.count(kind) if limit is None else min(limit, self.count(kind))
        keys = [f"{self._prefix}:ids:{kind}:{chunk}".encode() for chunk in range(-(-n // IDS_A_CHUNK))]
        chunks = [np.frombuffer(v, dtype="<i8") for v in self._get(keys) if v is not None]
        return np.concatenate([np.zeros(0, dtype=np.int64), *chunks])[:n].astype(np.int64)

    def close(self) -> None:
        """See KnowledgeStore.close: nothing is held, other releases use the same connections."""

    def _values(self, database: str, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        keys = [encode_key(kind, int(id_)) for id_ in ids]
        return self._rows(database, keys) if getattr(self._manifest, database) else [None] * len(keys)

    def _rows(self, database: str, keys: Iterable[bytes]) -> list[bytes | None]:
        prefix = row_prefix(self._prefix, database)
        return self._get([prefix + key for key in keys])

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        with explained():
            if len(keys) <= _KEYS_A_GET:
                return list(self._client.mget(keys))
            pipeline = self._client.pipeline(transaction=False)
            for start in range(0, len(keys), _KEYS_A_GET):
                pipeline.mget(keys[start : start + _KEYS_A_GET])
            return [value for answer in pipeline.execute() for value in answer]


class RedisReleases:
    """The releases that a server holds: what `owlrec.serving.served` follows."""

    def __init__(self, url: str, namespace: str = NAMESPACE, *, timeout_s: float = 1.0) -> None:
        """See `connect`."""
        self.client = connect(url, timeout_s=timeout_s)
        self.namespace = namespace

    def history(self) -> list[str]:
        """What was current, oldest first, the current release last. Raises ReleaseError where the pointer is none."""
        with explained():
            raw = self.client.get(f"{self.namespace}:current")
        if raw is None:
            return []
        try:
            return history_in(json.loads(raw))
        except (ValueError, KeyError, TypeError) as error:
            raise ReleaseError(
                f"the key {self.namespace}:current is no pointer ({error}). Delete it and run `owlrec push` again."
            ) from None

    def current(self) -> str | None:
        """The name of the release in force; None where nothing was pushed yet."""
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
                f"release {name} in Redis: its manifest is unreadable ({error}). Run `owlrec push --replace`."
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
                raise ReleaseError(f"Redis holds no release '{step}'. Run `owlrec push` for the workspace that has it.")
            manifests.append(manifest)
            step = manifest.parent if manifest.delta else None
        return manifests

    def open(self, name: str) -> Release:
        """Opens a release with all that it is read on top of. Raises ReleaseError where a part is missing."""
        manifests = self.chain(name)
        newest, parts = manifests[0], [RedisStore(self.client, m, self.namespace) for m in manifests]
        store = ChainedStore(parts, dim=newest.dim, totals=newest.totals) if newest.delta else parts[0]
        return Release(store, manifests, [Path()])  # its codebooks stay with the workspace


def release_prefix(namespace: str, name: str) -> str:
    """Under which all keys of a release stand."""
    return f"{namespace}:r:{name}"


def row_prefix(prefix: str, database: str) -> bytes:
    """What a row's key begins with; the rest is as in LMDB."""
    return f"{prefix}:{database}:".encode()


@contextmanager
def explained() -> Iterator[None]:
    """Turns what the redis package raises into StoreUnavailableError."""
    import redis

    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StoreUnavailableError(f"Redis does not answer: {type(error).__name__}: {error}") from error
