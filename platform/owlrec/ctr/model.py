"""A whole CTR model: embeddings, the adaptor where the arm has knowledge, and a backbone.

Items and ids recur within a batch (a popular item stands in hundreds of histories), so each distinct item is embedded once and each
distinct id goes through the adaptor once; rows then gather the results. The numbers are the same, the work several times less.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from owlrec.ctr.adaptor import Adaptor, Knowledge
from owlrec.ctr.backbones import backbone_class
from owlrec.ctr.backbones.interface import BackboneInputs, InputShape
from owlrec.ctr.features import PADDING, RATING_BUCKETS, FeatureSpec

INIT_STD = 0.05


@dataclass(frozen=True)
class Batch:
    """One batch of codes, and of knowledge where the arm has it."""

    items: Tensor  # int64 [b], row numbers of the item table
    history: Tensor  # int64 [b, L], row numbers, 0 for padding
    ratings: Tensor  # int64 [b, L]
    profile: Tensor  # int64 [b, n_profile]
    user: Knowledge | None = None
    item: Knowledge | None = None


class CTRModel(nn.Module):
    def __init__(
        self,
        spec: FeatureSpec,
        item_codes: Tensor,
        item_attributes: Tensor,
        *,
        backbone,
        knowledge_dim,
        embed_dim,
        hidden_dims,
        dropout,
        adaptor,
        inter=False,
    ) -> None:
        super().__init__()
        self.inter = inter
        self.register_buffer("item_codes", item_codes, persistent=False)
        self.register_buffer("item_attributes", item_attributes, persistent=False)
        self.item = embedding(spec.n_items, embed_dim)
        self.attributes = nn.ModuleList(embedding(n, embed_dim) for n in spec.attributes.values())
        self.rating = embedding(RATING_BUCKETS + 1, embed_dim)
        self.profile = nn.ModuleList(embedding(n, embed_dim) for n in spec.profile.values())
        shape = InputShape(1 + len(self.attributes), len(self.profile), 2 if knowledge_dim else 0, embed_dim)
        if inter:
            shape = InputShape(1 + len(self.attributes), len(self.profile), 2 if knowledge_dim else 0, embed_dim)
        self.backbone = backbone_class(backbone)(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.adaptor = Adaptor(knowledge_dim, embed_dim, adaptor) if knowledge_dim else None

    def embed_items(self, rows: Tensor) -> Tensor:
        fields = [self.item(self.item_codes[rows])]
        values = self.item_attributes[rows]
        for i, table in enumerate(self.attributes):
            codes = values[:, i]
            n = (codes != PADDING).sum(1, keepdim=True).clamp(min=1)
            fields.append(table(codes).sum(1) / n)
        return torch.stack(fields, dim=1)

    def forward(self, batch: Batch) -> Tensor:
        rows, where = torch.unique(torch.cat([batch.items.unsqueeze(1), batch.history], dim=1), return_inverse=True)
        items = self.embed_items(rows)
        fl = items.flatten(1).index_select(0, where.flatten()).view(*where.shape, *items.shape[1:])
        rating = self.rating(batch.ratings)
        hist = torch.cat([fl[:, 1:], rating.unsqueeze(2)], 2)
        if self.inter:
            hist = torch.cat([fl[:, 1:] * (1 + rating.unsqueeze(2)), rating.unsqueeze(2)], 2)
        profile = (
            torch.stack([t(batch.profile[:, i]) for i, t in enumerate(self.profile)], 1)
            if len(self.profile)
            else fl[:, 0, :0]
        )
        knowledge = self.adaptor(batch.user, batch.item) if self.adaptor is not None else None
        return self.backbone(BackboneInputs(fl[:, 0], hist, batch.history != PADDING, profile, knowledge))


def embedding(n: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(n, dim, padding_idx=PADDING)
    with torch.no_grad():
        table.weight.normal_(std=INIT_STD)
        table.weight[PADDING].zero_()
    return table
