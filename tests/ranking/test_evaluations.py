"""Evaluations against scikit-learn on hand-made rows: calibrated on valid only, each way of asking on its own."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from owlrec.errors import SchemaError
from owlrec.evaluation import load_calibration
from owlrec.ranking.question_sets import EVALUATION_COLUMNS, evaluate_model, evaluate_models, evaluation_row
from owlrec.ranking.samples import TUNING_ROWS
from owlrec.workspace import Workspace

WAYS = ("recent", "retrieved")


def rows(n: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    """Rows asked in both ways, interleaved, and overconfident scores: better ones where behaviors are retrieved."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    scores = []
    for i in range(n):
        label = bool(rng.random() < 0.6)
        for shown in WAYS:
            row = {"user_id": i % 17, "item_id": i, "timestamp": 0, "shown": shown, "system": "", "text": "t"}
            made.append({**row, "answer": "Yes" if label else "No"})
            signal = (1.0 if shown == "retrieved" else 0.3) * (1 if label else -1)
            scores.append(1 / (1 + np.exp(-4 * (signal + rng.normal()) + 3)))
    return pa.Table.from_pylist(made, schema=TUNING_ROWS), np.array(scores)


def test_each_way_is_evaluated_by_its_own_rows_and_calibration() -> None:
    (valid, on_valid), (test, on_test) = rows(300, 0), rows(400, 1)
    on_test[4] = np.nan  # of a recent row
    evaluations, calibrations = evaluate_model("tuned", valid, on_valid, test, on_test)
    assert [j.shown for j in evaluations] == list(WAYS)
    assert [(j.rows, j.unscored) for j in evaluations] == [(399, 1), (400, 0)]
    for j, shown in zip(evaluations, WAYS, strict=True):
        asked = (np.array(test["shown"].to_pylist()) == shown) & ~np.isnan(on_test)
        labels = np.array([a == "Yes" for a in test["answer"].to_pylist()])[asked]
        calibrated = calibrations[shown].apply(on_test[asked])
        assert j.auc == pytest.approx(roc_auc_score(labels, on_test[asked]))
        assert j.interval is not None
        assert j.interval.low < j.auc < j.interval.high
        assert j.raw_log_loss == pytest.approx(log_loss(labels, on_test[asked]), abs=1e-6)
        assert j.log_loss == pytest.approx(log_loss(labels, calibrated), abs=1e-6)
        assert j.accuracy == pytest.approx(((calibrated > 0.5) == labels).mean())
        assert j.log_loss < 0.69 < j.raw_log_loss
        assert j.calibration_error < j.raw_calibration_error
    assert evaluations[1].auc > evaluations[0].auc + 0.1
    assert calibrations["recent"] != calibrations["retrieved"]
    assert len(evaluation_row(evaluations[0])) == len(EVALUATION_COLUMNS)


def test_the_test_split_does_not_decide_its_own_calibration() -> None:
    (valid, on_valid), (test, on_test) = rows(300, 0), rows(200, 1)
    flipped = test.set_column(6, "answer", [["No" if a == "Yes" else "Yes" for a in test["answer"].to_pylist()]])
    assert (
        evaluate_model("m", valid, on_valid, test, on_test)[1]
        == evaluate_model("m", valid, on_valid, flipped, on_test)[1]
    )
    none_liked = valid.set_column(6, "answer", [["No"] * valid.num_rows])
    with pytest.raises(SchemaError, match="0 of 300 labels are 1"):
        evaluate_model("m", none_liked, on_valid, test, on_test)


def test_what_is_written_is_what_is_returned(workspace: Workspace) -> None:
    (valid, on_valid), (test, on_test) = rows(100, 0), rows(80, 1)
    scores = {"zero-shot": np.r_[on_valid, on_test][::1], "tuned": np.r_[on_valid, on_test] ** 2}
    evaluations = evaluate_models(workspace, "r", valid, test, scores)
    assert [(j.model, j.shown) for j in evaluations] == [(m, s) for m in scores for s in WAYS]
    assert workspace.read_json("r/evaluations.json") == [j.model_dump() for j in evaluations]
    written = workspace.read_parquet("r/scores-tuned.parquet")
    np.testing.assert_array_equal(written["score"].to_numpy(), scores["tuned"][valid.num_rows :])
    assert written.column_names[:-1] == TUNING_ROWS.names
    calibration = load_calibration(workspace, "r/calibration-tuned-recent.json")
    assert calibration == evaluate_model("tuned", valid, on_valid**2, test, on_test**2)[1]["recent"]
