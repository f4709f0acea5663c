"""model.json of an artifact, which is written last: read without torch, so that who only asks for it starts fast."""

from typing import Literal

from pydantic import BaseModel, ValidationError

from owlrec.ctr.experiment import Metrics, Trial
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

AGAIN = "Run `owlrec export-ctr` again."

Precision = Literal["float32", "float16"]


class ModelCard(BaseModel):
    """model.json: what an artifact is, and how it scored before it was exported."""

    trial: Trial
    grid: str  # fingerprint
    precision: Precision  # of the adaptor's outputs; float16 halves them and moves a score by about 1e-4
    users: int
    items: int
    adapted: dict[str, int]  # side -> ids with knowledge; empty for arm "none"
    valid: Metrics
    test: Metrics


def finish_artifact(workspace: Workspace, folder: str, card: ModelCard) -> None:
    """Completes an artifact: only now does a scorer open it."""
    workspace.write_json(f"{folder}/model.json", card.model_dump(mode="json"))


def read_card(workspace: Workspace, folder: str) -> ModelCard:
    """Raises WorkspaceError where the folder holds no finished artifact."""
    if not workspace.exists(folder, "model.json"):
        raise WorkspaceError(
            f"{workspace.path(folder)}: no finished artifact is there. `owlrec export-ctr` writes one and names it."
        )
    try:
        return ModelCard.model_validate(workspace.read_json(f"{folder}/model.json"))
    except ValidationError as error:
        raise WorkspaceError(f"{workspace.path(folder)}: model.json is of no known form ({error}). {AGAIN}") from None
