"""Tables to codes, on a world small enough to code by hand."""

import pyarrow as pa
import pytest

from owlrec.ctr.features import Features, FeatureSpec, build_features, encode_samples
from owlrec.errors import SchemaError
from owlrec.schema import SAMPLES

USERS = pa.table({"user_id": [1, 2, 3], "raw_id": ["a", "b", "c"], "gender": ["f", "m", "x"], "age": ["20", "", "9"]})
# Out of order on purpose; 40 occurs in no sample, and 50 in samples only.
ITEMS = pa.table(
    {
        "item_id": [30, 10, 20, 40],
        "raw_id": ["30", "10", "20", "40"],
        "title": ["t"] * 4,
        "genres": pa.array([["War", "Drama"], ["War"], [], ["A", "B", "C", "D", "E"]], pa.list_(pa.string())),
        "year": ["1990", "1980", None, "1980"],
    }
)


def samples(*rows: tuple[int, int, float, list[int], list[float | None], str]) -> pa.Table:
    user, item, label, history, ratings, split = (list(column) for column in zip(*rows, strict=True))
    outcomes = [[1.0] * len(items) for items in history]
    return pa.table([user, item, label, [0] * len(rows), history, ratings, outcomes, split], schema=SAMPLES)


TABLE = samples(
    (1, 10, 1, [20, 10, 20], [4.4, 0.2, None], "train"),
    (2, 30, 0, [10], [99], "train"),
    (1, 10, 1, [], [], "valid"),
    (2, 20, 0, [10], [3], "valid"),
    (3, 50, 1, [40, 50, 10, 20], [1, 2, 3, 4.5], "test"),
    (9, 40, 0, [10], [3], "test"),
)


def build(**changes: object) -> Features:
    options: dict = {"attributes": ["genres", "color", "year"], "profile": ["gender", "age"], "min_item_count": 1}
    return build_features(USERS, ITEMS, TABLE, **{**options, **changes})


def test_sizes_come_from_training_and_the_item_table() -> None:
    # Items 10, 20, 30; genres A to E, Drama, War; years 1980, 1990; of users 1 and 2 only: f, m and the age 20.
    expected = FeatureSpec(
        n_items=5, attributes={"genres": 9, "year": 4}, profile={"gender": 4, "age": 3}, history_length=3
    )
    assert build().spec == expected
    assert FeatureSpec.model_validate_json(expected.model_dump_json()) == expected


def test_items_are_coded_once_in_order_of_id() -> None:
    items = build().items
    assert items.ids.tolist() == [10, 20, 30, 40]
    # Padding, unknown, 10, 20, 30, and 40, which training never shows.
    assert items.codes.tolist() == [0, 1, 2, 3, 4, 1]
    genres, year = items.attributes[:, 0].tolist(), items.attributes[:, 1, 0].tolist()
    assert genres == [[0] * 4, [1, 0, 0, 0], [8, 0, 0, 0], [0] * 4, [8, 6, 0, 0], [2, 3, 4, 5]]
    assert year == [0, 1, 2, 1, 3, 2]


def test_training_samples_by_hand() -> None:
    train = build().splits["train"].whole()
    assert train.items.tolist() == [2, 4]
    assert train.history.tolist() == [[3, 2, 3], [2, 0, 0]]
    assert train.ratings.tolist() == [[1, 1, 0], [10, 0, 0]]  # of ten levels from .2 to 99; 0 where there is none
    assert train.profile.tolist() == [[2, 2], [3, 1]]
    assert train.labels.tolist() == [1, 0]


def test_unknown_items_and_users_of_other_splits_share_code_one() -> None:
    test = build().splits["test"].whole()
    assert test.items.tolist() == [1, 5]  # 50 is in no table; 40 has a row of its own, with the unknown item's code
    assert test.history.tolist() == [[1, 2, 3], [2, 0, 0]]  # the last three of four; 50 is unknown
    assert test.profile.tolist() == [[1, 1], [1, 1]]  # gender x and age 9 were never seen; user 9 has no row


def test_rare_items_lose_their_own_code() -> None:
    # In training 10 stands three times, 20 twice, 30 once.
    assert build(min_item_count=2).items.codes.tolist() == [0, 1, 2, 3, 1, 1]
    assert build(min_item_count=3).items.codes.tolist() == [0, 1, 2, 1, 1, 1]


def test_no_attributes_and_no_profile() -> None:
    features = build(attributes=[], profile=[])
    assert features.items.attributes.shape == (6, 0, 4)
    assert features.splits["train"].whole().profile.shape == (2, 0)


def test_at_most_two_attributes() -> None:
    assert list(build(attributes=["year", "raw_id", "genres"]).spec.attributes) == ["year", "raw_id"]


def test_one_class_split_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"split 'valid' has 1 rows and the labels \[1.0\]"):
        build_features(USERS, ITEMS, TABLE.slice(0, 3), attributes=[], profile=[], min_item_count=1)


def test_an_empty_valid_split_is_refused() -> None:
    table = TABLE.filter([row != "valid" for row in TABLE["split"].to_pylist()])
    with pytest.raises(SchemaError, match=r"split 'valid' has 0 rows and the labels \[\].*source.split"):
        build_features(USERS, ITEMS, table, attributes=[], profile=[], min_item_count=1)


def test_soft_labels_are_learned_from_and_evaluated_as_classes() -> None:
    more = [samples((1, 10, 0.75, [], [], split), (1, 10, 0.25, [], [], split)) for split in ("train", "valid")]
    splits = build_features(
        USERS, ITEMS, pa.concat_tables([TABLE, *more]), attributes=[], profile=[], min_item_count=1
    ).splits
    assert splits["train"].whole().labels.tolist() == [1, 0, 0.75, 0.25]
    assert splits["valid"].whole().labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("label", [2.0, -1.0, float("nan"), None])
def test_a_label_outside_zero_to_one_is_refused(label: float | None) -> None:
    table = pa.concat_tables([TABLE, samples((1, 10, label, [], [], "train"))])  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match=f"split 'train' has the label {label}; .* be in"):
        build_features(USERS, ITEMS, table, attributes=[], profile=[], min_item_count=1)


def test_misaligned_ratings_are_refused() -> None:
    features = build()
    bad = samples((1, 10, 1, [10, 20], [1], "train"))
    with pytest.raises(SchemaError, match="differs in length"):
        encode_samples(bad, USERS, features.items, features.vocabularies, 3)
