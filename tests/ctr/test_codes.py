"""Semantic ids as features: embedded by level and source, as good as the vectors where they tell as much."""

from typing import Any

import numpy as np
import pytest
import torch

from owlrec.ctr import model as ctr_model
from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.knowledge_tables import Arm, KnowledgeTable
from owlrec.ctr.model import CTRModel, ModelSpec, PrefixFields, code_sizes
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.compression import SemanticIdConfig, code_vectors, train_quantizer
from owlrec.errors import SchemaError

torch.set_num_threads(1)
CONFIG = CTRConfig(batch_size=64, learning_rate=0.01, epochs=6, embed_dim=8, hidden_dims=(16, 8))
IDS = SemanticIdConfig(levels=2, codes_per_level=4)


def trial(arm: Arm, backbone: str = "din", seed: int = 0) -> Trial:
    return Trial(backbone=backbone, arm=arm, seed=seed)


def coded(table: KnowledgeTable) -> KnowledgeTable:
    quantizer = train_quantizer(table.vectors, IDS)
    codes = code_vectors(quantizer, table.ids, table.vectors)[:, :-1]
    return KnowledgeTable(table.ids, table.vectors, codes=codes, code_sizes=tuple(quantizer.sizes))


@pytest.fixture(scope="module")
def data(toy_world: Any) -> TrainingData:
    kind_tables = {kind: coded(table) for kind, table in zip(("user", "item"), toy_world.vectors, strict=True)}
    metadata = dict(zip(("user", "item"), toy_world.vectors, strict=True))
    return TrainingData(toy_world.data.features, {"knowledge": kind_tables, "metadata": metadata})


@pytest.mark.parametrize("backbone", ["din", "dcnv2", "deepfm"])
def test_true_codes_find_what_only_the_vectors_tell(data: TrainingData, backbone: str) -> None:
    results = {
        arm: train_one(trial(arm, backbone), data, CONFIG).result
        for arm in ("none", "knowledge-codes", "shuffled-codes", "knowledge+codes")
    }
    assert results["knowledge-codes"].test.auc > 0.95
    assert results["knowledge+codes"].test.auc > 0.95
    assert results["shuffled-codes"].test.auc < 0.65
    sizes = {arm: r.parameters for arm, r in results.items()}
    assert sizes["none"] < sizes["knowledge-codes"] == sizes["shuffled-codes"] < sizes["knowledge+codes"]


def test_each_prefix_is_a_field_with_an_embedding_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = PrefixFields((2, 3), 4, init_std=1.0)
    first, second = (table.weight for table in prefixes.tables)
    assert (first.shape, second.shape) == ((1 + 2, 4), (1 + 2 * 3, 4))
    fields = prefixes(torch.tensor([[2, 1], [1, 3], [0, 0]]))  # codes plus one
    torch.testing.assert_close(fields[0], torch.stack([first[2], second[1 + 3]]))
    torch.testing.assert_close(fields[1], torch.stack([first[1], second[1 + 2]]))
    torch.testing.assert_close(fields[2], torch.stack([first[0], second[0]]))  # missing, which is learned too
    monkeypatch.setattr(ctr_model, "PREFIX_ROWS", 4)
    hashed = PrefixFields((8, 8), 4, init_std=1.0)
    values = torch.tensor([[a, b] for a in range(1, 9) for b in range(1, 9)])
    assert [len(table.weight) for table in hashed.tables] == [5, 5]
    assert len(hashed(values)[:, 1].unique(dim=0)) == 4


def test_shuffling_hands_codes_and_vectors_to_the_same_wrong_ids(data: TrainingData) -> None:
    tables, own = data.tables(trial("shuffled+codes", seed=3)), data.knowledge["knowledge"]
    assert tables is not None
    for (table,), kind in ((tables.users, "user"), (tables.items, "item")):
        ids = own[kind].ids
        (before, _), codes_before = own[kind].gather(ids), own[kind].gather_codes(ids)
        (vectors, _), codes = table.gather(ids), table.gather_codes(ids)
        code_of = {v.tobytes(): c.tolist() for v, c in zip(before, codes_before, strict=True)}
        assert codes.tolist() == [code_of[v.tobytes()] for v in vectors]
        assert (vectors != before).any(axis=1).all()


@pytest.mark.parametrize("arm", ["knowledge-codes", "knowledge+codes"])
def test_repeated_ids_score_as_they_do_alone_and_from_prestored_fields(data: TrainingData, arm: Arm) -> None:
    torch.manual_seed(0)
    tables = data.tables(trial(arm))
    assert tables is not None
    sizes: dict[str, Any] = {
        "user_codes": code_sizes(tables.users),
        "item_codes": code_sizes(tables.items),
        **tables.slots,
    }
    model = CTRModel(ModelSpec.of(data.features.spec, "din", tables.dim, CONFIG, **sizes), data.features.items).eval()
    split = SplitTensors(data.features.splits["test"].whole(), tables, "cpu")
    batch = split.batch(torch.arange(40))
    assert (batch.user is None) == (arm == "knowledge-codes")
    alone = torch.cat([model(split.batch(torch.tensor([row]))) for row in range(40)])
    torch.testing.assert_close(model(batch), alone)


def test_fields_are_in_the_order_of_the_spec(data: TrainingData) -> None:
    tables = data.tables(trial("knowledge+codes"))
    assert tables is not None
    sizes: dict[str, Any] = {
        "user_codes": code_sizes(tables.users),
        "item_codes": code_sizes(tables.items),
        **tables.slots,
    }
    model = CTRModel(ModelSpec.of(data.features.spec, "din", tables.dim, CONFIG, **sizes), data.features.items).eval()
    batch = SplitTensors(data.features.splits["test"].whole(), tables, "cpu").batch(torch.arange(5))
    fields = model.adaptor_fields(batch)
    assert fields is not None
    assert model.adaptor is not None
    assert batch.user_codes is not None
    assert model.user_prefixes is not None
    assert model.item_prefixes is not None
    assert batch.distinct is not None
    assert batch.similarities is not None
    assert model.similarity is not None
    dense = model.adaptor.fields(batch.user, batch.item)
    prefixes = model.user_prefixes(batch.user_codes.values)[batch.user_codes.rows]
    torch.testing.assert_close(fields, torch.cat([dense[:, :1], prefixes, dense[:, 1:]], dim=1))
    knowledge = model.knowledge(batch)
    assert knowledge is not None
    assert knowledge.shape == (5, model.spec.knowledge_fields, 8) == (5, 1 + 2 + 1 + 1 + 1, 8)
    torch.testing.assert_close(knowledge[:, 4], dense[:, 0] * dense[:, 1])
    torch.testing.assert_close(knowledge[:, 5], model.similarity(batch.similarities))
    # Prefixes of items are the last fields of targets and behaviors.
    items = model.embed_items(batch.distinct.rows, batch.distinct.codes)
    assert batch.distinct.codes is not None
    torch.testing.assert_close(items[:, -2:], model.item_prefixes(batch.distinct.codes))
    own = data.knowledge["knowledge"]["item"]
    ids = data.features.splits["test"].whole().item_ids[:5]
    assert batch.distinct.codes[batch.distinct.target_rows].tolist() == own.gather_codes(ids).tolist()
    history = batch.history.numpy()
    past = own.gather_codes(data.features.items.ids[np.maximum(history, 2) - 2].reshape(-1)).reshape(*history.shape, 2)
    assert (batch.distinct.codes[batch.distinct.history_rows].numpy() == past * (history > 0)[..., None]).all()


def test_an_id_without_knowledge_has_the_missing_code(data: TrainingData) -> None:
    users = data.knowledge["knowledge"]["user"]
    codes = users.gather_codes(np.array([10**9, 3, 3]))
    assert codes[0].tolist() == [0, 0]
    assert codes[1].tolist() == codes[2].tolist()
    assert codes[1].min() > 0


def test_vectors_without_codes_are_refused(data: TrainingData) -> None:
    with pytest.raises(SchemaError, match=r"encoder\.semantic_ids"):
        train_one(trial("metadata-codes"), data, CONFIG)
    table = data.knowledge["knowledge"]["user"]
    spec = ModelSpec.of(data.features.spec, "din", 0, CONFIG, user_codes=(4, 4), item_codes=(4, 4))
    tables = Tables((table,), (table,), item_ids=data.features.items.ids)
    batch = SplitTensors(data.features.splits["test"].whole(), tables, "cpu").batch(torch.arange(3))
    with pytest.raises(ValueError, match="batches need codes"):
        CTRModel(spec, data.features.items)(batch)
