"""Label rules: what each log's columns come to, what is refused, and negatives that nobody took."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.errors import SchemaError
from owlrec.sources.outcomes import ANSWER_MS, LabelConfig, Labels, answered, drawn_negatives, taken, with_outcomes

COLUMNS = {"user_id": [1, 1, 2], "item_id": [5, 6, 5], "timestamp": [10, 20, 30]}


def resolved(columns: dict[str, list], **config: object) -> tuple[list, list]:
    table = pa.table({**COLUMNS, **columns})
    labels = Labels.of(LabelConfig.model_validate(config), columns, rating_above=3)
    labeled = with_outcomes(table, labels, "log.csv", first_row=100)
    return labeled["rating"].to_pylist(), labeled["label"].to_pylist()


def test_ratings_are_labeled_by_a_threshold() -> None:
    assert resolved({"rating": [5, 3, 4]}) == ([5, 3, 4], [1, 0, 1])
    assert resolved({"rating": [5, 3, 4]}, rule={"rating_above": 4})[1] == [1, 0, 0]
    np.testing.assert_allclose(resolved({"rating": [0.9, 0.2, 0.6]}, rule={"rating_above": 0.5})[1], [1, 0, 1])


def test_labels_and_events_are_taken_as_logged() -> None:
    assert resolved({"label": [1, 0, 0.25]}) == ([None] * 3, [1, 0, 0.25])
    assert resolved({"event": ["click", "impression", "purchase"]}) == ([None] * 3, [1, 0, 1])
    graded = {"event": ["click", "impression", "play"], "rating": [4, None, None]}
    assert resolved(graded) == ([4, None, None], [1, 0, 1])


def test_negatives_are_a_number_or_a_way_to_draw_it() -> None:
    for negatives, expected in ((3, (3, "uniform")), ({"popularity": 2}, (2, "popularity"))):
        config = LabelConfig.model_validate({"rule": "positives_only", "negatives": negatives})
        labels = Labels.of(config, [], rating_above=3)
        assert (labels.negatives, labels.negatives_by) == expected
    assert Labels.of(LabelConfig(negatives=3), ["rating"], rating_above=3).negatives == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": {}},
        {"rule": {"column": 1}},
        {"negatives": 0},
        {"negatives": {"popularity": 0}},
        {"negatives": {"uniform": 1, "popularity": 1}},
    ],
)
def test_odd_rules_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        LabelConfig.model_validate(wrong)


def test_weights_are_taken_as_they_stand_and_are_1_elsewhere() -> None:
    labels = Labels(rule="positives_only", rating_above=0)
    for columns, weights in (({"weight": [0, 2, 0.5]}, [0, 2, 0.5]), ({}, [1, 1, 1])):
        column = with_outcomes(pa.table({**COLUMNS, **columns}), labels, "log.csv")["weight"]
        assert (column.to_pylist(), column.type) == (weights, pa.float32())


def test_positives_alone_count_how_often_where_they_say_so() -> None:
    assert resolved({}) == ([None] * 3, [1, 1, 1])
    assert resolved({"rating": [12, 1, None]}, rule="positives_only") == ([12, 1, None], [1, 1, 1])


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"label": [1, 0, 2]}, {}, r"log\.csv, row 102: the label is 2, but it must lie in \[0, 1\]"),
        ({"label": [1, None, 1]}, {}, r"row 101: the label is None, but it must lie in"),
        ({"weight": [1, 0, -0.5]}, {}, r"log\.csv, row 102: the weight is -0\.5, but it must be a non-negative number"),
        ({"weight": [1, None, 1]}, {}, r"row 101: the weight is None"),
        ({"weight": [float("inf"), 1, 1]}, {}, r"row 100: the weight is inf"),
        ({"event": ["click", "clik", "play"]}, {}, r"row 101: the event is 'clik'.*Did you mean 'click'"),
        ({"event": ["click", None, "play"]}, {}, r"row 101: the event is 'None'"),
        ({"rating": [1, None, 2]}, {}, r"row 101: rating is null \(1 such rows\).*positives_only"),
        ({"rating": [1, 2, 3]}, {"rule": "column"}, r"neither a column label nor event"),
        ({}, {"rule": "rating_above"}, r"no column rating"),
        (
            {"split": ["train", None, "test"]},
            {},
            r"row 101: the split is None, but it must be one of train, valid, test",
        ),
        ({"split": ["train", "dev", "test"]}, {}, r"row 101: the split is 'dev'"),
    ],
)
def test_what_does_not_tell_an_outcome_is_refused(columns: dict, config: dict, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        resolved(columns, **config)


def test_who_grades_has_taken_and_a_label_below_a_half_was_passed_over() -> None:
    rating, label = np.array([1.0, np.nan, np.nan, np.nan]), np.array([0.0, 0.0, 0.4, 0.5])
    assert taken(rating, label).tolist() == [True, False, False, True]


def test_an_impression_that_is_acted_on_was_not_passed_over() -> None:
    rows = [
        (1, 5, 100, 0, True),  # clicked later
        (1, 5, 100 + ANSWER_MS, 1, False),
        (1, 5, 200 + ANSWER_MS, 0, False),  # afterwards
        (1, 6, 100, 0, False),
        (2, 5, 100, 0, False),  # of somebody else
        (3, 5, 100, 0, False),  # too long before
        (3, 5, 101 + ANSWER_MS, 1, False),
        (4, 5, 100, 0, True),  # at the same moment
        (4, 5, 100, 1, False),
    ]
    user, item, time, label, expected = (np.array(column) for column in zip(*rows, strict=True))
    assert answered(user, item, time, label.astype(np.float32)).tolist() == expected.tolist()
    assert answered(user[:0], item[:0], time[:0], label[:0]).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["uniform", "popularity"]), st.integers(1, 5))
def test_a_negative_is_never_what_its_user_took(data: st.DataObject, how: str, k: int) -> None:
    n_items = data.draw(st.integers(1, 12))
    catalog = np.arange(n_items) * 7
    pairs = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, n_items - 1)), min_size=1, max_size=40, unique=True)
    )
    user, at = np.array(sorted(pairs)).T
    item, time = catalog[at], np.arange(len(user))
    labels = Labels(rule="positives_only", rating_above=3, negatives=k, negatives_by=how)
    drawn_items = drawn_negatives(user, time, item, labels, took=(user, item), catalog=catalog)
    assert drawn_items.shape == (len(user), k)
    for who, drawn in zip(user.tolist(), drawn_items.tolist(), strict=True):
        took = set(item[user == who].tolist())
        left = set(catalog.tolist()) - took
        assert set(drawn) <= (left or {-1})  # who has taken everything has none
    again = drawn_negatives(user[::-1], time[::-1], item[::-1], labels, took=(user, item), catalog=catalog)
    assert again[::-1].tolist() == drawn_items.tolist()


def test_popular_items_are_drawn_more_often() -> None:
    catalog, user = np.arange(50), np.repeat(np.arange(400), 2)
    rng = np.random.default_rng(0)
    item = np.where(rng.random(800) < 0.5, 7, rng.integers(0, 50, 800))
    for how, low, high in (("uniform", 0.0, 0.06), ("popularity", 0.2, 0.7)):
        labels = Labels(rule="positives_only", rating_above=3, negatives=2, negatives_by=how)
        asked = np.flatnonzero(user < 200)
        drawn = drawn_negatives(user[asked], asked, item[asked], labels, took=(user, item), catalog=catalog)
        free = ~np.isin(user[asked], user[item == 7])
        assert low <= (drawn[free] == 7).mean() <= high
