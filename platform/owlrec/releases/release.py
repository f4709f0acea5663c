"""Releases: immutable folders of verified knowledge, and the one small file that says which of them is in force.

    releases/<UTC time>-<fingerprint8>/   store.lmdb and release.json; semantic_ids/<kind>/ where vectors have codes
    releases/CURRENT                      JSON: {"release": name, "history": [oldest, ..., name]}

The pointer carries its own history, so that one atomic write changes both: a roll-back goes to what was current before,
even where a later release was never current or two were published out of order. A folder without release.json is no
release. A delta is read on top of its parent, whose folder it needs, and so on to a full release. Readers hold what
they opened, whatever the pointer says afterwards.
"""

import shutil
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import lmdb
import pyarrow.fs as pafs

from owlrec.encoding.semantic_ids import Quantiser
from owlrec.environment import cache_folder
from owlrec.errors import ReleaseError, WorkspaceError
from owlrec.releases.chain import ChainedStore
from owlrec.releases.interface import KnowledgeStore
from owlrec.releases.lmdb_store import LmdbStore
from owlrec.releases.manifest import MANIFEST, MEND, STORE, ReleaseManifest, check_files, read_manifest
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

_POINTER = "releases/CURRENT"
_HISTORY = 100  # swaps remembered
_TRIES = 10  # to open what is current: each fails only where the pointer moved and the old release went meanwhile


class Release:
    """One release, open for reading together with all that it is read on top of; a context manager."""

    def __init__(self, store: KnowledgeStore, chain: Sequence[ReleaseManifest], folders: Sequence[Path]) -> None:
        """chain: newest first; folders: theirs, local: the cached copies where the workspace is remote."""
        self.manifest = chain[0]
        self.store = store
        self.folder = folders[0]
        self.chain = tuple(chain)
        self._full_folder = folders[-1]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.manifest.name

    def quantisers(self) -> dict[str, Quantiser]:
        """By kind, what its vectors' semantic ids are made with; none for a kind without."""
        books = Workspace(self._full_folder)
        return {kind: Quantiser.load(books, quantiser_folder(kind)) for kind in self.chain[-1].semantic_ids}

    def close(self) -> None:
        """Closes its store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def quantiser_folder(kind: str) -> str:
    """Where a full release keeps the codebooks of a kind, relative to its folder."""
    return f"semantic_ids/{kind}"


def list_releases(workspace: Workspace) -> list[ReleaseManifest]:
    """The manifests of all complete releases, oldest first. Raises ReleaseError where one cannot be read."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def chain(workspace: Workspace, name: str) -> list[ReleaseManifest]:
    """The manifests of release `name` and of what it is read on top of: newest first, the last of them full.

    Raises ReleaseError where one is missing or cannot be read.
    """
    manifests = [read_manifest(workspace, name)]
    while (delta := manifests[-1]).delta:
        parent = delta.parent or ""
        if not workspace.exists("releases", parent, MANIFEST):
            raise ReleaseError(
                f"{workspace.path('releases', delta.name)} is a delta of release '{parent}', which is gone. "
                f"{_way_back(workspace)}"
            )
        manifests.append(read_manifest(workspace, parent))
    return manifests


def _way_back(workspace: Workspace) -> str:
    for name in reversed(workspace.names("releases")):
        with suppress(ReleaseError):
            if not read_manifest(workspace, name).delta:
                return f"Roll back to a full release (`owlrec rollback --to {name}`), or publish in full."
    return "Publish in full: no full release is left."


def current_release(workspace: Workspace) -> str | None:
    """The name of the release in force, None where nothing was published yet."""
    history = pointer_history(workspace)
    return history[-1] if history else None


def make_current(workspace: Workspace, name: str) -> None:
    """Swaps the pointer to release `name`. Raises ReleaseError where there is no such release, or no parent of it."""
    chain(workspace, name)
    history = pointer_history(workspace)
    if not history or history[-1] != name:
        _write_pointer(workspace, [*history, name])


def roll_back(workspace: Workspace, to: str | None = None) -> str:
    """Makes the release that was current before the current one current again, or release `to`; gives its name.

    What was current after the target is forgotten by the pointer (the folders stay), so that rolling back again goes
    further back; `roll_back(to=...)` also leads forward again. Releases that were removed, or whose parents were, are
    passed over. Raises ReleaseError where there is nothing to go back to.
    """
    history = pointer_history(workspace)
    if to is None:
        earlier = (n for n in reversed(history) if n != history[-1] and _is_whole(workspace, n))
        to = next(earlier, None)
        if to is None:
            raise ReleaseError(
                f"{workspace.path(_POINTER)}: no release was current before "
                f"{repr(history[-1]) if history else 'this'}, so there is nothing to roll back to. "
                f"Name a release: `owlrec releases` shows them."
            )
    chain(workspace, to)
    _write_pointer(workspace, back_to(history, to))
    return to


def back_to(history: list[str], to: str) -> list[str]:
    """A pointer's history after a roll-back to release `to`: what was current after it is forgotten."""
    return history[: len(history) - history[::-1].index(to)] if to in history else [*history, to]


def _is_whole(workspace: Workspace, name: str) -> bool:
    try:
        return bool(chain(workspace, name))
    except ReleaseError:
        return False


def open_release(
    workspace: Workspace, name: str | None = None, *, verify: bool = True, cache: Path | None = None
) -> Release:
    """Opens release `name`, or the current one, with all that it is read on top of.

    verify: compare the SHA-256 of its files as well as their sizes; a large release is opened faster without (about 1 s
    a GB).
    cache: where a remote workspace's releases are copied to, by default `releases` in OwlRec's cache; copies are always
    verified.
    Raises ReleaseError where there is none, or where a file or a parent is missing, cut short or changed. Without a
    name, a release that is replaced and pruned while it is being opened is no error: the one in its place is opened.
    """
    if name:
        return _open(workspace, name, verify, cache)
    for _ in range(_TRIES):
        name = current_release(workspace)
        if name is None:
            raise ReleaseError(f"{workspace.path('releases')}: nothing was published yet. Run the publish stage first.")
        try:
            return _open(workspace, name, verify, cache)
        except (ReleaseError, OSError) as error:
            if current_release(workspace) == name:
                raise
            last = error
    raise ReleaseError(
        f"{workspace.path(_POINTER)} moved {_TRIES} times while what it named was being opened (last: {last}). "
        f"Prune less often, or with a greater minimum age."
    )


def _open(workspace: Workspace, name: str, verify: bool, cache: Path | None) -> Release:
    manifests = chain(workspace, name)
    parts = open_parts(workspace, manifests, verify=verify, cache=cache)
    newest = manifests[0]
    store = ChainedStore(parts, dim=newest.dim, totals=newest.totals) if newest.delta else parts[0]
    return Release(store, manifests, [part.path.parent for part in parts])


def open_parts(
    workspace: Workspace, manifests: Sequence[ReleaseManifest], *, verify: bool = True, cache: Path | None = None
) -> list[LmdbStore]:
    """The store of each release, its files checked as open_release says. One that fails leaves none open."""
    with ExitStack() as opened:
        parts = []
        for manifest in manifests:
            if workspace.local:
                folder = workspace.local_path("releases", manifest.name)
                check_files(folder, manifest, checksums=verify)
            else:
                folder = _cached_copy(workspace, manifest, cache or cache_folder("releases"), verify)
            parts.append(opened.enter_context(open_store(folder, manifest)))
        opened.pop_all()
    return parts


def open_store(folder: Path, manifest: ReleaseManifest) -> LmdbStore:
    """The store in a release's local folder. Raises ReleaseError where its row counts are not the manifest's."""
    sizes = {kind: entry.sizes for kind, entry in manifest.semantic_ids.items()}
    store = LmdbStore(folder / STORE, dim=manifest.dim, counts=manifest.knowledge, code_sizes=sizes)
    expected = {
        "knowledge": sum(manifest.knowledge.values()),
        "vectors": sum(manifest.vectors.values()) + sum(manifest.partitions.values()),
        "memberships": sum(manifest.memberships.values()),
        "codes": sum(manifest.codes.values()),
    }
    try:
        for database, rows in expected.items():
            if store.rows(database) != rows:
                raise ReleaseError(
                    f"{folder / STORE} holds {store.rows(database)} rows of {database}, but {MANIFEST} says {rows}. "
                    f"{MEND}"
                )
    except lmdb.Error as error:
        store.close()
        raise ReleaseError(f"{folder / STORE} cannot be read ({error}). {MEND}") from None
    except ReleaseError:
        store.close()
        raise
    return store


def pointer_history(workspace: Workspace) -> list[str]:
    """What was current, oldest first, the current one last; empty where nothing was published yet.

    Raises ReleaseError where the pointer cannot be read.
    """
    if not workspace.exists(_POINTER):
        return []
    try:
        return history_in(workspace.read_json(_POINTER))
    except (WorkspaceError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{workspace.path(_POINTER)} is unreadable ({error}). Delete it and name a release: "
            f"`owlrec releases` shows them, `owlrec rollback --to` makes one current."
        ) from None


def history_in(pointer: Any) -> list[str]:
    """The history that a pointer carries. Raises ValueError, KeyError or TypeError where it is none."""
    history = pointer["history"]
    if not isinstance(history, list) or not history or history[-1] != pointer["release"]:
        raise ValueError("'history' does not end with 'release'")
    return [str(name) for name in history]


def pointer_to(history: Sequence[str]) -> dict[str, Any]:
    """The pointer with this history, the release in force last."""
    return {"release": history[-1], "history": list(history[-_HISTORY:])}


def _write_pointer(workspace: Workspace, history: Sequence[str]) -> None:
    workspace.write_json(_POINTER, pointer_to(history))


def _cached_copy(workspace: Workspace, manifest: ReleaseManifest, cache: Path, verify: bool) -> Path:
    target = cache / f"{fingerprint(workspace.root)[:8]}-{manifest.name}"
    if target.is_dir():
        try:
            check_files(target, manifest, checksums=verify)
            return target
        except ReleaseError:
            shutil.rmtree(target, ignore_errors=True)  # a damaged copy costs another download, never an error
    temporary = cache / f".{target.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        pafs.copy_files(
            workspace.path("releases", manifest.name),
            str(temporary),
            source_filesystem=workspace.filesystem,
            destination_filesystem=pafs.LocalFileSystem(),
        )
        check_files(temporary, manifest, checksums=True)
        try:
            temporary.rename(target)
        except OSError:  # another process copied it meanwhile
            check_files(target, manifest, checksums=verify)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
