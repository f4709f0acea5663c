"""AUC, gAUC, RelaImp, log-loss and calibration error of click predictions, in float64 and without a Python loop.

AUC is the Mann-Whitney rank sum, tied scores sharing their mean rank. gAUC (group AUC; Zhu et al., "Optimized Cost
per Click in Taobao Display Advertising", KDD 2017) averages each user's own AUC weighted by impressions: it leaves
out what tells users apart and keeps what orders one user's items, which is what a ranking is used for. Both are nan
where no group holds the two classes. A NaN among scores or a label that is no label is refused: sorted among the
others it would yield a figure that looks like any other.
"""

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half.

    labels: [n], 0 or 1; scores: [n], any monotone scale. Returns nan where one class is absent.
    Raises ValueError where the lengths differ, a label is neither 0 nor 1, or a score is NaN.
    """
    labels, scores = binary_rows(labels, scores)
    sums, positives, sizes = _rank_sums(labels, scores, np.zeros(len(labels), dtype=np.int64))
    return float(_auc_of_groups(sums, positives, sizes)[0]) if len(sums) else float("nan")


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """The mean of the users' AUCs, weighted by impressions, over the users who have both a positive and a negative.

    labels, scores: [n] as in `auc`; users: int [n], whose impression each row is. Returns nan where no user has both
    classes.
    """
    labels, scores = binary_rows(labels, scores)
    users = np.asarray(users)
    if len(users) != len(labels):
        raise ValueError(f"{len(users)} users for {len(labels)} labels: give one user a row.")
    sums, positives, sizes = _rank_sums(labels, scores, users)
    each = _auc_of_groups(sums, positives, sizes)
    usable = ~np.isnan(each)
    return float(np.average(each[usable], weights=sizes[usable])) if usable.any() else float("nan")


def relative_improvement(auc: float, base: float) -> float:
    """RelaImp of an AUC over another, 0.01 meaning 1 % (Yan et al., "Coupled Group Lasso", ICML 2014): the part above
    chance, .5, is what is compared.

    Returns nan where `base` does not exceed chance: there is nothing to be relative to.
    """
    return (auc - 0.5) / (base - 0.5) - 1 if base > 0.5 else float("nan")


def log_loss(labels: np.ndarray, probabilities: np.ndarray, *, clip: float = 1e-7) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped to [clip, 1 - clip]: a float32 sigmoid reaches 0
    and 1 exactly.

    labels: [n] within [0, 1], soft targets included; one class is as good as two. Returns nan for no rows. Raises
    ValueError where the lengths differ, or a label or probability is outside [0, 1].
    """
    labels, probabilities = _rows_of_probabilities(labels, probabilities)
    p = np.clip(probabilities, clip, 1 - clip)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))) if len(p) else float("nan")


def equal_mass_calibration_error(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """The mean distance between what was predicted and what happened, over `bins` of equally many rows, weighted by
    rows (Nguyen and O'Connor, EMNLP 2015).

    Click rates crowd into a few bins of equal width, each of which averages over- and underestimates away. Equal
    probabilities share the bin in which the first of them falls, so that the order of rows does not matter.
    labels, probabilities: as in `log_loss`. Returns nan for no rows. Raises ValueError as `log_loss` does, and where
    bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: give at least one.")
    labels, probabilities = _rows_of_probabilities(labels, probabilities)
    n = len(labels)
    if n == 0:
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    first_of_equals = np.searchsorted(probabilities[order], probabilities[order], side="left")
    gaps = np.bincount(first_of_equals * bins // n, weights=(labels - probabilities)[order], minlength=bins)
    return float(np.abs(gaps).sum() / n)


def binary_rows(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n]. Raises ValueError where they are no n labels of 0 and 1 with n scores without NaN."""
    labels, scores = _aligned(labels, scores)
    _refuse((labels != 0) & (labels != 1), labels, "label", "labels are 0 or 1")
    _refuse(np.isnan(scores), scores, "score", "it has no place in an order")
    return labels, scores


def _rows_of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = _aligned(labels, probabilities)
    for name, values in (("label", labels), ("probability", probabilities)):
        _refuse(~((values >= 0) & (values <= 1)), values, name, "give a value within [0, 1]")
    return labels, probabilities


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, why: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row}: {name} is {values[row]:g} ({int(wrong.sum())} such rows); {why}.")


def _aligned(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels are {labels.shape} and scores {scores.shape}: give one score a label.")
    return labels, scores


def _rank_sums(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group (in ascending order): the sum of its positives' ranks within the group, its positives, its rows."""
    if len(labels) == 0:
        return np.empty(0), np.empty(0), np.empty(0)
    order = np.lexsort((scores, groups))
    labels, scores, groups = labels[order], scores[order], groups[order]
    position = np.arange(len(labels))
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    group_start = position[new_group]
    tie_start = position[new_tie]
    tie_size = np.diff(np.r_[tie_start, len(labels)])
    mean_position = np.repeat(tie_start + (tie_size - 1) / 2, tie_size)
    sizes = np.diff(np.r_[group_start, len(labels)])
    ranks = mean_position - np.repeat(group_start, sizes) + 1
    return np.add.reduceat(labels * ranks, group_start), np.add.reduceat(labels, group_start), sizes


def _auc_of_groups(sums: np.ndarray, positives: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    pairs = positives * (sizes - positives)
    return np.divide(sums - positives * (positives + 1) / 2, pairs, out=np.full(len(sums), np.nan), where=pairs > 0)
