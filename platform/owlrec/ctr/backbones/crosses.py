"""Backbones that multiply fields: DeepFM, xDeepFM, DCN and DCN-V2."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

# --------------------------------------------------------------------------------------------------------------- deepfm
# DeepFM (Guo et al., IJCAI 2017): a linear term, a factorization machine and an MLP, summed (sec. 2.1).
#
# A backbone sees only embeddings, so the linear term is a learned projection of them: the weight of a feature is the
# dot product of its embedding and a vector of its field. Knowledge enters that term and the MLP but not the
# factorization machine, as in KAR: an id's embedding and a dense vector do not co-occur like two features.


def pair_sum(fields: Tensor) -> Tensor:
    """Second order of a factorization machine: the sum of <v_i, v_j> over all pairs i < j.

    Computed as half of (square of the fields' sum - sum of their squares), in time linear in the number of fields.
    fields: float32 [b, n, e]. Returns float32 [b].
    """
    return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)


class DeepFM(Backbone):
    """All three parts share the embeddings; a history counts as one field, its mean."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.paired_fields = shape.n_fields - shape.knowledge_fields
        width = shape.n_fields * shape.embed_dim
        self.linear = nn.Linear(width, 1)
        self.deep = mlp(width, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields()
        flat = fields.flatten(1)
        return (self.linear(flat) + self.deep(flat)).squeeze(-1) + pair_sum(fields[:, : self.paired_fields])


# -------------------------------------------------------------------------------------------------------------- xdeepfm
# xDeepFM (Lian et al., KDD 2018): a linear term, a compressed interaction network and an MLP, summed (sec. 3.3).
#
# Each layer of the network (CIN, sec. 3.1) weights the products of all pairs of its own and the original feature maps,
# component by component, so a map stays a vector of the embedding's width. There is no activation, which the paper
# found best. Components come before maps in memory here, so a layer is one matrix product. The linear term is a learned
# projection of the embeddings, since a backbone sees nothing else. Knowledge is two more fields of all three parts.


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
    """Explicit vector-wise interactions up to degree three, plus the implicit ones of an MLP."""

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


# ---------------------------------------------------------------------------------------------------------------- dcnv1
# DCN, the deep and cross network (Wang et al., ADKDD 2017): a cross network and a deep network side by side.
#
# A cross layer is x_{l+1} = x_0 (x_l . w_l) + b_l + x_l (sec. 2.2). Its weight matrix has rank one, so a layer scales
# x_0 by one number per row, while DCN-V2 weights each component separately. The paper uses batch normalization in the
# deep part; our backbones do not, since a row's score must not depend on the other rows of its batch.


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
    """Crosses up to degree four, and an MLP; the crossed fields include knowledge and the history's mean."""

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


# ---------------------------------------------------------------------------------------------------------------- dcnv2
# DCN-V2 (Wang et al., WWW 2021), parallel form: a cross network and a deep network side by side over all fields.
#
# A cross layer is x_{l+1} = x_0 * (W x_l + b) + x_l with a full-rank W. At our input width (about 300) the
# paper's low-rank form saves nothing.
#
# With knowledge, W is block-diagonal: the knowledge fields are crossed with each other, so a user's taste meets an
# item's facts. Only the deep network reads them together with the others. A full W would be 1.7 times as large.


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
    """Explicit feature crosses up to degree four, plus an MLP; the history enters as its mean."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width, knowledge_width = shape.n_fields * shape.embed_dim, shape.knowledge_fields * shape.embed_dim
        self.blocks = [width - knowledge_width, knowledge_width] if knowledge_width else [width]  # knowledge comes last
        self.cross = nn.ModuleList(MatrixCross(block) for block in self.blocks)
        self.deep = mlp(width, hidden_dims, dropout)
        self.head = nn.Linear(width + hidden_dims[-1], 1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields().flatten(1)
        crossed = [cross(block) for cross, block in zip(self.cross, fields.split(self.blocks, dim=1), strict=True)]
        return self.head(torch.cat([*crossed, self.deep(fields)], dim=1)).squeeze(-1)
