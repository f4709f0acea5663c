"""Evaluation of a ranker's scores: AUC, gAUC, log loss, accuracy and calibration error on test, before and after a
calibration fitted on valid.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec import evaluation as metrics
from owlrec.evaluation import (
    Interval,
    PlattScaling,
    bootstrap_aucs,
    expected_calibration_error,
    fit_calibration,
    percentile_interval,
    save_calibration,
)
from owlrec.prompting.ranking import YES
from owlrec.ranking.experiment import RankingConfig
from owlrec.workspace import Workspace

_RESAMPLES = 500
EVALUATION_COLUMNS = ("model", "shown", "AUC", "95 % interval", "gAUC", "accuracy", "log-loss", "calibration error")


class Evaluation(BaseModel):
    """Evaluation of one model with one type of prompt."""

    model: str  # "zero-shot" or "tuned"
    shown: str  # samples.Shown
    rows: int
    unscored: int  # rows without a score; excluded from all figures
    auc: float
    interval: Interval | None  # 95 %, users resampled; None with fewer than two users
    gauc: float | None  # None if no user has both classes
    accuracy: float  # calibrated, at threshold 0.5
    log_loss: float  # calibrated
    raw_log_loss: float
    calibration_error: float  # calibrated
    raw_calibration_error: float


def evaluate_models(
    workspace: Workspace,
    folder: str,
    valid: pa.Table,
    test: pa.Table,
    scores: Mapping[str, np.ndarray],
) -> list[Evaluation]:
    """Evaluates all models; writes the results, the calibrations and the scored test rows into `folder`.

    scores: of each model, for the valid rows and then the test rows.
    """
    evaluations = []
    for model, model_scores in scores.items():
        on_valid, on_test = model_scores[: valid.num_rows], model_scores[valid.num_rows :]
        model_evaluations, calibrations = evaluate_model(model, valid, on_valid, test, on_test)
        workspace.write_parquet(f"{folder}/scores-{model}.parquet", test.append_column("score", pa.array(on_test)))
        for shown, calibration in calibrations.items():
            save_calibration(workspace, f"{folder}/calibration-{model}-{shown}.json", calibration)
        evaluations += model_evaluations
    workspace.write_json(f"{folder}/evaluations.json", [e.model_dump() for e in evaluations])
    return evaluations


def evaluate_model(
    model: str,
    valid: pa.Table,
    valid_scores: np.ndarray,
    test: pa.Table,
    test_scores: np.ndarray,
) -> tuple[list[Evaluation], dict[str, PlattScaling]]:
    """An evaluation and a calibration for each prompt type in both tables, in the order of `test`.

    valid, test: samples.TUNING_ROWS; scores: float64, aligned, nan for none. Raises SchemaError if the valid rows of
    a prompt type have only one class.
    """
    evaluations, calibrations = [], {}
    for shown in dict.fromkeys(test["shown"].to_pylist()):
        _, valid_labels, on_valid, _ = _rows(valid, valid_scores, shown)
        users, labels, raw, unscored = _rows(test, test_scores, shown)
        calibration = fit_calibration(on_valid, valid_labels)
        probabilities = calibration.apply(raw)
        gauc = metrics.gauc(labels, raw, users)
        evaluations.append(
            Evaluation(
                model=model,
                shown=shown,
                rows=len(labels),
                unscored=unscored,
                auc=metrics.auc(labels, raw),
                interval=_interval(labels, raw, users),
                gauc=None if np.isnan(gauc) else gauc,
                accuracy=float(((probabilities > 0.5) == (labels == 1)).mean()),
                log_loss=metrics.log_loss(labels, probabilities),
                raw_log_loss=metrics.log_loss(labels, raw),
                calibration_error=expected_calibration_error(labels, probabilities),
                raw_calibration_error=expected_calibration_error(labels, raw),
            )
        )
        calibrations[shown] = calibration
    return evaluations, calibrations


def evaluation_row(e: Evaluation) -> tuple[object, ...]:
    """The cells under EVALUATION_COLUMNS."""
    interval = f"[{e.interval.low:.4f}, {e.interval.high:.4f}]" if e.interval else ""
    gauc = f"{e.gauc:.4f}" if e.gauc is not None else ""
    error = f"{e.calibration_error:.3f} (raw {e.raw_calibration_error:.3f})"
    loss = f"{e.log_loss:.4f} (raw {e.raw_log_loss:.4f})"
    return e.model, e.shown, f"{e.auc:.4f}", interval, gauc, f"{e.accuracy:.4f}", loss, error


def _rows(table: pa.Table, scores: np.ndarray, shown: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Users, labels and scores of the scored rows of one prompt type; and the number without a score."""
    asked = np.array(table["shown"].to_pylist(), dtype=object) == shown
    kept = asked & ~np.isnan(scores)
    labels = np.array([answer == YES for answer in table["answer"].to_pylist()], dtype=np.float64)
    return table["user_id"].to_numpy()[kept], labels[kept], scores[kept], int((asked & ~kept).sum())


def _interval(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> Interval | None:
    if len(np.unique(users)) < 2 or labels.min() == labels.max():
        return None
    return percentile_interval(bootstrap_aucs(labels, [scores], users, resamples=_RESAMPLES)[:, 0])


# -------------------------------------------------------------------------------------------------------------- results
# Results of ranker runs, and of CTR models on the same samples: small files that a report gathers.


_FOLDER = "ranking/results"


class RankerResult(BaseModel):
    """Test AUC of one model with one prompt type, or of a CTR model on the same samples."""

    model: str  # "zero-shot", "tuned", or a backbone
    shots: int | None  # training samples: None for the whole train split, 0 for zero-shot
    behaviors: int | None  # maximum in a prompt; None for a CTR model
    shown: str  # samples.Shown; "" for a CTR model
    seed: int
    auc: float
    interval: Interval | None = None  # 95 %, users resampled


def results_of(config: RankingConfig, evaluations: list[Evaluation], seed: int = 0) -> list[RankerResult]:
    """Results of one run of the ranker. seed: of its shots."""
    return [
        RankerResult(
            model=e.model,
            shots=0 if e.model == "zero-shot" else config.data.shots,
            behaviors=config.data.behaviors,
            shown=e.shown,
            seed=seed,
            auc=e.auc,
            interval=e.interval,
        )
        for e in evaluations
    ]


def write_results(workspace: Workspace, name: str, results: list[RankerResult]) -> None:
    """Stores the results of a run. name: unique per run, the same for a repeated run."""
    workspace.write_json(f"{_FOLDER}/{name}.json", [result.model_dump() for result in results])


def read_results(workspace: Workspace) -> list[RankerResult]:
    """Results of all runs, without duplicates: few behaviors and few shots first."""
    results = {}
    for file in workspace.names(_FOLDER):
        for row in workspace.read_json(f"{_FOLDER}/{file}"):
            result = RankerResult.model_validate(row)
            key = (result.behaviors or 0, result.shown, result.shots if result.shots is not None else 1 << 62)
            results[(*key, result.model, result.seed)] = result
    return [results[key] for key in sorted(results)]
