"""Samples encoded by shard and mapped are those encoded at once."""

from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from worlds import write_samples, write_world

from owlrec.ctr import dataset as encoded
from owlrec.ctr.dataset import encode_tables, evaluated, open_features
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import SPLITS, Features, ItemFeatures, build_features
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.errors import SchemaError
from owlrec.workspace import Workspace

OPTIONS: dict[str, Any] = {"min_item_count": 2}
GRID = "ctr/abc"
COLUMNS = ("user_ids", "item_ids", "items", "history", "ratings", "fields", "numbers", "labels")


def by_shard(workspace: Workspace, world: Any, n_shards: int, profile: list[str]) -> Features:
    write_world(workspace, world, n_shards)
    encode_tables(workspace, GRID, features={"users": profile}, **OPTIONS)
    return open_features(workspace, GRID)


def in_memory(workspace: Workspace, world: Any, profile: list[str]) -> Features:
    """Of the samples in the order of the shards."""
    shards = [encoded_order(workspace, world, number) for number in workspace.table_shards("samples")]
    return build_features(world.users, world.items, pa.concat_tables(shards), features={"users": profile}, **OPTIONS)


def encoded_order(workspace: Workspace, world: Any, number: int) -> pa.Table:
    rows = workspace.read_shard("samples", number, ["user_id"])["user_id"].to_numpy()
    ids = world.samples["user_id"].to_numpy()
    return world.samples.filter(np.isin(ids, rows)).sort_by("user_id")


@pytest.mark.parametrize("n_shards", [1, 8])
@pytest.mark.parametrize("profile", [[], ["gender"]])
def test_shards_on_disk_are_the_whole_in_memory(
    workspace: Workspace, toy_world: Any, n_shards: int, profile: list[str]
) -> None:
    mapped = by_shard(workspace, toy_world, n_shards, profile)
    whole = in_memory(workspace, toy_world, profile)
    assert mapped.spec == whole.spec
    np.testing.assert_array_equal(mapped.item_counts, whole.item_counts)
    for field in fields(ItemFeatures):
        np.testing.assert_array_equal(getattr(mapped.items, field.name), getattr(whole.items, field.name))
    for split in SPLITS:
        assert len(mapped.splits[split].sizes) == n_shards
        for name in COLUMNS:
            ours, theirs = (getattr(features.splits[split].whole(), name) for features in (mapped, whole))
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_no_shard_holds_a_copy_of_a_history(workspace: Workspace, toy_world: Any) -> None:
    features = by_shard(workspace, toy_world, 1, [])
    histories = features.splits["train"].shards[0].histories
    behaviors = workspace.read_shard("interactions", 0)
    assert len(histories.items) == len(behaviors)  # of all splits
    assert not histories.items.flags.owndata
    assert not histories.items.flags.writeable  # mapped from the file


def test_training_on_mapped_samples_is_training_on_samples_in_memory(workspace: Workspace, toy_world: Any) -> None:
    config = CTRConfig(batch_size=64, learning_rate=0.01, epochs=1, embed_dim=8, hidden_dims=(16, 8))
    trial = Trial(backbone="din", arm="none", seed=0)
    mapped = train_one(trial, TrainingData(by_shard(workspace, toy_world, 4, []), {}), config)
    whole = train_one(trial, TrainingData(in_memory(workspace, toy_world, []), {}), config)
    assert mapped.result.test == whole.result.test
    assert mapped.result.slices == whole.result.slices


def test_an_interrupted_encoding_goes_on_from_its_shards(
    workspace: Workspace, toy_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(workspace, toy_world, 4)
    made: list[int] = []
    run = encoded.EncodeSamples.run

    def counting(self: Any, work: Any) -> Any:
        if len(made) == 3 and "fails" not in seen:
            seen.append("fails")
            raise SchemaError("interrupted")
        made.append(work.shard.number)
        return run(self, work)

    seen: list[str] = []
    monkeypatch.setattr(encoded.EncodeSamples, "run", counting)
    with pytest.raises(SchemaError, match="interrupted"):
        encode_tables(workspace, GRID, features={"users": ()}, **OPTIONS)
    for _ in range(2):  # the second time all is there
        encode_tables(workspace, GRID, features={"users": ()}, **OPTIONS)
    assert sorted(made) == [0, 1, 2, 3]


def test_bad_samples_leave_nothing_that_passes_for_complete(workspace: Workspace, toy_world: Any) -> None:
    write_world(workspace, toy_world)
    write_samples(workspace, toy_world.samples.slice(0, 100))
    with pytest.raises(SchemaError, match="split 'valid' has 0 rows"):
        encode_tables(workspace, GRID, features={"users": ()}, **OPTIONS)
    assert not workspace.exists(GRID, "samples", "done.json")


def test_a_label_outside_zero_to_one_is_named_with_its_file_and_row(workspace: Workspace, toy_world: Any) -> None:
    write_world(workspace, toy_world, 1)
    samples = workspace.read_shard("samples", 0)
    labels = samples["label"].to_numpy().copy()
    labels[7] = 1.5
    column = samples.column_names.index("label")
    changed = samples.set_column(column, "label", pa.array(labels, pa.float32()))
    workspace.write_parquet("tables/samples/00000000.parquet", changed)
    with pytest.raises(SchemaError, match=r"samples/00000000.parquet, row 7: the label is 1.5"):
        encode_tables(workspace, GRID, features={"users": ()}, **OPTIONS)


def test_only_the_first_shards_of_a_large_split_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "EVALUATED_ROWS", 100)
    assert evaluated([40, 60, 1, 5]) == [40, 60]
    assert evaluated([40, 61, 1]) == [40]
    assert evaluated([101, 1]) == [101]  # at least one shard
    assert evaluated([0, 40]) == [0, 40]
