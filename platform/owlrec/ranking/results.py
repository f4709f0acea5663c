"""What runs of the ranker, and CTR models on the same samples, came to: small files that a report gathers."""

from pydantic import BaseModel

from owlrec.ctr.intervals import Interval
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.judging import Judgement
from owlrec.workspace import Workspace

_FOLDER = "ranking/results"


class RankerResult(BaseModel):
    """Test AUC of one model asked in one way, or of a CTR model on the same samples."""

    model: str  # "zero-shot", "tuned", or a backbone
    shots: int | None  # samples that it was trained on: None for the whole train split, 0 for zero-shot
    behaviours: int | None  # that a prompt shows at most; None for a CTR model
    shown: str  # samples.Shown; "" for a CTR model
    seed: int
    auc: float
    interval: Interval | None = None  # 95 %, users resampled


def results_of(config: RankingConfig, judgements: list[Judgement]) -> list[RankerResult]:
    """Of one run of the ranker."""
    return [
        RankerResult(
            model=j.model,
            shots=0 if j.model == "zero-shot" else config.data.shots,
            behaviours=config.data.behaviours,
            shown=j.shown,
            seed=config.data.seed,
            auc=j.auc,
            interval=j.interval,
        )
        for j in judgements
    ]


def write_results(workspace: Workspace, name: str, results: list[RankerResult]) -> None:
    """Keeps the results of a run. name: other for every run, the same when one is done again."""
    workspace.write_json(f"{_FOLDER}/{name}.json", [result.model_dump() for result in results])


def read_results(workspace: Workspace) -> list[RankerResult]:
    """Those of all runs, without those that were found twice: few behaviours and few shots first."""
    found = {}
    for file in workspace.names(_FOLDER):
        for row in workspace.read_json(f"{_FOLDER}/{file}"):
            result = RankerResult.model_validate(row)
            key = (result.behaviours or 0, result.shown, result.shots if result.shots is not None else 1 << 62)
            found[(*key, result.model, result.seed)] = result
    return [found[key] for key in sorted(found)]
