"""Soft labels in training: blended by hand, weighted by hand, encoded by shard; and what a teacher that knows the truth
is worth.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from worlds import write_world

from benchmarks.distillation import CONFIG, PAIRS, model_aucs
from benchmarks.planted import plant
from owlrec.ctr.batches import Targets
from owlrec.ctr.dataset import encode_tables, open_features
from owlrec.ctr.experiment import CTRConfig, DistillationConfig, SoftLabels, Trial, blended
from owlrec.ctr.features import Features, SampleFeatures, Split
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.errors import SchemaError
from owlrec.ids import shard_of
from owlrec.schema import SAMPLE_ROWS, SOFT_LABELS
from owlrec.workspace import Workspace, shard_file

torch.set_num_threads(1)
MOMENT = 1  # of all samples of toy_world
KEY = ("user_id", "item_id", "timestamp")


def samples(*rows: tuple[Any, ...]) -> pa.Table:
    """user, item, label, timestamp, split, history_start, history_end; each weighs 1."""
    return pa.table([list(column) for column in zip(*((*row, 1.0) for row in rows), strict=True)], schema=SAMPLE_ROWS)


def soft(*rows: tuple[int, int, int, float]) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in SOFT_LABELS]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SOFT_LABELS, strict=True)], schema=SOFT_LABELS)


def test_labels_are_blended_and_pairs_without_a_label_are_added_by_hand() -> None:
    rows = samples(
        (1, 10, 1.0, 100, "train", 0, 2),
        (1, 11, 0.0, 200, "train", 0, 3),
        (1, 12, 1.0, 300, "valid", 1, 4),
        (2, 10, 0.0, 100, "test", 4, 5),
    )
    made = blended(
        rows,
        soft(
            (1, 10, 100, 0.5),  # a train sample
            (1, 12, 300, 0.1),  # of valid: keeps its label
            (1, 20, 200, 0.75),  # without a label, at the moment of the second sample
            (1, 21, 250, 0.75),  # at no sample's moment
            (1, 22, 300, 0.75),  # at the moment of a valid sample
            (2, 20, 100, 0.75),  # of a user of test
            (1, 20, 200, 0.25),  # said twice: the first counts
        ),
        alpha=0.4,
    )
    assert made.schema == rows.schema
    assert made.slice(0, 4).drop_columns("label") == rows.drop_columns("label")
    np.testing.assert_allclose(made["label"].to_numpy(), [0.6 * 1 + 0.4 * 0.5, 0.0, 1.0, 0.0, 0.75], rtol=1e-6)
    assert made.slice(4).drop_columns(["label", "weight"]).to_pylist() == [
        {"user_id": 1, "item_id": 20, "timestamp": 200, "split": "train", "history_start": 0, "history_end": 3}
    ]
    assert made["weight"][4].as_py() == pytest.approx(0.4)


def test_without_a_probability_samples_stay_as_they_are() -> None:
    rows = samples((1, 10, 1.0, 100, "train", 0, 2), (1, 11, 0.0, 200, "train", 0, 3))
    assert blended(rows, soft(), 0.5) == rows


def test_the_loss_is_that_of_labels_and_probabilities_apart() -> None:
    alpha, logits = 0.3, torch.tensor([0.5, -1.0, 2.0])
    label, p = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.7, 0.9])
    targets = Targets(torch.cat([(1 - alpha) * label + alpha * p[:2], p[2:]]), torch.tensor([1.0, 1.0, alpha]))

    def bce(target: float, logit: float) -> float:
        q = 1 / (1 + math.exp(-logit))
        return -target * math.log(q) - (1 - target) * math.log(1 - q)

    expected = (
        (1 - alpha) * bce(1, 0.5)
        + alpha * bce(0.2, 0.5)
        + (1 - alpha) * bce(0, -1)
        + alpha * bce(0.7, -1)
        + alpha * bce(0.9, 2)
    )
    assert targets.loss(logits).item() == pytest.approx(expected / 3, abs=1e-6)


def test_where_all_weigh_the_same_the_loss_is_the_plain_one() -> None:
    logits, labels = torch.randn(50), torch.rand(50)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert torch.equal(Targets(labels, torch.ones(50)).loss(logits), plain)


def test_what_is_asked_does_not_depend_on_how_much_it_counts() -> None:
    assert DistillationConfig(alpha=0.2).asks == DistillationConfig(alpha=0.7).asks
    assert DistillationConfig(unlabeled=1).asks != DistillationConfig().asks


# Encoded by shard


def encoded(workspace: Workspace, world: Any, rows: pa.Table, alpha: float = 0.5, folder: str = "ctr/abc") -> Features:
    """rows: schema.SOFT_LABELS, of any users."""
    write_world(workspace, world, 4)
    shards = shard_of(rows["user_id"].to_numpy(), 4)
    for number in range(4):
        own = rows.filter(pa.array(shards == number))
        workspace.write_parquet(f"soft-labels/x/user/{shard_file(number)}", own)
    taught = SoftLabels("soft-labels/x", alpha)
    options: dict[str, Any] = {"features": {"users": ()}, "min_item_count": 1}
    encode_tables(workspace, folder, soft_labels=taught, **options)
    return open_features(workspace, folder)


def test_encoded_samples_carry_blended_labels_and_weights(workspace: Workspace, toy_world: Any) -> None:
    train = toy_world.samples.filter(pa.array(toy_world.samples["split"].to_numpy() == "train")).slice(0, 300)
    keys = [train[name].to_numpy() for name in KEY]
    p = np.random.default_rng(0).random(300).astype(np.float32)
    # Item 99 is nobody's sample: a pair without a label of each of the first 15 users.
    users = np.arange(15)
    drawn = (users, np.full(15, 99), np.full(15, MOMENT), np.linspace(0, 1, 15, dtype=np.float32))
    rows = pa.table([np.concatenate(both) for both in zip((*keys, p), drawn, strict=True)], schema=SOFT_LABELS)
    features = encoded(workspace, toy_world, rows, alpha=0.25)
    whole = features.splits["train"].whole()
    assert len(whole) == 110 * 20 + 15
    label = dict(zip(zip(*keys[:2], strict=True), train["label"].to_numpy(), strict=True))
    probability = dict(zip(zip(*keys[:2], strict=True), p, strict=True))
    taught = 0
    for user, item, got, weight in zip(whole.user_ids, whole.item_ids, whole.labels, whole.weights, strict=True):
        key = (user, item)
        if item == 99:
            assert (got, weight) == (pytest.approx(user / 14), 0.25)
        elif key in probability:
            taught += 1
            assert (got, weight) == (pytest.approx(0.75 * label[key] + 0.25 * probability[key], abs=1e-6), 1.0)
        else:
            assert got in (0.0, 1.0)
            assert weight == 1.0
    assert taught == 300
    for split in ("valid", "test"):
        scored = features.splits[split].whole()
        assert set(scored.labels.tolist()) == {0.0, 1.0}
        assert set(scored.weights.tolist()) == {1.0}


def test_encoded_samples_keep_the_weights_of_their_interactions(workspace: Workspace, toy_world: Any) -> None:
    weights = np.random.default_rng(1).integers(0, 5, len(toy_world.samples)) / 2
    world = replace(toy_world, samples=toy_world.samples.append_column("weight", pa.array(weights)))
    features = encoded(workspace, world, soft((3, 5, MOMENT, 0.5)))
    keys = zip(*(world.samples[name].to_numpy() for name in KEY[:2]), strict=True)
    expected_weight = dict(zip(keys, weights.tolist(), strict=True))
    train = features.splits["train"].whole()
    got = dict(zip(zip(train.user_ids, train.item_ids, strict=True), train.weights.tolist(), strict=True))
    assert len(got) == 110 * 20
    assert all(expected_weight[key] == weight for key, weight in got.items())


def test_the_counts_of_items_are_those_of_logged_interactions(workspace: Workspace, toy_world: Any) -> None:
    """Item 20 is in the catalog, and only a pair without a label shows it: it has an embedding, and counts as cold."""
    items = pa.concat_tables([toy_world.items, toy_world.items.slice(0, 1).set_column(0, "item_id", pa.array([20]))])
    world = type(toy_world)(toy_world.users, items, toy_world.samples, toy_world.vectors)
    plain = encoded(workspace, world, soft(), folder="ctr/plain")
    taught = encoded(workspace, world, soft((3, 20, MOMENT, 0.5)), folder="ctr/taught")
    assert 20 not in plain.vocabularies.items.to_pylist()
    assert 20 in taught.vocabularies.items.to_pylist()
    np.testing.assert_array_equal(taught.item_counts, plain.item_counts)
    assert taught.item_counts[22] == 0


def test_a_probability_that_is_none_is_named_with_file_and_row(workspace: Workspace, toy_world: Any) -> None:
    with pytest.raises(SchemaError, match=r"soft-labels/x/user/0000000\d.parquet, row 0: p is 1.5"):
        encoded(workspace, toy_world, soft((3, 5, MOMENT, 1.5)))


def test_an_object_store_gives_the_samples_of_a_local_disk(workspace: Workspace, s3_root: str, toy_world: Any) -> None:
    rows = soft((3, 5, MOMENT, 0.5), (3, 99, MOMENT, 0.125))
    ours, theirs = (
        encoded(where, toy_world, rows).splits["train"].whole() for where in (workspace, Workspace(s3_root))
    )
    for name in ("user_ids", "item_ids", "labels", "weights"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_the_heavier_of_two_opposite_samples_is_learned(toy_world: Any) -> None:
    """Every train sample stands there twice, with its label and with the opposite one."""
    data = toy_world.data
    whole = data.features.splits["train"].whole()
    twice = SampleFeatures.concatenated([whole, whole])
    labels = np.concatenate([whole.labels, 1 - whole.labels])
    config = CTRConfig(batch_size=64, learning_rate=0.01, epochs=1, embed_dim=8, hidden_dims=(16, 8))

    def test_auc(true_weight: float, false_weight: float) -> float:
        weights = np.repeat(np.array([true_weight, false_weight], np.float32), len(whole))
        train = Split.of(replace(twice, labels=labels, weights=weights))
        features = replace(data.features, splits={**data.features.splits, "train": train})
        trial = Trial(backbone="dcnv2", arm="knowledge", seed=0)
        auc: float = train_one(trial, TrainingData(features, data.knowledge), config).result.test.auc
        return auc

    assert test_auc(1.0, 0.1) > 0.9
    assert test_auc(0.1, 1.0) < 0.5


# The bar


def test_a_teacher_that_knows_the_truth_makes_up_for_lost_labels() -> None:
    """Through the questions, the stage, the artifact and training: at least half of the gap between a tenth of the
    labels and all of them is closed. Answers at random close none of it.
    """
    config = CONFIG.model_copy(update={"learning_rate": 0.01, "epochs": 12, "patience": 4})
    aucs = model_aucs(plant(400, 40), PAIRS, config, seed=0)
    gap = aucs["all"] - aucs["labels"]
    assert gap > 0.03
    assert aucs["taught"] - aucs["labels"] >= 0.5 * gap
    assert aucs["guessed"] < aucs["labels"]
