"""xDeepFM (Lian et al., KDD 2018): a linear term, a compressed interaction network and an MLP, summed (sec. 3.3).

Each layer of the network (CIN, sec. 3.1) weighs the products of all pairs of its own and the original feature maps,
component by component, so that a map stays a vector of the embedding's width; no activation, as the paper found best.
Components come before maps in memory here, so that a layer is one matrix product. The linear term is a learned
projection of the embeddings, since a backbone sees nothing else. Knowledge is two further fields of all three parts.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

# Maps of each layer. The paper's 200 cost ten times as much; KAR has 50, 50.
CIN_MAPS = (64, 64)


class CompressedInteraction(nn.Module):
    """X^k_h = sum over i, j of W^{k,h}_ij (X^{k-1}_i * X^0_j), each map summed over its components."""

    def __init__(self, n_fields: int, maps: Sequence[int]) -> None:
        super().__init__()
        widths = [n_fields, *maps]
        self.layers = nn.ModuleList(
            nn.Linear(before * n_fields, after, bias=False) for before, after in pairwise(widths)
        )

    def forward(self, fields: Tensor) -> Tensor:
        """fields: float32 [b, n_fields, e]. Returns float32 [b, sum of all layers' maps]."""
        first = fields.transpose(1, 2)
        maps, pooled = first, []
        for layer in self.layers:
            products = maps.unsqueeze(3) * first.unsqueeze(2)  # [b, e, maps, n_fields]
            maps = layer(products.flatten(2))
            pooled.append(maps.sum(1))
        return torch.cat(pooled, dim=1)


class XDeepFM(Backbone):
    """Explicit interactions up to degree three, vector by vector, beside the implicit ones of an MLP."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width = shape.n_fields * shape.embed_dim
        self.linear = nn.Linear(width, 1)
        self.interaction = CompressedInteraction(shape.n_fields, CIN_MAPS)
        self.explicit = nn.Linear(sum(CIN_MAPS), 1, bias=False)
        self.deep = mlp(width, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields()
        flat = fields.flatten(1)
        return (self.linear(flat) + self.explicit(self.interaction(fields)) + self.deep(flat)).squeeze(-1)
