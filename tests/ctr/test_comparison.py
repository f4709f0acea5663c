"""Arms weighed on rows where it is known which of them knows more."""

import numpy as np
import pytest

from owlrec import evaluation as comparison
from owlrec.evaluation import (
    GridScores,
    Interval,
    auc,
    bootstrap_aucs,
    clustered_difference,
    compare_arms,
    detectable_difference,
    percentile_interval,
)


def grid(draw: int = 0, users: int = 40, rows: int = 10) -> GridScores:
    """Two seeds of an arm that knows more than its base, and one of an arm that knows as much."""
    rng = np.random.default_rng(draw)
    n = users * rows
    labels = rng.integers(0, 2, n)
    noise = rng.normal(size=n)
    scores = {f"base/{seed}": labels + noise + 0.3 * rng.normal(size=n) for seed in (0, 1)}
    scores |= {f"arm/{seed}": 1.8 * labels + noise + 0.3 * rng.normal(size=n) for seed in (0, 1)}
    scores["same/0"] = labels + noise + 0.3 * rng.normal(size=n)
    return GridScores(np.repeat(np.arange(users), rows), labels.astype(np.float32), scores)


def test_interval_is_that_of_the_mean_over_seeds_of_paired_differences() -> None:
    given = grid()
    pairs = [("arm/0", "base/0"), ("arm/1", "base/1")]
    intervals = compare_arms(given, {"gain": pairs, "other": [("same/0", "base/0")]}, resamples=200, seed=3)
    vectors = [given.scores[path] for pair in pairs for path in pair]
    a0, b0, a1, b1 = bootstrap_aucs(given.labels, vectors, given.user_ids, resamples=200, seed=3).T
    differences = np.stack([a0 - b0, a1 - b1], axis=1)
    drawn = np.random.default_rng([3, 2]).integers(0, 2, (200, 2))
    mean, resampled = differences.mean(1), np.take_along_axis(differences, drawn, axis=1).mean(1)
    assert intervals["gain"] == percentile_interval(mean + 2**0.5 * (resampled - mean))
    assert intervals["gain"].low > 0


def test_seeds_that_disagree_widen_the_interval_and_pairs_of_one_seed_are_drawn_together() -> None:
    given = grid()
    agree = [("arm/0", "base/0"), ("arm/1", "base/1")]
    disagree = [("arm/0", "base/0"), ("base/1", "arm/1")]
    seeds = {"agree": [0, 1], "disagree": [0, 1], "one seed": [0, 0]}
    pairs = {"agree": agree, "disagree": disagree, "one seed": disagree}
    width = {k: i.high - i.low for k, i in compare_arms(given, pairs, seeds=seeds, resamples=400).items() if i}
    assert width["disagree"] > 3 * width["agree"]
    assert width["one seed"] < width["disagree"] / 3


def test_the_smallest_detectable_difference_is_that_of_a_test_with_a_power_of_80_percent() -> None:
    # A standard error of .01: the interval is 1.96 of these to each side.
    assert detectable_difference(Interval(low=-0.0096, high=0.0296)) == pytest.approx(0.028, abs=1e-4)


def test_equal_arms_are_told_apart_about_as_rarely_as_promised() -> None:
    missed = 0
    for draw in range(200):
        interval = compare_arms(grid(draw), {"nothing": [("same/0", "base/0")]}, resamples=200, seed=draw)["nothing"]
        assert interval is not None
        missed += not interval.low <= 0 <= interval.high
    assert 3 <= missed <= 22


def test_of_many_rows_the_interval_is_computed_and_as_wide_as_the_resampled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = grid(7, users=400)
    # A user's rows share their noise: as independent rows they would give a much narrower interval.
    rng = np.random.default_rng(1)
    shift = np.repeat(rng.normal(size=400), 10)
    given = GridScores(rows.user_ids, rows.labels, {p: s + shift * p.startswith("arm") for p, s in rows.scores.items()})
    pairs = {"gain": [("arm/0", "base/0"), ("arm/1", "base/1")]}
    resampled = compare_arms(given, pairs)["gain"]
    monkeypatch.setattr(comparison, "_RESAMPLED_ROWS", 100)
    computed = compare_arms(given, pairs)["gain"]
    assert resampled is not None
    assert computed is not None
    width = resampled.high - resampled.low
    assert computed.low == pytest.approx(resampled.low, abs=0.08 * width)
    assert computed.high == pytest.approx(resampled.high, abs=0.08 * width)


def test_a_comparison_without_all_of_its_scores_is_left_out() -> None:
    pairs = {"whole": [("arm/0", "base/0")], "half": [("arm/0", "base/0"), ("arm/2", "base/2")], "none": []}
    assert compare_arms(grid(), pairs, resamples=2).keys() == {"whole"}


def test_one_user_gives_no_interval() -> None:
    rows = GridScores(np.zeros(4), np.array([1, 0, 1, 0]), {"arm": np.arange(4.0), "base": -np.arange(4.0)})
    assert compare_arms(rows, {"gain": [("arm", "base")]}) == {"gain": None}


def two_scores(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    noise = rng.normal(size=n)
    return labels, 0.2 * labels + noise, noise + 0.5 * rng.normal(size=n)


def test_closed_form_agrees_with_the_bootstrap_and_with_the_aucs() -> None:
    labels, first, second = two_scores(1, 1500)
    users = np.arange(1500)
    aucs = bootstrap_aucs(labels, [first, second], users)
    difference, error = clustered_difference(labels, first, second, users)
    assert difference == pytest.approx(auc(labels, first) - auc(labels, second))
    assert error == pytest.approx((aucs[:, 0] - aucs[:, 1]).std(ddof=1), rel=0.12)
    seeds = clustered_difference(labels, np.stack([first, second]), np.stack([second, second]), users)
    assert seeds[0] == pytest.approx(difference / 2)


def test_repeated_rows_of_a_user_are_no_further_evidence() -> None:
    labels, first, second = two_scores(6, 300)
    once = clustered_difference(labels, first, second, np.arange(300))
    again = clustered_difference(*(np.repeat(a, 4) for a in (labels, first, second, np.arange(300))))
    assert again == pytest.approx(once)
    with pytest.raises(ValueError, match="1 users"):
        clustered_difference(labels, first, second, np.zeros(300))
