"""Semantic ids as features: embedded by level and source, as good as the vectors where they tell as much."""

from typing import Any

import numpy as np
import pytest
import torch

from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.knowledge_tables import Arm, KnowledgeTable
from owlrec.ctr.model import CodeTower, CTRModel, ModelSpec, code_sizes
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


def test_a_level_has_its_own_embeddings_and_their_sum_is_the_field() -> None:
    tower = CodeTower((2, 3), 4, init_std=1.0)
    table = tower.table.weight
    assert table.shape == (3 + 4, 4)
    fields = tower(torch.tensor([[2, 1], [1, 3], [0, 0]]))
    torch.testing.assert_close(fields[0], table[2] + table[3 + 1])
    torch.testing.assert_close(fields[1], table[1] + table[3 + 3])
    torch.testing.assert_close(fields[2], table[0] + table[3])  # the missing codes, which are learned too


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
    sizes = {"user_codes": code_sizes(tables.users), "item_codes": code_sizes(tables.items)}
    model = CTRModel(ModelSpec.of(data.features.spec, "din", tables.dim, CONFIG, **sizes), data.features.items).eval()
    split = SplitTensors(data.features.splits["test"].whole(), tables, "cpu")
    batch = split.batch(torch.arange(40))
    assert (batch.user is None) == (arm == "knowledge-codes")
    alone = torch.cat([model(split.batch(torch.tensor([row]))) for row in range(40)])
    torch.testing.assert_close(model(batch), alone)


def test_the_users_fields_come_first_whatever_the_form(data: TrainingData) -> None:
    tables = data.tables(trial("knowledge+codes"))
    assert tables is not None
    sizes = {"user_codes": code_sizes(tables.users), "item_codes": code_sizes(tables.items)}
    model = CTRModel(ModelSpec.of(data.features.spec, "din", tables.dim, CONFIG, **sizes), data.features.items).eval()
    batch = SplitTensors(data.features.splits["test"].whole(), tables, "cpu").batch(torch.arange(5))
    fields = model.adaptor_fields(batch)
    assert fields is not None
    assert model.adaptor is not None
    assert batch.user_codes is not None
    assert fields.shape == (5, model.spec.knowledge_fields, 8) == (5, 4, 8)
    dense = model.adaptor.fields(batch.user, batch.item)
    torch.testing.assert_close(fields[:, 0], dense[:, 0])
    torch.testing.assert_close(fields[:, 2], dense[:, 1])
    torch.testing.assert_close(fields[:, 1], model.code_fields.user(batch.user_codes.values)[batch.user_codes.rows])


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
    batch = SplitTensors(data.features.splits["test"].whole(), Tables((table,), (table,)), "cpu").batch(torch.arange(3))
    with pytest.raises(ValueError, match="batches need codes"):
        CTRModel(spec, data.features.items)(batch)
