"""Samples encoded part by part and mapped are those encoded at once."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlrec.ctr.encoded import DONE, encode_to_folder, open_features
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import SPLITS, ItemFeatures, SampleFeatures, build_features
from owlrec.ctr.fitting import TrainingData, train_one
from owlrec.errors import SchemaError

OPTIONS: dict[str, Any] = {"attributes": ["genres"], "min_item_count": 2}


def parts(samples: pa.Table, n: int) -> list[pa.Table]:
    size = -(-len(samples) // n)
    return [samples.slice(i * size, size) for i in range(n)]


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("profile", [[], ["gender"]])
def test_parts_on_disk_are_the_whole_in_memory(toy_world: Any, tmp_path: Path, n: int, profile: list[str]) -> None:
    tables = (toy_world.users, toy_world.items)
    whole = build_features(*tables, toy_world.samples, profile=profile, **OPTIONS)
    assert not (tmp_path / DONE).exists()
    vocabularies = encode_to_folder(*tables, lambda: parts(toy_world.samples, n), tmp_path, profile=profile, **OPTIONS)
    assert (tmp_path / DONE).exists()
    mapped = open_features(tmp_path, vocabularies)
    assert mapped.spec == whole.spec
    for field in fields(ItemFeatures):
        np.testing.assert_array_equal(getattr(mapped.items, field.name), getattr(whole.items, field.name))
    for split in SPLITS:
        for field in fields(SampleFeatures):
            ours, theirs = getattr(mapped.splits[split], field.name), getattr(whole.splits[split], field.name)
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert isinstance(mapped.splits["train"].history, np.memmap)


def test_training_on_mapped_samples_is_training_on_samples_in_memory(toy_world: Any, tmp_path: Path) -> None:
    config = CTRConfig(batch_size=64, learning_rate=0.01, epochs=1, embed_dim=8, hidden_dims=(16, 8))
    trial = Trial(backbone="din", arm="none", seed=0)
    tables, options = (toy_world.users, toy_world.items), {"profile": [], **OPTIONS}
    vocabularies = encode_to_folder(*tables, lambda: parts(toy_world.samples, 3), tmp_path, **options)
    mapped = train_one(trial, TrainingData(open_features(tmp_path, vocabularies), {}), config)
    whole = train_one(trial, TrainingData(build_features(*tables, toy_world.samples, **options), {}), config)
    assert mapped.result.test == whole.result.test


def test_bad_samples_leave_nothing_that_passes_for_complete(toy_world: Any, tmp_path: Path) -> None:
    samples = toy_world.samples.slice(0, 100)
    with pytest.raises(SchemaError, match="split 'valid' has 0 rows"):
        encode_to_folder(toy_world.users, toy_world.items, lambda: [samples], tmp_path, profile=[], **OPTIONS)
    assert not (tmp_path / DONE).exists()
