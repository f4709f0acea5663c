"""A whole CTR model: embeddings, the adaptor where the arm has knowledge, and a backbone.

Items and ids recur within a batch (a popular item stands in hundreds of histories), so each distinct item is embedded
once and each distinct id goes through the adaptor once; rows then gather the results. The numbers are the same, the
work several times less.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from owlrec.config import Config
from owlrec.ctr.adaptor import Adaptor, Knowledge
from owlrec.ctr.backbones import backbone_class
from owlrec.ctr.backbones.interface import BackboneInputs, InputShape
from owlrec.ctr.experiment import AdaptorConfig, CTRConfig
from owlrec.ctr.features import PADDING, RATING_BUCKETS, FeatureSpec, ItemFeatures

# Small, so that an item that training hardly saw stays near zero: .01 beats .05 by .002 valid AUC on MovieLens-100K.
_INIT_STD = 0.01


class ModelSpec(Config):
    """All that a model is built from: with its weights, what a serving process needs."""

    features: FeatureSpec
    backbone: str
    knowledge_dim: int  # components of a knowledge vector; 0 builds no adaptor
    embed_dim: int
    hidden_dims: tuple[int, ...]
    dropout: float
    adaptor: AdaptorConfig
    # Vectors an id; a spec.json from before there were several says nothing of them.
    user_sources: int = 1
    item_sources: int = 1

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
    ) -> "ModelSpec":
        """The model that `config` asks for."""
        return cls(
            features=features,
            backbone=backbone,
            knowledge_dim=knowledge_dim,
            embed_dim=config.embed_dim,
            hidden_dims=config.hidden_dims,
            dropout=config.dropout,
            adaptor=config.adaptor,
            user_sources=user_sources,
            item_sources=item_sources,
        )


@dataclass(frozen=True)
class Batch:
    """The codes of b rows, and their knowledge where the model has an adaptor. L: history length.

    history, ratings and profile have one row where all rows are of one user's request.
    """

    items: Tensor  # int64 [b], row numbers of ItemFeatures
    history: Tensor  # int64 [b or 1, L], row numbers, 0 for padding
    ratings: Tensor  # int64 [b or 1, L]
    profile: Tensor  # int64 [b or 1, n_profile]
    user: Knowledge | None = None
    item: Knowledge | None = None
    adapted: Tensor | None = None  # float32 [b, 2, e]: what the adaptor made of user and item, in their place


class CTRModel(nn.Module):
    """Embeddings, adaptor and backbone.

    The items' codes are buffers that stay out of the weights file: they follow from the item table.
    """

    item_codes: Tensor
    item_attributes: Tensor

    def __init__(self, spec: ModelSpec, items: ItemFeatures) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("item_codes", torch.from_numpy(items.codes.astype(np.int64)), persistent=False)
        self.register_buffer("item_attributes", torch.from_numpy(items.attributes.astype(np.int64)), persistent=False)
        features, width = spec.features, spec.embed_dim
        self.item = _embedding(features.n_items, width)
        self.attributes = nn.ModuleList(_embedding(size, width) for size in features.attributes.values())
        self.rating = _embedding(RATING_BUCKETS + 1, width)
        self.profile = nn.ModuleList(_embedding(size, width) for size in features.profile.values())
        shape = InputShape(
            item_fields=1 + len(features.attributes),
            profile_fields=len(features.profile),
            knowledge_fields=2 if spec.knowledge_dim else 0,
            embed_dim=width,
        )
        self.backbone = backbone_class(spec.backbone)(shape, hidden_dims=spec.hidden_dims, dropout=spec.dropout)
        self.adaptor = (
            Adaptor(spec.knowledge_dim, width, spec.adaptor, spec.user_sources, spec.item_sources)
            if spec.knowledge_dim
            else None
        )

    def forward(self, batch: Batch) -> Tensor:
        """float32 [b]: logits.

        Raises ValueError where the model has an adaptor and the batch no knowledge, or of another number of sources.
        """
        target, history = self._embedded(batch)
        profile = [table(batch.profile[:, i]) for i, table in enumerate(self.profile)]
        return self.backbone(
            BackboneInputs(
                target=target,
                history=torch.cat([history, self.rating(batch.ratings).unsqueeze(2)], dim=2),
                mask=batch.history != PADDING,
                profile=torch.stack(profile, dim=1) if profile else target[:, :0],
                knowledge=self._adapted(batch),
            )
        )

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Targets and behaviours: float32 [b, 1 + n_attributes, e] and [b or 1, L, 1 + n_attributes, e]."""
        rows = torch.cat([batch.items, batch.history.flatten()])
        if len(batch.history) == 1:  # a request: its items hardly recur
            found = self.embed_items(rows)
        else:
            rows, where = torch.unique(rows, return_inverse=True)
            found = self.embed_items(rows).index_select(0, where)
        target, history = found.split([len(batch.items), batch.history.numel()])
        return target, history.unflatten(0, batch.history.shape)

    def embed_items(self, rows: Tensor) -> Tensor:
        """rows: int64 [u]. Returns float32 [u, 1 + n_attributes, embed_dim]; several values of an attribute are
        averaged.
        """
        fields = [self.item(self.item_codes[rows])]
        values = self.item_attributes[rows]
        for i, table in enumerate(self.attributes):
            n_values = (values[:, i] != PADDING).sum(1, keepdim=True).clamp(min=1)
            fields.append(table(values[:, i]).sum(1) / n_values)
        return torch.stack(fields, dim=1)

    def _adapted(self, batch: Batch) -> Tensor | None:
        if self.adaptor is None or batch.adapted is not None:
            return batch.adapted
        if batch.user is None or batch.item is None:
            raise ValueError("this model has an adaptor: give its batches the knowledge of users and items.")
        adapted: Tensor = self.adaptor(batch.user, batch.item)
        return adapted


def _embedding(size: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(size, dim, padding_idx=PADDING)
    nn.init.normal_(table.weight, std=_INIT_STD)
    with torch.no_grad():
        table.weight[PADDING].zero_()
    return table
