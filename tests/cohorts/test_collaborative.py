"""Item factors and fold-in, against the normal equations and against planted tastes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts.clustering import FactorSettings, ItemFactors, fold_in, items_and_likes, train_item_factors, unit
from owlrec.errors import SchemaError
from owlrec.schema import HISTORIES
from owlrec.workspace import Workspace


def histories(lists: list[list[int]]) -> pa.Table:
    rows = [{"user_id": u, "as_of": 1, "items": i, "ratings": [5.0] * len(i)} for u, i in enumerate(lists)]
    return pa.Table.from_pylist(rows, schema=HISTORIES)


def planted(n_users: int = 120, n_groups: int = 3, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Users of group g choose 8 of the 20 items 100 g to 100 g + 19."""
    rng = np.random.default_rng(seed)
    group = np.arange(n_users) % n_groups
    return histories([(100 * g + rng.choice(20, 8, replace=False)).tolist() for g in group]), group


SETTINGS = FactorSettings(factors=3, iterations=10)


def test_items_of_one_taste_are_nearer_than_items_of_two() -> None:
    factors = train_item_factors(planted()[0], SETTINGS)
    vectors, taste = unit(factors.vectors), factors.ids // 100
    cosine = vectors @ vectors.T
    same = taste[:, None] == taste[None, :]
    assert cosine[same].min() > cosine[~same].max()


def test_fold_in_solves_the_normal_equations() -> None:
    factors = train_item_factors(planted()[0], SETTINGS)
    chosen = [0, 3, 7, 101]
    y = factors.gather(np.array(chosen))[0].astype(np.float64)
    all_y = factors.vectors.astype(np.float64)
    left = all_y.T @ all_y + SETTINGS.alpha * y.T @ y + SETTINGS.regularization * np.eye(3)
    expected = np.linalg.solve(left, (1 + SETTINGS.alpha) * y.sum(axis=0))
    folded, known = fold_in(factors, SETTINGS, pa.array([chosen], pa.list_(pa.int64())))
    assert known.tolist() == [True]
    np.testing.assert_allclose(folded[0], expected / np.linalg.norm(expected), atol=1e-4)


def test_doubled_and_unknown_items_add_nothing() -> None:
    factors = train_item_factors(planted()[0], SETTINGS)
    lists = pa.array([[0, 1, 2], [0, 0, 1, 2, 2, 99999], [0, 1], []], pa.list_(pa.int64()))
    folded, known = fold_in(factors, SETTINGS, lists)
    np.testing.assert_allclose(folded[0], folded[1], atol=1e-6)
    assert known.tolist() == [True, True, False, False]
    assert not folded[2:].any()


def test_only_the_chosen_behaviors_count() -> None:
    factors = train_item_factors(planted()[0], SETTINGS)
    whole = pa.array([[0, 1, 2, 100, 101, 102]], pa.list_(pa.int64()))
    liked, _ = fold_in(factors, SETTINGS, whole, np.array([1, 1, 1, 0, 0, 0], bool))
    np.testing.assert_allclose(
        liked, fold_in(factors, SETTINGS, pa.array([[0, 1, 2]], pa.list_(pa.int64())))[0], atol=1e-6
    )


def test_a_later_training_keeps_the_axes() -> None:
    first = train_item_factors(planted(seed=0)[0], SETTINGS)
    table = planted(seed=1)[0]
    later = train_item_factors(table, SETTINGS, previous=first)
    fresh = train_item_factors(table, replace(SETTINGS, seed=5))

    def agreement(other: ItemFactors) -> float:
        vectors, known = other.gather(first.ids)
        return float((unit(vectors) * unit(first.vectors)).sum(axis=1)[known].mean())

    assert agreement(later) > 0.9 > agreement(fresh)


def test_a_behavior_without_a_rating_is_liked() -> None:
    rows = [
        {"user_id": 1, "as_of": 1, "items": [1, 2], "ratings": [3.0, 4.0]},
        {"user_id": 2, "as_of": 1, "items": [3], "ratings": [None]},
    ]
    items, liked = items_and_likes(pa.Table.from_pylist(rows, schema=HISTORIES), 3)
    assert items.to_pylist() == [[1, 2], [3]]
    assert liked.tolist() == [False, True, True]


def test_what_was_passed_over_is_not_liked() -> None:
    rows = [
        {"user_id": 1, "as_of": 1, "items": [1, 2], "ratings": [None, None], "passed": [7]},
        {"user_id": 2, "as_of": 1, "items": [3], "ratings": [None], "passed": [8, 9]},
    ]
    items, liked = items_and_likes(pa.Table.from_pylist(rows, schema=HISTORIES), 3)
    assert items.to_pylist() == [[1, 2, 7], [3, 8, 9]]
    assert liked.tolist() == [True, True, False, True, False, False]


def test_factors_are_mapped_and_fold_in_as_before(tmp_path: Path) -> None:
    factors, workspace = train_item_factors(planted()[0], SETTINGS), Workspace(tmp_path)
    factors.save(workspace, "f.arrow")
    mapped = ItemFactors.load(workspace, "f.arrow")
    lists = pa.array([[0, 1, 2, 2], [7, 101, 102]], pa.list_(pa.int64()))
    np.testing.assert_array_equal(mapped.ids, factors.ids)
    np.testing.assert_array_equal(fold_in(mapped, SETTINGS, lists)[0], fold_in(factors, SETTINGS, lists)[0])


def test_nobody_and_users_without_a_behavior_fold_in_to_nothing() -> None:
    factors = train_item_factors(planted()[0], SETTINGS)
    vectors, known = fold_in(factors, SETTINGS, pa.array([[], []], pa.list_(pa.int64())))
    assert (vectors.shape, known.tolist()) == ((2, 3), [False, False])


def test_no_item_that_several_users_chose_is_a_clear_error() -> None:
    with pytest.raises(SchemaError, match="none of 4 items was chosen by at least 3 users"):
        train_item_factors(histories([[1, 2], [3, 4]]), SETTINGS)
