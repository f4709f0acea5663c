"""Releases: immutable folders of verified knowledge, and the one small file that names the current one.

    releases/<UTC time>-<fingerprint8>/   release.json, written last; parts/00000.lmdb, parts/00000.ids for each part;
                                          semantic_ids/<kind>/ where vectors have codes
    releases/CURRENT                      a Pointer: compare-and-swap, with its history, and HOLD beside it

The pointer carries its own history, so that one atomic write changes both: a roll-back goes to what was current before,
even where a later release was never current or two were published out of order. A folder without release.json is not a
release. A delta is read on top of its parent, whose folder it needs, and so on to a full release. Readers hold what
they opened, whatever the pointer says afterwards. On a node a remote workspace's parts are copies in its cache; a local
workspace's are mapped where they lie.
"""

import resource
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Protocol, Self

import numpy as np

from owlrec.config import Registry
from owlrec.encoding.compression import Quantiser
from owlrec.errors import OwlRecError, ReleaseError, did_you_mean
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
    quantiser_folder,
)
from owlrec.releases.lmdb import LmdbFile, LmdbStore, warm
from owlrec.schema import KINDS, TABLES, Kind, as_ids
from owlrec.storage import FileEntry, Pointer, PointerMoved
from owlrec.workspace import Tombstones, Workspace, read_tombstones

_TRIES = 10  # to open what is current: each fails only where the pointer moved and the old release went meanwhile
_AT_ONCE = 8  # parts that are fetched, or hashed, at a time; each is fetched by a dozen ranged reads
_SPARE_FILES = 512  # descriptors for what else a process has open
ANY: Any = object()


class Release:
    """One release, open for reading together with all that it is read on top of; a context manager.

    Ids are those of `schema.as_ids`: a text is a raw id, an integer an int64 id as tables hold it. Answers are aligned
    with the ids; an id of which nothing is known has None, or zeros and False.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        chain: Sequence[ReleaseManifest],
        workspace: Workspace | None = None,
        tombstones: Tombstones | None = None,
    ) -> None:
        """chain: newest first. workspace: that has its codebooks, where they are within reach. tombstones: of users of
        whom nothing is said.
        """
        self.manifest = chain[0]
        self.tombstones = tombstones or Tombstones()
        self.store = TombstonedStore(store, self.tombstones) if len(self.tombstones) else store
        self.chain = tuple(chain)
        self._workspace = workspace

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """The name, and who is forgotten: of two releases of one version every answer is the same."""
        return f"{self.name}+{self.tombstones.mark}" if self.tombstones.mark else self.name

    def __getitem__(self, key: tuple[Kind, int | str]) -> Knowledge:
        """The text about one id: `release["user", "B007"]`. Raises KeyError where there is none."""
        kind, id_ = key
        if kind not in KINDS:
            raise KeyError(f"there is no kind {kind!r}.{did_you_mean(str(kind), KINDS)}")
        (knowledge,) = self.get(kind, [id_])
        if knowledge is None:
            raise KeyError(f"release {self.name} holds no text about {kind} {id_!r}. Ask with `get` where it may miss.")
        return knowledge

    def __len__(self) -> int:
        """How many users and items have a text of their own."""
        return sum(self.store.count(kind) for kind in TABLES)

    def __bool__(self) -> bool:
        return True  # however many texts it has

    def get(self, kind: Kind, ids: Iterable[int | str]) -> list[Knowledge | None]:
        """The texts about some ids: an id's own, else what its cohorts say."""
        return self.store.get(kind, as_ids(ids))

    def vectors(self, kind: Kind, ids: Iterable[int | str]) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of some ids: (float32 [n, d], bool [n])."""
        return self.store.vectors(kind, as_ids(ids))

    def codes(self, kind: Kind, ids: Iterable[int | str]) -> tuple[np.ndarray, np.ndarray]:
        """The semantic ids of some ids, coarse to fine and a duplicate digit: (uint16 [n, levels + 1], bool [n])."""
        return self.store.codes(kind, as_ids(ids))

    def quantisers(self) -> dict[str, Quantiser]:
        """By kind, what its vectors' semantic ids are made with; none for a kind without."""
        return read_codebooks(self._workspace, self.chain[-1]) if self._workspace else {}

    def close(self) -> None:
        """Closes its store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# The pointer


def pointer(workspace: Workspace) -> Pointer:
    """What names the current release."""
    return Pointer(workspace, "releases/CURRENT")


def current_release(workspace: Workspace) -> str | None:
    """The name of the current release, None where nothing was published yet."""
    return pointer(workspace).current


def pointer_history(workspace: Workspace) -> list[str]:
    """What was current, oldest first, the current one last; empty where nothing was published yet."""
    return pointer(workspace).history


def make_current(workspace: Workspace, name: str, *, expected: str | None = ANY) -> None:
    """Swaps the pointer to release `name`; does nothing where it is current.

    expected: the release that must be current, since `name` was built on it; by default anything.
    Raises ReleaseError where there is no such release, or no parent of it, or another one is current; PointerHeld on a
    HOLD.
    """
    chain(workspace, name)
    current = pointer(workspace)
    if current.current == name:
        return
    try:
        current.move(name) if expected is ANY else current.move(name, expected=expected)
    except PointerMoved as error:
        raise ReleaseError(
            f"release {name} was built while {expected} was current, but now {current.current} is, and stays so "
            f"({error}) Run the same command again, or make this one current: `owlrec release rollback --to {name}`."
        ) from None


def roll_back(workspace: Workspace, to: str | None = None) -> str:
    """Makes the release that was current before the current one current again, or release `to`; gives its name.

    What was current after the target is forgotten by the pointer (the folders stay), so that rolling back again goes
    further back; `roll_back(to=...)` also leads forward again. Releases that were removed, or whose parents were, are
    passed over. Raises ReleaseError where there is nothing to go back to, PointerHeld on a HOLD.
    """
    history = pointer_history(workspace)
    if to is None:
        earlier = (n for n in reversed(history) if n != history[-1] and _is_whole(workspace, n))
        to = next(earlier, None)
        if to is None:
            raise ReleaseError(
                f"{workspace.path('releases/CURRENT')}: no release was current before "
                f"{repr(history[-1]) if history else 'this'}, so there is nothing to roll back to. "
                f"Name a release: `owlrec release list` shows them."
            )
    chain(workspace, to)
    pointer(workspace).rewind(to)
    return to


def _is_whole(workspace: Workspace, name: str) -> bool:
    try:
        return bool(chain(workspace, name))
    except ReleaseError:
        return False


# Opening


def open_release(
    workspace: Workspace, name: str | None = None, *, verify: bool = True, warmed: bool = False, lazily: bool = False
) -> Release:
    """Opens release `name`, or the current one, with all that it is read on top of; fetches what a remote workspace's
    node does not have yet.

    verify: compare the SHA-256 of a local workspace's files as well as their sizes; a large release is opened faster
    without (about 1 s per GB). Copies of a remote one are checked when they arrive. warmed: read its files ahead.
    lazily: open, and fetch, a part when an id of it is first asked for; for stages that need few.
    Raises ReleaseError where there is none, or where a file or a parent is missing, cut short or changed;
    WorkspaceError where it does not fit on the node. Without a name, a release that is replaced and pruned while it is
    being opened is not an error: the one in its place is opened.
    """
    if name:
        return _open(workspace, name, verify, warmed, lazily)
    for _ in range(_TRIES):
        name = current_release(workspace)
        if name is None:
            raise ReleaseError(f"{workspace.path('releases')}: nothing was published yet. Run the publish stage first.")
        try:
            return _open(workspace, name, verify, warmed, lazily)
        except (OwlRecError, OSError) as error:
            if current_release(workspace) == name:
                raise
            last = error
    raise ReleaseError(
        f"{workspace.path('releases/CURRENT')} moved {_TRIES} times while what it named was being opened (last: "
        f"{last}). Prune less often, or with a greater minimum age."
    )


def _open(workspace: Workspace, name: str, verify: bool, warmed: bool, lazily: bool) -> Release:
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
        opened.pop_all()
    store = ChainedStore(layers, dim=newest.dim, totals=newest.totals) if newest.delta else layers[0]
    return Release(store, manifests, workspace, read_tombstones(workspace))


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
    """One part, fetched if it has to be. Raises ReleaseError where its row counts are not the manifest's."""
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
    """Refuses a release whose files are missing, of another size or, with `hashed`, of other content (ReleaseError).

    unless_tagged: hash only files that were written again since, as their e_tags tell. The size is always compared:
    LMDB answers a truncated file with SIGBUS, which no caller can catch.
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


def read_codebooks(workspace: Workspace, full: ReleaseManifest) -> dict[str, Quantiser]:
    """By kind, the quantisers that a full release keeps."""
    folders = {kind: f"releases/{full.name}/{quantiser_folder(kind)}" for kind in full.semantic_ids}
    return {kind: Quantiser.load(workspace, folder) for kind, folder in folders.items()}


def read_part_ids(workspace: Workspace, manifest: ReleaseManifest, number: int, kind: str) -> np.ndarray:
    """The ids of a kind with knowledge of their own in one part, from its file of ids: int64, ascending."""
    ids = manifest.parts[number].ids
    if not ids.get(kind):
        return np.zeros(0, dtype=np.int64)
    before = sum(ids.get(earlier, 0) for earlier in KEY_ORDER[: KEY_ORDER.index(kind)])
    data = workspace.read_range(f"releases/{manifest.name}/{ids_file(number)}", 8 * before, 8 * ids[kind])
    return np.frombuffer(data, dtype="<i8").astype(np.int64)


def _check_fits(manifests: Sequence[ReleaseManifest]) -> None:
    """Refuses, before anything is fetched, a release that the node's cache cannot hold."""
    size = sum(m.bytes for m in manifests)
    room = NodeCache.default().max_bytes
    if size > room:
        raise ReleaseError(
            f"release {manifests[0].name} has {size:,} bytes, but this node's cache may hold {room:,}. Raise "
            "OWLREC_CACHE_GIB, or set OWLREC_CACHE to a folder on a larger disk."
        )


def _allow_files(n: int) -> None:
    """Raises this process's limit of open files where it can: a part takes two, itself and its copy's lock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + _SPARE_FILES
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


# Where servers look for releases


class ReleaseSource(Protocol):
    """Where releases come from."""

    def current(self) -> str | None:
        """The name of the current release; None where nothing was published yet."""

    def forgotten(self) -> str:
        """The mark of those who are forgotten (Tombstones.mark): where it changed, a release must be opened again."""

    def open(self, name: str) -> Release:
        """Opens a release. Raises ReleaseError or StoreUnavailableError."""


class Database(ReleaseSource, Protocol):
    """A ReleaseSource behind an address."""

    def __init__(self, url: str) -> None: ...


# Databases that hold copies of releases, by the scheme of their address: a new one is a class and a line here.
STORES: Registry[Database] = Registry(
    "store",
    {
        "redis": "owlrec.releases.redis.RedisReleases",
        "rediss": "owlrec.releases.redis.RedisReleases",
        "unix": "owlrec.releases.redis.RedisReleases",
    },
)


def open_store(url: str) -> ReleaseSource:
    """The releases at an address such as redis://host:6379/0. Raises ReleaseError for a scheme that nobody knows."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise ReleaseError(f"'{scheme}' begins no address of a store.{did_you_mean(scheme, STORES)}")
    return STORES.load(scheme)(url)
