"""What a release says of itself, in release.json, and the check of the files that it lists.

Manifests are small and read often: what a count or a decision needs of a whole chain of deltas stands in its newest
manifest, so that nobody has to read rows for it.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError, model_validator

from owlrec.errors import ReleaseError, WorkspaceError, did_you_mean
from owlrec.storage import file_digest
from owlrec.workspace import Workspace

FORMAT = 2  # the newest that this owlrec reads: 2 knows deltas and interest partitions
MANIFEST = "release.json"
STORE = "store.lmdb"
MEND = "Roll back to the previous release (`owlrec rollback`), or publish again."


class FileEntry(BaseModel):
    """A data file of a release."""

    sha256: str
    bytes: int


class SemanticIdEntry(BaseModel):
    """How the semantic ids of one kind are written."""

    sizes: tuple[int, ...]  # codes of each level
    last_digit: int = 0  # the greatest duplicate digit of the release or its parents


class ReleaseManifest(BaseModel):
    """What release.json says. Counts are the release's own rows by kind; a delta has those of its parent besides."""

    format: int = 1
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    parent: str | None = None  # what a delta is read on top of; of a full release, what was current before it
    delta: bool = False
    knowledge: dict[str, int]
    vectors: dict[str, int]  # the newest of each id
    partitions: dict[str, int] = {}  # vectors of older interest partitions
    memberships: dict[str, int] = {}
    codes: dict[str, int] = {}  # newest vectors whose semantic ids are known, or known to be none
    semantic_ids: dict[str, SemanticIdEntry] = {}  # by kind; the codebooks stand with the oldest release of a chain
    totals: dict[str, int] = {}  # ids with knowledge of their own, its parents' included
    dim: int
    as_of_min: int  # ms since 1970, UTC; no text of it or its parents is earlier
    as_of_max: int
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _count_full_release(self) -> Self:
        if not self.delta and not self.totals:  # one of the first releases, which had no totals
            self.totals = dict(self.knowledge)
        return self


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError where there is none, or one that this version cannot read."""
    path = f"releases/{name}/{MANIFEST}"
    if not workspace.exists(path):
        have = [n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST)]
        hint = did_you_mean(name, have) if have else " Nothing was published yet: run the publish stage."
        raise ReleaseError(f"{workspace.path('releases')} holds no release '{name}'.{hint}")
    try:
        manifest = ReleaseManifest.model_validate(workspace.read_json(path))
    except (ValidationError, WorkspaceError) as error:
        raise ReleaseError(f"{workspace.path(path)} is unreadable ({error}). {MEND}") from None
    if manifest.format > FORMAT:
        raise ReleaseError(
            f"{workspace.path(path)} has format {manifest.format}; this owlrec reads up to {FORMAT}. Upgrade owlrec."
        )
    return manifest


def check_files(folder: Path, manifest: ReleaseManifest, *, checksums: bool) -> None:
    """Refuses a release whose files are missing, of another size or, with `checksums`, of other content (ReleaseError).

    The size is always compared: LMDB answers a truncated file with SIGBUS, which no caller can catch.
    """
    for file, entry in manifest.files.items():
        path = folder / file
        if not path.is_file():
            raise ReleaseError(f"{path} is missing. {MEND}")
        if path.stat().st_size != entry.bytes:
            raise ReleaseError(f"{path} has {path.stat().st_size} bytes, but {MANIFEST} says {entry.bytes}. {MEND}")
        if checksums and file_digest(path) != entry.sha256:
            raise ReleaseError(f"{path} is corrupt: its SHA-256 is not the one in {MANIFEST}. {MEND}")
