"""The hybrid-expert adaptor in a torch model of your own: two more fields of what an encoder made of an LLM's texts.

    python examples/adaptor_in_torch.py

In this toy world users like odd or even items, and only their vector tells which. Who has none gets a learnt default
vector. Real vectors come from a release: `open_release(workspace).store.vectors("user", ids)`.
"""

import torch
from torch import Tensor, nn

from owlrec.ctr.adaptor import Adaptor, Knowledge
from owlrec.ctr.experiment import AdaptorConfig
from owlrec.evaluation import auc

USERS, ITEMS, DIM, WIDTH = 400, 20, 32, 8


class Model(nn.Module):
    """A model as yours may be, with the adaptor's two fields beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.adaptor = Adaptor(DIM, WIDTH, AdaptorConfig())
        self.head = nn.Sequential(nn.Linear(3 * WIDTH, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, items: Tensor, of_users: Knowledge, of_items: Knowledge) -> Tensor:
        fields = [self.items(items), *self.adaptor(of_users, of_items).unbind(1)]
        return self.head(torch.cat(fields, dim=1)).squeeze(1)


def knowledge(ids: Tensor, vectors: Tensor) -> Knowledge:
    """Of a batch's ids, each distinct one once. vectors: float32 [n, DIM] by id, zeros where nothing is known."""
    distinct, rows = torch.unique(ids, return_inverse=True)
    found = vectors[distinct].unsqueeze(1)  # one source of knowledge
    return Knowledge(found, found.any(2), rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    taste, item_vectors = torch.arange(USERS) % 2, torch.randn(ITEMS, DIM)
    user_vectors = torch.cat([2.0 * taste[:, None] - 1, torch.randn(USERS, DIM - 1) / 4], dim=1)
    user_vectors[torch.rand(USERS) < 0.05] = 0  # of whom nothing is known
    users, items = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS)).unbind(1)
    labels, train = (taste[users] == items % 2).float(), users < 300
    for name, vectors in (("own", user_vectors), ("shuffled", user_vectors[torch.randperm(USERS)])):
        model = Model()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):  # all users stand in one batch, but only the first 300 are learnt from
            logits = model(items, knowledge(users, vectors), knowledge(items, item_vectors))
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logits[train], labels[train]).backward()
            optimiser.step()
        found = auc(labels[~train].numpy(), logits[~train].detach().numpy())
        print(f"{name} vectors: AUC {found:.3f} on users never trained on")
