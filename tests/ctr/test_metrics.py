"""AUC, gAUC, RelaImp, log-loss and calibration error against scikit-learn, plain loops and cases worked by hand."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from owlrec.evaluation import auc, calibration_error, gauc, log_loss, relative_improvement


def test_auc_by_hand() -> None:
    # Positives .8 and .4, negatives .6, .4, .1: of six pairs .8 wins three, .4 wins one and ties one.
    assert auc(np.array([1, 0, 1, 0, 0]), np.array([0.8, 0.6, 0.4, 0.4, 0.1])) == pytest.approx(4.5 / 6)


def test_gauc_by_hand() -> None:
    users = np.array([7, 3, 7, 3, 7, 9, 9])
    labels = np.array([1, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.95, 0.5, 0.4])
    # User 7 (3 rows): .9 beats .1, loses to .95: 1/2. User 3 (2 rows): 0. User 9 has one class and does not count.
    assert gauc(labels, scores, users) == pytest.approx((3 * 0.5 + 2 * 0.0) / 5)


def test_log_loss_by_hand_and_clipped() -> None:
    assert log_loss(np.array([1, 0]), np.array([0.8, 0.4])) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert log_loss(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1, 1]])
def test_single_class_is_nan(labels: list[int]) -> None:
    scores = np.linspace(0, 1, len(labels))
    assert math.isnan(auc(np.array(labels), scores))
    assert math.isnan(gauc(np.array(labels), scores, np.zeros(len(labels), dtype=int)))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="one score per label"):
        auc(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="one user per row"):
        gauc(np.ones(3), np.ones(3), np.ones(2))


def gauc_by_loops(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """The definition: for each user, every positive against every negative."""
    groups: dict[int, tuple[list[float], list[float]]] = {}
    for user, label, score in zip(users.tolist(), labels.tolist(), scores.tolist(), strict=True):
        groups.setdefault(user, ([], []))[int(label)].append(score)
    total = weight = 0.0
    for negatives, positives in groups.values():
        if negatives and positives:
            won = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
            total += won / (len(positives) * len(negatives)) * (len(positives) + len(negatives))
            weight += len(positives) + len(negatives)
    return total / weight


def test_gauc_of_an_amazon_sized_split_equals_the_definition_within_a_second() -> None:
    """As many rows and users as the test split of AmazonElectronics_x1 in BARS, where a pool of processes takes 3.5
    minutes.
    """
    rng = np.random.default_rng(0)
    users = rng.permutation(np.arange(385_000) % 192_000)
    labels, scores = rng.integers(0, 2, 385_000), rng.integers(0, 50, 385_000) / 50
    started = time.thread_time()
    value = gauc(labels, scores, users)
    assert time.thread_time() - started < 1  # of CPU: a busy machine is no failure
    assert value == pytest.approx(gauc_by_loops(labels, scores, users), abs=1e-9)


def test_relative_improvement_counts_from_chance() -> None:
    assert relative_improvement(0.76, 0.75) == pytest.approx(0.04)  # .26 is 4 % more than .25
    assert relative_improvement(0.5, 0.75) == pytest.approx(-1)
    assert math.isnan(relative_improvement(0.6, 0.5))


def test_calibration_error_by_hand() -> None:
    labels, p = np.array([0, 0, 1, 1, 1, 0]), np.array([0.1, 0.2, 0.3, 0.6, 0.9, 0.8])
    # Halves of three rows: (.1, .2, .3) predict .6 clicks where 1 came, (.6, .8, .9) 2.3 where 2 came.
    assert calibration_error(labels, p, bins=2) == pytest.approx((0.4 + 0.3) / 6)
    assert calibration_error(labels, p, bins=1) == pytest.approx(0.1 / 6)
    assert calibration_error(np.ones(4), np.full(4, 0.7)) == pytest.approx(0.3)
    assert math.isnan(calibration_error(np.array([]), np.array([])))
    with pytest.raises(ValueError, match="bins is 0"):
        calibration_error(labels, p, bins=0)


def test_calibration_error_is_that_of_equal_bins_and_blind_to_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(1500)
    labels = (rng.random(1500) < p**2).astype(float)
    in_order = np.argsort(p).reshape(15, 100)
    expected = np.mean([abs(labels[rows].mean() - p[rows].mean()) for rows in in_order])
    assert calibration_error(labels, p) == pytest.approx(expected)
    coarse, order = np.round(p, 1), rng.permutation(1500)
    once, again = (calibration_error(labels[rows], coarse[rows]) for rows in (order, np.arange(1500)))
    assert once == pytest.approx(again)


@pytest.mark.parametrize("metric", [auc, log_loss, calibration_error, lambda y, s: gauc(y, s, np.zeros(3))])
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 2], [0.1, 0.2, 0.3], "row 2: label is 2"),
        ([0, math.nan, 1], [0.1, 0.2, 0.3], "row 1: label is nan"),
        ([0, 1, 1], [0.1, math.nan, math.nan], r"row 1: (score|probability) is nan \(2 such rows\)"),
    ],
)
def test_no_label_and_no_score_are_refused(
    metric: Callable[[np.ndarray, np.ndarray], float], labels: list[float], scores: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(np.array(labels), np.array(scores))


def test_logits_are_no_probabilities() -> None:
    for metric in (log_loss, calibration_error):
        with pytest.raises(ValueError, match=r"row 0: probability is -0.5"):
            metric(np.array([0, 1]), np.array([-0.5, 0.5]))
    assert auc(np.array([0, 1]), np.array([-math.inf, 5])) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(0, 6)), min_size=1, max_size=60))
def test_agrees_with_scikit_learn_under_ties(rows: list[tuple[int, int, int]]) -> None:
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    scores = scores / 7
    if 0 < labels.sum() < len(labels):
        assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
    mixed = [u for u in set(users) if 0 < labels[users == u].sum() < (users == u).sum()]
    if mixed:
        each = [sk.roc_auc_score(labels[users == u], scores[users == u]) for u in mixed]
        expected = np.average(each, weights=[(users == u).sum() for u in mixed])
        assert gauc(labels, scores, users) == pytest.approx(expected)
    assert log_loss(labels, scores) == pytest.approx(sk.log_loss(labels, np.clip(scores, 1e-7, 1), labels=[0, 1]))
