"""AutoInt+ (Song et al., CIKM 2019): self-attention over the fields, beside an MLP (sec. 5.5), summed.

An interacting layer (sec. 4.4) lets each field gather from all fields what goes with it; a residual keeps what it was.
The scores are not scaled, as in the paper. Query, key and value have no bias: the softmax would cancel the key's. The
MLP is the paper's joint form; without it the model would have no use for `hidden_dims`, and in the paper it is weaker.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

# The paper's sizes.
LAYERS = 3
HEADS = 2
HEAD_DIM = 32


class FieldAttention(nn.Module):
    """One interacting layer: multi-head self-attention over fields, a projected residual, ReLU."""

    def __init__(self, in_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.projections = nn.Linear(in_dim, 4 * width, bias=False)  # query, key, value and residual in one product

    def forward(self, fields: Tensor) -> Tensor:
        """fields: float32 [b, n, in_dim]. Returns float32 [b, n, heads * head_dim], not negative."""
        query, key, value, residual = self.projections(fields).chunk(4, dim=2)
        query, key, value = (x.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        weights = torch.softmax(query @ key.transpose(2, 3), dim=3)
        gathered = (weights @ value).transpose(1, 2).flatten(2)
        return torch.relu(gathered + residual)


class AutoInt(Backbone):
    """Knowledge is two further fields: attention decides which others each goes with."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width = HEADS * HEAD_DIM
        self.attention = nn.Sequential(
            *(FieldAttention(width if i else shape.embed_dim, HEADS, HEAD_DIM) for i in range(LAYERS))
        )
        self.explicit = nn.Linear(shape.n_fields * width, 1)
        self.deep = mlp(shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields()
        return (self.explicit(self.attention(fields).flatten(1)) + self.deep(fields.flatten(1))).squeeze(-1)
