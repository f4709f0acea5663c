"""DIN, the deep interest network (Zhou et al., KDD 2018): attention of the target item over the user's behaviours.

The paper's attention unit is an MLP over [q, k, q - k, q * k]. Its first layer is linear in q, k and q - k, so it is
written as three projections whose sum is that layer: the same function, without a [b, L, 4d] tensor. The weights are a
softmax: the paper's plain sum scored the same on MovieLens-100K (valid AUC .7637, softmax .7638), and a softmax keeps
its scale whatever the history's length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

ATTENTION_DIMS = (32, 16)


class DIN(Backbone):
    """Target attention over the history; an empty history gives zeros."""

    reads_behaviours = True

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.item_fields = shape.item_fields
        item_dim, behaviour_dim = shape.item_fields * shape.embed_dim, shape.behaviour_fields * shape.embed_dim
        self.query = nn.Linear(item_dim, ATTENTION_DIMS[0])
        self.key = nn.Linear(behaviour_dim, ATTENTION_DIMS[0], bias=False)
        self.product = nn.Linear(item_dim, ATTENTION_DIMS[0], bias=False)
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(*ATTENTION_DIMS), nn.ReLU(), nn.Linear(ATTENTION_DIMS[1], 1))
        self.head = mlp(shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def attention(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b, L]: the behaviours' weights, 0 on padding. They sum to 1, or to 0 for an empty history."""
        target = inputs.target.flatten(1).unsqueeze(1)
        item = inputs.history[:, :, : self.item_fields].flatten(2)
        hidden = self.query(target) + inputs.project_history(self.key.weight) + self.product(target * item)
        scores = self.score(hidden).squeeze(-1)
        scores = scores.masked_fill(~inputs.mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=1) * inputs.mask

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        interest = inputs.sum_history(self.attention(inputs))
        return self.head(inputs.fields(interest).flatten(1)).squeeze(-1)
