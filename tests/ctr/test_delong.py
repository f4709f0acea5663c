"""DeLong's test against the double loop of its definition, against a bootstrap, and under a true null."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.evaluation import auc, bootstrap_aucs, clustered_difference, delong_test, placements


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=2, max_size=40))
def test_placements_are_the_mean_of_all_pairs_ties_counting_half(rows: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    positives, negatives = scores[labels == 1], scores[labels == 0]
    if len(positives) and len(negatives):
        won = (positives[:, None] > negatives) + (positives[:, None] == negatives) / 2
        of_positives, of_negatives = placements(labels, scores)
        assert of_positives == pytest.approx(won.mean(axis=1))
        assert of_negatives == pytest.approx(won.mean(axis=0))
        assert of_positives.mean() == pytest.approx(auc(labels, scores))


def two_scores(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two coarse (hence tied) scores with noise in common; the first has `gain` more signal."""
    labels = rng.integers(0, 2, n)
    shared = labels + rng.normal(size=n)
    first, second = (shared + extra * labels + 0.5 * rng.normal(size=n) for extra in (gain, 0))
    return labels, np.round(first, 1), np.round(second, 1)


def test_variance_is_that_of_the_definition_with_covariance() -> None:
    labels, first, second = two_scores(np.random.default_rng(0), 80, 0.2)
    rows = {key: [placements(labels, s)[key] for s in (first, second)] for key in (0, 1)}
    covariance = np.cov(rows[0]) / len(rows[0][0]) + np.cov(rows[1]) / len(rows[1][0])
    test = delong_test(labels, first, second)
    expected = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert test.standard_error**2 == pytest.approx(expected)
    assert test.difference == pytest.approx(auc(labels, first) - auc(labels, second))
    swapped = delong_test(labels, second, first)
    assert (swapped.difference, swapped.p) == pytest.approx((-test.difference, test.p))


def test_variance_agrees_with_a_bootstrap_of_independent_rows() -> None:
    labels, first, second = two_scores(np.random.default_rng(1), 1500, 0.1)
    aucs = bootstrap_aucs(labels, [first, second], np.arange(1500), resamples=1000)
    spread = (aucs[:, 0] - aucs[:, 1]).std(ddof=1)
    assert delong_test(labels, first, second).standard_error == pytest.approx(spread, rel=0.12)


def test_clusters_of_one_row_are_independent_rows_and_repeated_rows_are_one_cluster() -> None:
    labels, first, second = two_scores(np.random.default_rng(6), 300, 0.2)
    users = np.arange(300)
    difference, error = clustered_difference(labels, first, second, users)
    test = delong_test(labels, first, second)
    assert difference == pytest.approx(test.difference)
    assert error == pytest.approx(test.standard_error, rel=0.01)
    again = clustered_difference(*(np.repeat(a, 4) for a in (labels, first, second, users)))
    assert again == pytest.approx((difference, error))
    with pytest.raises(ValueError, match="1 users"):
        clustered_difference(labels, first, second, np.zeros(300))


def test_p_is_uniform_where_there_is_no_difference_and_small_where_there_is() -> None:
    rng = np.random.default_rng(2)
    null = [delong_test(*two_scores(rng, 300, 0)).p for _ in range(400)]
    assert 0.025 <= np.mean(np.array(null) < 0.05) <= 0.085
    assert 0.42 <= np.mean(null) <= 0.58
    assert delong_test(*two_scores(rng, 2000, 0.4)).p < 1e-6


def test_p_of_a_known_z() -> None:
    labels, first, second = two_scores(np.random.default_rng(3), 200, 0.15)
    test = delong_test(labels, first, second)
    normal = np.random.default_rng(4).normal(size=1_000_000)
    assert test.p == pytest.approx(np.mean(np.abs(normal) > abs(test.difference) / test.standard_error), abs=2e-3)


def test_several_seeds_are_tested_by_the_mean_of_their_aucs() -> None:
    rng = np.random.default_rng(5)
    labels, first, second = two_scores(rng, 400, 0.2)
    other = first + 0.4 * rng.normal(size=400)
    test = delong_test(labels, np.stack([first, other]), np.stack([second, second]))
    assert test.difference == pytest.approx((auc(labels, first) + auc(labels, other)) / 2 - auc(labels, second))
    doubled = delong_test(labels, np.stack([first, first]), second)
    single = delong_test(labels, first, second)
    assert (doubled.difference, doubled.standard_error) == pytest.approx((single.difference, single.standard_error))


def test_extremes() -> None:
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.3, 0.9])
    alike = delong_test(labels, scores, 7 * scores + 1)
    assert (alike.difference, alike.standard_error, alike.p) == (0, 0, 1)
    opposite = delong_test(labels, labels, 1 - labels)
    assert (opposite.difference, opposite.standard_error, opposite.p) == (1, 0, 0)
    with pytest.raises(ValueError, match="1 positives and 3 negatives"):
        delong_test(np.array([0, 0, 0, 1]), scores, scores)
