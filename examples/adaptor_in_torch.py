"""The hybrid-expert adaptor in your own torch model: it turns the vectors of an LLM's texts into two more fields.

    python examples/adaptor_in_torch.py

In this toy world users like odd or even items, and only their vectors reveal which. A user without one gets a learned
default vector. Real vectors come from a release: `owlrec.open("runs/shop").vectors("user", ids)`.
"""

import torch
from torch import Tensor, nn

import owlrec
from owlrec.evaluation import auc

USERS, ITEMS, DIM, WIDTH = 200, 10, 32, 8


class Model(nn.Module):
    """An example model: the adaptor's two fields next to its own."""

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
    user_vectors[torch.rand(USERS) < 0.05] = 0  # no knowledge for these
    users, items = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS)).unbind(1)
    labels, train = (taste[users] == items % 2).float(), users < 150
    for name, vectors in (("own", user_vectors), ("shuffled", user_vectors[torch.randperm(USERS)])):
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):  # all users are in one batch, but the loss reads only the first 150
            logits = model(items, vectors[users], item_vectors[items])
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logits[train], labels[train]).backward()
            optimizer.step()
        score = auc(labels[~train].numpy(), logits[~train].detach().numpy())
        print(f"{name} vectors: AUC {score:.3f} on users never trained on")
