"""Releases: immutable folders of verified knowledge, and the one small file that names the current one.

    releases/<UTC time>-<fingerprint8>/   release.json, written last; parts/00000.lmdb, parts/00000.ids per part;
                                          parts/00000-<kind>.faiss, indexes of similar vectors; semantic_ids/<kind>/
                                          if vectors have codes
    releases/CURRENT                      a Pointer with its history, changed by compare-and-swap, and an optional HOLD
    releases/.log/                        one file per publish, roll-back and removal: when, what, by whom

The pointer contains its own history, so one atomic write changes both: a roll-back goes to the previously current
release, even if a later release was never current or two were published out of order. A folder without release.json is
not a release. A delta is read on top of its parent, whose folder it needs, and so on down to a full release. Readers
keep the release they opened, whatever the pointer says later. On a node, a remote workspace's parts are copies in its
cache; a local workspace's are mapped in place.
"""

import getpass
import os
import resource
import secrets
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel

from owlrec.config import Registry
from owlrec.encoding.compression import Quantizer
from owlrec.errors import OwlRecError, ReleaseError, did_you_mean
from owlrec.ids import KINDS, TABLES, Kind, as_ids
from owlrec.machine import NodeCache
from owlrec.releases.format import (
    DATABASES,
    KEY_ORDER,
    MANIFEST,
    WAY_BACK,
    ChainedStore,
    Knowledge,
    KnowledgeStore,
    ReleaseManifest,
    TombstonedStore,
    chain,
    ids_file,
    part_file,
    quantizer_folder,
)
from owlrec.releases.lmdb import LmdbFile, LmdbStore, warm
from owlrec.releases.similar import SimilarIndex, faiss_or_none, open_index, similar_file
from owlrec.storage import FileEntry, Pointer, PointerMoved
from owlrec.workspace import Tombstones, Workspace, read_tombstones

_TRIES = 10  # to open the current release: fails only if it is replaced and pruned meanwhile
_AT_ONCE = 8  # parts fetched or hashed at a time, each by a dozen ranged reads
_SPARE_FILES = 512  # descriptors for a process's other files
_LOG = "releases/.log"
ANY: Any = object()


class Release:
    """One release, open for reading together with its parents; a context manager.

    Ids follow `ids.as_ids`: a text is a raw id, an integer an int64 id as in tables. Answers are aligned
    with the ids; an unknown id has None, or zeros and False.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        chain: Sequence[ReleaseManifest],
        workspace: Workspace | None = None,
        tombstones: Tombstones | None = None,
        similar: SimilarIndex | None = None,
    ) -> None:
        """chain: newest first. workspace: source of its codebooks, if reachable. tombstones: users to
        hide. similar: open for nearest neighbors, if asked for.
        """
        self.manifest = chain[0]
        self.tombstones = tombstones or Tombstones()
        self.store = TombstonedStore(store, self.tombstones) if len(self.tombstones) else store
        self.chain = tuple(chain)
        self.similar = similar
        self._workspace = workspace

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """The name plus the forgotten users: two releases of one version give the same answers."""
        return f"{self.name}+{self.tombstones.mark}" if self.tombstones.mark else self.name

    def __getitem__(self, key: tuple[Kind, int | str]) -> Knowledge:
        """Text about one id: `release["user", "B007"]`. Raises KeyError if there is none."""
        kind, id_ = key
        if kind not in KINDS:
            raise KeyError(f"there is no kind {kind!r}.{did_you_mean(str(kind), KINDS)}")
        (knowledge,) = self.get(kind, [id_])
        if knowledge is None:
            raise KeyError(
                f"release {self.name} has no text about {kind} {id_!r}. Use `get` for ids that may be missing."
            )
        return knowledge

    def __len__(self) -> int:
        """Number of users and items with their own text."""
        return sum(self.store.count(kind) for kind in TABLES)

    def __bool__(self) -> bool:
        return True  # for any number of texts

    def get(self, kind: Kind, ids: Iterable[int | str]) -> list[Knowledge | None]:
        """Texts about some ids: an id's own, or else its cohorts'."""
        return self.store.get(kind, as_ids(ids))

    def vectors(self, kind: Kind, ids: Iterable[int | str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of some ids: (float32 [n, d], bool [n])."""
        return self.store.vectors(kind, as_ids(ids))

    def codes(self, kind: Kind, ids: Iterable[int | str]) -> tuple[np.ndarray, np.ndarray]:
        """Semantic ids of some ids, coarse to fine and a duplicate digit: (uint16 [n, levels + 1], bool [n])."""
        return self.store.codes(kind, as_ids(ids))

    def quantizers(self) -> dict[str, Quantizer]:
        """By kind, the quantizers of its semantic ids; kinds without codes are missing."""
        return read_codebooks(self._workspace, self.chain[-1]) if self._workspace else {}

    def close(self) -> None:
        """Closes its store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# The log


ReleaseChange = Literal["publish", "rollback", "remove", "push"]


class ReleaseEvent(BaseModel):
    """One change of what is served, or could be."""

    at: str  # ISO 8601, UTC
    event: ReleaseChange
    release: str
    by: str  # the actor


def actor() -> str:
    """Who acts: OWLREC_ACTOR, which a scheduler should set, or else the user and the machine."""
    if named := os.environ.get("OWLREC_ACTOR"):
        return named[:200]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def record_event(workspace: Workspace, event: ReleaseChange, release: str) -> None:
    """Adds to the log of a workspace's releases."""
    now = datetime.now(UTC)
    entry = ReleaseEvent(at=now.isoformat(timespec="milliseconds"), event=event, release=release, by=actor())
    name = f"{_LOG}/{now:%Y%m%dT%H%M%S%f}Z-{event}-{secrets.token_hex(3)}.json"
    workspace.write_bytes(name, entry.model_dump_json().encode())


def release_events(workspace: Workspace, last: int = 100) -> list[ReleaseEvent]:
    """The last changes of a workspace's releases, oldest first."""
    return [ReleaseEvent(**workspace.read_json(f"{_LOG}/{name}")) for name in workspace.names(_LOG)[-last:]]


# The pointer


def pointer(workspace: Workspace) -> Pointer:
    """Pointer to the current release."""
    return Pointer(workspace, "releases/CURRENT")


def current_release(workspace: Workspace) -> str | None:
    """Name of the current release, None if nothing has been published."""
    return pointer(workspace).current


def pointer_history(workspace: Workspace) -> list[str]:
    """Previously current releases, oldest first, the current one last; empty if nothing has been published."""
    return pointer(workspace).history


def make_current(workspace: Workspace, name: str, *, expected: str | None = ANY) -> None:
    """Swaps the pointer to release `name`; does nothing if it is already current.

    expected: the release that must be current, since `name` was built on it; by default any.
    Raises ReleaseError if there is no such release, or no parent of it, or another one is current; PointerHeld on a
    HOLD.
    """
    chain(workspace, name)
    current = pointer(workspace)
    if current.current == name:
        return
    try:
        current.move(name) if expected is ANY else current.move(name, expected=expected)
        record_event(workspace, "publish", name)
    except PointerMoved as error:
        raise ReleaseError(
            f"release {name} was built on {expected}, but {current.current} is now current and stays current "
            f"({error}) Run the same command again, or make {name} current: `owlrec release rollback --to "
            f"{name}`."
        ) from None


def roll_back(workspace: Workspace, to: str | None = None) -> str:
    """Makes the previously current release, or release `to`, current again; returns its name.

    The pointer drops everything after the target from its history (the folders stay), so rolling back again goes
    further back; `roll_back(to=...)` can also go forward again. Removed releases, and those with removed parents, are
    skipped. Raises ReleaseError if there is nothing to go back to, PointerHeld on a HOLD.
    """
    history = pointer_history(workspace)
    if to is None:
        earlier = (n for n in reversed(history) if n != history[-1] and _is_whole(workspace, n))
        to = next(earlier, None)
        if to is None:
            raise ReleaseError(
                f"{workspace.path('releases/CURRENT')}: no release was current before "
                f"{repr(history[-1]) if history else 'this'}, so there is nothing to roll back to. Choose a "
                "release from `owlrec release list`."
            )
    chain(workspace, to)
    pointer(workspace).rewind(to)
    record_event(workspace, "rollback", to)
    return to


def _is_whole(workspace: Workspace, name: str) -> bool:
    try:
        return bool(chain(workspace, name))
    except ReleaseError:
        return False


# Opening


def open_release(
    workspace: Workspace,
    name: str | None = None,
    *,
    verify: bool = True,
    warmed: bool = False,
    lazily: bool = False,
    similar: bool = False,
) -> Release:
    """Opens release `name`, or the current one, with its parents; for a remote workspace, fetches the parts that the
    node does not have.

    verify: compare the SHA-256 of a local workspace's files in addition to their sizes, which takes about 1 s per GB
    for a large release. Copies of remote files are verified on arrival. warmed: read its files ahead. lazily: open and
    fetch a part when one of its ids is first requested, for stages that need few. similar: also open its indexes of
    similar vectors, if it and all its parents have them. Raises ReleaseError if there is none,
    or if a file or a parent is missing, truncated or changed; WorkspaceError if it does not fit on the node. Without a
    name, a release that is replaced and pruned during opening is not an error: the new one is opened.
    """
    if name:
        return _open(workspace, name, verify, warmed, lazily, similar)
    for _ in range(_TRIES):
        name = current_release(workspace)
        if name is None:
            raise ReleaseError(
                f"{workspace.path('releases')}: nothing has been published. Run the publish stage first."
            )
        try:
            return _open(workspace, name, verify, warmed, lazily, similar)
        except (OwlRecError, OSError) as error:
            if current_release(workspace) == name:
                raise
            last = error
    raise ReleaseError(
        f"{workspace.path('releases/CURRENT')} changed {_TRIES} times while its release was being opened "
        f"(last: {last}). Prune less often, or with a higher minimum age."
    )


def _open(workspace: Workspace, name: str, verify: bool, warmed: bool, lazily: bool, similar: bool) -> Release:
    manifests = chain(workspace, name)
    newest = manifests[0]
    if not workspace.local and not lazily:
        _check_fits(manifests)
    _allow_files(2 * sum(len(m.parts) for m in manifests))
    with ExitStack() as opened:
        layers = []
        for manifest in manifests:
            if workspace.local:
                check_files(workspace, manifest, hashed=verify)
            layers.append(opened.enter_context(_open_layer(workspace, manifest, warmed)))
            if not lazily:
                layers[-1].open_all(_AT_ONCE)
        index = _open_similar(workspace, manifests, layers) if similar else None
        opened.pop_all()
    store = ChainedStore(layers, dim=newest.dim, totals=newest.totals) if newest.delta else layers[0]
    return Release(store, manifests, workspace, read_tombstones(workspace), index)


def _open_similar(
    workspace: Workspace, manifests: Sequence[ReleaseManifest], stores: Sequence[LmdbStore]
) -> SimilarIndex | None:
    """The indexes of a chain; None if one of its releases with vectors was built without, or without faiss here."""
    if faiss_or_none() is None or any(m.vectors and not m.similar for m in manifests):
        return None

    def mapped(manifest: ReleaseManifest, file: str) -> Any:
        copy = workspace.local_copy(f"releases/{manifest.name}/{file}", manifest.files[file])
        index = open_index(copy.path)
        copy.keep_for(index)
        return index

    layers = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for manifest, store in zip(manifests, stores, strict=True):
            files = {k: [similar_file(part, k) for part in range(len(manifest.parts))] for k in manifest.similar}
            files = {kind: [file for file in listed if file in manifest.files] for kind, listed in files.items()}
            opening = {kind: [pool.submit(mapped, manifest, file) for file in listed] for kind, listed in files.items()}
            layers.append((store, {kind: [one.result() for one in listed] for kind, listed in opening.items()}))
    return SimilarIndex(layers)


def _open_layer(workspace: Workspace, manifest: ReleaseManifest, warmed: bool) -> LmdbStore:
    return LmdbStore(
        workspace.path("releases", manifest.name),
        len(manifest.parts),
        lambda number: open_part(workspace, manifest, number, warmed=warmed),
        dim=manifest.dim,
        counts=manifest.knowledge,
        partitions=manifest.partitions,
        code_sizes={kind: entry.sizes for kind, entry in manifest.semantic_ids.items()},
    )


def open_part(workspace: Workspace, manifest: ReleaseManifest, number: int, *, warmed: bool = False) -> LmdbFile:
    """Opens one part, fetching it if needed. Raises ReleaseError if its row counts differ from the manifest's."""
    path = f"releases/{manifest.name}/{part_file(number)}"
    copy = workspace.local_copy(path, manifest.files[part_file(number)])
    try:
        if warmed:
            warm(copy.path)
        file = LmdbFile(copy.path, copy)
    except BaseException:
        copy.close()
        raise
    try:
        for database in DATABASES:
            expected, rows = manifest.parts[number].rows.get(database, 0), file.rows(database)
            if rows != expected:
                raise ReleaseError(
                    f"{workspace.path(path)} holds {rows} rows of {database}, but {MANIFEST} says {expected}. "
                    f"{WAY_BACK}"
                )
    except BaseException:
        file.close()
        raise
    return file


def check_files(workspace: Workspace, manifest: ReleaseManifest, *, hashed: bool, unless_tagged: bool = False) -> None:
    """Refuses a release with missing files, wrong sizes or, with `hashed`, wrong contents (ReleaseError).

    unless_tagged: hash only files rewritten since, according to their e_tags. Sizes are always compared:
    LMDB reacts to a truncated file with SIGBUS, which no caller can catch.
    """
    folder = f"releases/{manifest.name}"
    listed = workspace.entries(folder)

    def check(file: str, entry: FileEntry) -> None:
        path, present = f"{folder}/{file}", listed.get(file)
        if present is None:
            raise ReleaseError(f"{workspace.path(path)} is missing. {WAY_BACK}")
        if present.bytes != entry.bytes:
            raise ReleaseError(
                f"{workspace.path(path)} has {present.bytes} bytes, but {MANIFEST} says {entry.bytes}. {WAY_BACK}"
            )
        if hashed and not (unless_tagged and entry.matches(present)) and workspace.digest(path) != entry.sha256:
            raise ReleaseError(
                f"{workspace.path(path)} is corrupt: its SHA-256 is not the one in {MANIFEST}. {WAY_BACK}"
            )

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(check, *zip(*manifest.files.items(), strict=True)):
            pass


def read_codebooks(workspace: Workspace, full: ReleaseManifest) -> dict[str, Quantizer]:
    """Quantizers in a full release, by kind."""
    folders = {kind: f"releases/{full.name}/{quantizer_folder(kind)}" for kind in full.semantic_ids}
    return {kind: Quantizer.load(workspace, folder) for kind, folder in folders.items()}


def read_part_ids(workspace: Workspace, manifest: ReleaseManifest, number: int, kind: str) -> np.ndarray:
    """Ids of a kind with their own knowledge in one part, from its file of ids: int64, ascending."""
    ids = manifest.parts[number].ids
    if not ids.get(kind):
        return np.zeros(0, dtype=np.int64)
    before = sum(ids.get(earlier, 0) for earlier in KEY_ORDER[: KEY_ORDER.index(kind)])
    data = workspace.read_range(f"releases/{manifest.name}/{ids_file(number)}", 8 * before, 8 * ids[kind])
    return np.frombuffer(data, dtype="<i8").astype(np.int64)


def _check_fits(manifests: Sequence[ReleaseManifest]) -> None:
    """Refuses, before fetching anything, a release that is too large for the node's cache."""
    size = sum(m.bytes for m in manifests)
    room = NodeCache.default().max_bytes
    if size > room:
        raise ReleaseError(
            f"release {manifests[0].name} has {size:,} bytes, but this node's cache is limited to {room:,}. "
            "Raise OWLREC_CACHE_GIB, or set OWLREC_CACHE to a folder on a larger disk."
        )


def _allow_files(n: int) -> None:
    """Raises this process's limit of open files if possible: a part takes two, itself and its copy's lock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + _SPARE_FILES
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


# Sources of releases for servers


class ReleaseSource(Protocol):
    """A source of releases."""

    def current(self) -> str | None:
        """Name of the current release; None if nothing has been published."""

    def forgotten(self) -> str:
        """Mark of the forgotten users (Tombstones.mark): when it changes, a release must be reopened."""

    def open(self, name: str) -> Release:
        """Opens a release. Raises ReleaseError or StoreUnavailableError."""


class Database(ReleaseSource, Protocol):
    """A ReleaseSource behind an address."""

    def __init__(self, url: str) -> None: ...


# Databases with copies of releases, by the scheme of their address: a new one is a class and a line here.
STORES: Registry[Database] = Registry(
    "store",
    {
        "redis": "owlrec.releases.redis.RedisReleases",
        "rediss": "owlrec.releases.redis.RedisReleases",
        "unix": "owlrec.releases.redis.RedisReleases",
    },
)


def open_store(url: str) -> ReleaseSource:
    """Releases at an address such as redis://host:6379/0. Raises ReleaseError for an unknown scheme."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise ReleaseError(f"'{scheme}' is not a known store scheme.{did_you_mean(scheme, STORES)}")
    return STORES.load(scheme)(url)
