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
JUDGEMENT_COLUMNS = ("model", "shown", "AUC", "95 % interval", "gAUC", "accuracy", "log-loss", "calibration error")


class Judgement(BaseModel):
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


def judge_models(
    workspace: Workspace,
    folder: str,
    valid: pa.Table,
    test: pa.Table,
    scores: Mapping[str, np.ndarray],
) -> list[Judgement]:
    """Evaluates all models; writes the results, the calibrations and the scored test rows into `folder`.

    scores: of each model, for the valid rows and then the test rows.
    """
    judgements = []
    for model, found in scores.items():
        on_valid, on_test = found[: valid.num_rows], found[valid.num_rows :]
        judged, calibrations = judge(model, valid, on_valid, test, on_test)
        workspace.write_parquet(f"{folder}/scores-{model}.parquet", test.append_column("score", pa.array(on_test)))
        for shown, calibration in calibrations.items():
            save_calibration(workspace, f"{folder}/calibration-{model}-{shown}.json", calibration)
        judgements += judged
    workspace.write_json(f"{folder}/judgements.json", [j.model_dump() for j in judgements])
    return judgements


def judge(
    model: str,
    valid: pa.Table,
    valid_scores: np.ndarray,
    test: pa.Table,
    test_scores: np.ndarray,
) -> tuple[list[Judgement], dict[str, PlattScaling]]:
    """An evaluation and a calibration for each prompt type in both tables, in the order of `test`.

    valid, test: samples.TUNING_ROWS; scores: float64, aligned, nan for none. Raises SchemaError if the valid rows of
    a prompt type have only one class.
    """
    judgements, calibrations = [], {}
    for shown in dict.fromkeys(test["shown"].to_pylist()):
        _, valid_labels, on_valid, _ = _rows(valid, valid_scores, shown)
        users, labels, raw, unscored = _rows(test, test_scores, shown)
        calibration = fit_calibration(on_valid, valid_labels)
        probabilities = calibration.apply(raw)
        gauc = metrics.gauc(labels, raw, users)
        judgements.append(
            Judgement(
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
    return judgements, calibrations


def judgement_row(j: Judgement) -> tuple[object, ...]:
    """The cells under JUDGEMENT_COLUMNS."""
    interval = f"[{j.interval.low:.4f}, {j.interval.high:.4f}]" if j.interval else ""
    gauc = f"{j.gauc:.4f}" if j.gauc is not None else ""
    error = f"{j.calibration_error:.3f} (raw {j.raw_calibration_error:.3f})"
    loss = f"{j.log_loss:.4f} (raw {j.raw_log_loss:.4f})"
    return j.model, j.shown, f"{j.auc:.4f}", interval, gauc, f"{j.accuracy:.4f}", loss, error


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
    behaviours: int | None  # maximum in a prompt; None for a CTR model
    shown: str  # samples.Shown; "" for a CTR model
    seed: int
    auc: float
    interval: Interval | None = None  # 95 %, users resampled


def results_of(config: RankingConfig, judgements: list[Judgement], seed: int = 0) -> list[RankerResult]:
    """Results of one run of the ranker. seed: of its shots."""
    return [
        RankerResult(
            model=j.model,
            shots=0 if j.model == "zero-shot" else config.data.shots,
            behaviours=config.data.behaviours,
            shown=j.shown,
            seed=seed,
            auc=j.auc,
            interval=j.interval,
        )
        for j in judgements
    ]


def write_results(workspace: Workspace, name: str, results: list[RankerResult]) -> None:
    """Stores the results of a run. name: unique per run, the same for a repeated run."""
    workspace.write_json(f"{_FOLDER}/{name}.json", [result.model_dump() for result in results])


def read_results(workspace: Workspace) -> list[RankerResult]:
    """Results of all runs, without duplicates: few behaviours and few shots first."""
    found = {}
    for file in workspace.names(_FOLDER):
        for row in workspace.read_json(f"{_FOLDER}/{file}"):
            result = RankerResult.model_validate(row)
            key = (result.behaviours or 0, result.shown, result.shots if result.shots is not None else 1 << 62)
            found[(*key, result.model, result.seed)] = result
    return [found[key] for key in sorted(found)]
