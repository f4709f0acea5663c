"""Evaluation for CTR models and rankers: AUC, gAUC, log-loss, calibration error, intervals by the cluster
bootstrap, comparisons of arms, Platt scaling.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from owlrec.config import Config
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------------- metrics
# AUC, gAUC, RelaImp, log-loss and calibration error of click predictions, in float64 and without a Python loop.
#
# AUC is the Mann-Whitney rank sum; tied scores share their mean rank. gAUC (group AUC; Zhu et al., "Optimized Cost
# per Click in Taobao Display Advertising", KDD 2017) averages each user's own AUC weighted by impressions: it ignores
# differences between users and keeps the order of one user's items, which is the purpose of a ranking. Both are nan
# if no group has both classes. A NaN among scores or an invalid label is refused: sorted with the
# others it would give a plausible but wrong figure.


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive scores above a negative; ties count half.

    labels: [n], 0 or 1; scores: [n], any monotone scale. Returns nan if one class is absent.
    Raises ValueError if the lengths differ, a label is neither 0 nor 1, or a score is NaN.
    """
    labels, scores = binary_rows(labels, scores)
    sums, positives, sizes = _rank_sums(labels, scores, np.zeros(len(labels), dtype=np.int64))
    return float(_auc_of_groups(sums, positives, sizes)[0]) if len(sums) else float("nan")


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """Mean of the users' AUCs, weighted by impressions, over the users with both a positive and a negative.

    labels, scores: [n] as in `auc`; users: int [n], the user of each row. Returns nan if no user has both
    classes.
    """
    labels, scores = binary_rows(labels, scores)
    users = np.asarray(users)
    if len(users) != len(labels):
        raise ValueError(f"{len(users)} users for {len(labels)} labels: pass one user per row.")
    sums, positives, sizes = _rank_sums(labels, scores, users)
    each = _auc_of_groups(sums, positives, sizes)
    usable = ~np.isnan(each)
    return float(np.average(each[usable], weights=sizes[usable])) if usable.any() else float("nan")


def relative_improvement(auc: float, base: float) -> float:
    """RelaImp of an AUC over another, 0.01 meaning 1 % (Yan et al., "Coupled Group Lasso", ICML 2014): compares
    the parts above chance, .5.

    Returns nan if `base` does not exceed chance.
    """
    return (auc - 0.5) / (base - 0.5) - 1 if base > 0.5 else float("nan")


def log_loss(labels: np.ndarray, probabilities: np.ndarray, *, clip: float = 1e-7) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped to [clip, 1 - clip]: a float32 sigmoid reaches 0
    and 1 exactly.

    labels: [n] in [0, 1], including soft targets; one class is enough. Returns nan for no rows. Raises
    ValueError if the lengths differ, or a label or probability is outside [0, 1].
    """
    labels, probabilities = _rows_of_probabilities(labels, probabilities)
    p = np.clip(probabilities, clip, 1 - clip)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))) if len(p) else float("nan")


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance between prediction and outcome over `bins` of equally many rows, weighted by
    rows (Nguyen and O'Connor, EMNLP 2015).

    Click rates crowd into a few bins of equal width, within which over- and underestimates cancel. Equal
    probabilities share the bin of the first of them, so the order of rows does not matter.
    labels, probabilities: as in `log_loss`. Returns nan for no rows. Raises ValueError like `log_loss`, and if
    bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: use at least one.")
    labels, probabilities = _rows_of_probabilities(labels, probabilities)
    n = len(labels)
    if n == 0:
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    first_of_equals = np.searchsorted(probabilities[order], probabilities[order], side="left")
    gaps = np.bincount(first_of_equals * bins // n, weights=(labels - probabilities)[order], minlength=bins)
    return float(np.abs(gaps).sum() / n)


def binary_rows(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n]. Raises ValueError unless they are n labels of 0 and 1 and n scores without NaN."""
    labels, scores = _aligned(labels, scores)
    _refuse((labels != 0) & (labels != 1), labels, "label", "labels must be 0 or 1")
    _refuse(np.isnan(scores), scores, "score", "it cannot be ranked")
    return labels, scores


def _rows_of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = _aligned(labels, probabilities)
    for name, values in (("label", labels), ("probability", probabilities)):
        _refuse(~((values >= 0) & (values <= 1)), values, name, "it must be in [0, 1]")
    return labels, probabilities


def _refuse(wrong: np.ndarray, values: np.ndarray, name: str, advice: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row}: {name} is {values[row]:g} ({int(wrong.sum())} such rows); {advice}.")


def _aligned(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape} and scores {scores.shape}: pass one score per label.")
    return labels, scores


def _rank_sums(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per group (in ascending order): the sum of its positives' ranks within the group, its positives, its rows."""
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


# ------------------------------------------------------------------------------------------------------------ intervals
# Intervals of AUCs by the cluster bootstrap: it draws users, not rows, with replacement.
#
# A user's rows share taste, history and knowledge vector, so drawing single rows would overstate the evidence
# (Field and Welsh, "Bootstrapping clustered data", JRSS-B 2007). A drawn user counts as often as drawn, which
# makes each resample an AUC with integer weights: rows are sorted once, and a resample is one pass. All score vectors
# see the same resamples, so effects shared by two arms cancel in their difference.


class Interval(BaseModel):
    """Both ends of a figure's interval."""

    low: float
    high: float


class WeightedAUC:
    """AUC of fixed rows under any weights of their groups (users)."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> None:
        """labels, scores: [n] as in `auc`; groups: int [n], the position of each row's weight."""
        labels, scores = binary_rows(labels, scores)
        order = np.argsort(scores, kind="stable")
        positives, negatives = order[labels[order] == 1], order[labels[order] == 0]
        # Per positive: the number of lower negatives, and of those not higher. Half of the difference are its ties.
        self._below = np.searchsorted(scores[negatives], scores[positives], side="left")
        self._up_to = np.searchsorted(scores[negatives], scores[positives], side="right")
        self._positive_groups, self._negative_groups = groups[positives], groups[negatives]

    def __call__(self, weights: np.ndarray) -> float:
        """weights: float64 [n_groups], not negative. Returns nan if the weight of one class is zero.

        Integers are summed exactly: up to 10^8 rows no product exceeds float64's 2^53.
        """
        lighter = np.concatenate(([0.0], np.cumsum(weights[self._negative_groups])))
        positive_weights = weights[self._positive_groups]
        pairs = positive_weights.sum() * lighter[-1]
        # Not a dot product: OpenBLAS would spread it over threads, six times slower on busy cores.
        won = (positive_weights * (lighter[self._below] + lighter[self._up_to])).sum()
        return float(won / (2 * pairs)) if pairs > 0 else float("nan")


def bootstrap_aucs(
    labels: np.ndarray, scores: Sequence[np.ndarray], users: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """float64 [resamples, len(scores)]: the AUC of each score vector on each resample of the users.

    For the interval of an AUC, use `percentile_interval` of a column; for a difference of AUCs, of the difference of
    two columns. labels: [n], 0 or 1; scores: vectors of [n] on the same rows; users: int [n]. nan marks a resample with
    only one class. Raises ValueError if lengths differ, there are fewer than two users, or resamples < 1.
    """
    distinct, groups = np.unique(np.asarray(users), return_inverse=True)
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} users for {len(labels)} labels: pass one user per row.")
    if len(distinct) < 2 or resamples < 1:
        raise ValueError(f"{len(distinct)} users in {resamples} resamples: use at least two users and one resample.")
    aucs = [WeightedAUC(labels, vector, groups) for vector in scores]
    rng = np.random.default_rng(seed)
    resampled = np.empty((resamples, len(aucs)))
    for resample in resampled:
        drawn = rng.integers(0, len(distinct), len(distinct))
        weights = np.bincount(drawn, minlength=len(distinct)).astype(np.float64)
        resample[:] = [auc(weights) for auc in aucs]
    return resampled


def percentile_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The middle `level` of bootstrapped values, ignoring nan.

    Raises ValueError if all are nan, or level is not within (0, 1).
    """
    finite = values[~np.isnan(values)]
    if len(finite) == 0 or not 0 < level < 1:
        raise ValueError(
            f"{len(finite)} values for a level of {level}: pass at least one value, and a level in (0, 1)."
        )
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high))


# ----------------------------------------------------------------------------------------------- many rows, closed form
# Standard error of the cluster bootstrap in closed form (Obuchowski, Biometrics 1997), using the midrank placements of
# Sun and Xu (IEEE Signal Processing Letters 2014), which need sorting instead of comparing every pair.


def clustered_difference(
    labels: np.ndarray, scores: np.ndarray, base: np.ndarray, users: np.ndarray
) -> tuple[float, float]:
    """Difference in AUC and its standard error with users, not rows, as independent units.

    labels: [n], 0 or 1; scores, base: [n], or [seeds, n] for the mean of the seeds' AUCs; users: int [n]. Raises
    ValueError if lengths differ, a score is NaN, or there are fewer than two users or rows of a class.
    """
    won, lost = _mean_placements(labels, scores), _mean_placements(labels, base)
    positives, negatives = won[0] - lost[0], won[1] - lost[1]
    distinct, user_places = np.unique(users, return_inverse=True)
    if min(len(positives), len(negatives), len(distinct)) < 2:
        raise ValueError(
            f"{len(positives)} positives, {len(negatives)} negatives, {len(distinct)} users: each needs at least two."
        )
    difference, positive = float(positives.mean()), np.asarray(labels) == 1
    influence = np.bincount(user_places[positive], (positives - difference) / len(positives), len(distinct))
    influence += np.bincount(user_places[~positive], (negatives - difference) / len(negatives), len(distinct))
    return difference, math.sqrt((influence**2).sum() * len(distinct) / (len(distinct) - 1))


def placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives it outranks, and for each negative the share of positives that
    outrank it; ties count half; in the order of rows. The mean of either is the AUC.
    """
    labels, scores = binary_rows(labels, scores)
    positive = labels == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    among_all = _midranks(scores)
    positive_shares = (among_all[positive] - _midranks(scores[positive])) / max(n_negative, 1)
    negative_shares = 1 - (among_all[~positive] - _midranks(scores[~positive])) / max(n_positive, 1)
    return positive_shares, negative_shares


def _mean_placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.atleast_2d(scores)
    positive_shares, negative_shares = placements(labels, rows[0])
    for row in rows[1:]:  # one at a time, to save memory
        for total, row_placements in zip((positive_shares, negative_shares), placements(labels, row), strict=True):
            total += row_placements
    return positive_shares / len(rows), negative_shares / len(rows)


def _midranks(scores: np.ndarray) -> np.ndarray:
    """float64 [n]: ranks from 1; tied scores share their mean rank."""
    ordered = np.sort(scores)
    return (np.searchsorted(ordered, scores, side="left") + np.searchsorted(ordered, scores, side="right") + 1) / 2


# ----------------------------------------------------------------------------------------------------------- comparison
# Compares arms of a grid on test rows that all of them scored, by the mean over seeds of the difference in AUC.
#
# It is the mean of differences, not the difference of averaged scores: averaging makes an ensemble, which nobody
# serves and which favors the arm whose seeds disagree most. The interval shows how far other users and other seeds
# would move that mean: both are resampled. Up to a million rows, users are drawn. Beyond that, the bootstrap
# distribution is normal and its width is computed in closed form, with one sort of a trial's scores instead of a
# thousand passes over all trials'.


_RESAMPLED_ROWS = 1 << 20
_NORMAL_95 = 1.959964

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class GridScores:
    """Test scores of a grid's trials, all of the same rows in the same order."""

    user_ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # float32 [n]
    scores: Mapping[str, np.ndarray]  # the trial's path -> float64 [n]; read from disk on demand


def compare_arms(
    grid: GridScores,
    pairs: Mapping[_Key, Sequence[tuple[str, str]]],
    *,
    seeds: Mapping[_Key, Sequence[int]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[_Key, Interval | None]:
    """95 % interval, over resampled users and seeds, of the mean difference in AUC for each comparison whose trials all
    have scores; others are left out. None with fewer than two users.

    pairs: comparison -> (path of the arm's trial, path of its base's trial). seeds: of each of its pairs; those of one
    seed, such as of several backbones, are drawn together. By default each pair has a seed of its own. Each trial is
    resampled once for all its comparisons.
    """
    complete = {
        key: trials
        for key, trials in pairs.items()
        if trials and all(path in grid.scores for pair in trials for path in pair)
    }
    paths = sorted({path for trials in complete.values() for pair in trials for path in pair})
    resampled: dict[str, np.ndarray] = {}
    several = len(np.unique(grid.user_ids)) > 1
    if paths and several and len(grid.labels) <= _RESAMPLED_ROWS:
        vectors = [grid.scores[path] for path in paths]
        columns = bootstrap_aucs(grid.labels, vectors, grid.user_ids, resamples=resamples, seed=seed).T
        resampled = dict(zip(paths, columns, strict=True))
    intervals = dict[_Key, Interval | None]()
    for key, trials in complete.items():
        drawn = (seeds or {}).get(key, range(len(trials)))
        interval: Interval | None = None
        if resampled:
            differences = np.stack([resampled[arm] - resampled[base] for arm, base in trials], axis=1)
            interval = percentile_interval(mean_over_seeds(means_by_seed(differences, drawn), seed))
        elif several:
            arms, bases = (np.stack([grid.scores[path] for path in half]) for half in zip(*trials, strict=True))
            difference, error = clustered_difference(grid.labels, arms, bases, grid.user_ids)
            each = [auc(grid.labels, arm) - auc(grid.labels, base) for arm, base in zip(arms, bases, strict=True)]
            by_seed = means_by_seed(np.array([each]), drawn)[0]
            if len(by_seed) > 1:
                error = math.hypot(error, float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)))
            interval = Interval(low=difference - _NORMAL_95 * error, high=difference + _NORMAL_95 * error)
        intervals[key] = interval
    return intervals


def means_by_seed(differences: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """float64 [n, seeds]: means over the pairs of each seed. differences: float64 [n, pairs]."""
    numbers = np.asarray(list(seeds))
    return np.stack([differences[:, numbers == number].mean(axis=1) for number in np.unique(numbers)], axis=1)


def mean_over_seeds(differences: np.ndarray, seed: int) -> np.ndarray:
    """float64 [resamples]: means over seeds drawn again in each resample. differences: float64 [resamples, seeds].

    Deviations are widened by n / (n - 1), as in a sample variance: three seeds drawn from three vary too little.
    """
    mean, n = differences.mean(axis=1), differences.shape[1]
    if n == 1:
        return mean
    drawn = np.random.default_rng([seed, n]).integers(0, n, differences.shape)
    resampled = np.take_along_axis(differences, drawn, axis=1).mean(axis=1)
    widened: np.ndarray = mean + math.sqrt(n / (n - 1)) * (resampled - mean)
    return widened


_POWER_80 = 0.841621


def detectable_difference(interval: Interval) -> float:
    """Smallest true difference that would have been shown with a probability of 80 %, from a 95 % interval."""
    return (interval.high - interval.low) / 2 * (_NORMAL_95 + _POWER_80) / _NORMAL_95


# ---------------------------------------------------------------------------------------------------------- calibration
# Platt scaling turns an LLM ranker's scores into meaningful probabilities.
#
# A model that answers Yes or No orders candidates long before its probabilities mean anything: untuned, Vicuna-7B has
# an AUC of .67 on MovieLens-1M at a log loss of .95, while a constant .5 has .69 (ReLLa, WWW 2024). The map
# is monotone, so no order is reversed. It is fitted on the valid split, never on reported data.


_CLIP = 1e-6  # a score of exactly 0 or 1 has no logit


class PlattScaling(Config):
    """probability = sigmoid(slope * logit(score) + intercept); slope 1 and intercept 0 change nothing."""

    slope: float = Field(ge=0)
    intercept: float

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities inside (0, 1), float64 [n]. scores: float [n] in [0, 1]."""
        return np.clip(_sigmoid(self.slope * _logit(_checked(scores)) + self.intercept), _CLIP, 1 - _CLIP)


def fit_calibration(scores: np.ndarray, labels: np.ndarray) -> PlattScaling:
    """Fits the map from `scores` to `labels`.

    scores: float [n] in [0, 1], as from yes_probability; labels: [n], 0 or 1. If scores rank backwards,
    all get the same probability. Raises SchemaError if a value is out of range or one class is absent, since any
    probability would then fit.
    """
    scores, labels = _checked(scores), np.asarray(labels, dtype=np.float64)
    if labels.shape != scores.shape:
        raise SchemaError(f"calibration: {len(scores)} scores, but {len(labels)} labels. Pass one label per score.")
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise SchemaError(f"calibration, row {wrong[0]}: the label is {labels[wrong[0]]}, which is neither 0 nor 1.")
    n_positive = int(labels.sum())
    if n_positive in (0, len(labels)):
        raise SchemaError(
            f"calibration: {n_positive} of {len(labels)} labels are 1, but both classes are needed. Score more "
            "of the valid split."
        )
    return _fit_platt(scores, labels)


def save_calibration(workspace: Workspace, path: str, calibration: PlattScaling) -> None:
    """Writes the parameters as JSON."""
    workspace.write_json(path, calibration.model_dump(mode="json"))


def load_calibration(workspace: Workspace, path: str) -> PlattScaling:
    """Loads the file of `save_calibration`. Raises WorkspaceError if it is missing or damaged."""
    try:
        return PlattScaling.model_validate(workspace.read_json(path))
    except ValidationError as error:
        raise WorkspaceError(
            f"{workspace.path(path)} is not a calibration ({error.errors()[0]['msg']}). Delete it and calibrate again."
        ) from None


def _fit_platt(scores: np.ndarray, labels: np.ndarray) -> PlattScaling:
    """Logistic regression on Platt's smoothed targets (Lin, Lin and Weng, Machine Learning 68, 2007).

    The targets keep the parameters finite if scores separate the classes perfectly.
    """
    from sklearn.linear_model import LogisticRegression  # here, since `apply` needs only numpy

    n_positive = labels.sum()
    high, low = (n_positive + 1) / (n_positive + 2), 1 / (len(labels) - n_positive + 2)
    targets = np.where(labels == 1, high, low)
    logits = _logit(scores)
    prior = float(_logit(np.array([targets.mean()]))[0])
    if np.ptp(logits) == 0:  # the slope is undetermined: shift only, so later scores keep their order
        return PlattScaling(slope=1.0, intercept=prior - float(logits[0]))
    # A target of .9 is a positive with weight .9 and a negative with weight .1.
    classes, weights = np.repeat([1, 0], len(labels)), np.r_[targets, 1 - targets]
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9)
    model.fit(np.r_[logits, logits][:, None], classes, sample_weight=weights)
    if model.coef_[0, 0] <= 0:
        return PlattScaling(slope=0.0, intercept=prior)
    return PlattScaling(slope=float(model.coef_[0, 0]), intercept=float(model.intercept_[0]))


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(wrong):
        raise SchemaError(
            f"calibration, row {wrong[0]}: the score is {scores[wrong[0]]}, but must be a probability of yes "
            "in [0, 1]. Drop rows without a score."
        )
    return scores


def _logit(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, _CLIP, 1 - _CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
