"""The batched adaptor against a loop over samples, sources and experts; laws of fusion and of missing knowledge."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from owlrec.ctr.experiment import AdaptorConfig
from owlrec.ctr.model import FUSION_DIM, Adaptor, BatchVectors, Tower

D, OUT = 6, 3
CONFIG = AdaptorConfig(shared_experts=2, dedicated_experts=3, hidden_dim=4)
SOURCES = [(1, 1), (3, 2), (4, 1)]  # of users, of items


def adaptor(user_slots: int = 1, item_slots: int = 1) -> Adaptor:
    torch.manual_seed(0)
    return Adaptor(D, OUT, CONFIG, (user_slots,), (item_slots,)).eval()


def knowledge_of(n: int, seed: int, sources: int = 1) -> BatchVectors:
    """Seven rows; the first id, which the first row is of, has no knowledge of any source."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, n, (7,), generator=generator)
    rows[0] = 0
    vectors = torch.randn(n, sources, D, generator=generator)
    mask = torch.rand(n, sources, generator=generator) > 0.4
    mask[0] = False
    return BatchVectors(vectors, mask, rows)


def fused_by_hand(tower: Tower, vectors: Tensor, mask: Tensor) -> Tensor:
    units = {i: vectors[i] / vectors[i].norm() for i in range(len(mask)) if mask[i]}
    if not units:
        return tower.default
    if tower.fusion is None:
        return units[0]
    fusion, weights = tower.fusion, {}
    for i, unit in units.items():
        hidden = torch.tanh(fusion.key.weight @ unit + fusion.slots[i])
        weights[i] = math.exp(fusion.query @ hidden)
    return sum((w / sum(weights.values()) * units[i] for i, w in weights.items()), torch.zeros(D))


def by_hand(model: Adaptor, tower: Tower, knowledge: BatchVectors, row: int) -> Tensor:
    u = knowledge.rows[row]
    z = fused_by_hand(tower, knowledge.vectors[u], knowledge.mask[u])
    scores = [float(tower.gate.weight[i] @ z + tower.gate.bias[i]) for i in range(5)]
    gates = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
    total = torch.zeros(OUT)
    for i in range(5):
        experts, j = (model.shared, i) if i < 2 else (tower.experts, i - 2)
        hidden = (experts.first.weight[4 * j : 4 * j + 4] @ z + experts.first.bias[4 * j : 4 * j + 4]).clamp(min=0)
        total = total + gates[i] * (hidden @ experts.weight[j] + experts.bias[j]).clamp(min=0)
    return total


@pytest.mark.parametrize("sources", SOURCES)
def test_equals_a_loop_over_samples_sources_and_experts(sources: tuple[int, int]) -> None:
    model, user, item = adaptor(*sources), knowledge_of(5, 1, sources[0]), knowledge_of(4, 2, sources[1])
    assert user.mask.any()
    with torch.no_grad():
        out = model.fields(user, item)
        expected = [
            torch.stack([by_hand(model, model.user[0], user, r), by_hand(model, model.item[0], item, r)])
            for r in range(7)
        ]
    assert out.shape == (7, 2, OUT)
    torch.testing.assert_close(out, torch.stack(expected))


def drawn_by_hand() -> dict[str, Tensor]:
    """The parameters of the adaptor of the paper, drawn in the order shared, user, item."""

    def experts(name: str, n: int) -> dict[str, Tensor]:
        first = nn.Linear(D, n * 4)
        return {
            f"{name}.first.weight": first.weight,
            f"{name}.first.bias": first.bias,
            f"{name}.weight": torch.empty(n, 4, OUT).uniform_(-0.5, 0.5),
            f"{name}.bias": torch.empty(n, OUT).uniform_(-0.5, 0.5),
        }

    def tower(name: str) -> dict[str, Tensor]:
        default, gate = torch.randn(D) * D**-0.5, nn.Linear(D, 5)
        parts = {f"{name}.default": default, f"{name}.gate.weight": gate.weight, f"{name}.gate.bias": gate.bias}
        return {**parts, **experts(f"{name}.experts", 3)}

    return {**experts("shared", 2), **tower("user.0"), **tower("item.0")}


def test_one_source_draws_the_numbers_of_an_adaptor_without_fusion() -> None:
    parameters = dict(adaptor().named_parameters())
    after = torch.rand(3)
    torch.manual_seed(0)
    expected = drawn_by_hand()
    assert torch.equal(torch.rand(3), after)
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(parameters[name], value), name


@pytest.mark.parametrize("garbage", [99.0, -math.inf, math.nan])
@pytest.mark.parametrize("sources", SOURCES)
def test_a_missing_source_contributes_nothing_whatever_its_vector_holds(
    sources: tuple[int, int], garbage: float
) -> None:
    model, user, item = adaptor(*sources), knowledge_of(5, 1, sources[0]), knowledge_of(4, 2, sources[1])
    others = [BatchVectors(k.vectors.masked_fill(~k.mask.unsqueeze(2), garbage), k.mask, k.rows) for k in (user, item)]
    assert torch.equal(model.fields(*others), model.fields(user, item))
    model.fields(*others).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("sources", [1, 3])
def test_only_ids_without_any_source_read_the_default(sources: int) -> None:
    model, user, item = adaptor(sources), knowledge_of(5, 1, sources), knowledge_of(4, 2)
    missing = ~user.mask.any(dim=1)
    assert torch.equal(model.user[0].fused(user.vectors, user.mask)[missing], torch.zeros(int(missing.sum()), D))
    before = model.fields(user, item)[:, 0]
    with torch.no_grad():
        model.user[0].default += 1
    changed = (model.fields(user, item)[:, 0] != before).any(dim=1)
    assert torch.equal(changed, missing[user.rows])
    assert not changed.all()


@pytest.mark.parametrize("present", [0, 1, 2])
def test_an_id_with_one_source_reads_just_that_vector(present: int) -> None:
    tower, vectors = adaptor(3).user[0], knowledge_of(5, 1, 3).vectors
    mask = (torch.arange(3) == present).expand(5, 3)
    torch.testing.assert_close(tower.fused(vectors, mask), F.normalize(vectors[:, present], dim=1))


def test_nothing_known_of_a_whole_batch_trains_without_nan() -> None:
    model, user, item = adaptor(3, 2), knowledge_of(5, 1, 3), knowledge_of(4, 2, 2)
    user, item = (BatchVectors(k.vectors, torch.zeros_like(k.mask), k.rows) for k in (user, item))
    out = model.fields(user, item)
    out.sum().backward()
    assert model.user[0].fusion is not None
    assert torch.equal(model.user[0].fused(user.vectors, user.mask), torch.zeros(5, D))
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("sources", SOURCES)
def test_ids_permuted_with_their_vectors_leave_the_outputs(sources: tuple[int, int]) -> None:
    model, user, item = adaptor(*sources), knowledge_of(5, 1, sources[0]), knowledge_of(4, 2, sources[1])
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = BatchVectors(user.vectors[order], user.mask[order], torch.argsort(order)[user.rows])
    torch.testing.assert_close(model.fields(moved, item), model.fields(user, item))


def test_sources_are_told_apart_by_their_slots_alone() -> None:
    tower, vectors = adaptor(3).user[0], knowledge_of(5, 1, 3).vectors
    mask, order = torch.ones(5, 3, dtype=torch.bool), torch.tensor([2, 0, 1])
    assert tower.fusion is not None
    before, swapped = tower.fused(vectors, mask), tower.fused(vectors[:, order], mask)
    assert ((swapped - before).abs().amax(dim=1) > 1e-4).all()
    with torch.no_grad():
        tower.fusion.slots.copy_(tower.fusion.slots[order])
    torch.testing.assert_close(tower.fused(vectors[:, order], mask), before)


def test_default_query_keys_and_slots_are_learned() -> None:
    model, user, item = adaptor(3, 2), knowledge_of(5, 1, 3), knowledge_of(4, 2, 2)
    for knowledge in (user, item):
        knowledge.mask[1:] = True
    model.fields(user, item).sum().backward()
    for tower in (model.user[0], model.item[0]):
        assert tower.fusion is not None
        for parameter in (tower.default, tower.fusion.query, tower.fusion.key.weight):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
        assert tower.fusion.slots.grad is not None
        assert (tower.fusion.slots.grad != 0).any(dim=1).all()


def test_another_number_of_sources_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 vectors per id.*built for 3"):
        adaptor(3, 1).fields(knowledge_of(5, 1, 2), knowledge_of(4, 2))


def test_each_source_has_a_field_of_its_own_tower_and_a_side_may_have_none() -> None:
    model = Adaptor(D, OUT, CONFIG, (1, 3), ()).eval()
    user = knowledge_of(5, 1, 4)
    out = model.fields(user, None)
    assert out.shape == (7, 2, OUT)
    first, second = (
        BatchVectors(v, m, user.rows)
        for v, m in ((user.vectors[:, :1], user.mask[:, :1]), (user.vectors[:, 1:], user.mask[:, 1:]))
    )
    with torch.no_grad():
        expected = [
            torch.stack([by_hand(model, model.user[0], first, r), by_hand(model, model.user[1], second, r)])
            for r in range(7)
        ]
    torch.testing.assert_close(out, torch.stack(expected))


def test_size_is_kars_and_that_of_two_fusions() -> None:
    # 12 experts of 768 x 128 + 128 + 128 x 32 + 32, two gates of 768 x 7 + 7, two default vectors: KAR's 1.23 million.
    kar = 12 * (768 * 128 + 128 + 128 * 32 + 32) + 2 * (768 * 7 + 7) + 2 * 768
    assert sum(p.numel() for p in Adaptor(768, 32).parameters()) == kar
    experts = 12 * (384 * 128 + 128 + 128 * 32 + 32) + 2 * (384 * 7 + 7) + 2 * 384
    one, several = (Adaptor(384, 32, AdaptorConfig(), *slots) for slots in (((1,), (1,)), ((4,), (2,))))
    assert sum(p.numel() for p in one.parameters()) == experts
    fusions = 2 * (384 * FUSION_DIM + FUSION_DIM) + (4 + 2) * FUSION_DIM
    assert sum(p.numel() for p in several.parameters()) == experts + fusions
