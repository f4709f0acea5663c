"""Tables to codes, on a world small enough to code by hand."""

import numpy as np
import pyarrow as pa
import pytest

from owlrec.ctr.features import (
    FeatureOptions,
    Features,
    FeatureSections,
    FeatureSpec,
    build_features,
    encode_samples,
)
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


def build(users: pa.Table = USERS, items: pa.Table = ITEMS, table: pa.Table = TABLE, **changes: object) -> Features:
    options: dict = {"features": {"items": ("genres", "year"), "users": ("gender", "age")}, "min_item_count": 1}
    return build_features(users, items, table, **{**options, **changes})


def test_sizes_come_from_training_alone() -> None:
    # Items 10, 20, 30 with the genres Drama, War and the years 1980, 1990; of users 1 and 2 only: f, m and the age 20.
    spec = build().spec
    assert (spec.n_items, spec.history_length) == (5, 3)
    assert spec.tables == {"items/genres": 4, "items/year": 4, "users/gender": 4, "users/age": 3}
    assert FeatureSpec.model_validate_json(spec.model_dump_json()) == spec


def test_items_are_coded_once_in_order_of_id() -> None:
    items = build().items
    assert items.ids.tolist() == [10, 20, 30, 40]
    # Padding, unknown, 10, 20, 30, and 40, which training never shows.
    assert items.codes.tolist() == [0, 1, 2, 3, 4, 1]
    # In training lists have at most two values; those of 40 are all unknown, and 20 has none.
    assert items.attributes[:, 0].tolist() == [[0, 0], [1, 0], [3, 0], [1, 0], [3, 2], [1, 1]]
    assert items.attributes[:, 1, 0].tolist() == [0, 1, 2, 1, 3, 2]


def test_training_samples_by_hand() -> None:
    train = build().splits["train"].whole()
    assert train.items.tolist() == [2, 4]
    assert train.history.tolist() == [[3, 2, 3], [2, 0, 0]]
    assert train.ratings.tolist() == [[1, 1, 0], [10, 0, 0]]  # of ten levels from .2 to 99; 0 where there is none
    assert train.fields[:, :, 0].tolist() == [[2, 2], [3, 1]]
    assert train.labels.tolist() == [1, 0]


def test_unknown_items_and_users_of_other_splits_share_code_one() -> None:
    test = build().splits["test"].whole()
    assert test.items.tolist() == [1, 5]  # 50 is in no table; 40 has a row of its own, with the unknown item's code
    assert test.history.tolist() == [[1, 2, 3], [2, 0, 0]]  # the last three of four; 50 is unknown
    assert test.fields[:, :, 0].tolist() == [[1, 1], [1, 1]]  # gender x and age 9 were never seen; user 9 has no row


def test_rare_items_and_rare_values_lose_their_own_code() -> None:
    # In training 10 stands three times, 20 twice, 30 once: Drama once, War four times; each user once.
    features = build(min_item_count=2)
    assert features.items.codes.tolist() == [0, 1, 2, 3, 1, 1]
    assert features.vocabularies.values["items/genres"].to_pylist() == ["War"]
    assert features.spec.tables["users/gender"] == 2
    assert build(min_item_count=3).items.codes.tolist() == [0, 1, 2, 1, 1, 1]


def test_no_features() -> None:
    features = build(features={"items": (), "users": ()})
    assert features.items.attributes.shape == (6, 0, 1)
    assert features.splits["train"].whole().fields.shape == (2, 0, 1)


def test_by_default_all_columns_but_those_that_identify_a_row() -> None:
    n = 400
    columns = {"zip": "z{}", "income": "{}.5", "code": "0{}"}
    values = {"zip": range(n), "income": range(9, 9 + 3 * n, 3), "code": [u % 9 for u in range(n)]}
    users = pa.table({"user_id": range(n), "raw_id": map(str, range(n))})
    for name, form in columns.items():
        users = users.append_column(name, pa.array([form.format(value) for value in values[name]]))
    table = samples(
        *((u, 10 + 10 * (u % 2), u % 2, [20], [1], s) for s in ("train", "valid", "test") for u in range(n))
    )
    features = build(users=users, table=table, features={})
    fields = features.spec.fields
    assert [f.column for f in fields.items] == ["genres", "year"]
    assert [(f.column, f.type) for f in fields.users] == [("income", "quantiles"), ("code", "categorical")]
    # 400 incomes in 50 buckets of eight.
    buckets = np.bincount(features.splits["train"].whole().fields[:, 0, 0])
    assert buckets.tolist() == [0, 0, *[8] * 50]


TYPED = TABLE.append_column("interactions/device", pa.array(["tv", "web", "tv", None, "fax", "web"])).append_column(
    "interactions/spent", pa.array(["0", "", "7", "x", "1e3", "2"])
)  # fmt: skip


def test_context_numbers_and_shared_tables_by_hand() -> None:
    hours = pa.array([3_600_000 * h for h in (5, 6, 5, 7, 6, 30)])
    table = TYPED.set_column(TYPED.column_names.index("timestamp"), "timestamp", hours)
    users = USERS.append_column("tastes", pa.array([["War"], ["Drama", "Jazz"], None], pa.list_(pa.string())))
    genre = FeatureOptions(table="genre")
    sections: FeatureSections = {
        "items": {"genres": genre},
        "users": {"tastes": genre, "user_id": FeatureOptions(hash=64)},
        "interactions": {"device": "auto", "hour": "auto", "weekday": "auto", "spent": "log"},
    }
    features = build(users=users, table=table, features=sections)
    assert features.spec.tables["genre"] == 5  # Drama, Jazz, War
    assert features.items.attributes[2:5, 0].tolist() == [[4, 0], [1, 0], [4, 2]]
    train, test = (features.splits[split].whole() for split in ("train", "test"))
    assert train.fields[:, 0].tolist() == [[4, 0], [2, 3]]
    assert test.fields[:, 0].tolist() == [[1, 0], [1, 0]]  # no list, and no row
    ids = test.fields[:, 1, 0]
    assert len(set(ids.tolist())) == 2  # by hash, also of users without a row
    assert all(2 <= code < 66 for code in ids.tolist())
    assert train.fields[:, 2:, 0].tolist() == [[2, 2, 2], [3, 3, 2]]
    assert test.fields[:, 2:, 0].tolist() == [[1, 3, 2], [3, 3, 1]]  # a fax; hour 6; Friday, the day after
    # In training 0 alone: log1p(0) has mean 0 and no spread.
    np.testing.assert_allclose(test.numbers[:, 0], np.log1p([1000, 2]), rtol=1e-6)
    assert np.isnan(train.numbers[1, 0])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"items": ("genre",)}, r"features\.items: .*no column 'genre'.*'genres'"),
        ({"users": {"sex": "auto"}}, r"features\.users: .*no column 'sex'"),
        ({"interactions": ("devise",)}, r"features\.interactions: .*no column 'devise'.*'device'"),
        ({"interactions": ("label",)}, r"features\.interactions: 'label' is an outcome"),
        ({"users": {"gender": "log"}}, r"features\.users\.gender: .*log, but the column holds text such as 'f'"),
        ({"items": {"genres": "quantiles"}}, r"features\.items\.genres: .*quantiles, but holds lists"),
        ({"sequences": {"carts": ("cart",)}}, r"features\.sequences: carts .*no column event"),
        ({"users": {"gender": FeatureOptions(table="t", hash=9), "age": FeatureOptions(table="t")}}, "share the table"),
    ],
)
def test_features_that_the_tables_do_not_have_are_named(sections: FeatureSections, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        build(table=TYPED, features=sections)


@pytest.mark.parametrize("column", ["equal", "later", "dwell"])
def test_a_column_that_tells_the_label_is_refused(column: str) -> None:
    rng = np.random.default_rng(0)
    n = 300
    label = rng.integers(0, 2, n)
    told = {"equal": label, "later": np.where(label, rng.integers(0, 40, n), rng.integers(40, 80, n)),
            "dwell": label + rng.random(n) * 0.9, "session": rng.permutation(n), "device": np.full(n, 4)}  # fmt: skip
    rows = [(1, 10, float(y), [], [], split) for split in ("train", "valid", "test") for y in label]
    table = samples(*rows)
    for name, values in told.items():
        table = table.append_column(f"interactions/{name}", pa.array([str(v) for v in np.tile(values, 3)]))
    build(table=table, features={"interactions": ("session", "device")})
    with pytest.raises(SchemaError, match=rf"features\.interactions: '{column}' alone predicts the label"):
        build(table=table, features={"interactions": ("session", "device", column)})


def test_one_class_split_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"split 'valid' has 1 rows and the labels \[1.0\]"):
        build_features(USERS, ITEMS, TABLE.slice(0, 3), features={"items": (), "users": ()}, min_item_count=1)


def test_an_empty_valid_split_is_refused() -> None:
    table = TABLE.filter([row != "valid" for row in TABLE["split"].to_pylist()])
    with pytest.raises(SchemaError, match=r"split 'valid' has 0 rows and the labels \[\].*source.split"):
        build_features(USERS, ITEMS, table, features={"items": (), "users": ()}, min_item_count=1)


def test_soft_labels_are_learned_from_and_evaluated_as_classes() -> None:
    more = [samples((1, 10, 0.75, [], [], split), (1, 10, 0.25, [], [], split)) for split in ("train", "valid")]
    splits = build_features(
        USERS, ITEMS, pa.concat_tables([TABLE, *more]), features={"items": (), "users": ()}, min_item_count=1
    ).splits
    assert splits["train"].whole().labels.tolist() == [1, 0, 0.75, 0.25]
    assert splits["valid"].whole().labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("label", [2.0, -1.0, float("nan"), None])
def test_a_label_outside_zero_to_one_is_refused(label: float | None) -> None:
    table = pa.concat_tables([TABLE, samples((1, 10, label, [], [], "train"))])  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match=f"split 'train' has the label {label}; .* be in"):
        build_features(USERS, ITEMS, table, features={"items": (), "users": ()}, min_item_count=1)


def test_misaligned_ratings_are_refused() -> None:
    features = build()
    bad = samples((1, 10, 1, [10, 20], [1], "train"))
    with pytest.raises(SchemaError, match="differs in length"):
        encode_samples(bad, USERS, features.items, features.vocabularies, 3)
