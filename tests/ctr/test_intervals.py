"""Weighted AUC against repeated rows, and what the cluster bootstrap must get right: clusters, coverage, pairing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.evaluation import Interval, WeightedAUC, auc, bootstrap_aucs, percentile_interval


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40))
def test_integer_weights_are_repeated_rows(rows: list[tuple[int, int, int]]) -> None:
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    weighted = WeightedAUC(labels, scores, np.arange(len(rows)))(weights.astype(float))
    repeated = auc(np.repeat(labels, weights), np.repeat(scores, weights))
    assert weighted == pytest.approx(repeated, nan_ok=True)


def test_weights_of_ones_give_the_plain_auc_whatever_the_groups() -> None:
    rng = np.random.default_rng(0)
    labels, scores, groups = rng.integers(0, 2, 500), rng.integers(0, 40, 500) / 40, rng.integers(0, 30, 500)
    assert WeightedAUC(labels, scores, groups)(np.ones(30)) == pytest.approx(auc(labels, scores), abs=1e-12)


def test_a_resample_is_the_auc_of_the_drawn_users_rows() -> None:
    rng = np.random.default_rng(1)
    users = np.array([900, 7, 50])[rng.integers(0, 3, 60)]
    labels, scores = rng.integers(0, 2, 60), rng.integers(0, 9, 60)
    [[first], [second]] = bootstrap_aucs(labels, [scores], users, resamples=2, seed=5)
    draws = np.random.default_rng(5)
    for resampled in (first, second):
        rows = np.concatenate([np.flatnonzero(users == np.array([7, 50, 900])[u]) for u in draws.integers(0, 3, 3)])
        assert resampled == pytest.approx(auc(labels[rows], scores[rows]), nan_ok=True)


def test_a_seed_gives_the_same_resamples_and_the_same_to_all_scores() -> None:
    rng = np.random.default_rng(2)
    labels, scores, users = rng.integers(0, 2, 300), rng.random(300), rng.integers(0, 40, 300)
    twice = bootstrap_aucs(labels, [scores, 10 * scores - 3], users, resamples=50, seed=1)
    np.testing.assert_array_equal(twice[:, 0], twice[:, 1])
    np.testing.assert_array_equal(twice, bootstrap_aucs(labels, [scores, scores], users, resamples=50, seed=1))
    assert not np.array_equal(twice, bootstrap_aucs(labels, [scores, scores], users, resamples=50, seed=2))


def clustered(rng: np.random.Generator, users: int = 60, rows: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and users: a score's use, a sign, is shared by a user's rows."""
    user = np.repeat(np.arange(users), rows)
    labels = rng.integers(0, 2, users * rows)
    use = rng.choice([1.5, -0.5], users)[user]
    return labels, use * labels + rng.normal(size=users * rows), user


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    truth = auc(*clustered(rng, users=50_000)[:2])
    covered, naive = 0, 0
    for draw in range(200):
        labels, scores, users = clustered(rng)
        by_user = percentile_interval(bootstrap_aucs(labels, [scores], users, resamples=200, seed=draw))
        by_row = percentile_interval(bootstrap_aucs(labels, [scores], np.arange(480), resamples=200, seed=draw))
        covered += by_user.low <= truth <= by_user.high
        naive += by_row.low <= truth <= by_row.high
    assert 0.89 <= covered / 200 <= 0.985
    assert naive < covered - 10  # rows drawn one by one pretend to more evidence than there is


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(4)
    labels, scores, users = clustered(rng)
    better = scores + 0.3 * labels
    aucs = bootstrap_aucs(labels, [better, scores], users, resamples=300)
    paired = percentile_interval(aucs[:, 0] - aucs[:, 1])
    alone = percentile_interval(aucs[:, 1])
    assert 0 < paired.low < auc(labels, better) - auc(labels, scores) < paired.high
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_resamples_of_one_class_are_left_out_of_the_interval() -> None:
    labels, scores, users = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.2, 0.8]), np.array([1, 2, 1, 2])
    aucs = bootstrap_aucs(labels, [scores], users, resamples=40)
    assert 0 < np.isnan(aucs).sum() < 40
    assert percentile_interval(aucs) == Interval(low=1, high=1)


def test_percentiles_by_hand() -> None:
    interval = percentile_interval(np.arange(101.0), level=0.8)
    assert (interval.low, interval.high) == pytest.approx((10, 90))
    assert percentile_interval(np.array([math.nan, 2.0])) == Interval(low=2, high=2)


def test_what_cannot_have_an_interval_is_refused() -> None:
    labels, scores = np.array([0, 1]), np.array([0.2, 0.3])
    with pytest.raises(ValueError, match="one user per row"):
        bootstrap_aucs(labels, [scores], np.arange(3))
    with pytest.raises(ValueError, match="1 users in 1000 resamples"):
        bootstrap_aucs(labels, [scores], np.zeros(2))
    with pytest.raises(ValueError, match="0 values for a level"):
        percentile_interval(np.array([math.nan]))
    with pytest.raises(ValueError, match="one score per label"):
        bootstrap_aucs(labels, [np.ones(3)], np.arange(2))
