"""Semantic ids as categorical features: a field a side (user, item), beside the adaptor's or in its place.

A residual quantiser's vector is the sum of its codes' centroids, and a linear layer of it the sum of what the layer
makes of each. So a code embeds as (level, code) and the levels are summed: the field can be any linear function of the
decoded vector, and field models get one further field, not three that belong together. Missing knowledge has a code of
its own on each level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from owlrec.ctr.knowledge import VectorTable
from owlrec.errors import SchemaError


@dataclass(frozen=True)
class Codes:
    """The semantic ids of one side of a batch, each distinct id once."""

    values: Tensor  # int64 [u, levels], codes plus one; 0 where an id has no knowledge
    rows: Tensor  # int64 [b]: which of the u ids belongs to each row


class CodeTower(nn.Module):
    """The embeddings of one side's codes."""

    starts: Tensor

    def __init__(self, sizes: Sequence[int], dim: int, *, init_std: float) -> None:
        super().__init__()
        rows = [size + 1 for size in sizes]  # of a level: the missing code, then its codes
        self.table = nn.EmbeddingBag(sum(rows), dim, mode="sum")
        nn.init.normal_(self.table.weight, std=init_std)
        self.register_buffer("starts", torch.from_numpy(np.cumsum([0, *rows[:-1]])), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """float32 [u, dim]. values: see Codes."""
        field: Tensor = self.table(values + self.starts)
        return field


class CodeFields(nn.Module):
    """Both sides' codes."""

    def __init__(self, user: Sequence[int], item: Sequence[int], dim: int, *, init_std: float) -> None:
        super().__init__()
        self.user, self.item = CodeTower(user, dim, init_std=init_std), CodeTower(item, dim, init_std=init_std)

    def forward(self, user: Codes, item: Codes) -> Tensor:
        """float32 [b, 2, dim]: the user's field, then the item's, of each row."""
        return torch.stack([self.user(user.values)[user.rows], self.item(item.values)[item.rows]], dim=1)


def code_sizes(tables: Sequence[VectorTable]) -> tuple[int, ...]:
    """How many codes each level of a side has. Raises SchemaError where its table has none."""
    (table,) = tables
    if not table.code_sizes:
        raise SchemaError(
            "ctr.arms: an arm with codes reads vectors without semantic ids. Set encoder.semantic_ids in the recipe "
            "and run `encode` again, or leave the arm out."
        )
    return table.code_sizes
