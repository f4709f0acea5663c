"""Builds a release where nobody sees it, reads it back, moves it into place, and only then swaps the pointer.

An interruption at any point leaves what was current in force, and at worst a hidden folder that the next publish
removes. Publishing what is there already (the same fingerprint) verifies it and makes it current again instead of
building a twin. A delta holds only what is new or changed, and is read on top of its parent. Publish to one workspace
from one process at a time: two at once both leave whole releases, but the pointer's history may miss one swap.
"""

import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.fs as pafs

from owlrec.config import Config
from owlrec.encoding.semantic_ids import Quantiser
from owlrec.errors import ReleaseError
from owlrec.releases.chain import count_new_ids
from owlrec.releases.lmdb_store import LmdbStore
from owlrec.releases.lmdb_writer import LmdbWriter
from owlrec.releases.manifest import (
    FORMAT,
    MANIFEST,
    STORE,
    FileEntry,
    ReleaseManifest,
    SemanticIdEntry,
    check_files,
    read_manifest,
)
from owlrec.releases.placing import place
from owlrec.releases.release import chain, make_current, open_parts, open_store, quantiser_folder
from owlrec.storage import file_digest
from owlrec.workspace import Workspace

_BUILDING = re.compile(r"\.building-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_RELEASE = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_LEFTOVER_AFTER_S = 3600.0  # a build writes all the time, so that an hour without a change means that it died


class ReleaseInfo(Config):
    """What a release says about where its contents come from."""

    fingerprint: str  # of all that shaped the contents; publishing it twice gives one release
    model: str
    encoder: str
    parent: str | None = None
    delta: bool = False  # only rows that are new or changed; what it lacks is read from `parent`


def publish(
    workspace: Workspace,
    *,
    knowledge: Iterable[pa.Table],
    vectors: Iterable[pa.Table],
    info: ReleaseInfo,
    memberships: Iterable[pa.Table] = (),
    quantisers: Mapping[str, Quantiser] | None = None,
    on_rows: Callable[[int], None] | None = None,
    cache: Path | None = None,
) -> ReleaseManifest:
    """Publishes knowledge and vectors as a release and makes it current.

    knowledge: tables of schema.KNOWLEDGE; vectors: tables of schema.vectors_schema, with a column `partition` where ids
    have several; memberships: tables of schema.MEMBERSHIPS. All are read once, one table at a time, and not at all
    where a whole release of this fingerprint exists (and, for a delta, of this parent).
    quantisers: by kind, whose codes the vectors have; a full release keeps them, and a delta's codes are its parent's.
    on_rows: called with the number of rows just written.
    cache: see open_release; the parents of a delta are read, to count which ids are new.
    Raises SchemaError for a broken table, a key that occurs twice or vectors of another length than a delta's parent
    has; ReleaseError where there is nothing to publish, a delta has no complete parent, or what was written does not
    read back. Nothing becomes visible in either case.
    """

    def fill(writer: LmdbWriter) -> None:
        for what, tables, add in (
            ("knowledge", knowledge, writer.add_knowledge),
            ("vectors", vectors, writer.add_vectors),
            ("memberships", memberships, writer.add_memberships),
        ):
            for number, table in enumerate(tables):
                add(table, name=f"{what} table {number}")
                if on_rows:
                    on_rows(table.num_rows)
        writer.check_partitions()

    manifest = build_release(workspace, info, fill, base=_parents(workspace, info), quantisers=quantisers, cache=cache)
    make_current(workspace, manifest.name)
    return manifest


def build_release(
    workspace: Workspace,
    info: ReleaseInfo,
    fill: Callable[[LmdbWriter], None],
    *,
    base: Sequence[ReleaseManifest] = (),
    quantisers: Mapping[str, Quantiser] | None = None,
    cache: Path | None = None,
) -> ReleaseManifest:
    """Builds a release, verified and in its place but not current, unless a whole one is there; gives its manifest.

    fill: writes all rows.
    base: the chain, newest first, that a delta is read on top of or whose rows a full release takes over; vectors must
    be as long as its own, and their codes its own.
    quantisers: see publish; a delta needs none.
    Raises as publish does.
    """
    if info.delta and quantisers:
        raise ValueError("a delta's vectors have the codes of its parent's quantisers: give it none.")
    remove_leftovers(workspace)
    existing = _whole_release(workspace, info)
    if existing:
        return existing
    building = _building_folder(workspace)
    try:
        manifest = _build(workspace, building, info, fill, base, quantisers or {}, cache)
        place(workspace, building, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
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


def _parents(workspace: Workspace, info: ReleaseInfo) -> list[ReleaseManifest]:
    if not info.delta:
        return []
    if info.parent is None:
        raise ReleaseError(
            f"{workspace.root}: a delta release needs a parent. Name the release that it changes, or publish in full."
        )
    try:
        return chain(workspace, info.parent)
    except ReleaseError as error:
        raise ReleaseError(
            f"release '{info.parent}' cannot be the parent of a delta: {error} "
            f"Name a complete release, or publish in full."
        ) from None


def _whole_release(workspace: Workspace, info: ReleaseInfo) -> ReleaseManifest | None:
    for name in reversed(workspace.names("releases")):
        if not name.endswith(info.fingerprint[:8]) or not workspace.exists("releases", name, MANIFEST):
            continue
        try:
            manifest = read_manifest(workspace, name)
            if (manifest.fingerprint, manifest.delta) != (info.fingerprint, info.delta):
                continue
            if info.delta and manifest.parent != info.parent:
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
    info: ReleaseInfo,
    fill: Callable[[LmdbWriter], None],
    base: Sequence[ReleaseManifest],
    quantisers: Mapping[str, Quantiser],
    cache: Path | None,
) -> ReleaseManifest:
    writer = LmdbWriter(folder / STORE)
    for kind, quantiser in quantisers.items():
        writer.semantic_ids[kind] = SemanticIdEntry(sizes=quantiser.sizes)
        quantiser.save(Workspace(folder), quantiser_folder(kind))
    if base:
        writer.dim, writer.as_of_min, writer.as_of_max = base[0].dim, base[0].as_of_min, base[0].as_of_max
        writer.semantic_ids = dict(base[0].semantic_ids)
    try:
        fill(writer)
    except BaseException:
        writer.abort()
        raise
    writer.close()
    if info.delta and not any(writer.counts.values()):
        raise ReleaseError(
            f"{workspace.root}: the delta of release '{info.parent}' has no row. Nothing is new or changed, so there "
            f"is nothing to publish."
        )
    if writer.as_of_min is None or writer.as_of_max is None:
        raise ReleaseError(f"{workspace.root}: there is no knowledge to publish. Run the generate stage first.")
    name, created = _free_name(workspace, info.fingerprint)
    manifest = ReleaseManifest(
        # A full release that an older owlrec can read says so.
        format=FORMAT if info.delta or writer.counts["partitions"] else 1,
        name=name,
        created=created.isoformat(),
        knowledge=writer.counts["knowledge"],
        vectors=writer.counts["vectors"],
        partitions=writer.counts["partitions"],
        memberships=writer.counts["memberships"],
        codes=writer.counts["codes"],
        semantic_ids=writer.semantic_ids,
        totals=_totals(workspace, writer, base if info.delta else (), cache),
        dim=writer.dim,
        as_of_min=writer.as_of_min,
        as_of_max=writer.as_of_max,
        files=_entries(folder),
        **info.model_dump(),
    )
    _read_back(folder, manifest, writer)
    return manifest


def _entries(folder: Path) -> dict[str, FileEntry]:
    """All files in a folder, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: FileEntry(sha256=file_digest(p), bytes=p.stat().st_size) for name, p in entries.items()}


def _totals(
    workspace: Workspace, writer: LmdbWriter, parents: Sequence[ReleaseManifest], cache: Path | None
) -> dict[str, int]:
    own = writer.counts["knowledge"]
    if not parents:
        return own
    with ExitStack() as opened:
        parts = [opened.enter_context(part) for part in open_parts(workspace, parents, verify=False, cache=cache)]
        added = opened.enter_context(LmdbStore(writer.path, dim=writer.dim, counts=own))
        return dict(count_new_ids(added, parts) + Counter(parents[0].totals))


def _read_back(folder: Path, manifest: ReleaseManifest, writer: LmdbWriter) -> None:
    with open_store(folder, manifest) as store:
        for database, sample in writer.samples.items():
            for key, value in sample.rows:
                if store.raw(database, key) != value:
                    raise ReleaseError(
                        f"{folder / STORE}: a row of {database} does not read back as it was written. "
                        f"Check the disk, then publish again; nothing was made visible."
                    )
    check_files(folder, manifest, checksums=True)


def _free_name(workspace: Workspace, fingerprint: str) -> tuple[str, datetime]:
    now = datetime.now(UTC).replace(microsecond=0)
    while workspace.exists("releases", name := f"{now:%Y%m%dT%H%M%SZ}-{fingerprint[:8]}"):
        now += timedelta(seconds=1)  # a damaged twin of this very second
    return name, now
