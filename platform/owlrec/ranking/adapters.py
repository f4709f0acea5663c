"""A tuned adapter on disk: the folder that peft and vLLM load as it is, and beside their files what it was tuned for.

    adapter_config.json, adapter_model.safetensors    as peft writes them
    ranker.json                                       model, wording and settings; written last

vLLM loads an adapter of whatever model into whatever model of the same shape, and a prompt in another wording scores
without complaint; ranker.json is what both are checked against.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from owlrec.environment import cache_folder
from owlrec.errors import EngineError, WorkspaceError
from owlrec.ranking.checkpoints import Progress
from owlrec.storage import Storage
from owlrec.workspace import Workspace

_FILES = ("adapter_config.json", "adapter_model.safetensors")


class RankerManifest(BaseModel):
    """What an adapter was tuned for, and how that went."""

    model: str  # its identity (generation.models.model_identity)
    wording: str  # prompting.rella.rank_fingerprint
    rank: int
    progress: Progress
    sha256: str  # of the weights


@dataclass(frozen=True)
class Adapter:
    """A checked adapter on a local disk."""

    folder: str
    manifest: RankerManifest


def save_adapter(
    workspace: Workspace,
    folder: str,
    weights: bytes,
    settings: Mapping[str, Any],
    *,
    model: str,
    wording: str,
    progress: Progress,
) -> None:
    """Writes the folder. weights: a safetensors file; settings: peft's; model, wording: see RankerManifest."""
    workspace.write_json(f"{folder}/{_FILES[0]}", dict(settings))
    workspace.write_bytes(f"{folder}/{_FILES[1]}", weights)
    manifest = RankerManifest(
        model=model,
        wording=wording,
        rank=settings["r"],
        progress=progress,
        sha256=hashlib.sha256(weights).hexdigest(),
    )
    workspace.write_json(f"{folder}/ranker.json", manifest.model_dump(mode="json"))


def open_adapter(workspace: Workspace, folder: str, *, model: str, wording: str) -> Adapter:
    """What `save_adapter` wrote, on a local disk: copied into OwlRec's cache from an object store.

    Raises WorkspaceError where it is missing or damaged, EngineError where it was tuned for another model or wording.
    """
    where = workspace.path(folder)
    about = workspace.read_json(f"{folder}/ranker.json")
    weights = workspace.read_bytes(f"{folder}/{_FILES[1]}")
    try:
        manifest = RankerManifest.model_validate(about)
        if manifest.sha256 != hashlib.sha256(weights).hexdigest():
            raise ValueError("its weights are not those that were written")
    except ValidationError as error:
        raise WorkspaceError(f"{where}/ranker.json is damaged ({error.errors()[0]['msg']}). Tune again.") from None
    except ValueError as error:
        raise WorkspaceError(f"{where} is damaged: {error}. Delete the folder and tune again.") from None
    if manifest.model != model:
        raise EngineError(
            f"{where} is an adapter of {manifest.model}, but the ranker's model is {model}. Name the model that it was "
            "tuned for, or tune one for this model."
        )
    if manifest.wording != wording:
        raise EngineError(
            f"{where} was tuned on prompts of another wording ({manifest.wording[:8]}, not {wording[:8]}). Use the "
            "ranking.prompt and the scenario that it was tuned with, or tune again."
        )
    if workspace.local:
        return Adapter(where, manifest)
    local = cache_folder("adapters", manifest.sha256[:16])
    for name in _FILES:
        if not (local / name).exists():
            Storage(local).write_bytes(name, workspace.read_bytes(f"{folder}/{name}"))
    return Adapter(str(local), manifest)
