"""What every backbone must do, run over all of them (a new one is covered once it is registered), and what makes each
the model of its paper, against the paper's formulas as loops.
"""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.backbones.networks import (
    DIEN,
    DIN,
    FIGNN_STATE_DIM,
    AttentionalGRU,
    AutoInt,
    Backbone,
    BackboneInputs,
    BilinearPairs,
    CompressedInteraction,
    CrossNetwork,
    DCNv1,
    DCNv2,
    DeepFM,
    FiBiNET,
    FieldAttention,
    FieldGraph,
    FieldWeights,
    FiGNN,
    InputShape,
    XDeepFM,
    pair_sum,
)
from owlrec.errors import RecipeError

B, L, E = 6, 4, 5
PARTS = ("target", "history", "mask", "profile", "knowledge")
# What a softmax cancels gets no gradient: DIN adds the same number to all scores of a history.
NO_GRADIENT = {"din": {"score.3.bias"}}


def shape(knowledge_fields: int = 2, profile_fields: int = 1) -> InputShape:
    return InputShape(item_fields=2, profile_fields=profile_fields, knowledge_fields=knowledge_fields, embed_dim=E)


def inputs(length: int = L, **changes: object) -> BackboneInputs:
    generator = torch.Generator().manual_seed(3)
    values = {
        "target": torch.randn(B, 2, E, generator=generator),
        "profile": torch.randn(B, 1, E, generator=generator),
        "knowledge": torch.randn(B, 2, E, generator=generator),
        "history": torch.randn(B, length, 3, E, generator=generator),
        "mask": torch.arange(length) < torch.tensor([0, 1, 2, 3, 4, 4])[:, None],
    }
    return BackboneInputs(**{**values, **changes})  # type: ignore[arg-type]


def rows_of(given: BackboneInputs, rows: Tensor | slice) -> BackboneInputs:
    return BackboneInputs(*(getattr(given, part)[rows] for part in PARTS))


def build(name: str, shape_: InputShape | None = None) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES.load(name)(shape_ or shape(), hidden_dims=(8, 4), dropout=0.5).eval()


def random_fields(n: int, e: int = E, rows: int = 3) -> Tensor:
    return torch.randn(rows, n, e, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BACKBONES)
class TestEveryBackbone:
    @pytest.mark.parametrize("knowledge_fields", [0, 2])
    @pytest.mark.parametrize("profile_fields", [0, 1])
    def test_gives_a_logit_per_row(self, name: str, knowledge_fields: int, profile_fields: int) -> None:
        given = inputs(
            **({} if profile_fields else {"profile": torch.empty(B, 0, E)}),
            **({} if knowledge_fields else {"knowledge": None}),
        )
        logits = build(name, shape(knowledge_fields, profile_fields))(given)
        assert logits.shape == (B,)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_padding_never_changes_a_score(self, name: str) -> None:
        given = inputs()
        garbage = torch.where(given.mask[:, :, None, None], given.history, 1e4)
        longer = torch.cat([garbage, torch.full((B, 3, 3, E), -7.0)], dim=1)
        mask = torch.cat([given.mask, torch.zeros(B, 3, dtype=torch.bool)], dim=1)
        torch.testing.assert_close(build(name)(given), build(name)(inputs(history=longer, mask=mask)))

    @pytest.mark.parametrize("part", ["target", "profile", "knowledge", "history"])
    def test_every_input_matters(self, name: str, part: str) -> None:
        given = inputs()
        moved = build(name)(inputs(**{part: getattr(given, part) + 1}))
        changed = moved != build(name)(given)
        assert changed.shape == (B,)
        assert changed[1:].all()
        assert changed[0] == (part != "history")  # the first row's history is empty

    def test_rows_do_not_see_each_other(self, name: str) -> None:
        given, model = inputs(), build(name)
        torch.testing.assert_close(model(rows_of(given, slice(2, 4))), model(given)[2:4])

    def test_order_of_rows_is_the_order_of_scores(self, name: str) -> None:
        given, model = inputs(), build(name)
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        torch.testing.assert_close(model(rows_of(given, order)), model(given)[order])

    @pytest.mark.parametrize("row", [0, 3])
    def test_one_users_history_stands_for_all_candidates(self, name: str, row: int) -> None:
        given, model = inputs(), build(name)
        once = {part: getattr(given, part)[row : row + 1] for part in ("history", "mask", "profile")}
        repeated = {part: value.repeat_interleave(B, 0) for part, value in once.items()}
        torch.testing.assert_close(model(inputs(**once)), model(inputs(**repeated)))

    def test_nobody_with_a_history_is_no_trouble(self, name: str) -> None:
        model = build(name).train()
        logits = model(inputs(mask=torch.zeros(B, L, dtype=torch.bool)))
        logits.sum().backward()
        assert logits.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_gradient_reaches_every_parameter(self, name: str) -> None:
        torch.manual_seed(0)
        model = BACKBONES.load(name)(shape(), hidden_dims=(32, 16), dropout=0.0)
        model(inputs()).square().sum().backward()
        unreached = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6}
        assert unreached == NO_GRADIENT.get(name, set())

    def test_only_training_is_random(self, name: str) -> None:
        given, model = inputs(), build(name)
        assert torch.equal(model(given), model(given))
        model.train()
        assert not torch.equal(model(given), model(given))


def test_din_attends_as_written_in_the_paper() -> None:
    model, given = build("din"), inputs()
    assert isinstance(model, DIN)
    weights = model.attention(given)
    torch.testing.assert_close(weights.sum(1), torch.tensor([0.0, 1, 1, 1, 1, 1]))
    q = given.target[3].flatten()
    scores = []
    for behavior in given.history[3, :3]:
        k = behavior[:2].flatten()
        first = (
            model.query.weight @ q
            + model.query.bias
            + model.key.weight @ behavior.flatten()
            + model.product.weight @ (q * k)
        )
        scores.append(model.score(first).item())
    total = sum(math.exp(s) for s in scores)
    assert weights[3].tolist() == pytest.approx([*(math.exp(s) / total for s in scores), 0], abs=1e-6)


def test_dcnv2_crosses_as_written_in_the_paper() -> None:
    model, given = build("dcnv2"), inputs()
    assert isinstance(model, DCNv2)
    row = 3
    mean = given.history[row, :3].mean(0)
    assert given.knowledge is not None
    x = x0 = torch.cat([given.target[row], mean, given.profile[row], given.knowledge[row]]).flatten()
    for layer in model.cross.layers:
        x = x0 * (layer.weight @ x + layer.bias) + x  # type: ignore[operator]
    logit = model.head(torch.cat([x, model.deep(x0)]))
    assert model(given)[row].item() == pytest.approx(logit.item(), abs=1e-5)


def test_dcnv1_crosses_as_written_in_the_paper() -> None:
    network = CrossNetwork(width=7, n_layers=3)
    nn.init.normal_(network.biases)
    first = random_fields(1, 7)[:, 0]
    crossed = network(first)
    for row, x0 in enumerate(first):
        x = x0
        for layer, b in zip(network.weights, network.biases, strict=True):
            w = layer.weight[0]  # type: ignore[union-attr, index]
            x = torch.outer(x0, x) @ w + b + x
        torch.testing.assert_close(crossed[row], x)


def test_dcnv1_joins_the_two_networks() -> None:
    model, given = build("dcnv1"), inputs()
    assert isinstance(model, DCNv1)
    first = given.fields().flatten(1)
    both = torch.cat([model.cross(first), model.deep(first)], dim=1)
    torch.testing.assert_close(model(given), model.head(both)[:, 0])


def test_pair_sum_is_the_sum_over_pairs() -> None:
    fields = random_fields(6)
    for row, vectors in enumerate(fields):
        expected = sum((a @ b).item() for a, b in combinations(vectors, 2))
        assert pair_sum(fields)[row].item() == pytest.approx(expected, abs=1e-4)


def test_deepfm_keeps_knowledge_out_of_the_pairs() -> None:
    model, given = build("deepfm"), inputs()
    assert isinstance(model, DeepFM)
    flat = given.fields().flatten(1)
    without = torch.cat([given.target, given.mean_history(), given.profile], dim=1)
    expected = model.linear(flat)[:, 0] + model.deep(flat)[:, 0] + pair_sum(without)
    torch.testing.assert_close(model(given), expected)


def test_cin_compresses_as_written_in_the_paper() -> None:
    n, maps = 4, (3, 2)
    network, fields = CompressedInteraction(n, maps), random_fields(4)
    pooled = network(fields)
    assert pooled.shape == (3, 5)
    for row, x0 in enumerate(fields):
        previous, expected = x0, []
        for layer, after in zip(network.layers, maps, strict=True):
            weight = layer.weight.view(after, len(previous), n)  # type: ignore[operator, union-attr]
            rows = []
            for h in range(after):
                vector = torch.zeros(E)
                for i in range(len(previous)):
                    for j in range(n):
                        vector = vector + weight[h, i, j] * previous[i] * x0[j]
                rows.append(vector)
            previous = torch.stack(rows)
            expected.append(previous.sum(1))
        torch.testing.assert_close(pooled[row], torch.cat(expected))


def test_xdeepfm_sums_three_parts() -> None:
    model, given = build("xdeepfm"), inputs()
    assert isinstance(model, XDeepFM)
    fields = given.fields()
    flat = fields.flatten(1)
    expected = model.linear(flat) + model.deep(flat) + model.explicit(model.interaction(fields))
    torch.testing.assert_close(model(given), expected[:, 0])


def test_autoint_attends_over_fields_as_written_in_the_paper() -> None:
    heads, dim, n = 2, 3, 4
    layer, fields = FieldAttention(E, heads, dim), random_fields(4)
    # Rows of the one matrix: query, key, value, residual; of each, head by head.
    query, key, value, residual = layer.projections.weight.view(4, heads, dim, E)
    out = layer(fields).view(3, n, heads, dim)
    for row, e in enumerate(fields):
        for h in range(heads):
            for m in range(n):
                scores = [((query[h] @ e[m]) @ (key[h] @ e[k])).item() for k in range(n)]
                total = sum(math.exp(s) for s in scores)
                gathered = sum(math.exp(s) / total * (value[h] @ e[k]) for k, s in enumerate(scores))
                torch.testing.assert_close(out[row, m, h], torch.relu(gathered + residual[h] @ e[m]))


def test_autoint_sums_attention_and_mlp() -> None:
    model, given = build("autoint"), inputs()
    assert isinstance(model, AutoInt)
    fields = given.fields()
    assert len(model.attention) == 3
    expected = model.explicit(model.attention(fields).flatten(1)) + model.deep(fields.flatten(1))
    torch.testing.assert_close(model(given), expected[:, 0])


def test_fibinet_pairs_as_written_in_the_paper() -> None:
    layer, fields = BilinearPairs(4, E), random_fields(4)
    pairs = layer(fields)
    assert pairs.shape == (3, 6, E)
    for row, v in enumerate(fields):
        expected = [(v[i] @ layer.weight[i]) * v[j] for i, j in combinations(range(4), 2)]
        torch.testing.assert_close(pairs[row], torch.stack(expected))


def test_fibinet_weighs_fields_by_their_means() -> None:
    layer, fields = FieldWeights(6), random_fields(6)
    first, second = layer.excite[0].weight, layer.excite[2].weight
    assert first.shape == (2, 6)  # reduced by 3
    weighted = layer(fields)
    for row, v in enumerate(fields):
        means = torch.stack([field.mean() for field in v])  # type: ignore[arg-type]
        gates = torch.sigmoid(second @ torch.relu(first @ means))  # type: ignore[operator]
        torch.testing.assert_close(weighted[row], torch.stack([g * field for g, field in zip(gates, v, strict=True)]))


def test_fibinet_reads_both_kinds_of_pairs() -> None:
    model, given = build("fibinet"), inputs()
    assert isinstance(model, FiBiNET)
    fields = given.fields()
    both = torch.cat([model.pairs(fields).flatten(1), model.pairs(model.field_weights(fields)).flatten(1)], dim=1)
    torch.testing.assert_close(model(given), (model.linear(fields.flatten(1)) + model.deep(both))[:, 0])


def test_fignn_exchanges_messages_as_written_in_the_paper() -> None:
    n, dim = 4, 3
    graph, states = FieldGraph(n, dim), random_fields(4, 3)
    nn.init.normal_(graph.bias)
    edges, after = graph.edges(states), graph.step(states, graph.edges(states))
    vector = torch.cat([graph.receiver_score.weight[0], graph.sender_score.weight[0]])
    for row, h in enumerate(states):
        for i in range(n):
            others = [j for j in range(n) if j != i]
            raw = {j: (vector @ torch.cat([h[i], h[j]])).item() for j in others}
            exponents = {j: math.exp(s if s > 0 else 0.01 * s) for j, s in raw.items()}
            taken = graph.bias.clone()
            for j in others:
                weight = exponents[j] / sum(exponents.values())
                assert edges[row, i, j].item() == pytest.approx(weight, abs=1e-6)
                taken = taken + weight * (h[j] @ graph.send[j] @ graph.receive[i])
            assert edges[row, i, i] == 0
            torch.testing.assert_close(after[row, i], graph.update(taken[None], h[i][None])[0])


def test_fignn_adds_the_start_after_each_of_two_steps() -> None:
    model, given = build("fignn"), inputs()
    assert isinstance(model, FiGNN)
    start = model.attention(given.fields())
    edges = model.graph.edges(start)
    assert start.shape == (B, 8, FIGNN_STATE_DIM)
    states = model.graph.step(start, edges) + start
    states = model.graph.step(states, edges) + start
    for row, nodes in enumerate(states):
        weights = torch.sigmoid(model.field_gate(nodes.flatten()))
        expected = sum((w * model.score(node)).item() for w, node in zip(weights, nodes, strict=True))
        assert model(given)[row].item() == pytest.approx(expected, abs=1e-5)


def test_augru_steps_as_written_in_the_paper() -> None:
    dim, length = 3, 5
    layer = AttentionalGRU(E, dim)
    steps = random_fields(2, E, rows=length)
    weights = torch.rand(length, 2, generator=torch.Generator().manual_seed(1))
    out = layer(steps, weights)
    w_r, w_u, w_h = layer.read.weight.split(dim)
    b_r, b_u, b_h = layer.read.bias.split(dim)
    u_r, u_u, u_h = layer.recall.weight.split(dim)
    for row in range(2):
        h = torch.zeros(dim)
        for t in range(length):
            i = steps[t, row]
            u = torch.sigmoid(w_u @ i + u_u @ h + b_u)
            r = torch.sigmoid(w_r @ i + u_r @ h + b_r)
            candidate = torch.tanh(w_h @ i + r * (u_h @ h) + b_h)
            scaled = weights[t, row] * u
            h = (1 - scaled) * h + scaled * candidate
        torch.testing.assert_close(out[row], h)


def test_dien_attends_to_its_interests_and_reads_them_in_order() -> None:
    model, given = build("dien"), inputs()
    assert isinstance(model, DIEN)
    row, length = 3, 3
    behaviors = given.history[row, :length].flatten(1).unsqueeze(1)
    interests, _ = model.extractor(behaviors)
    e = given.target[row].flatten()
    scores = [(h @ model.key.weight @ e).item() for h in interests[:, 0]]
    total = sum(math.exp(s) for s in scores)
    weights = torch.tensor([math.exp(s) / total for s in scores])
    state = model.evolution(interests, weights[:, None])
    expected = model.head(torch.cat([state, given.fields()[row].flatten()[None]], dim=1))
    assert model(given)[row].item() == pytest.approx(expected.item(), abs=1e-5)
    backwards = given.history.clone()
    backwards[row, :length] = given.history[row, :length].flip(0)
    assert model(inputs(history=backwards))[row].item() != pytest.approx(expected.item(), abs=1e-5)


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'dcnv2'"):
        BACKBONES.load("dcn2")


class TestAgainstFuxiCTR:
    """The same weights in, the same numbers out, where FuxiCTR happens to be installed; it is no dependency."""

    def test_cross_network(self) -> None:
        layers = pytest.importorskip("fuxictr.pytorch.layers")
        ours, theirs, first = CrossNetwork(7, 3), layers.CrossNet(7, 3), random_fields(1, 7)[:, 0]
        nn.init.normal_(ours.biases)
        for i, layer in enumerate(theirs.cross_net):
            layer.weight.load_state_dict(ours.weights[i].state_dict())
            layer.bias.data.copy_(ours.biases[i])
        torch.testing.assert_close(ours(first), theirs(first))

    def test_pair_sum(self) -> None:
        layers = pytest.importorskip("fuxictr.pytorch.layers")
        fields = random_fields(6)
        torch.testing.assert_close(pair_sum(fields), layers.InnerProductInteraction(6, "product_sum")(fields)[:, 0])

    def test_compressed_interaction(self) -> None:
        layers = pytest.importorskip("fuxictr.pytorch.layers")
        n, maps, fields = 4, [3, 2], random_fields(4)
        ours, theirs = CompressedInteraction(n, maps), layers.CompressedInteractionNet(n, maps)
        for layer, convolution in zip(ours.layers, theirs.cin_layer.values(), strict=True):
            # Theirs counts pairs with the original field first.
            weight = layer.weight.view(len(layer.weight), -1, n)  # type: ignore[operator, union-attr, arg-type]
            convolution.weight.data.copy_(weight.transpose(1, 2).flatten(1).unsqueeze(2))
            nn.init.zeros_(convolution.bias)
        torch.testing.assert_close(theirs.fc(ours(fields)), theirs(fields))

    def test_bilinear_pairs(self) -> None:
        layers = pytest.importorskip("fuxictr.pytorch.layers")
        ours, theirs, fields = BilinearPairs(4, E), layers.BilinearInteraction(4, E, "field_each"), random_fields(4)
        theirs.bilinear_W.data[:3] = ours.weight.data
        torch.testing.assert_close(ours(fields), theirs(fields))

    def test_field_weights(self) -> None:
        layers = pytest.importorskip("fuxictr.pytorch.layers")
        ours, theirs, fields = FieldWeights(6), layers.SqueezeExcitation(6, 3, "Sigmoid"), random_fields(6)
        theirs.excitation.load_state_dict(ours.excite.state_dict())
        torch.testing.assert_close(ours(fields), theirs(fields))
