"""A complete CTR model: embeddings, the adaptor if the arm has knowledge, and a backbone.

Items and ids repeat within a batch (a popular item is in hundreds of histories). So each distinct item is embedded
once and each distinct id passes the adaptor once; rows then gather the results. The numbers are the same, for
several times less work.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.config import Config
from owlrec.ctr.adaptor import Adaptor, CodeFields, Codes, Knowledge
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.backbones.interface import BackboneInputs, InputShape, TableRows
from owlrec.ctr.experiment import AdaptorConfig, CTRConfig
from owlrec.ctr.features import OUTCOMES, PADDING, FeatureSpec, ItemFeatures

# Small, so an item rarely seen in training stays near zero: .01 beats .05 by .002 valid AUC on MovieLens-100K.
_INIT_STD = 0.01


# Of a backbone's layers: none, as chosen on the valid AUC of MovieLens-100K. Early stopping keeps from overfitting.
DROPOUT = 0.0


class ModelSpec(Config):
    """Everything a model is built from. With its weights, it is all that a serving process needs."""

    features: FeatureSpec
    backbone: str
    knowledge_dim: int  # components of a knowledge vector; 0 builds no adaptor
    embed_dim: int
    hidden_dims: tuple[int, ...]
    expert_dim: int  # of the adaptor
    # Vectors per id; a spec.json from before there were several does not have it.
    user_sources: int = 1
    item_sources: int = 1
    # Number of codes per level of the semantic ids; empty if they are not read.
    user_codes: tuple[int, ...] = ()
    item_codes: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        features: FeatureSpec,
        backbone: str,
        knowledge_dim: int,
        config: CTRConfig,
        *,
        user_sources: int = 1,
        item_sources: int = 1,
        user_codes: tuple[int, ...] = (),
        item_codes: tuple[int, ...] = (),
    ) -> "ModelSpec":
        """The model specified by `config`."""
        return cls(
            features=features,
            backbone=backbone,
            knowledge_dim=knowledge_dim,
            embed_dim=config.embed_dim,
            hidden_dims=config.hidden_dims,
            expert_dim=config.expert_dim,
            user_sources=user_sources,
            item_sources=item_sources,
            user_codes=user_codes,
            item_codes=item_codes,
        )

    @property
    def knowledge_fields(self) -> int:
        """The fields of the adaptor and of the semantic ids, two each if present."""
        return 2 * bool(self.knowledge_dim) + 2 * bool(self.user_codes)


@dataclass(frozen=True)
class DistinctItems:
    """The u distinct items among a batch's targets and behaviors."""

    rows: Tensor  # int64 [u], ascending row numbers of ItemFeatures
    target_rows: Tensor  # int64 [b]: each target's index among the u
    history_rows: Tensor  # int64 [b, L]

    @classmethod
    def of(cls, items: np.ndarray, history: np.ndarray) -> "DistinctItems":
        """items: int [b], history: int [b, L]. Computed on the CPU: on a GPU the step would wait for the count."""
        where, rows = pd.factorize(np.concatenate([items, history.reshape(-1)]), sort=True)
        target_rows, history_rows = np.split(where.astype(np.int64), [len(items)])
        arrays = (rows, target_rows, history_rows.reshape(history.shape))
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@dataclass(frozen=True)
class Batch:
    """Codes of b rows, and their knowledge if the model has an adaptor. L: history length.

    history, ratings and profile have one row if all rows belong to one user's request.
    """

    items: Tensor  # int64 [b], row numbers of ItemFeatures
    history: Tensor  # int64 [b or 1, L], row numbers, 0 for padding
    ratings: Tensor  # int64 [b or 1, L]
    profile: Tensor  # int64 [b or 1, n_profile]
    user: Knowledge | None = None
    item: Knowledge | None = None
    user_codes: Codes | None = None  # if the model reads semantic ids
    item_codes: Codes | None = None
    distinct: DistinctItems | None = None  # for batches with many rows; a request's items rarely repeat
    # float32 [b, knowledge_fields, e]: precomputed output for all of these, the user's fields first; replaces them
    adaptor_fields: Tensor | None = None


class CTRModel(nn.Module):
    """Embeddings, adaptor and backbone.

    The items' codes are buffers outside the weights file, because they follow from the item table.
    """

    item_codes: Tensor
    item_attributes: Tensor
    all_ratings: Tensor

    def __init__(self, spec: ModelSpec, items: ItemFeatures) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("item_codes", torch.from_numpy(items.codes.astype(np.int64)), persistent=False)
        self.register_buffer("item_attributes", torch.from_numpy(items.attributes.astype(np.int64)), persistent=False)
        features, width = spec.features, spec.embed_dim
        self.item = _embedding(features.n_items, width)
        self.attributes = nn.ModuleList(_embedding(size, width) for size in features.attributes.values())
        self.rating = _embedding(OUTCOMES, width)
        self.register_buffer("all_ratings", torch.arange(OUTCOMES), persistent=False)
        self.profile = nn.ModuleList(_embedding(size, width) for size in features.profile.values())
        shape = InputShape(
            item_fields=1 + len(features.attributes),
            profile_fields=len(features.profile),
            knowledge_fields=spec.knowledge_fields,
            embed_dim=width,
        )
        self.backbone = BACKBONES.load(spec.backbone)(shape, hidden_dims=spec.hidden_dims, dropout=DROPOUT)
        self.adaptor = (
            Adaptor(
                spec.knowledge_dim,
                width,
                AdaptorConfig(hidden_dim=spec.expert_dim),
                spec.user_sources,
                spec.item_sources,
            )
            if spec.knowledge_dim
            else None
        )
        self.code_fields = (
            CodeFields(spec.user_codes, spec.item_codes, width, init_std=_INIT_STD) if spec.user_codes else None
        )

    def forward(self, batch: Batch) -> Tensor:
        """float32 [b]: logits.

        Raises ValueError if the model has an adaptor and the batch has no knowledge, or another number of sources.
        """
        target, history, behaviors = self._embedded(batch)
        profile = [table(batch.profile[:, i]) for i, table in enumerate(self.profile)]
        return self.backbone(
            BackboneInputs(
                target=target,
                history=history,
                mask=batch.history != PADDING,
                profile=torch.stack(profile, dim=1) if profile else target[:, :0],
                knowledge=self.adaptor_fields(batch),
                behaviors=behaviors,
            )
        )

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor, TableRows | None]:
        """Targets, behaviors, and behaviors as table rows, as in BackboneInputs."""
        if batch.distinct is None:
            rows = torch.cat([batch.items, batch.history.flatten()])
            target, history = self.embed_items(rows).split([batch.items.shape[0], batch.history.numel()])
            return target, self._with_ratings(history, batch), None
        target_rows, history_rows = batch.distinct.target_rows, batch.distinct.history_rows.flatten()
        distinct = self.embed_items(batch.distinct.rows)
        flat = distinct.flatten(1)
        behaviors = TableRows((flat, self.rating(self.all_ratings)), (batch.distinct.history_rows, batch.ratings))
        target = F.embedding(target_rows, flat).unflatten(1, distinct.shape[1:])
        if not self.backbone.reads_behaviors:
            return target, target.new_empty(len(target), 0, distinct.shape[1] + 1, distinct.shape[2]), behaviors
        history = F.embedding(history_rows, flat).unflatten(1, distinct.shape[1:])
        return target, self._with_ratings(history, batch), behaviors

    def _with_ratings(self, history: Tensor, batch: Batch) -> Tensor:
        ratings = self.rating(batch.ratings).unsqueeze(2)
        return torch.cat([history.unflatten(0, batch.history.shape), ratings], dim=2)

    def embed_items(self, rows: Tensor) -> Tensor:
        """rows: int64 [u]. Returns float32 [u, 1 + n_attributes, embed_dim]; averages the values of a multi-valued
        attribute.
        """
        fields = [self.item(self.item_codes[rows])]
        values = self.item_attributes[rows]
        for i, table in enumerate(self.attributes):
            n_values = (values[:, i] != PADDING).sum(1, keepdim=True).clamp(min=1)
            fields.append(table(values[:, i]).sum(1) / n_values)
        return torch.stack(fields, dim=1)

    def adaptor_fields(self, batch: Batch) -> Tensor | None:
        """float32 [b, knowledge_fields, e]: the user's fields, then the item's; None for an arm without knowledge."""
        if batch.adaptor_fields is not None:
            return batch.adaptor_fields
        forms: list[Tensor] = []
        if self.adaptor is not None:
            if batch.user is None or batch.item is None:
                raise ValueError("this model has an adaptor, so its batches need knowledge of users and items.")
            forms.append(self.adaptor.fields(batch.user, batch.item))
        if self.code_fields is not None:
            if batch.user_codes is None or batch.item_codes is None:
                raise ValueError("this model reads semantic ids, so its batches need codes of users and items.")
            forms.append(self.code_fields(batch.user_codes, batch.item_codes))
        return torch.stack(forms, dim=2).flatten(1, 2) if forms else None


def _embedding(size: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(size, dim, padding_idx=PADDING)
    nn.init.normal_(table.weight, std=_INIT_STD)
    with torch.no_grad():
        table.weight[PADDING].zero_()
    return table
