"""AUC, gAUC and log-loss against scikit-learn, a double loop and cases worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from owlrec.ctr.metrics import auc, gauc, log_loss


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
    with pytest.raises(ValueError, match="one score a label"):
        auc(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="one user a row"):
        gauc(np.ones(3), np.ones(3), np.ones(2))


@settings(deadline=None)  # a busy machine is no failure
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
