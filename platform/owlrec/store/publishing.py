"""Builds a release where nobody sees it, reads it back, moves it into place, and only then swaps the pointer.

An interruption at any point leaves what was current in force, and at worst a hidden folder that the next publish
removes. Publishing what is there already (the same fingerprint) verifies it and makes it current again instead of
building a twin. Publish to one workspace from one process at a time: two at once both leave whole releases, but the
pointer's history may miss one swap.
"""

import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.fs as pafs

from owlrec.config import Config
from owlrec.errors import ReleaseError
from owlrec.store.lmdb_writer import LmdbWriter
from owlrec.store.release import (
    MANIFEST,
    STORE,
    FileEntry,
    ReleaseManifest,
    check_files,
    make_current,
    open_store,
    read_manifest,
)
from owlrec.workspace import Workspace, file_digest

_BUILDING = re.compile(r"\.building-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_RELEASE = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_LEFTOVER_AFTER_S = 3600.0  # a build writes all the time, so that an hour without a change means that it died


class ReleaseInfo(Config):
    """What a release says about where its contents come from."""

    fingerprint: str  # of all that shaped the contents; publishing it twice gives one release
    model: str
    encoder: str
    parent: str | None = None


def publish(
    workspace: Workspace,
    *,
    knowledge: Iterable[pa.Table],
    vectors: Iterable[pa.Table],
    info: ReleaseInfo,
    on_rows: Callable[[int], None] | None = None,
) -> ReleaseManifest:
    """Publishes knowledge and vectors as a release and makes it current.

    knowledge: tables of schema.KNOWLEDGE; vectors: tables of schema.vectors_schema. Both are read once, one table at a
    time, and not at all where a whole release of this fingerprint exists.
    on_rows: called with the number of rows just written.
    Raises SchemaError for a broken table or a key that occurs twice, ReleaseError where there is nothing to publish or
    what was written does not read back. Nothing becomes visible in either case.
    """
    remove_leftovers(workspace)
    existing = _whole_release(workspace, info.fingerprint)
    if existing:
        make_current(workspace, existing.name)
        return existing
    building = _building_folder(workspace)
    try:
        manifest = _build(workspace, building, knowledge, vectors, info, on_rows or (lambda n: None))
        _place(workspace, building, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    make_current(workspace, manifest.name)
    return manifest


def remove_leftovers(workspace: Workspace) -> list[str]:
    """Removes builds of dead processes, and builds and uploads that nobody touched for an hour; gives their names."""
    selector = pafs.FileSelector(workspace.path("releases"), allow_not_found=True)
    removed = []
    for entry in workspace.filesystem.get_file_info(selector):
        build = _BUILDING.fullmatch(entry.base_name)
        upload = _RELEASE.fullmatch(entry.base_name) and not workspace.exists("releases", entry.base_name, MANIFEST)
        if not (build or upload):
            continue
        dead = build and build["host"] == socket.gethostname() and not psutil.pid_exists(int(build["pid"]))
        if dead or _idle_s(workspace, entry) > _LEFTOVER_AFTER_S:
            workspace.delete_dir("releases", entry.base_name)
            removed.append(entry.base_name)
    return removed


def _idle_s(workspace: Workspace, folder: pafs.FileInfo) -> float:
    inside = workspace.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    changes = [i.mtime.timestamp() for i in [folder, *inside] if i.mtime]
    return time.time() - max(changes) if changes else 0.0


def _whole_release(workspace: Workspace, fingerprint: str) -> ReleaseManifest | None:
    for name in reversed(workspace.names("releases")):
        if not name.endswith(fingerprint[:8]) or not workspace.exists("releases", name, MANIFEST):
            continue
        try:
            manifest = read_manifest(workspace, name)
            if manifest.fingerprint != fingerprint:
                continue
            if workspace.local:  # a remote one was checked when it was uploaded, and each reader checks its copy
                folder = workspace.local_path("releases", name)
                check_files(folder, manifest, checksums=True)
                open_store(folder, manifest).close()
            return manifest
        except ReleaseError:
            continue  # damaged: it is built again, under a new name
    return None


def _building_folder(workspace: Workspace) -> Path:
    if not workspace.local:
        return Path(tempfile.mkdtemp(prefix="owlrec-release-"))
    name = f".building-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder = workspace.local_path("releases", name)
    folder.mkdir(parents=True)
    return folder


def _build(
    workspace: Workspace,
    folder: Path,
    knowledge: Iterable[pa.Table],
    vectors: Iterable[pa.Table],
    info: ReleaseInfo,
    on_rows: Callable[[int], None],
) -> ReleaseManifest:
    writer = LmdbWriter(folder / STORE)
    try:
        for number, table in enumerate(knowledge):
            writer.add_knowledge(table, name=f"knowledge table {number}")
            on_rows(table.num_rows)
        for number, table in enumerate(vectors):
            writer.add_vectors(table, name=f"vectors table {number}")
            on_rows(table.num_rows)
    finally:
        writer.close()
    if writer.as_of_min is None or writer.as_of_max is None:
        raise ReleaseError(f"{workspace.root}: there is no knowledge to publish. Run the generate stage first.")
    name, created = _free_name(workspace, info.fingerprint)
    manifest = ReleaseManifest(
        name=name,
        created=created.isoformat(),
        knowledge=writer.counts["knowledge"],
        vectors=writer.counts["vectors"],
        dim=writer.dim,
        as_of_min=writer.as_of_min,
        as_of_max=writer.as_of_max,
        files={STORE: FileEntry(sha256=file_digest(folder / STORE), bytes=(folder / STORE).stat().st_size)},
        **info.model_dump(),
    )
    _read_back(folder, manifest, writer)
    return manifest


def _read_back(folder: Path, manifest: ReleaseManifest, writer: LmdbWriter) -> None:
    store = open_store(folder, manifest)
    try:
        for database, sample in writer.samples.items():
            for key, value in sample.rows:
                if store.raw(database, key) != value:
                    raise ReleaseError(
                        f"{folder / STORE}: a row of {database} does not read back as it was written. "
                        f"Check the disk, then publish again; nothing was made visible."
                    )
    finally:
        store.close()
    check_files(folder, manifest, checksums=True)


def _free_name(workspace: Workspace, fingerprint: str) -> tuple[str, datetime]:
    now = datetime.now(UTC).replace(microsecond=0)
    while workspace.exists("releases", name := f"{now:%Y%m%dT%H%M%SZ}-{fingerprint[:8]}"):
        now += timedelta(seconds=1)  # a damaged twin of this very second
    return name, now


def _place(workspace: Workspace, building: Path, manifest: ReleaseManifest) -> None:
    document = manifest.model_dump_json(indent=2).encode()
    if workspace.local:
        (building / MANIFEST).write_bytes(document)
        for path in (building / MANIFEST, building):
            _sync(path)
        target = workspace.local_path("releases", manifest.name)
        building.rename(target)
        _sync(target.parent)
        return
    # An object store has no rename: the folder is no release until its manifest, uploaded last, is there.
    pafs.copy_files(
        str(building),
        workspace.path("releases", manifest.name),
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=workspace.filesystem,
    )
    for file, entry in manifest.files.items():
        uploaded = workspace.filesystem.get_file_info(workspace.path("releases", manifest.name, file)).size
        if uploaded != entry.bytes:
            raise ReleaseError(
                f"{workspace.path('releases', manifest.name, file)} has {uploaded} bytes after its upload, "
                f"not {entry.bytes}. Publish again; nothing was made visible."
            )
    workspace.write_bytes(f"releases/{manifest.name}/{MANIFEST}", document)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
