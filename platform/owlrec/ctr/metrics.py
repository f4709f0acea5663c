"""AUC, gAUC and log-loss of click predictions, in float64 and without a Python loop over users.

AUC is the Mann-Whitney rank sum, tied scores sharing their mean rank. gAUC (group AUC; Zhu et al., "Optimized Cost
per Click in Taobao Display Advertising", KDD 2017) averages each user's own AUC weighted by impressions: it leaves
out what tells users apart and keeps what orders one user's items, which is what a ranking is used for. Both are nan
where no group holds the two classes.
"""

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half.

    labels: [n], 0 or 1; scores: [n], any monotone scale. Returns nan where one class is absent.
    Raises ValueError where the lengths differ.
    """
    labels, scores = _aligned(labels, scores)
    sums, positives, sizes = _rank_sums(labels, scores, np.zeros(len(labels), dtype=np.int64))
    return float(_auc_of_groups(sums, positives, sizes)[0]) if len(sums) else float("nan")


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """The mean of the users' AUCs, weighted by impressions, over the users who have both a positive and a negative.

    labels, scores: [n] as in `auc`; users: int [n], whose impression each row is. Returns nan where no user has both
    classes.
    """
    labels, scores = _aligned(labels, scores)
    users = np.asarray(users)
    if len(users) != len(labels):
        raise ValueError(f"{len(users)} users for {len(labels)} labels: give one user a row.")
    sums, positives, sizes = _rank_sums(labels, scores, users)
    each = _auc_of_groups(sums, positives, sizes)
    usable = ~np.isnan(each)
    return float(np.average(each[usable], weights=sizes[usable])) if usable.any() else float("nan")


def log_loss(labels: np.ndarray, probabilities: np.ndarray, *, clip: float = 1e-7) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped to [clip, 1 - clip]: a float32 sigmoid reaches 0
    and 1 exactly.
    """
    labels, probabilities = _aligned(labels, probabilities)
    p = np.clip(probabilities, clip, 1 - clip)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))) if len(p) else float("nan")


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
