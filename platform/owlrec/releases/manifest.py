"""A release's manifest, release.json.

Manifests are small and read often: the newest manifest has all the totals of its chain of deltas,
so nothing has to read rows for them.
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
    """Format of one kind's semantic ids."""

    sizes: tuple[int, ...]  # codes per level
    codebooks: str = ""  # fingerprint of the quantizer


class PartEntry(BaseModel):
    """One of a release's files and its rows."""

    rows: dict[str, int]  # by database
    ids: dict[str, int]  # ids with their own knowledge, by kind


class ReleaseManifest(BaseModel):
    """release.json. Counts are the release's own rows by kind; a delta also has those of its parent."""

    format: int = FORMAT
    name: str
    created: str  # ISO 8601, UTC
    fingerprint: str
    model: str
    encoder: str
    encoder_identity: str = ""  # changes with its weights
    parent: str | None = None  # base of a delta; for a full release, the previously current one
    delta: bool = False
    knowledge: dict[str, int]
    vectors: dict[str, int]  # the newest of each id
    partitions: dict[str, int] = {}  # vectors of older interest partitions
    memberships: dict[str, int] = {}
    codes: dict[str, int] = {}  # newest vectors with semantic ids, or marked as having none
    behaviors: dict[str, int] = {}  # users with behaviors
    history_length: int = 0  # maximum behaviors per user; 0 without any
    semantic_ids: dict[str, SemanticIdEntry] = {}  # by kind; the codebooks are in the oldest release of a chain
    totals: dict[str, int] = {}  # ids with their own knowledge, including its parents'
    dim: int
    as_of_min: int  # ms since 1970, UTC; no text of it or its parents is earlier
    as_of_max: int
    parts: list[PartEntry]  # a power of two; an id's part is its hash's
    files: dict[str, FileEntry]  # by their path in the release's folder

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.files.values())


def part_file(number: int) -> str:
    """File with the rows of a part, relative to the release's folder."""
    return f"parts/{number:05d}.lmdb"


def ids_file(number: int) -> str:
    """File with a part's ids that have knowledge, relative to the release's folder."""
    return f"parts/{number:05d}.ids"


def quantizer_folder(kind: str) -> str:
    """Folder of a kind's codebooks in a full release, relative to its folder."""
    return f"semantic_ids/{kind}"


def read_manifest(workspace: Workspace, name: str) -> ReleaseManifest:
    """release.json of release `name`. Raises ReleaseError if it is missing, or unreadable by this version."""
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
    """Manifests of all complete releases, oldest first. Raises ReleaseError if one is unreadable."""
    names = (n for n in workspace.names("releases") if workspace.exists("releases", n, MANIFEST))
    return [read_manifest(workspace, name) for name in names]


def chain(workspace: Workspace, name: str) -> list[ReleaseManifest]:
    """Manifests of release `name` and its parents: newest first, the last of them full.

    Raises ReleaseError if one is missing or unreadable, or if deltas form a cycle.
    """
    manifests = [read_manifest(workspace, name)]
    while (delta := manifests[-1]).delta:
        parent = delta.parent or ""
        if not workspace.exists("releases", parent, MANIFEST):
            raise ReleaseError(
                f"{workspace.path('releases', delta.name)} is a delta of release '{parent}', which is missing. "
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
