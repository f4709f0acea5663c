"""Training on a toy world whose answer is known, early stopping, and two ranks against one."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from two_ranks import be_a_rank, run_two_ranks  # type: ignore[import-not-found]

from owlrec.ctr import model as ctr_model
from owlrec.ctr import trainer
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.batches import SplitBatches, SplitTensors
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import Split
from owlrec.ctr.knowledge_tables import Arm, KnowledgeTable, OwnArm
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.trainer import Epochs, TrainingData, Worker, score, train_one
from owlrec.errors import RecipeError, SchemaError

torch.set_num_threads(1)
CONFIG = CTRConfig(batch_size=64, learning_rate=0.01, epochs=6, embed_dim=8, hidden_dims=(16, 8))


def trial(arm: Arm = "none", backbone: str = "din", seed: int = 0) -> Trial:
    return Trial(backbone=backbone, arm=arm, seed=seed)


@pytest.fixture(scope="session")
def data(toy_world: Any) -> TrainingData:
    return toy_world.data


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_true_knowledge_finds_what_only_the_vectors_tell(data: TrainingData, backbone: str) -> None:
    results = {arm: train_one(trial(arm, backbone), data, CONFIG).result for arm in ("none", "knowledge", "shuffled")}
    assert results["knowledge"].test.auc > 0.95
    assert results["none"].test.auc < 0.65
    assert results["shuffled"].test.auc < 0.65
    assert results["knowledge"].parameters > results["none"].parameters
    assert results["knowledge"].parameters == results["shuffled"].parameters


def test_a_new_backbone_is_one_file_and_one_line(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "one_mlp", "own_backbone.OneMLP")
    config = CTRConfig(**{**CONFIG.model_dump(), "backbones": ("one_mlp",)})
    assert train_one(trial("knowledge", "one_mlp"), data, config).result.test.auc > 0.95


def test_same_seed_same_result_other_seed_another(data: TrainingData) -> None:
    first, again, other = (train_one(trial("knowledge", seed=s), data, CONFIG).result for s in (1, 1, 2))
    assert first.test == again.test
    assert first.test.log_loss != other.test.log_loss


def test_slices_part_the_test_rows_and_calibration_is_measured(data: TrainingData) -> None:
    result = train_one(trial("knowledge"), data, CONFIG).result
    rows = len(data.features.splits["test"])
    # The toy world's histories have 0 to 4 behaviors, and every item occurs in training more than a hundred times.
    lengths_and_texts = {"history 0", "history 1-2", "history 3-5", "user has a text", "item has a text"}
    assert result.slices.keys() == {"cold users", "warm items", "popular items", "other warm items", *lengths_and_texts}
    assert result.slices["popular items"].rows + result.slices["other warm items"].rows == rows
    assert result.slices["cold users"].rows == result.slices["warm items"].rows == rows
    assert result.slices["warm items"].auc == result.test.auc
    assert result.slices["warm items"].log_loss == result.test.log_loss
    assert sum(result.slices[f"history {lengths}"].rows for lengths in ("0", "1-2", "3-5")) == rows
    assert 0 <= result.test.calibration_error < 0.25


def test_early_stopping_keeps_the_best_epoch(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, given = [], iter([0.6, 0.8, 0.7, 0.75, 0.9])
    original = Epochs._train_epoch

    def spy(self: Epochs, split: Any) -> None:
        original(self, split)
        weights.append({k: v.clone() for k, v in self.model.state_dict().items()})

    real_auc = trainer.metrics.auc
    monkeypatch.setattr(Epochs, "_train_epoch", spy)
    monkeypatch.setattr(trainer.metrics, "auc", lambda labels, scores: next(given, real_auc(labels, scores)))
    trained = train_one(trial(), data, CONFIG.model_copy(update={"patience": 2, "epochs": 10}))
    assert (trained.result.epochs, trained.result.best_epoch) == (4, 2)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, weights[1][name])


def test_small_training_set_gets_smaller_batches(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = SplitTensors.assembled
    monkeypatch.setattr(SplitTensors, "assembled", lambda self, rows: sizes.append(len(rows)) or original(self, rows))
    train_one(trial(), data, CONFIG.model_copy(update={"batch_size": 4096, "epochs": 1}))
    assert sizes[:31] == [73] * 30 + [2200 - 30 * 73]


def test_divergence_is_an_error_that_says_what_to_lower(data: TrainingData) -> None:
    with pytest.raises(RecipeError, match=r"diverged in epoch 1.*learning_rate"):
        train_one(trial(), data, CONFIG.model_copy(update={"learning_rate": 1e30}))


def test_arm_without_vectors_is_refused(data: TrainingData) -> None:
    with pytest.raises(RecipeError, match="arm 'shuffled' needs knowledge vectors"):
        TrainingData(data.features, {}).tables(trial("shuffled"))


@pytest.mark.parametrize(
    ("arm", "source", "kind", "message"),
    [
        ("knowledge", "knowledge", "item", "users have 8 .* knowledge vectors of items have 3"),
        ("both", "collective", "user", "users have 8 .* collective vectors of users have 3"),
        ("streaming", "streaming", "user", "users have 8 .* streaming vectors of users have 3"),
    ],
)
def test_vectors_of_two_encoders_are_refused(
    data: TrainingData, arm: Arm, source: str, kind: str, message: str
) -> None:
    table = data.knowledge[source][kind]
    narrow = {**data.knowledge[source], kind: KnowledgeTable(table.ids, table.vectors[:, :3])}
    with pytest.raises(SchemaError, match=message):
        TrainingData(data.features, {**data.knowledge, source: narrow}).tables(trial(arm))


def test_a_batch_holds_the_sources_of_each_id_in_their_order(data: TrainingData) -> None:
    kind_tables = data.knowledge["knowledge"]
    users, items = kind_tables["user"], kind_tables["item"]
    cohort = KnowledgeTable(users.ids[::2], users.vectors[1::2])  # of every other user
    given = {"knowledge": kind_tables, "collective": {"user": cohort, "item": items}}
    tables = TrainingData(data.features, given).tables(trial("both"))
    rows = torch.arange(0, 400, 7)
    batch = SplitTensors(data.features.splits["test"].whole(), tables, "cpu").batch(rows)
    assert batch.user is not None
    assert batch.item is not None
    assert (batch.user.vectors.shape[1:], batch.item.vectors.shape[1:]) == ((2, 8), (2, 8))
    assert batch.item.mask.all()
    assert torch.equal(batch.item.vectors[:, 0], batch.item.vectors[:, 1])
    for row, user in enumerate(data.features.splits["test"].whole().user_ids[rows.numpy()]):
        vectors, mask = batch.user.vectors[batch.user.rows[row]], batch.user.mask[batch.user.rows[row]]
        assert mask.tolist() == [True, user % 2 == 0]
        np.testing.assert_array_equal(vectors[0], users.vectors[user])
        np.testing.assert_array_equal(vectors[1], users.vectors[user + 1] if user % 2 == 0 else np.zeros(8))


def test_a_vector_that_is_no_number_is_refused_with_its_id(data: TrainingData) -> None:
    kind_tables = data.knowledge["knowledge"]
    vectors = kind_tables["user"].vectors.copy()
    vectors[7, 3] = np.nan
    broken = {"knowledge": {**kind_tables, "user": KnowledgeTable(kind_tables["user"].ids, vectors)}}
    with pytest.raises(SchemaError, match="vector of id 7 has a component that is not finite"):
        train_one(trial("knowledge"), TrainingData(data.features, broken), CONFIG)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_and_large_tables_learn_as_much(
    data: TrainingData, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SPARSE_ABOVE_ROWS", 0)
    monkeypatch.setattr(trainer, "TABLE_LEARNING_RATE", 0.05)  # as this world's dense weights, it learns in few steps
    config = CONFIG.model_copy(update={"precision": "bfloat16", "epochs": 4})
    assert train_one(trial("knowledge", backbone), data, config).result.test.auc > 0.95


@pytest.mark.parametrize("source", ["knowledge", "collective"])
def test_shuffled_permutes_the_vectors_of_each_side_by_the_trials_seed(data: TrainingData, source: str) -> None:
    given = {source: data.knowledge[source]}
    for seed in (0, 3):
        shared = TrainingData(data.features, given)
        tables = shared.tables(trial("shuffled", seed=seed))
        assert tables is not None
        for kind, (table,), strata in zip(("user", "item"), (tables.users, tables.items), shared.strata, strict=True):
            own = given[source][kind]
            expected = own.shuffled(seed, strata).gather(own.ids)[0]
            np.testing.assert_array_equal(table.gather(own.ids)[0], expected)
            assert (expected != own.gather(own.ids)[0]).any(axis=1).all()


def test_two_sources_tell_together_what_neither_tells_alone(toy_world: Any) -> None:
    """A user likes even items where the sum of two signals is positive; each source holds one of the signals.

    In the world of this seed each signal alone, perfectly read, would rank the test rows with an AUC of .86 and .93.
    """
    rng = np.random.default_rng(0)
    n_users, dim = len(toy_world.users), 8
    signals = rng.uniform(-1, 1, size=(2, n_users))
    noise = rng.normal(size=(2, n_users, dim - 1))
    noise *= np.sqrt(1 - signals**2)[..., None] / np.linalg.norm(noise, axis=2, keepdims=True)
    vectors = np.concatenate([signals[..., None], noise], axis=2).astype(np.float16)  # of length one
    user, item = (toy_world.samples[name].to_numpy() for name in ("user_id", "item_id"))
    label = (item % 2 == 0) == (signals.sum(axis=0) > 0)[user]
    column = toy_world.samples.column_names.index("label")
    samples = toy_world.samples.set_column(column, "label", pa.array(label).cast(toy_world.samples["label"].type))
    kind_tables = [{"user": KnowledgeTable(np.arange(n_users), v), "item": toy_world.vectors[1]} for v in vectors]
    features = dataclasses.replace(toy_world, samples=samples).data.features
    data = TrainingData(features, {"knowledge": kind_tables[0], "collective": kind_tables[1]})
    arms: tuple[Arm, ...] = ("knowledge", "collective", "both")
    config = CONFIG.model_copy(update={"epochs": 10, "patience": 10})  # like an exclusive or, it is learnt late
    auc = {arm: train_one(trial(arm), data, config).result.test.auc for arm in arms}
    assert auc["both"] > max(auc["knowledge"], auc["collective"]) + 0.05


@pytest.mark.parametrize("arm", ["knowledge", "streaming"])
def test_repeated_ids_and_items_score_as_they_do_alone(data: TrainingData, arm: Arm) -> None:
    torch.manual_seed(0)
    tables = data.tables(trial(arm))
    assert tables is not None
    spec = ModelSpec.of(data.features.spec, "din", 8, CONFIG, **tables.slots)
    model = CTRModel(spec, data.features.items).eval()
    split = SplitTensors(data.features.splits["test"].whole(), tables, "cpu")
    alone = torch.cat([model(split.batch(torch.tensor([row]))) for row in range(40)])
    torch.testing.assert_close(model(split.batch(torch.arange(40))), alone)


def test_an_arm_that_covers_almost_no_row_is_refused_and_coverage_is_counted(data: TrainingData) -> None:
    users, items = data.knowledge["knowledge"]["user"], data.knowledge["knowledge"]["item"]
    later = {
        kind: dataclasses.replace(table, as_of=np.full(len(table), 10**15))
        for kind, table in (("user", users), ("item", items))
    }
    with pytest.raises(RecipeError, match=r"vectors of users for 0\.00% and of items for 0\.00% of the training rows"):
        train_one(trial("knowledge"), TrainingData(data.features, {"knowledge": later}), CONFIG)
    half = KnowledgeTable(items.ids[::2], items.vectors[::2])
    given = TrainingData(data.features, {"knowledge": {"user": users, "item": half}})
    result = train_one(trial("knowledge"), given, CONFIG.model_copy(update={"epochs": 1})).result
    assert result.coverage == {"user": 1.0, "item": 0.5}
    rows = {name: metrics.rows for name, metrics in result.slices.items() if "text" in name}
    assert rows == {"user has a text": 400, "item has a text": 200, "item has no text": 200}


def test_item_knowledge_alone_ranks_new_items_by_the_history(toy_world: Any) -> None:
    """A user likes the items of one of two topics. The history shows which, but no item of valid or test is trained."""
    rng = np.random.default_rng(0)
    n_users, past = len(toy_world.users), np.arange(10)
    topic = np.concatenate([rng.permutation(np.arange(10) % 2) for _ in range(2)])
    likes = rng.integers(0, 2, n_users)
    user, item, split = (toy_world.samples[name].to_numpy() for name in ("user_id", "item_id", "split"))
    histories = [past[topic[past] == likes[u]][:3].tolist() for u in user]
    columns = {name: toy_world.samples[name] for name in toy_world.samples.column_names}
    columns |= {
        "label": pa.array(topic[item] == likes[user]),
        "history": pa.array(histories),
        "history_ratings": pa.array([[5.0] * len(h) for h in histories]),
        "history_labels": pa.array([[1.0] * len(h) for h in histories]),
    }
    kept = (item >= 10) & ((split == "train") == (item < 15))
    samples = pa.table(columns).filter(pa.array(kept)).cast(toy_world.samples.schema)
    features = dataclasses.replace(toy_world, samples=samples).data.features
    vectors = np.stack([2 * topic - 1, *rng.normal(scale=0.3, size=(4, 20))], axis=1)
    data = TrainingData(features, {"images": {"item": KnowledgeTable(np.arange(20), vectors.astype(np.float16))}})
    own = {"none": None, "images": OwnArm(items=("images",))}
    results = {
        arm: train_one(Trial(backbone="dcnv2", arm=arm, seed=0, own=read), data, CONFIG).result
        for arm, read in own.items()
    }
    assert results["images"].test.auc > 0.95
    assert results["none"].test.auc < 0.7
    assert results["images"].coverage == {"item": 1.0}


def _run_rank(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    ctr_model._HALF_ON_CPU = False  # as in the process that trains alone
    data = pickle.loads((folder / "data.pickle").read_bytes())
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        trained = train_one(trial("knowledge"), data, CONFIG.model_copy(update={"epochs": 2}), Worker(rank, 2))
        split = SplitBatches(_odd(data.features.splits["test"]), data.tables(trial("knowledge")), "cpu")
        scores = score(trained.model, split, Worker(rank, 2))
        weights = {name: value.numpy() for name, value in trained.model.state_dict().items()}
        np.savez(folder / f"{rank}.npz", scores=scores, auc=trained.result.test.auc, **weights)
    finally:
        dist.destroy_process_group()


def _odd(split: Split) -> Split:
    """The split without its last row if it has an even number of rows, so that two ranks get unequal shares."""
    samples = split.whole()
    return Split.of(samples.take(slice(len(samples) - (len(samples) % 2 == 0))))


@pytest.mark.process
def test_two_ranks_train_and_score_as_one(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctr_model, "_HALF_ON_CPU", False)  # bfloat16 rounds by how rows are shared out
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(data))
    run_two_ranks(__file__, tmp_path)
    one = train_one(trial("knowledge"), data, CONFIG.model_copy(update={"epochs": 2}))
    split = SplitBatches(_odd(data.features.splits["test"]), data.tables(trial("knowledge")), "cpu")
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    expected = score(one.model, split)
    assert len(first["scores"]) == len(expected)
    np.testing.assert_array_equal(first["scores"], second["scores"])
    # Averaged gradients of two half batches are the whole batch's gradient, up to float32 rounding, which AdamW
    # enlarges where gradients are small.
    np.testing.assert_allclose(first["scores"], expected, atol=1e-2)
    for name in one.model.state_dict():
        np.testing.assert_array_equal(first[name], second[name])


if __name__ == "__main__":
    be_a_rank(_run_rank)
