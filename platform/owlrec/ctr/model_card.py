"""model.json of an artifact, which is written last: read without torch, so that who only asks for it starts fast."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from owlrec.ctr.experiment import Metrics, Trial
from owlrec.errors import ReleaseError, WorkspaceError
from owlrec.workspace import Workspace

AGAIN = "Run `owlrec export-ctr` again."


class Reads(BaseModel):
    """The knowledge that a model was trained on. Other encoders and codebooks would give it numbers that mean something
    else.
    """

    user: tuple[str, ...]  # sources, in the order of the adaptor's slots
    item: tuple[str, ...]
    encoder: str  # EncoderConfig.identity
    codebooks: dict[str, str]  # by kind, fingerprints of those whose codes it reads

    def sources(self, kind: str) -> tuple[str, ...]:
        """Of users or items."""
        return self.user if kind == "user" else self.item

    def refuse_other(self, release: str, encoder: str, codebooks: Mapping[str, str]) -> None:
        """Raises ReleaseError where a release has the vectors of another encoder, or codes of other codebooks.

        encoder, codebooks: of the release.
        """
        again = "Train and export again on its vectors, or roll back to a release that the model was trained on."
        if encoder != self.encoder:
            raise ReleaseError(
                f"release {release} has vectors of encoder '{encoder}', but the model was trained on those of "
                f"'{self.encoder}'. {again}"
            )
        for kind, fingerprint in self.codebooks.items():
            if codebooks.get(kind, "") != fingerprint:
                raise ReleaseError(
                    f"release {release} has {kind} codes of codebooks {codebooks.get(kind, '')[:8] or 'none'}, but the "
                    f"model was trained on those of {fingerprint[:8]}. {again}"
                )


class ModelCard(BaseModel):
    """model.json: what an artifact is, and how it scored before it was exported."""

    trial: Trial
    grid: str  # fingerprint
    items: int
    reads: Reads | None  # None for arm "none"
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
