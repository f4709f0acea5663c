"""Arms of a grid compared on the test rows that they all scored, as the mean over seeds of the difference in AUC.

The mean of differences, not the difference of averaged scores: averaging makes an ensemble, which nobody serves and
which raises most the arm whose seeds disagree most. The interval says how far other users would move that mean, the
trained seeds given; how far other seeds would, their standard deviation says (`experiment.ArmSummary`). Up to a million
rows users are resampled; of more, the bootstrap's distribution is normal and its width is computed in closed form, in
one sort of a trial's scores in place of a thousand passes over all trials'.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pydantic import BaseModel

from owlrec.ctr.delong import clustered_difference, delong_test
from owlrec.ctr.intervals import Interval, bootstrap_aucs, percentile_interval

_RESAMPLED_ROWS = 1 << 20
_NORMAL_95 = 1.959964

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class GridScores:
    """The test scores of a grid's trials, all of the same rows in the same order."""

    user_ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # float32 [n]
    scores: Mapping[str, np.ndarray]  # the trial's path -> float64 [n]; from disk they are read when asked for


class Evidence(BaseModel):
    """What the test rows say of the mean difference in AUC between two arms."""

    interval: Interval | None  # 95 %, over draws of users; None with fewer than two users
    delong_p: float | None  # rows taken as independent; None where a class has fewer than two rows


def weigh(
    grid: GridScores, pairs: Mapping[_Key, Sequence[tuple[str, str]]], *, resamples: int = 1000, seed: int = 0
) -> dict[_Key, Evidence]:
    """The evidence for each comparison all of whose trials left scores; the others are left out.

    pairs: comparison -> (path of the arm's trial, path of its base's trial), a pair a seed. A trial is resampled once,
    in however many comparisons it takes part.
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
    evidence = {}
    for key, trials in complete.items():
        if resampled or not several:
            interval = _interval(resampled, trials)
        else:
            arms, bases = (np.stack([grid.scores[path] for path in side]) for side in zip(*trials, strict=True))
            difference, error = clustered_difference(grid.labels, arms, bases, grid.user_ids)
            interval = Interval(low=difference - _NORMAL_95 * error, high=difference + _NORMAL_95 * error)
        evidence[key] = Evidence(interval=interval, delong_p=_delong_p(grid, trials))
    return evidence


def _interval(resampled: Mapping[str, np.ndarray], trials: Sequence[tuple[str, str]]) -> Interval | None:
    if not resampled:
        return None
    return percentile_interval(np.mean([resampled[arm] - resampled[base] for arm, base in trials], axis=0))


def _delong_p(grid: GridScores, trials: Sequence[tuple[str, str]]) -> float | None:
    if min((grid.labels == 1).sum(), (grid.labels == 0).sum()) < 2:
        return None
    arms, bases = (np.stack([grid.scores[path] for path in paths]) for paths in zip(*trials, strict=True))
    return delong_test(grid.labels, arms, bases).p
