"""Releases: immutable folders of verified knowledge, and the one small file that says which of them is in force.

    releases/<UTC time>-<fingerprint8>/   store.lmdb and release.json
    releases/CURRENT                      JSON: {"release": name, "history": [oldest, ..., name]}

The pointer carries its own history, so that one atomic write changes both: a roll-back goes to what was current before,
even where a later release was never current or two were published out of order. A folder without release.json is no
release. Readers hold the release they opened, whatever the pointer says afterwards.
"""

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb
import pyarrow.fs as pafs
from pydantic import BaseModel, ValidationError

from owlrec.errors import ReleaseError, WorkspaceError, did_you_mean
from owlrec.store.interface import KnowledgeStore
from owlrec.store.lmdb_store import DATABASES, LmdbStore
from owlrec.workspace import Workspace, file_digest, fingerprint

FORMAT = 1
MANIFEST = "release.json"
STORE = "store.lmdb"
_POINTER = "releases/CURRENT"
_HISTORY = 100  # swaps remembered


class FileEntry(BaseModel):
    """A data file of a release."""

    sha256: str
    bytes: int


class ReleaseManifest(BaseModel):
    """What release.json says. Counts are rows by kind."""

    format: int = FORMAT
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    parent: str | None = None
    knowledge: dict[str, int]
    vectors: dict[str, int]
    dim: int
    as_of_min: int  # ms since 1970, UTC
    as_of_max: int
    files: dict[str, FileEntry]


class Release:
    """One release, open for reading; a context manager."""

    def __init__(self, manifest: ReleaseManifest, store: KnowledgeStore, folder: Path) -> None:
        self.manifest = manifest
        self.store = store
        self.folder = folder  # local: the cached copy where the workspace is remote

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.manifest.name

    def close(self) -> None:
        """Closes its store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def list_releases(workspace: Workspace) -> list[ReleaseManifest]:
    """The manifests of all complete releases, oldest first. Raises ReleaseError where one cannot be read."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def current_release(workspace: Workspace) -> str | None:
    """The name of the release in force, None where nothing was published yet."""
    history = _history(workspace)
    return history[-1] if history else None


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError where there is none, or one that this version cannot read."""
    path = f"releases/{name}/{MANIFEST}"
    if not workspace.exists(path):
        have = [n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST)]
        hint = did_you_mean(name, have) if have else " Nothing was published yet: run the publish stage."
        raise ReleaseError(f"{workspace.path('releases')} holds no release '{name}'.{hint}")
    try:
        manifest = ReleaseManifest.model_validate(workspace.read_json(path))
    except (ValidationError, WorkspaceError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{workspace.path(path)} is unreadable ({error}). {_MEND}") from None
    if manifest.format > FORMAT:
        raise ReleaseError(
            f"{workspace.path(path)} has format {manifest.format}; this owlrec reads up to {FORMAT}. Upgrade owlrec."
        )
    return manifest


def make_current(workspace: Workspace, name: str) -> None:
    """Swaps the pointer to release `name`. Raises ReleaseError where there is no such release."""
    read_manifest(workspace, name)
    history = _history(workspace)
    if not history or history[-1] != name:
        _write_pointer(workspace, [*history, name])


def roll_back(workspace: Workspace, to: str | None = None) -> str:
    """Makes the release that was current before the current one current again, or release `to`; gives its name.

    What was current after the target is forgotten by the pointer (the folders stay), so that rolling back again goes
    further back; `roll_back(to=...)` also leads forward again. Raises ReleaseError where there is nothing to go back
    to.
    """
    history = _history(workspace)
    if to is None:
        earlier = [n for n in history[:-1] if workspace.exists("releases", n, MANIFEST)]
        if not earlier:
            raise ReleaseError(
                f"{workspace.path(_POINTER)}: no release was current before "
                f"{repr(history[-1]) if history else 'this'}, so there is nothing to roll back to. "
                f"Name a release: `owlrec releases` shows them."
            )
        to = earlier[-1]
    read_manifest(workspace, to)
    if to in history:
        while history[-1] != to:
            history.pop()
    else:
        history.append(to)
    _write_pointer(workspace, history)
    return to


def open_release(
    workspace: Workspace, name: str | None = None, *, verify: bool = True, cache: Path | None = None
) -> Release:
    """Opens release `name`, or the current one.

    verify: compare the SHA-256 of its files as well as their sizes; a large release is opened faster without (about 1 s
    a GB).
    cache: where a remote workspace's releases are copied to, by default ~/.cache/owlrec/releases; copies are always
    verified.
    Raises ReleaseError where there is none, or where a file is missing, cut short or changed.
    """
    name = name or current_release(workspace)
    if name is None:
        raise ReleaseError(f"{workspace.path('releases')}: nothing was published yet. Run the publish stage first.")
    manifest = read_manifest(workspace, name)
    if workspace.local:
        folder = workspace.local_path("releases", name)
        check_files(folder, manifest, checksums=verify)
    else:
        folder = _cached_copy(workspace, manifest, cache or Path.home() / ".cache" / "owlrec" / "releases", verify)
    return Release(manifest, open_store(folder, manifest), folder)


def open_store(folder: Path, manifest: ReleaseManifest) -> LmdbStore:
    """The store in a release's local folder. Raises ReleaseError where its row counts are not the manifest's."""
    store = LmdbStore(folder / STORE, dim=manifest.dim, counts=manifest.knowledge)
    try:
        for database, counts in zip(DATABASES, (manifest.knowledge, manifest.vectors), strict=True):
            if store.rows(database) != sum(counts.values()):
                raise ReleaseError(
                    f"{folder / STORE} holds {store.rows(database)} rows of {database}, "
                    f"but {MANIFEST} says {sum(counts.values())}. {_MEND}"
                )
    except lmdb.Error as error:
        store.close()
        raise ReleaseError(f"{folder / STORE} cannot be read ({error}). {_MEND}") from None
    except ReleaseError:
        store.close()
        raise
    return store


def check_files(folder: Path, manifest: ReleaseManifest, *, checksums: bool) -> None:
    """Refuses a release whose files are missing, of another size or, with `checksums`, of other content (ReleaseError).

    The size is always compared: LMDB answers a truncated file with SIGBUS, which no caller can catch.
    """
    for file, entry in manifest.files.items():
        path = folder / file
        if not path.is_file():
            raise ReleaseError(f"{path} is missing. {_MEND}")
        if path.stat().st_size != entry.bytes:
            raise ReleaseError(f"{path} has {path.stat().st_size} bytes, but {MANIFEST} says {entry.bytes}. {_MEND}")
        if checksums and file_digest(path) != entry.sha256:
            raise ReleaseError(f"{path} is corrupt: its SHA-256 is not the one in {MANIFEST}. {_MEND}")


_MEND = "Roll back to the previous release (`owlrec rollback`), or publish again."


def _history(workspace: Workspace) -> list[str]:
    if not workspace.exists(_POINTER):
        return []
    try:
        pointer = workspace.read_json(_POINTER)
        history = pointer["history"]
        if not isinstance(history, list) or not history or history[-1] != pointer["release"]:
            raise ValueError("'history' does not end with 'release'")
        return [str(name) for name in history]
    except (WorkspaceError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{workspace.path(_POINTER)} is unreadable ({error}). Delete it and name a release: "
            f"`owlrec releases` shows them, `owlrec rollback --to` makes one current."
        ) from None


def _write_pointer(workspace: Workspace, history: Iterable[str]) -> None:
    kept = list(history)[-_HISTORY:]
    workspace.write_json(_POINTER, {"release": kept[-1], "history": kept})


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
