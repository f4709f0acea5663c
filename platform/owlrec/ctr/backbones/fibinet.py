"""FiBiNET (Huang et al., RecSys 2019): field weights, bilinear products of field pairs, an MLP, and a linear term.

SENET (sec. 3.2) weighs each field by what all fields' means say. Pairs (sec. 3.3) are (v_i W_i) * v_j, one matrix a
field (the paper's field-each type), taken once of the embeddings and once of the weighted ones with the same matrices.
The gate ends in a sigmoid, as in the SENET of images, where the paper has a ReLU: embeddings start near zero, and with
a ReLU half of the weighted fields start at exactly zero and the others too small to learn from. The linear term is a
learned projection of the embeddings. Knowledge is two further fields throughout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

REDUCTION = 3  # the paper's: the gate's hidden layer has a third of the fields


class FieldWeights(nn.Module):
    """Squeeze and excitation over fields: a gate in (0, 1) for each."""

    def __init__(self, n_fields: int) -> None:
        super().__init__()
        hidden = max(1, n_fields // REDUCTION)
        self.excite = nn.Sequential(
            nn.Linear(n_fields, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, n_fields, bias=False), nn.Sigmoid()
        )

    def forward(self, fields: Tensor) -> Tensor:
        """float32 [b, n_fields, e]: the fields, each times its gate."""
        return fields * self.excite(fields.mean(2)).unsqueeze(2)


class BilinearPairs(nn.Module):
    """(v_i W_i) * v_j of all pairs i < j, in the order (0, 1), (0, 2), ..., (1, 2), ..."""

    left: Tensor
    right: Tensor

    def __init__(self, n_fields: int, embed_dim: int) -> None:
        super().__init__()
        left, right = torch.triu_indices(n_fields, n_fields, offset=1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        # No pair has the last field on its left.
        self.weight = nn.Parameter(torch.empty(n_fields - 1, embed_dim, embed_dim))
        nn.init.xavier_normal_(self.weight)

    def forward(self, fields: Tensor) -> Tensor:
        """fields: float32 [b, n_fields, e]. Returns float32 [b, n_pairs, e]."""
        turned = torch.einsum("bfe,fed->bfd", fields[:, :-1], self.weight)
        return turned.index_select(1, self.left) * fields.index_select(1, self.right)


class FiBiNET(Backbone):
    """Which fields matter, and how each pair of them goes together."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        n_pairs = shape.n_fields * (shape.n_fields - 1) // 2
        self.field_weights = FieldWeights(shape.n_fields)
        self.pairs = BilinearPairs(shape.n_fields, shape.embed_dim)
        self.linear = nn.Linear(shape.n_fields * shape.embed_dim, 1)
        self.deep = mlp(2 * n_pairs * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields()
        pairs = torch.cat([self.pairs(fields), self.pairs(self.field_weights(fields))], dim=1)
        return (self.linear(fields.flatten(1)) + self.deep(pairs.flatten(1))).squeeze(-1)
