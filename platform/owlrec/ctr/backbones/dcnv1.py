"""DCN, the deep and cross network (Wang et al., ADKDD 2017): a cross network and a deep network side by side.

A cross layer is x_{l+1} = x_0 (x_l . w_l) + b_l + x_l (sec. 2.2): its weight matrix has rank one, so a layer weighs x_0
by one number a row, where DCN-V2 weighs each component by its own. The paper normalises the deep part by batch; here it
is not, as in all our backbones: a row's score must not hang on the rows beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

CROSS_LAYERS = 3  # as KAR has it


class CrossNetwork(nn.Module):
    """Feature crosses of bounded degree: n layers reach degree n + 1 with 2 x width weights each."""

    def __init__(self, width: int, n_layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(n_layers))
        self.biases = nn.Parameter(torch.zeros(n_layers, width))

    def forward(self, first: Tensor) -> Tensor:
        """first: float32 [b, width], x_0 of the paper. Returns float32 [b, width]."""
        crossed = first
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = first * weight(crossed) + bias + crossed
        return crossed


class DCNv1(Backbone):
    """Crosses up to degree four, and an MLP; knowledge and the history's mean stand among the crossed fields."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width = shape.n_fields * shape.embed_dim
        self.cross = CrossNetwork(width, CROSS_LAYERS)
        self.deep = mlp(width, hidden_dims, dropout)
        self.head = nn.Linear(width + hidden_dims[-1], 1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        first = inputs.fields().flatten(1)
        return self.head(torch.cat([self.cross(first), self.deep(first)], dim=1)).squeeze(-1)
