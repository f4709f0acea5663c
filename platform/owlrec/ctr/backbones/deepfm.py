"""DeepFM (Guo et al., IJCAI 2017): a linear term, a factorisation machine and an MLP, summed (sec. 2.1).

A backbone sees embeddings only, so the linear term is a learned projection of them: the weight of a feature is the dot
product of its embedding and a vector of its field. Knowledge enters that term and the MLP but not the factorisation
machine, as in KAR: a pair of an id's embedding and a dense vector is no co-occurrence of two features.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from owlrec.ctr.backbones.interface import Backbone, BackboneInputs, InputShape, mlp


def pair_sum(fields: Tensor) -> Tensor:
    """The second order of a factorisation machine: the sum of <v_i, v_j> over all pairs i < j.

    It is half of what the square of the fields' sum has more than the sum of their squares: linear in their number.
    fields: float32 [b, n, e]. Returns float32 [b].
    """
    return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)


class DeepFM(Backbone):
    """All three parts share the embeddings; a history stands for one field, its mean."""

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
