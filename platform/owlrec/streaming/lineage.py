"""Which release a refresh builds on, and whether its own is published already.

The pointer's history is the judge: what a roll-back leaves behind is no longer in it. A release that came after the
last refresh, a compaction or a whole new run, is built upon as it is. But what a roll-back took away may not come back
by itself with the next refresh, and behaviours that only it had read would be lost if the next one went on from there.
"""

from owlrec.errors import ReleaseError
from owlrec.releases.manifest import MANIFEST, ReleaseManifest, chain, read_manifest
from owlrec.releases.release import pointer_history
from owlrec.streaming.journal import ROOT
from owlrec.workspace import Workspace


def parent_release(workspace: Workspace, after: str | None, encoder: str) -> ReleaseManifest:
    """The current release, to build on.

    after: a release that it must be or come after; None for the first refresh. encoder: the recipe's.
    Raises ReleaseError where there is none, it or what it is read on top of is gone, it was rolled back, or its vectors
    are another encoder's.
    """
    history = pointer_history(workspace)
    if not history:
        raise ReleaseError(
            f"{workspace.path('releases')}: nothing was published yet, and a refresh builds on a whole run. "
            "Run `owlrec run` with the same recipe first."
        )
    current = history[-1]
    if not workspace.exists("releases", current, MANIFEST):
        raise ReleaseError(
            f"release {current}, which a refresh would build on, is gone from {workspace.path('releases')}. Make "
            "another one current (`owlrec releases` lists them, `owlrec rollback` goes back), or publish in full "
            "(`owlrec run --from publish`)."
        )
    if after is not None and after not in history:
        raise ReleaseError(
            f"the current release {current} does not come after {after}, which the refreshes go on from: it was "
            f"rolled back. Make that one current again (`owlrec rollback --to {after}`); or, to go on from {current}, "
            f"delete {workspace.path(ROOT)}: the refresh then reads the whole log again."
        )
    manifest = chain(workspace, current)[0]
    if manifest.encoder != encoder:
        raise ReleaseError(
            f"release {current} has the vectors of encoder '{manifest.encoder}', but the recipe names '{encoder}'. "
            "Put the encoder back, or run `encode` and `publish` with the new one first."
        )
    return manifest


def published_as(workspace: Workspace, fingerprint: str) -> str | None:
    """The release with this fingerprint that is current or was before it, None where there is none."""
    for name in reversed(pointer_history(workspace)):
        candidate = name.endswith(fingerprint[:8]) and workspace.exists("releases", name, MANIFEST)
        if candidate and read_manifest(workspace, name).fingerprint == fingerprint:
            return name
    return None
