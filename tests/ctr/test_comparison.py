"""Arms weighed on rows where it is known which of them knows more."""

import numpy as np
import pytest

from owlrec import evaluation as comparison
from owlrec.evaluation import GridScores, bootstrap_aucs, delong_test, percentile_interval, weigh


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
    evidence = weigh(given, {"gain": pairs, "other": [("same/0", "base/0")]}, resamples=200, seed=3)
    vectors = [given.scores[path] for pair in pairs for path in pair]
    a0, b0, a1, b1 = bootstrap_aucs(given.labels, vectors, given.user_ids, resamples=200, seed=3).T
    assert evidence["gain"].interval == percentile_interval(((a0 - b0) + (a1 - b1)) / 2)
    arms, bases = (np.stack([given.scores[f"{arm}/{seed}"] for seed in (0, 1)]) for arm in ("arm", "base"))
    assert evidence["gain"].delong_p == delong_test(given.labels, arms, bases).p < 1e-4
    assert evidence["gain"].interval is not None
    assert evidence["gain"].interval.low > 0


def test_equal_arms_are_told_apart_about_as_rarely_as_promised() -> None:
    missed, small = 0, 0
    for draw in range(200):
        evidence = weigh(grid(draw), {"nothing": [("same/0", "base/0")]}, resamples=200, seed=draw)["nothing"]
        assert evidence.interval is not None
        assert evidence.delong_p is not None
        missed += not evidence.interval.low <= 0 <= evidence.interval.high
        small += evidence.delong_p < 0.05
    assert 3 <= missed <= 22
    assert 3 <= small <= 22


def test_of_many_rows_the_interval_is_computed_and_as_wide_as_the_resampled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = grid(7, users=400)
    # A user's rows share their noise: as independent rows they would give a much narrower interval.
    rng = np.random.default_rng(1)
    shift = np.repeat(rng.normal(size=400), 10)
    given = GridScores(rows.user_ids, rows.labels, {p: s + shift * p.startswith("arm") for p, s in rows.scores.items()})
    pairs = {"gain": [("arm/0", "base/0"), ("arm/1", "base/1")]}
    resampled = weigh(given, pairs)["gain"].interval
    monkeypatch.setattr(comparison, "_RESAMPLED_ROWS", 100)
    computed = weigh(given, pairs)["gain"].interval
    assert resampled is not None
    assert computed is not None
    width = resampled.high - resampled.low
    assert computed.low == pytest.approx(resampled.low, abs=0.08 * width)
    assert computed.high == pytest.approx(resampled.high, abs=0.08 * width)


def test_a_comparison_without_all_of_its_scores_is_left_out() -> None:
    pairs = {"whole": [("arm/0", "base/0")], "half": [("arm/0", "base/0"), ("arm/2", "base/2")], "none": []}
    assert weigh(grid(), pairs, resamples=2).keys() == {"whole"}


@pytest.mark.parametrize("labels", [[1, 0, 1, 0], [1, 0, 0, 0]])
def test_too_little_to_tell_is_told_by_none(labels: list[int]) -> None:
    rows = GridScores(np.zeros(4), np.array(labels), {"arm": np.arange(4.0), "base": -np.arange(4.0)})
    evidence = weigh(rows, {"gain": [("arm", "base")]})["gain"]
    assert evidence.interval is None  # one user
    assert (evidence.delong_p is None) == (sum(labels) < 2)
