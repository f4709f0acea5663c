"""DeLong's test of two AUCs on the same rows (Biometrics 1988), in the midrank form of Sun and Xu (IEEE Signal
Processing Letters 2014), which takes sorting instead of comparing every pair.

It takes rows as independent. Where a user has many, its variance is too small: trust the cluster bootstrap
(`intervals`) for a verdict, or of many rows `clustered_difference`, its closed form (Obuchowski, Biometrics 1997),
and take DeLong's as the figure that other papers print.
"""

import math
from dataclasses import dataclass

import numpy as np

from owlrec.ctr.metrics import binary_rows


@dataclass(frozen=True)
class DeLongTest:
    """AUC of the first scores minus that of the second."""

    difference: float
    standard_error: float
    p: float  # two-sided; 1 where both scores order all rows alike


def delong_test(labels: np.ndarray, scores: np.ndarray, base: np.ndarray) -> DeLongTest:
    """Whether two scores of the same rows differ in AUC.

    labels: [n], 0 or 1; scores, base: [n], or [seeds, n] to test the mean of the seeds' AUCs.
    Raises ValueError where lengths differ, a score is NaN, or a class has fewer than two rows (no variance).
    """
    won, lost = _mean_placements(labels, scores), _mean_placements(labels, base)
    positives, negatives = won[0] - lost[0], won[1] - lost[1]
    if min(len(positives), len(negatives)) < 2:
        raise ValueError(f"{len(positives)} positives and {len(negatives)} negatives: a variance takes two of each.")
    difference = float(positives.mean())
    variance = positives.var(ddof=1) / len(positives) + negatives.var(ddof=1) / len(negatives)
    error = math.sqrt(variance)
    if error == 0:
        return DeLongTest(difference, error, 1.0 if difference == 0 else 0.0)
    return DeLongTest(difference, error, math.erfc(abs(difference) / error / math.sqrt(2)))


def clustered_difference(
    labels: np.ndarray, scores: np.ndarray, base: np.ndarray, users: np.ndarray
) -> tuple[float, float]:
    """The difference in AUC and its standard error where users, not rows, are independent.

    Arguments: see `delong_test`; users: int [n]. Raises ValueError as it does, and for fewer than two users.
    """
    won, lost = _mean_placements(labels, scores), _mean_placements(labels, base)
    positives, negatives = won[0] - lost[0], won[1] - lost[1]
    distinct, of_row = np.unique(users, return_inverse=True)
    if min(len(positives), len(negatives), len(distinct)) < 2:
        raise ValueError(
            f"{len(positives)} positives, {len(negatives)} negatives, {len(distinct)} users: give two each."
        )
    difference, positive = float(positives.mean()), np.asarray(labels) == 1
    influence = np.bincount(of_row[positive], (positives - difference) / len(positives), len(distinct))
    influence += np.bincount(of_row[~positive], (negatives - difference) / len(negatives), len(distinct))
    return difference, math.sqrt((influence**2).sum() * len(distinct) / (len(distinct) - 1))


def placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives that it outranks, and of each negative the share of positives that
    outrank it, ties counting half; in the order of rows. The mean of either is the AUC.
    """
    labels, scores = binary_rows(labels, scores)
    positive = labels == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    among_all = _midranks(scores)
    of_positives = (among_all[positive] - _midranks(scores[positive])) / max(n_negative, 1)
    of_negatives = 1 - (among_all[~positive] - _midranks(scores[~positive])) / max(n_positive, 1)
    return of_positives, of_negatives


def _mean_placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.atleast_2d(scores)
    of_positives, of_negatives = placements(labels, rows[0])
    for row in rows[1:]:  # one at a time: of many rows two are much memory
        for total, of_row in zip((of_positives, of_negatives), placements(labels, row), strict=True):
            total += of_row
    return of_positives / len(rows), of_negatives / len(rows)


def _midranks(scores: np.ndarray) -> np.ndarray:
    """float64 [n]: ranks from 1, tied scores sharing their mean rank."""
    ordered = np.sort(scores)
    return (np.searchsorted(ordered, scores, side="left") + np.searchsorted(ordered, scores, side="right") + 1) / 2
