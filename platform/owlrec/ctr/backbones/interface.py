"""The interface of every backbone: features, adaptor and training know no backbone by name.

A backbone sees only embeddings. Knowledge, if the arm has it, is two more fields (user, item) of the same
width as all others, so field models (FM, CIN, attention over fields) need no special case, as in
KAR (RecSys 2024, sec. 3.4).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class InputShape:
    """Sizes that a backbone needs to build its layers."""

    item_fields: int  # item id and attributes
    profile_fields: int
    knowledge_fields: int  # 2 per form of knowledge (vectors, semantic ids), or 0 without knowledge
    embed_dim: int

    @property
    def behavior_fields(self) -> int:
        """Fields of one behavior: those of its item, plus its rating."""
        return self.item_fields + 1

    @property
    def n_fields(self) -> int:
        """Number of fields in `BackboneInputs.fields`."""
        return self.item_fields + self.behavior_fields + self.profile_fields + self.knowledge_fields


@dataclass(frozen=True)
class TableRows:
    """Behaviors as rows of tables. A weighted sum over them is then an embedding bag, seven times faster on a CPU than
    gathering and multiplying a [b, L, f, e] tensor.
    """

    tables: tuple[Tensor, ...]  # float32 [r, width], their fields concatenated
    rows: tuple[Tensor, ...]  # int64 [b, L], of each table

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """float32 [b, sum of the widths]. weights: float32 [b, L]."""
        return torch.cat(
            [
                F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))
                for rows, table in zip(self.rows, self.tables, strict=True)
            ],
            dim=1,
        )

    def projected(self, weight: Tensor) -> Tensor:
        """float32 [b, L, out]: each behavior times `weight` [out, sum of the widths]; each row of a table once."""
        by_table = weight.split([table.shape[1] for table in self.tables], dim=1)
        parts = [
            F.embedding(rows, F.linear(table, table_weight))
            for rows, table, table_weight in zip(self.rows, self.tables, by_table, strict=True)
        ]
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class BackboneInputs:
    """One batch, embedded. b: rows, L: history length, e: embed_dim.

    history, mask and profile may have one row for all b: the row of the user whose candidates a request scores. Work
    that depends only on them is then done once.
    """

    target: Tensor  # float32 [b, item_fields, e]
    # float32 [b or 1, L, behavior_fields, e], the rating last; L is 0 if the backbone reads only sums of it
    history: Tensor
    mask: Tensor  # bool [b or 1, L], False for padding
    profile: Tensor  # float32 [b or 1, profile_fields, e]
    knowledge: Tensor | None  # float32 [b, knowledge_fields, e]: the user's, then the item's
    behaviors: TableRows | None = None  # the history as rows of tables, if a batch repeats items

    def mean_history(self) -> Tensor:
        """float32 [b or 1, behavior_fields, e]: mean over the behaviors without padding; zeros for an empty
        history.
        """
        weights = self.mask.to(self.target.dtype)
        return self.sum_history(weights / weights.sum(1, keepdim=True).clamp(min=1))

    def sum_history(self, weights: Tensor) -> Tensor:
        """float32 [b, behavior_fields, e]: weighted sum of the behaviors.

        weights: float32 [b, L], or [1, L] if history and weights have one row.
        """
        if self.behaviors is None:
            return torch.einsum("bl,blfe->bfe", weights, self.history)
        return self.behaviors.weighted_sum(weights).unflatten(1, self.history.shape[2:])

    def project_history(self, weight: Tensor) -> Tensor:
        """float32 [b or 1, L, out]: a linear map of each behavior. weight: float32 [out, behavior_fields * e]."""
        if self.behaviors is None:
            return F.linear(self.history.flatten(2), weight)
        return self.behaviors.projected(weight)

    def fields(self, history: Tensor | None = None) -> Tensor:
        """float32 [b, n_fields, e]: target, history (by default its mean), profile, knowledge."""
        user_parts = [self.mean_history() if history is None else history, self.profile]
        parts = [self.target, *(part.expand(self.target.shape[0], -1, -1) for part in user_parts)]
        return torch.cat(parts if self.knowledge is None else [*parts, self.knowledge], dim=1)


class Backbone(nn.Module, ABC):
    """The part of a CTR model above the embeddings."""

    reads_behaviors: ClassVar[bool] = False  # True if `forward` reads `history` itself, not only sums of it

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: the logit of a click (or of the label that the recipe defines)."""


def mlp(in_dim: int, hidden_dims: Sequence[int], dropout: float, out_dim: int | None = None) -> nn.Sequential:
    """Linear, ReLU and dropout for each of `hidden_dims`, then an optional linear layer to `out_dim`."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = width
    if out_dim is not None:
        layers.append(nn.Linear(in_dim, out_dim))
    return nn.Sequential(*layers)
