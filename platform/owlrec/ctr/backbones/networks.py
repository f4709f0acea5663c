"""Backbones: their interface, and nine published ones: products of fields, attention over fields or behaviors.

A backbone sees only embeddings. Knowledge, if the arm has it, is a few more fields of the same width as all others (of
the user, of the item, their product, similarities to the history), so field models (FM, CIN, attention over fields)
need no special case, as in KAR (RecSys 2024, sec. 3.4).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------------------ interface
# The interface of every backbone: features, adaptor and training know no backbone by name.


@dataclass(frozen=True)
class InputShape:
    """Sizes that a backbone needs to build its layers."""

    item_fields: int  # item id, features and prefixes of the semantic id
    profile_fields: int  # features of users and of the interaction, and further sequences
    knowledge_fields: int  # see ModelSpec; 0 without knowledge
    embed_dim: int
    side_fields: int = 1  # of a behavior: its outcome and, if recorded, its event

    @property
    def behavior_fields(self) -> int:
        """Fields of one behavior: those of its item, then its own."""
        return self.item_fields + self.side_fields

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
    # float32 [b or 1, L, behavior_fields, e], the side fields last; L is 0 if the backbone reads only sums of it
    history: Tensor
    mask: Tensor  # bool [b or 1, L], False for padding
    profile: Tensor  # float32 [b or 1, profile_fields, e]
    knowledge: Tensor | None  # float32 [b, knowledge_fields, e]
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


# -------------------------------------------------------------------------------------------------------------- crosses
# Backbones that multiply fields: DeepFM, xDeepFM, DCN and DCN-V2.


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
# projection of the embeddings, since a backbone sees nothing else. Knowledge is more fields of all three parts.


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
# paper's low-rank form saves nothing. Knowledge is crossed with all other fields, as in KAR: what a text says may mean
# something else for another item or history.


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
        width = shape.n_fields * shape.embed_dim
        self.cross = MatrixCross(width)
        self.deep = mlp(width, hidden_dims, dropout)
        self.head = nn.Linear(width + hidden_dims[-1], 1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields().flatten(1)
        return self.head(torch.cat([self.cross(fields), self.deep(fields)], dim=1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------ attention
# Backbones that weight fields by the other fields: AutoInt+, FiBiNET and Fi-GNN.


# -------------------------------------------------------------------------------------------------------------- autoint
# AutoInt+ (Song et al., CIKM 2019): self-attention over the fields plus an MLP (sec. 5.5), summed.
#
# An interacting layer (sec. 4.4) lets each field gather related information from all fields; a residual keeps its
# input. As in the paper, the scores are not scaled. Query, key and value have no bias: the softmax would cancel the
# key's. The MLP is the paper's joint form. Without it `hidden_dims` would be unused, and in the paper the model
# without an MLP is weaker.


# The paper's sizes.
AUTOINT_LAYERS = 3
AUTOINT_HEADS = 2
AUTOINT_HEAD_DIM = 32


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
    """Knowledge is more fields; attention relates them to the others."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        width = AUTOINT_HEADS * AUTOINT_HEAD_DIM
        self.attention = nn.Sequential(
            *(
                FieldAttention(width if i else shape.embed_dim, AUTOINT_HEADS, AUTOINT_HEAD_DIM)
                for i in range(AUTOINT_LAYERS)
            )
        )
        self.explicit = nn.Linear(shape.n_fields * width, 1)
        self.deep = mlp(shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        fields = inputs.fields()
        return (self.explicit(self.attention(fields).flatten(1)) + self.deep(fields.flatten(1))).squeeze(-1)


# -------------------------------------------------------------------------------------------------------------- fibinet
# FiBiNET (Huang et al., RecSys 2019): field weights, bilinear products of field pairs, an MLP, and a linear term.
#
# SENET (sec. 3.2) weights each field by the means of all fields. Pairs (sec. 3.3) are (v_i W_i) * v_j, one matrix per
# field (the paper's field-each type), computed from the embeddings and from the weighted embeddings with the same
# matrices. The gate ends in a sigmoid, as in the SENET for images, while the paper has a ReLU: embeddings start near
# zero, and with a ReLU half of the weighted fields start at exactly zero and the others too small to learn from. The
# linear term is a learned projection of the embeddings. Knowledge is more fields throughout.


FIBINET_REDUCTION = 3  # the paper's: the gate's hidden layer has a third of the fields


class FieldWeights(nn.Module):
    """Squeeze and excitation over fields: a gate in (0, 1) per field."""

    def __init__(self, n_fields: int) -> None:
        super().__init__()
        hidden = max(1, n_fields // FIBINET_REDUCTION)
        self.excite = nn.Sequential(
            nn.Linear(n_fields, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, n_fields, bias=False), nn.Sigmoid()
        )

    def forward(self, fields: Tensor) -> Tensor:
        """float32 [b, n_fields, e]: each field times its gate."""
        return fields * self.excite(fields.mean(2)).unsqueeze(2)


class BilinearPairs(nn.Module):
    """(v_i W_i) * v_j for all pairs i < j, in the order (0, 1), (0, 2), ..., (1, 2), ..."""

    left: Tensor
    right: Tensor

    def __init__(self, n_fields: int, embed_dim: int) -> None:
        super().__init__()
        left, right = torch.triu_indices(n_fields, n_fields, offset=1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        # The last field is never on the left of a pair.
        self.weight = nn.Parameter(torch.empty(n_fields - 1, embed_dim, embed_dim))
        nn.init.xavier_normal_(self.weight)

    def forward(self, fields: Tensor) -> Tensor:
        """fields: float32 [b, n_fields, e]. Returns float32 [b, n_pairs, e]."""
        turned = torch.einsum("bfe,fed->bfd", fields[:, :-1], self.weight)
        return turned.index_select(1, self.left) * fields.index_select(1, self.right)


class FiBiNET(Backbone):
    """Learns the importance of fields and the interaction of each pair."""

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


# ---------------------------------------------------------------------------------------------------------------- fignn
# Fi-GNN (Li et al., CIKM 2019): the fields as the nodes of a complete graph that exchange messages for some steps.
#
# Nodes start from self-attention over the fields, with AutoInt's layer, whose residual keeps them distinct while all
# embeddings are near zero. A message passes a matrix of its sender, the edge's weight and a matrix of its receiver. A
# GRU reads it, and the starting state is added after each step. A linear layer scores each node, and an MLP over
# all nodes weights the scores between 0 and 1. The paper uses an MLP that scores single nodes: on a toy world
# it died in two of three runs, since all nodes of all rows look alike to it at first. Knowledge is more nodes.


FIGNN_STEPS = 2  # as in KAR; the paper does best with 2 or 3
FIGNN_HEADS = 2
FIGNN_HEAD_DIM = 16
FIGNN_STATE_DIM = FIGNN_HEADS * FIGNN_HEAD_DIM


class FieldGraph(nn.Module):
    """Edge weights and message passing between fields."""

    def __init__(self, n_fields: int, dim: int) -> None:
        super().__init__()
        self.sender_score = nn.Linear(dim, 1, bias=False)
        self.receiver_score = nn.Linear(dim, 1, bias=False)
        self.send = nn.Parameter(torch.empty(n_fields, dim, dim))
        self.receive = nn.Parameter(torch.empty(n_fields, dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_normal_(self.send)
        nn.init.xavier_normal_(self.receive)
        self.update = nn.GRUCell(dim, dim)

    def edges(self, nodes: Tensor) -> Tensor:
        """float32 [b, n, n]: how much row i takes from column j, 0 on the diagonal; rows sum to 1.

        The paper scores an edge with one vector over both concatenated nodes, which is the sum of two scores.
        """
        scores = F.leaky_relu(self.receiver_score(nodes) + self.sender_score(nodes).transpose(1, 2))
        itself = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        return torch.softmax(scores.masked_fill(itself, float("-inf")), dim=2)

    def step(self, states: Tensor, edges: Tensor) -> Tensor:
        """float32 [b, n, dim]: states after one exchange of messages, without the residual."""
        sent = torch.einsum("bjd,jdk->bjk", states, self.send)
        taken = torch.einsum("bij,bjd,idk->bik", edges, sent, self.receive) + self.bias
        return self.update(taken.flatten(0, 1), states.flatten(0, 1)).view_as(states)


class FiGNN(Backbone):
    """Field interactions by message passing; a node's state is 32 wide for any embedding width."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.attention = FieldAttention(shape.embed_dim, FIGNN_HEADS, FIGNN_HEAD_DIM)
        self.graph = FieldGraph(shape.n_fields, FIGNN_STATE_DIM)
        self.score = nn.Linear(FIGNN_STATE_DIM, 1)
        self.field_gate = mlp(shape.n_fields * FIGNN_STATE_DIM, hidden_dims, dropout, out_dim=shape.n_fields)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        start = self.attention(inputs.fields())
        edges = self.graph.edges(start)
        states = start
        for _ in range(FIGNN_STEPS):
            states = self.graph.step(states, edges) + start
        weights = torch.sigmoid(self.field_gate(states.flatten(1)))
        return (weights * self.score(states).squeeze(2)).sum(1)


# ------------------------------------------------------------------------------------------------------------ sequences
# Backbones that attend over the user's behaviors: DIN and DIEN.


# ------------------------------------------------------------------------------------------------------------------ din
# DIN, the deep interest network (Zhou et al., KDD 2018): attention of the target item over the user's behaviors.
#
# The paper's attention unit is an MLP over [q, k, q - k, q * k]. Its first layer is linear in q, k and q - k, so it is
# written as the sum of three projections: the same function without a [b, L, 4d] tensor. The weights are
# a softmax: the paper's plain sum scored the same on MovieLens-100K (valid AUC .7637, softmax .7638), and a softmax
# keeps its scale for any history length.


ATTENTION_DIMS = (32, 16)


class DIN(Backbone):
    """Target attention over the history; an empty history gives zeros."""

    reads_behaviors = True

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.item_fields = shape.item_fields
        item_dim, behavior_dim = shape.item_fields * shape.embed_dim, shape.behavior_fields * shape.embed_dim
        self.query = nn.Linear(item_dim, ATTENTION_DIMS[0])
        self.key = nn.Linear(behavior_dim, ATTENTION_DIMS[0], bias=False)
        self.product = nn.Linear(item_dim, ATTENTION_DIMS[0], bias=False)
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(*ATTENTION_DIMS), nn.ReLU(), nn.Linear(ATTENTION_DIMS[1], 1))
        self.head = mlp(shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def attention(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b, L]: the behaviors' weights, 0 on padding. They sum to 1, or to 0 for an empty history."""
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


# ----------------------------------------------------------------------------------------------------------------- dien
# DIEN, the deep interest evolution network (Zhou et al., AAAI 2019): two GRUs over the history. The target steers the
# second: each step's update gate is scaled by that step's attention to the target (AUGRU), so irrelevant
# steps leave the state unchanged. So does padding, whose attention is 0. The paper's auxiliary loss,
# in which the first GRU's states predict the next behavior against a sampled one, is left out: a backbone returns a
# logit and sees no negatives. The head reads the final state and all fields, including the history's mean;
# knowledge is a dense input to it.


class AttentionalGRU(nn.Module):
    """A GRU whose update gate u_t is scaled by a weight a_t in [0, 1]: h_t = (1 - a_t u_t) h_{t-1} + a_t u_t n_t."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.read = nn.Linear(in_dim, 3 * dim)  # reset gate, update gate, candidate, for all steps in one product
        self.recall = nn.Linear(dim, 3 * dim, bias=False)
        nn.init.orthogonal_(self.recall.weight)

    def forward(self, steps: Tensor, weights: Tensor) -> Tensor:
        """The state after the last step, zeros before the first.

        steps: float32 [L, b or 1, in_dim]; weights: float32 [L, b]. Returns float32 [b, dim].
        """
        read_gates, read_candidate = self.read(steps).split([2 * self.dim, self.dim], dim=2)
        state = steps.new_zeros(weights.shape[1], self.dim)
        # unbind instead of an index per step: the gradient of an index is a tensor of all steps.
        for gates, candidate, weight in zip(
            read_gates.unbind(), read_candidate.unbind(), weights.unsqueeze(2).unbind(), strict=True
        ):
            recalled_gates, recalled = self.recall(state).split([2 * self.dim, self.dim], dim=1)
            reset, update = torch.sigmoid(gates + recalled_gates).chunk(2, dim=1)
            proposal = torch.tanh(candidate + reset * recalled)
            state = torch.lerp(state, proposal.to(state.dtype), (weight * update).to(state.dtype))
        return state


class DIEN(Backbone):
    """Interests that evolve towards the target; an empty history gives a zero state.

    A state is as wide as an item's embedding, as in the paper. Behaviors must come before padding, as in features.py,
    because the extractor reads them in order.
    """

    reads_behaviors = True

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        item_dim, behavior_dim = shape.item_fields * shape.embed_dim, shape.behavior_fields * shape.embed_dim
        self.extractor = nn.GRU(behavior_dim, item_dim)
        self.key = nn.Linear(item_dim, item_dim, bias=False)
        self.evolution = AttentionalGRU(item_dim, item_dim)
        self.head = mlp(item_dim + shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def attention(self, interests: Tensor, inputs: BackboneInputs) -> Tensor:
        """float32 [L, b]: softmax over a history of h_t W e, e the target; 0 on padding and for an empty history.

        interests: float32 [L, b or 1, item_dim], the extractor's states.
        """
        mask = inputs.mask.T
        scores = torch.einsum("lbd,bd->lb", interests, self.key(inputs.target.flatten(1)))
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=0) * mask

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        history = inputs.history.flatten(2).transpose(0, 1)
        interests, _ = self.extractor(history)
        interest = self.evolution(interests, self.attention(interests, inputs))
        return self.head(torch.cat([interest, inputs.fields().flatten(1)], dim=1)).squeeze(-1)
