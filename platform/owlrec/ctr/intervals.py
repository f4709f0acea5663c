"""Intervals of AUCs by the cluster bootstrap: users, not rows, are drawn with replacement.

A user's rows share taste, history and knowledge vector, so rows drawn one by one would pretend to more evidence than
there is (Field and Welsh, "Bootstrapping clustered data", JRSS-B 2007). A drawn user counts as often as drawn, which
makes each resample an AUC with integer weights: rows are sorted once, a resample is one pass. All score vectors see
the same resamples, so what a resample shifts in two arms cancels in their difference.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from owlrec.ctr.metrics import binary_rows


class Interval(BaseModel):
    """The two ends of a figure's interval."""

    low: float
    high: float


class WeightedAUC:
    """The AUC of fixed rows under any weights of the groups (users) that they belong to."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> None:
        """labels, scores: [n] as in `metrics.auc`; groups: int [n], the position of each row's weight."""
        labels, scores = binary_rows(labels, scores)
        order = np.argsort(scores, kind="stable")
        positives, negatives = order[labels[order] == 1], order[labels[order] == 0]
        # Of each positive: how many negatives score less, and how many no more. Half of the difference are its ties.
        self._below = np.searchsorted(scores[negatives], scores[positives], side="left")
        self._up_to = np.searchsorted(scores[negatives], scores[positives], side="right")
        self._of_positives, self._of_negatives = groups[positives], groups[negatives]

    def __call__(self, weights: np.ndarray) -> float:
        """weights: float64 [n_groups], not negative. Returns nan where one class weighs nothing.

        Integers are summed exactly: up to 10^8 rows no product exceeds float64's 2^53.
        """
        lighter = np.concatenate(([0.0], np.cumsum(weights[self._of_negatives])))
        of_positives = weights[self._of_positives]
        pairs = of_positives.sum() * lighter[-1]
        # No dot product: OpenBLAS would spread it over threads, six times slower where the cores are busy.
        won = (of_positives * (lighter[self._below] + lighter[self._up_to])).sum()
        return float(won / (2 * pairs)) if pairs > 0 else float("nan")


def bootstrap_aucs(
    labels: np.ndarray, scores: Sequence[np.ndarray], users: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """float64 [resamples, len(scores)]: the AUC of each score vector on each resample of the users.

    The interval of an AUC is `percentile_interval` of a column, that of a difference of AUCs of the difference of two
    columns.
    labels: [n], 0 or 1; scores: vectors of [n] on the same rows; users: int [n]. nan stands where a resample has one
    class only. Raises ValueError where lengths differ, there are fewer than two users, or resamples < 1.
    """
    distinct, groups = np.unique(np.asarray(users), return_inverse=True)
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} users for {len(labels)} labels: give one user a row.")
    if len(distinct) < 2 or resamples < 1:
        raise ValueError(
            f"{len(distinct)} users in {resamples} resamples: it takes two users to differ and one resample to see it."
        )
    aucs = [WeightedAUC(labels, vector, groups) for vector in scores]
    rng = np.random.default_rng(seed)
    found = np.empty((resamples, len(aucs)))
    for resample in found:
        drawn = rng.integers(0, len(distinct), len(distinct))
        weights = np.bincount(drawn, minlength=len(distinct)).astype(np.float64)
        resample[:] = [auc(weights) for auc in aucs]
    return found


def percentile_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The middle `level` of bootstrapped values; those that are nan are left out.

    Raises ValueError where all are nan, or level is not within (0, 1).
    """
    finite = values[~np.isnan(values)]
    if len(finite) == 0 or not 0 < level < 1:
        raise ValueError(f"{len(finite)} values for a level of {level}: give at least one, and a level within (0, 1).")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high))
