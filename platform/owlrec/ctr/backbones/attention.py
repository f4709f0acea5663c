"""Backbones that weight fields by the other fields: AutoInt+, FiBiNET and Fi-GNN."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

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
    """Knowledge is two more fields; attention relates them to the others."""

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
# linear term is a learned projection of the embeddings. Knowledge is two more fields throughout.


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
# it died in two of three runs, since all nodes of all rows look alike to it at first. Knowledge is two more nodes.


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
