"""The batched adaptor against a loop over samples and experts, and what it makes of missing knowledge."""

import torch
from torch import Tensor

from owlrec.ctr.adaptor import Adaptor, Knowledge, Tower
from owlrec.ctr.experiment import AdaptorConfig

D, OUT = 6, 3


def adaptor() -> Adaptor:
    torch.manual_seed(0)
    return Adaptor(D, OUT, AdaptorConfig(shared_experts=2, dedicated_experts=3, hidden_dim=4))


def side(n: int, seed: int) -> Knowledge:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, n, (7,), generator=generator)
    return Knowledge(torch.randn(n, D, generator=generator), torch.rand(n, generator=generator) > 0.4, rows)


def by_hand(model: Adaptor, tower: Tower, knowledge: Knowledge, row: int) -> Tensor:
    u = knowledge.rows[row]
    z = knowledge.vectors[u] / knowledge.vectors[u].norm() if knowledge.mask[u] else tower.default
    scores = [float(tower.gate.weight[i] @ z + tower.gate.bias[i]) for i in range(5)]
    gates = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
    total = torch.zeros(OUT)
    for i in range(5):
        experts, j = (model.shared, i) if i < 2 else (tower.experts, i - 2)
        hidden = (experts.first.weight[4 * j : 4 * j + 4] @ z + experts.first.bias[4 * j : 4 * j + 4]).clamp(min=0)
        total = total + gates[i] * (hidden @ experts.weight[j] + experts.bias[j]).clamp(min=0)
    return total


def test_equals_a_loop_over_samples_and_experts() -> None:
    model, user, item = adaptor(), side(5, 1), side(4, 2)
    assert not user.mask.all()
    with torch.no_grad():
        out = model(user, item)
        expected = [
            torch.stack([by_hand(model, model.user, user, r), by_hand(model, model.item, item, r)]) for r in range(7)
        ]
    assert out.shape == (7, 2, OUT)
    torch.testing.assert_close(out, torch.stack(expected))


def test_missing_knowledge_is_the_default_whatever_the_vector_holds() -> None:
    model, user, item = adaptor(), side(5, 1), side(4, 2)
    other = Knowledge(torch.where(user.mask[:, None], user.vectors, 99.0), user.mask, user.rows)
    assert torch.equal(model(user, item), model(other, item))
    missing = ~user.mask[user.rows]
    before = model(user, item)[:, 0]
    with torch.no_grad():
        model.user.default += 1
    changed = (model(user, item)[:, 0] != before).any(dim=1)
    assert torch.equal(changed, missing)


def test_default_vector_is_learned() -> None:
    model, user, item = adaptor(), side(5, 1), side(4, 2)
    model(user, item).sum().backward()
    assert model.user.default.grad is not None
    assert model.user.default.grad.abs().sum() > 0


def test_size_is_that_of_the_paper() -> None:
    # 12 experts of 384 x 128 + 128 + 128 x 32 + 32, two gates of 384 x 7 + 7, two default vectors.
    model = Adaptor(384, 32, AdaptorConfig())
    assert (
        sum(p.numel() for p in model.parameters())
        == 12 * (384 * 128 + 128 + 128 * 32 + 32) + 2 * (384 * 7 + 7) + 2 * 384
    )
