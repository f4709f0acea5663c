"""What the finished stages of a run leave behind: a manifest each, by which a later run skips or finds them."""

import time
from collections.abc import Sequence

from pydantic import BaseModel

from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace


class Stopwatch:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


class StageManifest(BaseModel):
    """What a finished stage leaves in manifests/<stage>.json: a later run with the same fingerprint skips the stage."""

    stage: str
    fingerprint: str
    seconds: float
    finished: float  # seconds since 1970
    counts: dict[str, float | int | str] = {}
    outputs: dict[str, str] = {}  # name -> path relative to the root


def finished_stage(workspace: Workspace, stage: str, expected: str | None = None) -> StageManifest | None:
    """The manifest of `stage` if it has finished, and, where `expected` is given, under exactly that fingerprint."""
    path = f"manifests/{stage}.json"
    if not workspace.exists(path):
        return None
    manifest = StageManifest.model_validate(workspace.read_json(path))
    return manifest if expected in (None, manifest.fingerprint) else None


def needed_stage(workspace: Workspace, stage: str, lacking: str) -> StageManifest:
    """The manifest of `stage`. Raises WorkspaceError, which says what is `lacking`, where it has not finished."""
    manifest = finished_stage(workspace, stage)
    if manifest is None:
        raise WorkspaceError(f"{workspace.root}: {lacking}. Run `{stage}` first, with the same recipe.")
    return manifest


def forget_stages(workspace: Workspace, stages: Sequence[str]) -> None:
    """Removes manifests. A stage that starts anew forgets its own and those after it: what it leaves if it is
    interrupted must not pass for finished, nor what was made from its earlier output for up to date.
    """
    for stage in stages:
        workspace.delete_file(f"manifests/{stage}.json")


def finish_stage(workspace: Workspace, manifest: StageManifest) -> None:
    """Records that a stage is done. Call it last: what the manifest lists must exist by then."""
    workspace.write_json(f"manifests/{manifest.stage}.json", manifest.model_dump())


def record_stage(
    workspace: Workspace,
    stage: str,
    fingerprint: str,
    watch: Stopwatch,
    counts: dict[str, float | int | str],
    outputs: dict[str, str],
) -> StageManifest:
    """finish_stage of a stage that ends now; watch: since it began."""
    seconds = round(watch.seconds, 3)
    manifest = StageManifest(
        stage=stage, fingerprint=fingerprint, seconds=seconds, finished=time.time(), counts=counts, outputs=outputs
    )
    finish_stage(workspace, manifest)
    return manifest
