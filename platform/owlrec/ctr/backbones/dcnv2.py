"""DCN-V2 (Wang et al., WWW 2021), parallel form: a cross network and a deep network side by side over all fields.

A cross layer is x_{l+1} = x_0 * (W x_l + b) + x_l with a full-rank W: at the width of our input (some 300) the
paper's low-rank form saves nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

CROSS_LAYERS = 3


class DCNv2(Backbone):
    """Explicit feature crosses up to degree four, and an MLP; the history enters as its mean."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width = shape.n_fields * shape.embed_dim
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(CROSS_LAYERS))
        self.deep = mlp(width, hidden_dims, dropout)
        self.head = nn.Linear(width + hidden_dims[-1], 1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        first = inputs.fields().flatten(1)
        crossed = first
        for layer in self.cross:
            crossed = torch.addcmul(crossed, first, layer(crossed))
        return self.head(torch.cat([crossed, self.deep(first)], dim=1)).squeeze(-1)
