"""Which pairs are asked about: by hand, and as laws over drawn logs."""

import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import write_samples

from owlrec import schema
from owlrec.ctr.experiment import DistillationConfig
from owlrec.errors import WorkspaceError
from owlrec.ranking.samples import asked_pairs
from owlrec.sources.splits import SplitConfig, id_values
from owlrec.workspace import Workspace

ITEMS = np.arange(0, 60, 2)


def prepare(workspace: Workspace, rows: list[tuple[int, int, float, int, list[int], str]]) -> None:
    """One shard. rows: user, item, label, timestamp, history, split of each sample."""
    columns = list(map(list, zip(*rows, strict=True)))
    lengths = [len(history) for history in columns[4]]
    columns[5:5] = [[[3.0] * n for n in lengths], [[1.0] * n for n in lengths]]
    workspace.fix_shards({"user": 1})
    write_samples(workspace, pa.table(columns, schema=schema.SAMPLES))


def test_pairs_are_the_train_samples_and_their_past(workspace: Workspace) -> None:
    prepare(
        workspace,
        [
            (1, 10, 1.0, 100, [2, 4], "train"),
            (1, 12, 0.0, 200, [2, 4, 10], "train"),
            (1, 14, 1.0, 300, [4, 10, 12], "valid"),
            (2, 10, 1.0, 100, [], "test"),
        ],
    )
    pairs = asked_pairs(workspace, 0, DistillationConfig(), SplitConfig(), ITEMS)
    assert pairs.schema == schema.SAMPLES
    quoted = [(r["user_id"], r["item_id"], r["timestamp"], r["history"], r["label"]) for r in pairs.to_pylist()]
    assert quoted == [(1, 10, 100, [2, 4], 0.0), (1, 12, 200, [2, 4, 10], 0.0)]  # whatever the labels were


def test_as_many_are_asked_about_as_the_recipe_says(workspace: Workspace) -> None:
    prepare(workspace, [(user, 2 * n, 1.0, 100 + n, [], "train") for user in range(40) for n in range(10)])

    def keys(**config: Any) -> set[tuple[int, int, int]]:
        rows = asked_pairs(workspace, 0, DistillationConfig(**config), SplitConfig(), ITEMS).to_pylist()
        return {(row["user_id"], row["item_id"], row["timestamp"]) for row in rows}

    labeled, drawn, further = keys(), keys(unlabeled=4), keys(unlabeled=8)
    assert len(labeled) == 40 * 10
    assert labeled < drawn <= further
    assert 40 * 3 < len(drawn - labeled) <= 40 * 4
    further -= labeled
    # Spread over moments: four draws of a user lie at four of their ten.
    assert all(
        len({t for u, _, t in further if u == user}) == 8
        for user in range(40)
        if sum(u == user for u, _, _ in further) == 8
    )


@settings(max_examples=50)
@given(st.data())
def test_no_pair_without_a_label_was_met_or_lies_at_a_moment_of_another_split(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    keys = data.draw(
        st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from(ITEMS.tolist()), st.integers(0, 6)),
            min_size=n,
            max_size=n,
            unique=True,
        )
    )
    threshold = data.draw(st.integers(0, 7))
    by_time = data.draw(st.booleans())
    rows = []
    for user, item, time in keys:
        later = time >= threshold if by_time else user >= 3
        history = [i for u, i, t in keys if u == user and t < time]
        rows.append((user, item, float(item % 4 == 0), time, history, "test" if later else "train"))
    workspace = Workspace(f"memory://{uuid.uuid4().hex}")
    prepare(workspace, rows)
    config = DistillationConfig(unlabeled=data.draw(st.integers(1, 8)))
    moments = {(user, time): history for user, _, _, time, history, split in rows if split == "train"}
    met = {(user, item) for user, item, *_ in rows}
    counts: dict[int, int] = {}
    for row in asked_pairs(workspace, 0, config, SplitConfig(), ITEMS).to_pylist():
        assert sorted(row["history"]) == sorted(moments[row["user_id"], row["timestamp"]])
        if (row["user_id"], row["item_id"], row["timestamp"]) in keys:
            continue  # a train sample
        assert (row["user_id"], row["item_id"]) not in met
        counts[row["user_id"]] = counts.get(row["user_id"], 0) + 1
    assert all(n <= config.unlabeled for n in counts.values())


def test_a_user_who_met_every_item_has_no_pair_without_a_label(workspace: Workspace) -> None:
    prepare(workspace, [(1, item, 1.0, 5, [], "train") for item in (0, 2)] + [(2, 0, 1.0, 5, [], "train")])
    pairs = asked_pairs(workspace, 0, DistillationConfig(unlabeled=3), SplitConfig(), np.array([0, 2]))
    assert [(row["user_id"], row["item_id"]) for row in pairs.to_pylist()] == [(1, 0), (1, 2), (2, 0), (2, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_in_a_split_by_item_no_pair_is_of_an_item_of_valid_or_test(
    workspace: Workspace, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a drawn sample of label 0 in train is of such an item."""
    monkeypatch.setattr("owlrec.sources.splits.SPLIT_SEED", seed)
    split = SplitConfig(method="item")
    values = id_values(ITEMS, split)
    train_items = set(ITEMS[values < np.sort(values)[15]].tolist())
    cold = next(item for item in ITEMS.tolist() if item not in train_items)
    rows = []
    for user in range(20):
        for time, item in enumerate(np.random.default_rng([seed, user]).permutation(ITEMS)[:6].tolist()):
            rows.append((user, item, 1.0, time, list[int](), "train" if item in train_items else "test"))
        rows.append((user, cold, 0.0, 9, list[int](), "train"))
    prepare(workspace, rows)
    pairs = asked_pairs(workspace, 0, DistillationConfig(unlabeled=5), split, ITEMS).to_pylist()
    labeled = {(user, item, time) for user, item, _, time, *_ in rows}
    drawn = [row["item_id"] for row in pairs if (row["user_id"], row["item_id"], row["timestamp"]) not in labeled]
    assert len(drawn) > 40
    assert set(drawn) <= train_items


def test_tables_that_are_not_prepared_are_named(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError):
        asked_pairs(workspace, 0, DistillationConfig(), SplitConfig(), ITEMS)
