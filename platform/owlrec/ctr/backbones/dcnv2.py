"""DCN-V2 (Wang et al., WWW 2021), parallel form: a cross network and a deep network side by side over all fields.

A cross layer is x_{l+1} = x_0 * (W x_l + b) + x_l with a full-rank W: at the width of our input (some 300) the
paper's low-rank form saves nothing.

With knowledge W is block-diagonal: the knowledge fields are crossed with each other, which is where a user's taste
meets what an item is, and the deep network alone reads them beside the others. A full W would be 1.7 times as large.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

CROSS_LAYERS = 3


class MatrixCross(nn.Module):
    """[b, width] -> [b, width]: sums of products of up to CROSS_LAYERS + 1 components."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(CROSS_LAYERS))

    def forward(self, first: Tensor) -> Tensor:
        """first: float32 [b, width]."""
        crossed = first
        for layer in self.layers:
            crossed = torch.addcmul(crossed, first, layer(crossed))
        return crossed


class DCNv2(Backbone):
    """Explicit feature crosses up to degree four, and an MLP; the history enters as its mean."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width, of_knowledge = shape.n_fields * shape.embed_dim, shape.knowledge_fields * shape.embed_dim
        self.blocks = [width - of_knowledge, of_knowledge] if of_knowledge else [width]  # knowledge comes last
        self.cross = nn.ModuleList(MatrixCross(block) for block in self.blocks)
        self.deep = mlp(width, hidden_dims, dropout)
        self.head = nn.Linear(width + hidden_dims[-1], 1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields().flatten(1)
        crossed = [cross(block) for cross, block in zip(self.cross, fields.split(self.blocks, dim=1), strict=True)]
        return self.head(torch.cat([*crossed, self.deep(fields)], dim=1)).squeeze(-1)
