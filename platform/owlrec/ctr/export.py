"""A trained trial on disk: model.safetensors, spec.json, test_scores.parquet and, last, result.json.

Vocabularies and items, which encode the input, are files in the grid's folder; an artifact has its own. No pickle:
weights that came from elsewhere must not be able to run code.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors
import safetensors.numpy
import safetensors.torch

from owlrec.ctr.experiment import grid_folder
from owlrec.ctr.features import Grades, ItemFeatures, Vocabularies
from owlrec.ctr.fitting import Trained
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.scores import FILE as SCORES_FILE
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

VOCABULARIES = "vocabularies.parquet"
ITEMS = "items.safetensors"
_SEPARATOR = "/"


def export_trial(workspace: Workspace, fingerprint: str, trained: Trained) -> str:
    """Writes a trained trial and returns its folder, relative to the workspace; result.json completes it."""
    folder = f"{grid_folder(fingerprint)}/{trained.result.trial.path}"
    weights = {name: value.cpu().contiguous() for name, value in trained.model.state_dict().items()}
    workspace.write_bytes(f"{folder}/model.safetensors", safetensors.torch.save(weights))
    workspace.write_json(f"{folder}/spec.json", trained.model.spec.model_dump(mode="json"))
    workspace.write_parquet(f"{folder}/{SCORES_FILE}", trained.test.to_table())
    workspace.write_json(f"{folder}/result.json", trained.result.model_dump(mode="json"))
    return folder


def load_trial(workspace: Workspace, folder: str, items: ItemFeatures) -> CTRModel:
    """A trained model, ready to score (in eval mode, on the CPU).

    items: the item table encoded by the grid's own vocabularies (`read_vocabularies`, `encode_items`).
    Raises WorkspaceError where the folder is incomplete, or holds weights of another model.
    """
    model = CTRModel(ModelSpec.model_validate(workspace.read_json(f"{folder}/spec.json")), items)
    try:
        model.load_state_dict(safetensors.torch.load(workspace.read_bytes(f"{folder}/model.safetensors")))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise WorkspaceError(
            f"{workspace.path(folder)}: weights and spec.json do not belong together ({error}). "
            f"Delete the folder and run `train_ctr` again."
        ) from None
    return model.eval()


def write_vocabularies(workspace: Workspace, folder: str, vocabularies: Vocabularies) -> None:
    """Writes vocabularies.parquet: columns field and value, in the order of the codes."""
    fields = {
        "item": vocabularies.items.cast(pa.string()),
        **{f"attribute{_SEPARATOR}{name}": values for name, values in vocabularies.attributes.items()},
        **{f"profile{_SEPARATOR}{name}": values for name, values in vocabularies.profile.items()},
        "grades": pa.array([repr(rating) for rating in vocabularies.grades]),  # the lowest and the highest
    }
    # A field without values would vanish from the table, and with it a column of the model's input.
    values = [pa.concat_arrays([pa.array([None], pa.string()), v.cast(pa.string())]) for v in fields.values()]
    names = [pa.array([name] * len(v), pa.string()) for name, v in zip(fields, values, strict=True)]
    table = pa.table({"field": pa.concat_arrays(names), "value": pa.concat_arrays(values)})
    workspace.write_parquet(f"{folder}/{VOCABULARIES}", table)


def read_vocabularies(workspace: Workspace, folder: str) -> Vocabularies:
    """What `write_vocabularies` wrote. Raises WorkspaceError where it is missing."""
    table = workspace.read_parquet(f"{folder}/{VOCABULARIES}")
    fields = {
        name: table.filter(pc.equal(table["field"], name))["value"].drop_null().combine_chunks()
        for name in pc.unique(table["field"]).to_pylist()
    }

    def of(kind: str) -> dict[str, pa.Array]:
        prefix = kind + _SEPARATOR
        return {name.removeprefix(prefix): values for name, values in fields.items() if name.startswith(prefix)}

    return Vocabularies(
        items=fields["item"].cast(pa.int64()),
        attributes=of("attribute"),
        profile=of("profile"),
        grades=Grades(*map(float, fields["grades"].to_pylist())),
    )


def write_items(workspace: Workspace, folder: str, items: ItemFeatures, counts: np.ndarray | None = None) -> None:
    """Writes items.safetensors. counts: features.Features.item_counts, for training alone."""
    counts = np.zeros(len(items.codes), np.int64) if counts is None else counts
    arrays = {"ids": items.ids, "codes": items.codes, "attributes": items.attributes, "counts": counts}
    workspace.write_bytes(f"{folder}/{ITEMS}", safetensors.numpy.save(arrays))


def read_items(workspace: Workspace, folder: str) -> tuple[ItemFeatures, np.ndarray]:
    """What `write_items` wrote. Raises WorkspaceError where it is missing or damaged."""
    try:
        arrays = safetensors.numpy.load(workspace.read_bytes(f"{folder}/{ITEMS}"))
        return ItemFeatures(arrays["ids"], arrays["codes"], arrays["attributes"]), arrays["counts"]
    except (KeyError, safetensors.SafetensorError) as error:
        raise WorkspaceError(
            f"{workspace.path(folder)}: {ITEMS} is damaged ({error}). Run the stage that wrote it again."
        ) from None
