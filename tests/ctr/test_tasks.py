"""Several labels: a planted pair, of which the rarer one learns from the other; losses by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from owlrec.ctr.batches import Targets
from owlrec.ctr.experiment import CTRConfig, Sharing, Trial
from owlrec.ctr.features import build_features
from owlrec.ctr.model import PLE, MMoE, mixed
from owlrec.ctr.trainer import Trained, TrainingData, train_one
from owlrec.schema import SAMPLES

torch.set_num_threads(1)
USERS, ITEMS = 300, 150


def planted(task: str | None) -> TrainingData:
    """A click follows a user's mood and an item's quality; one click in ten becomes a purchase, the more likely the
    better the item and, what clicks do not tell, the cheaper its class. task: the further label of the clicks, or None:
    purchases alone.
    """
    rng = np.random.default_rng(0)
    mood, quality, cheap = rng.normal(size=USERS), rng.normal(size=ITEMS), rng.integers(0, 2, ITEMS)
    rows, bought = [], []
    for user in range(USERS):
        for item in rng.choice(ITEMS, 40, replace=False).tolist():
            split = ("train", "train", "train", "valid", "test")[int(rng.integers(5))]
            match = 1.5 * mood[user] + 1.5 * quality[item]
            click = float(rng.random() < 1 / (1 + np.exp(-match)))
            buys = click * float(rng.random() < 1 / (1 + np.exp(3.5 - match / 2 - 2 * cheap[item])))
            rows.append((user, item, click if task else buys, 0, [], [], [], split))
            bought.append(buys)
    samples = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES)
    samples = samples.append_column("label/bought", pa.array(bought, pa.float32()))
    ids = [str(i) for i in range(max(USERS, ITEMS))]
    users = pa.table({"user_id": range(USERS), "raw_id": ids[:USERS]})
    items = pa.table({"item_id": range(ITEMS), "raw_id": ids[:ITEMS], "title": ids[:ITEMS],
                      "class": [str(c) for c in cheap]})  # fmt: skip
    features = build_features(
        users, items, samples, features={"users": ("user_id",)}, min_item_count=1, tasks=(task,) if task else ()
    )
    return TrainingData(features, {})


@pytest.fixture(scope="module")
def alone() -> float:
    """Test AUC of purchases, trained on them alone."""
    return train(None).result.test.auc


def train(sharing: Sharing | None) -> Trained:
    config = CTRConfig(
        batch_size=256, epochs=12, embed_dim=8, hidden_dims=(32, 16), learning_rate=4e-3,
        tasks={sharing: ("bought",)} if sharing else None,
    )  # fmt: skip
    return train_one(Trial(backbone="deepfm", arm="none", seed=0), planted("bought" if sharing else None), config)


@pytest.mark.parametrize("sharing", ["shared", "mmoe", "ple"])
def test_a_rare_label_learns_from_a_frequent_one(alone: float, sharing: Sharing) -> None:
    result = train(sharing).result
    assert result.tasks["bought"]["test"] > alone + 0.01


def test_the_loss_sums_labels_and_leaves_out_the_unknown_ones() -> None:
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    targets = Targets(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([[float("nan")], [1.0]]))
    by_hand = (-F.logsigmoid(logits[0, 0]) - 3 * (F.logsigmoid(-logits[1, 0]) + F.logsigmoid(logits[1, 1]))) / 2
    torch.testing.assert_close(targets.loss(logits), by_hand)
    assert torch.isfinite(torch.autograd.grad(targets.loss(logits.requires_grad_()), logits)[0]).all()


def test_mmoe_is_towers_over_gated_experts() -> None:
    torch.manual_seed(0)
    network, x = MMoE(2, 5, (3, 4)), torch.randn(6, 5)
    for task, (gate, tower) in enumerate(zip(network.gates, network.towers, strict=True)):
        weights = torch.softmax(gate(x), dim=1)
        experts = torch.relu(network.experts.layer(x)).reshape(6, -1, 3)
        by_row = torch.stack([sum(weights[row, n] * experts[row, n] for n in range(4)) for row in range(6)])
        torch.testing.assert_close(network(x)[:, task], tower(by_row)[:, 0])


def test_an_expert_of_one_label_never_reaches_the_other_in_the_last_layer_of_ple() -> None:
    torch.manual_seed(0)
    network, x = PLE(2, 5, (3, 4)), torch.randn(6, 5)
    before = network(x)
    with torch.no_grad():
        network.layers[1]["experts"][0].layer.bias += 1.0  # the first label's own
    after = network(x)
    torch.testing.assert_close(after[:, 1], before[:, 1])
    assert (after[:, 0] != before[:, 0]).any()
    with torch.no_grad():
        network.layers[0]["experts"][0].layer.bias += 1.0  # the shared part of the second layer reads it
    assert (network(x)[:, 1] != after[:, 1]).any()
    torch.testing.assert_close(mixed(torch.nn.Linear(5, 1), x, x[:, None]), x)
