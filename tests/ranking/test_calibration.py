"""Calibration: monotone, better than none where none is due, and honest about data that say nothing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.errors import SchemaError, WorkspaceError
from owlrec.evaluation import (
    PlattScaling,
    auc,
    calibration_error,
    fit_calibration,
    load_calibration,
    log_loss,
    save_calibration,
)
from owlrec.workspace import Workspace


def overconfident(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose logits are four times too large and one too high; labels drawn from the truth."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float)
    return 1 / (1 + np.exp(-(4 * logits + 1))), labels


def test_unseen_samples_lose_log_loss_and_calibration_error_but_no_order() -> None:
    calibration = fit_calibration(*overconfident(4000, 1))
    scores, labels = overconfident(4000, 2)
    calibrated = calibration.apply(scores)
    assert log_loss(labels, calibrated) < log_loss(labels, scores) - 0.2
    assert calibration_error(labels, scores) > 0.15
    assert calibration_error(labels, calibrated) < 0.04
    assert auc(labels, calibrated) == pytest.approx(auc(labels, scores), abs=0.005)


def test_platt_undoes_the_distortion_it_can_express() -> None:
    calibration = fit_calibration(*overconfident(50_000, 3))
    assert calibration.slope == pytest.approx(1 / 4, abs=0.01)
    assert calibration.intercept == pytest.approx(-1 / 4, abs=0.03)


def test_platt_is_the_optimum_of_its_own_loss() -> None:
    scores, labels = overconfident(300, 4)
    fitted = fit_calibration(scores, labels)
    n_positive = labels.sum()
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (len(labels) - n_positive + 2))
    best = log_loss(targets, fitted.apply(scores))
    for slope, intercept in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        nudged = PlattScaling(slope=fitted.slope + slope, intercept=fitted.intercept + intercept)
        assert log_loss(targets, nudged.apply(scores)) > best


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=60),
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_always_monotone_and_strictly_inside_zero_and_one(rows: list[tuple[float, bool]], asked: list[float]) -> None:
    rows = [*rows, (0.5, True), (0.5, False)]
    calibration = fit_calibration(np.array([s for s, _ in rows]), np.array([y for _, y in rows]))
    calibrated = calibration.apply(np.sort(asked))
    assert (np.diff(calibrated) >= -1e-12).all()
    assert ((calibrated > 0) & (calibrated < 1)).all()


def test_backwards_scores_give_the_base_rate() -> None:
    scores, labels = overconfident(2000, 5)
    calibrated = fit_calibration(1 - scores, labels).apply(np.linspace(0.1, 0.9, 9))
    np.testing.assert_allclose(calibrated, labels.mean(), atol=0.02)


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_constant_scores_give_the_base_rate(constant: float) -> None:
    labels = np.array([1, 0, 0, 0] * 100)
    calibration = fit_calibration(np.full(400, constant), labels)
    np.testing.assert_allclose(calibration.apply(np.array([constant])), 0.25, atol=0.002)


def test_constant_scores_leave_platt_the_order_of_other_scores() -> None:
    calibration = fit_calibration(np.full(4, 0.3), np.array([1, 0, 0, 0]))
    assert (np.diff(calibration.apply(np.array([0.1, 0.3, 0.8]))) > 0).all()


def test_perfectly_parted_scores_stay_finite() -> None:
    scores, labels = np.r_[np.zeros(50), np.ones(50)], np.r_[np.zeros(50), np.ones(50)]
    low, high = fit_calibration(scores, labels).apply(np.array([0, 1]))
    assert 0.005 < low < 0.03
    assert 0.97 < high < 0.995


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(label: int) -> None:
    with pytest.raises(SchemaError, match=f"{3 * label} of 3 labels are 1.*Score more"):
        fit_calibration(np.array([0.1, 0.2, 0.3]), np.full(3, label))


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        ([0.1, math.nan], [0, 1], "row 1: the score is nan"),
        ([0.1, 1.5], [0, 1], "row 1: the score is 1.5"),
        ([0.1, 0.5], [0, 2], "row 1: the label is 2.0"),
        ([0.1, 0.5], [math.nan, 1], "row 0: the label is nan"),
        ([0.1, 0.5], [1], "2 scores, but 1 labels"),
    ],
)
def test_bad_values_are_named(scores: list[float], labels: list[float], says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        fit_calibration(np.array(scores), np.array(labels))


def test_saved_is_loaded_exactly(workspace: Workspace) -> None:
    calibration = fit_calibration(*overconfident(200, 6))
    save_calibration(workspace, "ranker/calibration.json", calibration)
    assert load_calibration(workspace, "ranker/calibration.json") == calibration


@pytest.mark.parametrize("damaged", [{}, {"slope": -1, "intercept": 0}, {"method": "magic"}, []])
def test_damaged_parameters_are_refused(workspace: Workspace, damaged: object) -> None:
    workspace.write_json("calibration.json", damaged)
    with pytest.raises(WorkspaceError, match=r"calibration.json is not a calibration"):
        load_calibration(workspace, "calibration.json")
