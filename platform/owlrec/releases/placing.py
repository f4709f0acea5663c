"""A built release into its place: by one rename on a local disk, by an upload whose manifest comes last elsewhere."""

import os
from pathlib import Path

import pyarrow.fs as pafs

from owlrec.errors import ReleaseError
from owlrec.releases.manifest import MANIFEST, ReleaseManifest
from owlrec.workspace import Workspace


def place(workspace: Workspace, building: Path, manifest: ReleaseManifest) -> None:
    """Moves a built release to its place among the releases of a workspace, its manifest last.

    Raises ReleaseError where an upload is incomplete.
    """
    document = manifest.model_dump_json(indent=2).encode()
    if workspace.local:
        (building / MANIFEST).write_bytes(document)
        for path in (*building.rglob("*"), building):
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
