"""What a release says of itself, in release.json.

Manifests are small and read often: what a count or a decision needs of a whole chain of deltas is in its newest
manifest, so that nobody has to read rows for it.
"""

from contextlib import suppress

from pydantic import BaseModel, ValidationError

from owlrec.errors import ReleaseError, WorkspaceError, did_you_mean
from owlrec.storage import FileEntry
from owlrec.workspace import Workspace

FORMAT = 4
MANIFEST = "release.json"
WAY_BACK = "Roll back to the previous release (`owlrec release rollback`), or publish again."


class SemanticIdEntry(BaseModel):
    """How the semantic ids of one kind are written."""

    sizes: tuple[int, ...]  # codes of each level
    codebooks: str = ""  # fingerprint of the quantiser


class PartEntry(BaseModel):
    """One of a release's files: the rows that it holds."""

    rows: dict[str, int]  # by database
    ids: dict[str, int]  # ids with knowledge of their own by kind


class ReleaseManifest(BaseModel):
    """release.json. Counts are the release's own rows by kind; a delta has those of its parent besides."""

    format: int = FORMAT
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    encoder_identity: str = ""  # which changes with its weights
    parent: str | None = None  # what a delta is read on top of; of a full release, what was current before it
    delta: bool = False
    knowledge: dict[str, int]
    vectors: dict[str, int]  # the newest of each id
    partitions: dict[str, int] = {}  # vectors of older interest partitions
    memberships: dict[str, int] = {}
    codes: dict[str, int] = {}  # newest vectors whose semantic ids are known, or known to be none
    behaviors: dict[str, int] = {}  # users whose last behaviors it holds
    history_length: int = 0  # so many of each at most; 0 where it holds none
    semantic_ids: dict[str, SemanticIdEntry] = {}  # by kind; the codebooks are in the oldest release of a chain
    totals: dict[str, int] = {}  # ids with knowledge of their own, its parents' included
    dim: int
    as_of_min: int  # ms since 1970, UTC; no text of it or its parents is earlier
    as_of_max: int
    parts: list[PartEntry]  # a power of two; an id's part is its hash's
    files: dict[str, FileEntry]  # by their path in the release's folder

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(entry.bytes for entry in self.files.values())


def part_file(number: int) -> str:
    """The file with the rows of a part, relative to the release's folder."""
    return f"parts/{number:05d}.lmdb"


def ids_file(number: int) -> str:
    """The file with the ids of a part that have knowledge, relative to the release's folder."""
    return f"parts/{number:05d}.ids"


def quantiser_folder(kind: str) -> str:
    """Where a full release keeps the codebooks of a kind, relative to its folder."""
    return f"semantic_ids/{kind}"


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError where there is none, or one that this version cannot read."""
    path = f"releases/{name}/{MANIFEST}"
    if not workspace.exists(path):
        have = [n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST)]
        hint = did_you_mean(name, have) if have else " Nothing has been published: run the publish stage."
        raise ReleaseError(f"{workspace.path('releases')} has no release '{name}'.{hint}")
    try:
        document = workspace.read_json(path)
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise ReleaseError(
                f"{workspace.path(path)} has format {document.get('format')}; this owlrec reads {FORMAT}. Use "
                "the version that wrote it, or publish again."
            )
        return ReleaseManifest.model_validate(document)
    except (ValidationError, WorkspaceError) as error:
        raise ReleaseError(f"{workspace.path(path)} is unreadable ({error}). {WAY_BACK}") from None


def list_releases(workspace: Workspace) -> list[ReleaseManifest]:
    """The manifests of all complete releases, oldest first. Raises ReleaseError where one cannot be read."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def chain(workspace: Workspace, name: str) -> list[ReleaseManifest]:
    """The manifests of release `name` and of what it is read on top of: newest first, the last of them full.

    Raises ReleaseError where one is missing or cannot be read, or where deltas go round in a circle.
    """
    manifests = [read_manifest(workspace, name)]
    while (delta := manifests[-1]).delta:
        parent = delta.parent or ""
        if not workspace.exists("releases", parent, MANIFEST):
            raise ReleaseError(
                f"{workspace.path('releases', delta.name)} is a delta of release '{parent}', which is gone. "
                f"{_full_release(workspace)}"
            )
        if parent in {m.name for m in manifests}:
            raise ReleaseError(f"{workspace.path('releases', delta.name)} is a delta of itself. {WAY_BACK}")
        manifests.append(read_manifest(workspace, parent))
    return manifests


def _full_release(workspace: Workspace) -> str:
    for name in reversed(workspace.names("releases")):
        with suppress(ReleaseError):
            if not read_manifest(workspace, name).delta:
                return f"Roll back to a full release (`owlrec release rollback --to {name}`), or publish in full."
    return "Publish in full: no full release is left."
