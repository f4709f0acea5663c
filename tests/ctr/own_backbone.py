"""A backbone as somebody would add it: one MLP over all fields. `BACKBONES` gets one line for it."""

from collections.abc import Sequence

from torch import Tensor

from owlrec.ctr.backbones.networks import Backbone, BackboneInputs, InputShape, mlp


class OneMLP(Backbone):
    """A history stands for one field, its mean."""

    def __init__(self, shape: InputShape, *, hidden_dims: Sequence[int], dropout: float) -> None:
        super().__init__(shape, hidden_dims=hidden_dims, dropout=dropout)
        self.deep = mlp(shape.n_fields * shape.embed_dim, hidden_dims, dropout, out_dim=1)

    def forward(self, inputs: BackboneInputs) -> Tensor:
        """float32 [b]: logits."""
        return self.deep(inputs.fields().flatten(1)).squeeze(-1)
