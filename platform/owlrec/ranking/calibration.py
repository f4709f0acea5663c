"""Turns the scores of an LLM ranker into probabilities that can be believed: Platt scaling and isotonic regression.

A model that answers Yes or No orders candidates long before its probabilities mean anything: untuned, Vicuna-7B has an
AUC of .67 on MovieLens-1M at a log loss of .95, where answering .5 throughout has .69 (ReLLa, WWW 2024). Both maps are
monotone, so no order is reversed. They are fitted on the valid split, never on what is reported. Platt's has two
parameters and suits a few hundred samples; the isotonic one follows any curve, needs thousands, and makes ties.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from owlrec.config import Config
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.workspace import Workspace

_CLIP = 1e-6  # a score of exactly 0 or 1 has no logit
_NEWTON_STEPS = 100  # fewer than ten are usual
_TOLERANCE = 1e-9  # of a parameter, and of a share of a step


class PlattScaling(Config):
    """probability = sigmoid(slope * logit(score) + intercept); slope 1 and intercept 0 change nothing."""

    method: Literal["platt"] = "platt"
    slope: float = Field(ge=0)
    intercept: float

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities inside (0, 1), float64 [n]. scores: float [n] in [0, 1]."""
        return np.clip(_sigmoid(self.slope * _logit(_checked(scores)) + self.intercept), _CLIP, 1 - _CLIP)


class IsotonicScaling(Config):
    """Straight lines between the points (score, probability), and flat beyond the outermost."""

    method: Literal["isotonic"] = "isotonic"
    scores: tuple[float, ...]  # ascending
    probabilities: tuple[float, ...]  # never falling, inside (0, 1)

    @model_validator(mode="after")
    def _aligned(self) -> "IsotonicScaling":
        if len(self.scores) != len(self.probabilities) or not self.scores:
            raise ValueError(f"{len(self.scores)} scores and {len(self.probabilities)} probabilities are no points")
        return self

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities inside (0, 1), float64 [n]. scores: float [n] in [0, 1]."""
        return np.interp(_checked(scores), self.scores, self.probabilities)


Calibration = Annotated[PlattScaling | IsotonicScaling, Field(discriminator="method")]
CalibrationMethod = Literal["platt", "isotonic"]


def fit_calibration(
    method: CalibrationMethod, scores: np.ndarray, labels: np.ndarray
) -> PlattScaling | IsotonicScaling:
    """The map that brings `scores` nearest to `labels`.

    scores: float [n] in [0, 1], as answers.yes_probability gives them; labels: [n], 0 or 1. Scores that rank backwards
    get one probability for all. Raises SchemaError where a value is out of range, or one class is absent: then any
    probability would do.
    """
    scores, labels = _checked(scores), np.asarray(labels, dtype=np.float64)
    if labels.shape != scores.shape:
        raise SchemaError(f"calibration: {len(scores)} scores, but {len(labels)} labels. Give one a score.")
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise SchemaError(f"calibration, row {wrong[0]}: the label is {labels[wrong[0]]}, which is neither 0 nor 1.")
    n_positive = int(labels.sum())
    if n_positive in (0, len(labels)):
        raise SchemaError(
            f"calibration: {n_positive} of {len(labels)} labels are 1, so nothing tells one class from the other. "
            "Score more of the valid split."
        )
    return _fit_platt(scores, labels) if method == "platt" else _fit_isotonic(scores, labels)


def save_calibration(workspace: Workspace, path: str, calibration: PlattScaling | IsotonicScaling) -> None:
    """Writes the parameters as JSON."""
    workspace.write_json(path, calibration.model_dump(mode="json"))


def load_calibration(workspace: Workspace, path: str) -> PlattScaling | IsotonicScaling:
    """What `save_calibration` wrote. Raises WorkspaceError where it is missing or damaged."""
    adapter: TypeAdapter[PlattScaling | IsotonicScaling] = TypeAdapter(Calibration)
    try:
        return adapter.validate_python(workspace.read_json(path))
    except ValidationError as error:
        raise WorkspaceError(
            f"{workspace.path(path)} is no calibration ({error.errors()[0]['msg']}). Delete it and calibrate again."
        ) from None


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 15) -> float:
    """The mean distance between what was predicted and what happened, over `bins` of equal width, weighted by rows
    (ECE; Guo et al., ICML 2017).

    labels: [n], 0 or 1; probabilities: [n] in [0, 1]. Returns nan for no rows. Raises ValueError where lengths differ.
    """
    labels, probabilities = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if labels.shape != probabilities.shape:
        raise ValueError(f"labels are {labels.shape} and probabilities {probabilities.shape}: give one a label.")
    if len(labels) == 0:
        return float("nan")
    of_bin = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(of_bin, weights=labels - probabilities, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _fit_platt(scores: np.ndarray, labels: np.ndarray) -> PlattScaling:
    """Newton's method on Platt's smoothed targets, as Lin, Lin and Weng (Machine Learning 68, 2007) advise.

    The targets keep the parameters finite where scores part the classes perfectly.
    """
    n_positive = labels.sum()
    high, low = (n_positive + 1) / (n_positive + 2), 1 / (len(labels) - n_positive + 2)
    targets = np.where(labels == 1, high, low)
    logits = _logit(scores)
    prior = float(_logit(np.array([targets.mean()]))[0])
    if np.ptp(logits) == 0:  # nothing says how steep: shift, and keep the order of scores yet to come
        return PlattScaling(slope=1.0, intercept=prior - float(logits[0]))
    features = np.stack([logits, np.ones_like(logits)])
    weights = np.array([0.0, prior])
    for _ in range(_NEWTON_STEPS):
        predicted = _sigmoid(weights @ features)
        gradient = features @ (predicted - targets)
        hessian = (features * (predicted * (1 - predicted))) @ features.T
        step = np.linalg.lstsq(hessian, gradient)[0]  # nearly equal scores leave it all but singular
        loss, share = _loss(weights @ features, targets), 1.0
        while share > _TOLERANCE and _loss((weights - share * step) @ features, targets) > loss:
            share /= 2
        weights = weights - share * step
        if np.abs(share * step).max() < _TOLERANCE:
            break
    if weights[0] <= 0:
        return PlattScaling(slope=0.0, intercept=prior)
    return PlattScaling(slope=float(weights[0]), intercept=float(weights[1]))


def _fit_isotonic(scores: np.ndarray, labels: np.ndarray) -> IsotonicScaling:
    """Kept off 0 and 1 by what n samples can tell: a block without a positive says less than 1 in n + 2, not never."""
    from sklearn.isotonic import IsotonicRegression  # here: applying needs only numpy

    bound = 1 / (len(labels) + 2)
    fitted = IsotonicRegression(y_min=bound, y_max=1 - bound).fit(scores, labels)
    return IsotonicScaling(scores=fitted.X_thresholds_.tolist(), probabilities=fitted.y_thresholds_.tolist())


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    wrong = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(wrong):
        raise SchemaError(
            f"calibration, row {wrong[0]}: the score is {scores[wrong[0]]}, but probabilities of yes are meant, which "
            "lie in [0, 1]. Drop the rows that could not be scored."
        )
    return scores


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(np.sum(np.logaddexp(0, logits) - targets * logits))


def _logit(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, _CLIP, 1 - _CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
