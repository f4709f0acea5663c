"""The hybrid-expert adaptor in a torch model of your own: two more fields of what an encoder made of an LLM's texts.

    python examples/adaptor_in_torch.py

In this toy world users like odd or even items, and only their vector tells which. A user without one gets a learned
default vector. Real vectors come from a release: `owlrec.open("runs/shop").vectors("user", ids)`.
"""

import torch
from torch import Tensor, nn

import owlrec
from owlrec.evaluation import auc

USERS, ITEMS, DIM, WIDTH = 200, 10, 32, 8


class Model(nn.Module):
    """A model as yours may be, with the adaptor's two fields beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.adaptor = owlrec.Adaptor(DIM, WIDTH)
        self.head = nn.Sequential(nn.Linear(3 * WIDTH, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, items: Tensor, user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
        fields = self.adaptor(user_vectors, item_vectors)
        return self.head(torch.cat([self.items(items), fields.flatten(1)], dim=1)).squeeze(1)


if __name__ == "__main__":
    torch.manual_seed(0)
    taste, item_vectors = torch.arange(USERS) % 2, torch.randn(ITEMS, DIM)
    user_vectors = torch.cat([2.0 * taste[:, None] - 1, torch.randn(USERS, DIM - 1) / 4], dim=1)
    user_vectors[torch.rand(USERS) < 0.05] = 0  # nothing is known about these
    users, items = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS)).unbind(1)
    labels, train = (taste[users] == items % 2).float(), users < 150
    for name, vectors in (("own", user_vectors), ("shuffled", user_vectors[torch.randperm(USERS)])):
        model = Model()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):  # all users stand in one batch, but the loss reads the first 150 alone
            logits = model(items, vectors[users], item_vectors[items])
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logits[train], labels[train]).backward()
            optimiser.step()
        score = auc(labels[~train].numpy(), logits[~train].detach().numpy())
        print(f"{name} vectors: AUC {score:.3f} on users never trained on")
