"""Backbones that attend over the user's behaviors: DIN and DIEN."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp

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
