"""Fi-GNN (Li et al., CIKM 2019): the fields as the nodes of a complete graph that exchange messages for some steps.

Nodes start from self-attention over the fields; AutoInt's layer serves, whose residual keeps them apart while all
embeddings are near zero. A message passes a matrix of its sender, the edge's weight and a matrix of its receiver; a GRU
takes it in, and the starting state is added after each step. A linear layer scores each node, and an MLP over all nodes
weighs the scores, between 0 and 1. An MLP that scores single nodes is what the paper has: on a toy world it died in two
of three runs, since all nodes of all rows look alike to it at first. Knowledge is two further nodes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.ctr.backbones.autoint import FieldAttention
from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

STEPS = 2  # KAR's; the paper is at its best with 2 or 3
HEADS = 2
HEAD_DIM = 16
STATE_DIM = HEADS * HEAD_DIM


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

        The paper scores an edge by one vector over both nodes, concatenated: that is the sum of two scores.
        """
        scores = F.leaky_relu(self.receiver_score(nodes) + self.sender_score(nodes).transpose(1, 2))
        itself = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        return torch.softmax(scores.masked_fill(itself, float("-inf")), dim=2)

    def step(self, states: Tensor, edges: Tensor) -> Tensor:
        """float32 [b, n, dim]: the states after one exchange of messages, without the residual."""
        sent = torch.einsum("bjd,jdk->bjk", states, self.send)
        taken = torch.einsum("bij,bjd,idk->bik", edges, sent, self.receive) + self.bias
        return self.update(taken.flatten(0, 1), states.flatten(0, 1)).view_as(states)


class FiGNN(Backbone):
    """Field interactions by message passing; the state of a node is 32 wide whatever the embedding is."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.attention = FieldAttention(shape.embed_dim, HEADS, HEAD_DIM)
        self.graph = FieldGraph(shape.n_fields, STATE_DIM)
        self.score = nn.Linear(STATE_DIM, 1)
        self.weigh = mlp(shape.n_fields * STATE_DIM, hidden_dims, dropout, out_dim=shape.n_fields)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        start = self.attention(inputs.fields())
        edges = self.graph.edges(start)
        states = start
        for _ in range(STEPS):
            states = self.graph.step(states, edges) + start
        weights = torch.sigmoid(self.weigh(states.flatten(1)))
        return (weights * self.score(states).squeeze(2)).sum(1)
