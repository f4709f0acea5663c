"""Slices by hand: who and what counts as cold, by the training split alone."""

import numpy as np
import pytest

from owlrec.ctr.experiment import SliceMetrics, mean_slices, slice_metrics, slices_of

# Item 3 is a target five times; 4 is one four times and occurs once in a history; 5 four times in all; 1 is unknown.
COUNTS = np.array([0, 9, 0, 5, 5, 4, *[0] * 25])


def test_cold_users_and_items_by_hand() -> None:
    slices = slices_of(np.array([3, 4, 5, 1, 30]), np.array([4, 5, 0, 12, 5]), COUNTS)
    assert slices["cold items"].tolist() == [False, False, True, True, True]
    assert slices["warm items"].tolist() == [True, True, False, False, False]
    assert slices["cold users"].tolist() == [True, False, True, False, False]
    assert slices["warm users"].tolist() == [False, True, False, True, True]


def test_popular_items_are_those_of_at_least_a_fifth_of_the_warm_rows() -> None:
    slices = slices_of(np.array([2, 3, 4, 5, 6, 6, 0]), np.full(7, 9), np.array([0, 0, 50, 8, 7, 6, 5]))
    assert slices["popular items"].tolist() == [True, True, *[False] * 5]
    assert slices["other warm items"].tolist() == [False, False, *[True] * 4, False]


def test_history_buckets_part_the_rows_and_empty_ones_are_left_out() -> None:
    slices = slices_of(np.array([3] * 6), np.array([0, 1, 2, 3, 5, 12]), COUNTS)
    buckets = {name: rows.nonzero()[0].tolist() for name, rows in slices.items() if name.startswith("history")}
    assert buckets == {"history 0": [0], "history 1-2": [1, 2], "history 3-5": [3, 4], "history 11-20": [5]}
    assert "cold items" not in slices


def test_metrics_of_a_slice_are_those_of_its_rows() -> None:
    labels, scores = np.array([1, 0, 1, 1]), np.array([0.6, 0.7, 0.8, 0.9])
    slices = {"mixed": np.array([True, True, True, False]), "one class": np.array([True, False, False, False])}
    metrics = slice_metrics(labels, scores, slices)
    assert metrics["mixed"].rows == 3
    assert metrics["mixed"].auc == pytest.approx(0.5)
    assert metrics["mixed"].log_loss == pytest.approx(-np.log([0.6, 0.3, 0.8]).mean())
    alone = metrics["one class"]
    assert (alone.rows, alone.auc, alone.log_loss) == (1, None, pytest.approx(-np.log(0.6)))


def test_means_over_seeds() -> None:
    seeds = [{"a": SliceMetrics(rows=9, auc=auc, log_loss=loss)} for auc, loss in ((0.6, 0.5), (0.8, 0.7))]
    [mean] = mean_slices([*seeds, {}]).values()
    assert (mean.rows, mean.auc, mean.log_loss) == (9, pytest.approx(0.7), pytest.approx(0.6))
    blind = {"b": SliceMetrics(rows=1, auc=None, log_loss=0.5)}
    assert mean_slices([blind, blind]) == blind
