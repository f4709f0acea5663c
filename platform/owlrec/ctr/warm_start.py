"""Training that goes on from an artifact on newer samples: weights carry over, by the values that they embed.

A vocabulary keeps what it knew and grows by what is new, which starts as the embedding of unknown values: training went
on with it for everything that was rare. The optimizer starts fresh. Projection, grades and codebooks stay those of the
artifact, or its weights would read numbers of another meaning.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from torch import Tensor

from owlrec.ctr.experiment import Trial
from owlrec.ctr.export import read_vocabularies
from owlrec.ctr.features import RESERVED, UNKNOWN, Vocabularies
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.model_card import read_card
from owlrec.errors import RecipeError
from owlrec.workspace import Workspace

_MAY_DIFFER = {"features", "dropout"}  # of a spec


@dataclass(frozen=True)
class WarmStart:
    """An artifact to go on from."""

    folder: str
    trial: Trial
    spec: ModelSpec
    weights: dict[str, Tensor]
    vocabularies: Vocabularies

    @classmethod
    def open(cls, workspace: Workspace, folder: str) -> "WarmStart":
        """Raises WorkspaceError where the folder holds no finished artifact."""
        card = read_card(workspace, folder)
        return cls(
            folder,
            card.trial,
            ModelSpec.model_validate(workspace.read_json(f"{folder}/spec.json")),
            safetensors.torch.load(workspace.read_bytes(f"{folder}/model.safetensors")),
            read_vocabularies(workspace, folder),
        )

    def load_into(self, model: CTRModel, vocabularies: Vocabularies) -> None:
        """Gives a new model the weights. vocabularies: of the new samples, grown from the artifact's (`grown`).

        Raises RecipeError, naming the key of ctr, where the model has another backbone or other dimensions.
        """
        ours, theirs = (spec.model_dump(exclude=_MAY_DIFFER) for spec in (model.spec, self.spec))
        for key, value in ours.items():
            if value != theirs[key]:
                raise RecipeError(
                    f"ctr: {key} is {value}, but the model to go on from, {self.folder}, has {theirs[key]}. Give the "
                    "recipe the same, or train without --warm-start."
                )
        before, now = self.vocabularies, vocabularies
        tables = {"item.weight": (before.items, now.items)}
        for name, old, new in (
            ("attributes", before.attributes, now.attributes),
            ("profile", before.profile, now.profile),
        ):
            if list(old) != list(new):
                raise RecipeError(
                    f"ctr: {name} are {', '.join(new) or 'none'}, but the model to go on from, {self.folder}, reads "
                    f"{', '.join(old) or 'none'}. Give the tables the same columns, or train without --warm-start."
                )
            tables |= {f"{name}.{at}.weight": (old[field], new[field]) for at, field in enumerate(old)}
        weights = dict(self.weights)
        for name, (old, new) in tables.items():
            weights[name] = carried_over(weights[name], old, new)
        model.load_state_dict(weights)


def carried_over(table: Tensor, old: pa.Array, new: pa.Array) -> Tensor:
    """The rows of an embedding table for a new vocabulary: those of values that the old one has, and for others that
    of unknown values. table: float32 [len(old) + 2, e]. Returns float32 [len(new) + 2, e].
    """
    rows = pc.fill_null(pc.index_in(new, old), UNKNOWN - RESERVED).to_numpy().astype(np.int64) + RESERVED
    return torch.cat([table[:RESERVED], table[torch.from_numpy(rows)]])


def grown(new: Vocabularies, before: Vocabularies, items: np.ndarray) -> Vocabularies:
    """Vocabularies of new samples and all that an earlier one knew, items as far as the table still has them; with its
    grades. items: int64 [n], of the items table.
    """

    def union(ours: pa.Array, theirs: pa.Array) -> pa.Array:
        both = pc.unique(pa.concat_arrays([ours, theirs]))
        return both.take(pc.sort_indices(both))

    kept = before.items.filter(pc.is_in(before.items, value_set=pa.array(items, pa.int64())))
    return replace(
        before,
        items=union(new.items, kept),
        attributes={name: union(v, before.attributes.get(name, v[:0])) for name, v in new.attributes.items()},
        profile={name: union(v, before.profile.get(name, v[:0])) for name, v in new.profile.items()},
    )
