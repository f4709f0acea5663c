"""What a CTR model loses where a log says click or no click in place of a rating: MovieLens-100K, told in both ways.

Ratings above 3 become clicks, the others impressions that were passed over. Both logs go through `prepare` and
`train_ctr` with the same settings and give the same samples. What is lost are the grades of the histories.

    python -m benchmarks.outcomes               # DIN and DCN-V2, three seeds, some ten minutes
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.experiment import finished_trials, trials
from owlrec.recipe import Recipe
from owlrec.runs.models import train_ctr
from owlrec.runs.stages import prepare
from owlrec.shards import needed_stage
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.workspace import Workspace

BACKBONES = ("din", "dcnv2")
CLICK_ABOVE = 3


def main() -> None:
    """Trains on both logs and compares."""
    options = options_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_logs(Path(folder), 200 if options.quick else None)
        aucs = {log: train(Path(folder), log, options) for log in ("ratings", "impressions")}
    figures = []
    for backbone in BACKBONES:
        rated, shown = (np.array(aucs[log][backbone]) for log in ("ratings", "impressions"))
        for log, values in (("ratings", rated), ("impressions", shown)):
            figures.append(Figure(measure=backbone, method=log, value=round(float(values.mean()), 4), unit="AUC"))
            if len(values) > 1:
                spread = round(float(values.std(ddof=1)), 4)
                figures.append(Figure(measure=backbone, method=f"{log}, spread of the seeds", value=spread, unit="AUC"))
        difference = round(float(shown.mean() - rated.mean()), 4)
        figures.append(Figure(measure=backbone, method="impressions - ratings", value=difference, unit="AUC"))
    show("one data set as ratings and as impressions", figures, options)


def write_logs(folder: Path, max_users: int | None) -> None:
    """items.parquet, and the interactions as ratings.parquet and as impressions.parquet."""
    raw = MovieLens100KSource(type="movielens-100k", max_users=max_users).load()
    pq.write_table(raw.items.drop_columns(["raw_id"]), folder / "items.parquet")
    pq.write_table(raw.interactions, folder / "ratings.parquet")
    clicked = pc.greater(raw.interactions["rating"], CLICK_ABOVE)
    events = pc.if_else(clicked, pa.scalar("click"), pa.scalar("impression"))
    shown = raw.interactions.drop_columns(["rating"]).append_column("event", events)
    pq.write_table(shown, folder / "impressions.parquet")


def train(folder: Path, log: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Test AUC by backbone, seed by seed."""
    recipe = Recipe.model_validate(
        {
            "name": log,
            "scenario": "movies",
            "workspace": str(folder / log),
            "source": {"type": "table", "items": f"{folder}/items.parquet", "interactions": f"{folder}/{log}.parquet"},
            "split": {"history_length": 50},
            "engine": {"type": "echo"},
            "ctr": {"backbones": BACKBONES, "arms": ["none"], "seeds": [0] if options.quick else [0, 1, 2]},
        }
    )
    workspace = Workspace(recipe.workspace)
    prepare(recipe, workspace)
    train_ctr(recipe, workspace)
    grid = needed_stage(workspace, "train_ctr", "").outputs["grid"]
    aucs: dict[str, list[float]] = {backbone: [] for backbone in BACKBONES}
    for result in finished_trials(workspace, grid, trials(recipe.ctr)):
        aucs[result.trial.backbone].append(result.test.auc)
    return aucs


if __name__ == "__main__":
    main()
