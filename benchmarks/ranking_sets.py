"""What retrieving once for all candidates of a request costs in quality, and by which rule to do so. No LLM reads here.

MovieLens-100K, the recipe `movielens-100k-ranker`. A prompt shows K behaviors: the recent ones, those nearest to the
candidate (ReLLa), those nearest to its set of ten candidates (by the mean or the maximum of the cosines, or each
candidate's nearest in turns), or half of each kind. The reader is a logistic regression, fitted on train, of what a
list says of a candidate: ratings, plain and weighted by likeness, and how like it is. A list that holds less of what
bears on the candidate makes it rank worse. Differences are paired by row, with 95 % intervals by resampling users.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.ranking_quality import RECIPE
from benchmarks.ranking_scores import Scored, auc_figure
from benchmarks.table import Figure, options_parser, show
from owlrec.encoding.compression import unit_rows
from owlrec.ids import rows_of
from owlrec.ranking.behavior_retrieval import ItemVectors
from owlrec.ranking.samples import draw_samples
from owlrec.recipe import load_recipe
from owlrec.runs.stages import prepare
from owlrec.shards import finished_stage
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace

Rule = Callable[[np.ndarray, int, int], np.ndarray]  # cosines [candidates, behaviors], own row, K: the positions shown
SHARPNESS = (5.0, 15.0)  # of the weights by likeness
PER_CANDIDATE = "nearest to the candidate"


def main() -> None:
    """Prints an AUC for each rule and K, and what each lacks to retrieval for the candidate alone."""
    parser = options_parser(__doc__)
    parser.add_argument("--behaviors", type=int, nargs="+", default=[5, 15])
    parser.add_argument("--rows", type=int, default=10_000, help="of each split")
    options = parser.parse_args()
    if options.quick:
        options.rows = 1000
    recipe = load_recipe(RECIPE)
    workspace = Workspace(recipe.workspace)
    if finished_stage(workspace, "prepare") is None:
        prepare(recipe, workspace)
    vectors = ItemVectors.encoded(workspace, recipe.encoder)
    catalog = ItemCatalog.load(workspace).ids
    rows, mask = vectors.shards.gather(catalog)
    assert mask.all()
    unit = unit_rows(vectors.projection.apply(rows))
    splits = [draw_samples(workspace, split, options.rows, 0, catalog) for split in ("train", "test")]
    show("retrieval for a set", figures_of(splits, catalog, unit, options.behaviors), options)


def figures_of(splits: list[pa.Table], catalog: np.ndarray, unit: np.ndarray, lengths: list[int]) -> list[Figure]:
    """splits: train and test, samples with their candidates; unit: float32 [n, d], of the ids in `catalog`."""
    splits = [table.filter(pc.greater(pc.list_value_length(table["history"]), 0)) for table in splits]
    labels = [table["label"].to_numpy() for table in splits]
    users, figures = splits[1]["user_id"].to_numpy(), []
    for k in lengths:
        read = {}
        for name, rule in RULES.items():
            train, test = (said(table, catalog, unit, rule, k) for table in splits)
            reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels[0])
            read[name] = Scored(users, labels[1].astype(np.float64), reader.predict_proba(test)[:, 1])
        measure = f"K = {k}, {len(users):,} test rows"
        figures += [auc_figure(measure, name, scored) for name, scored in read.items()]
        figures += [
            auc_figure(measure, f"{name} - {PER_CANDIDATE}", scored, read[PER_CANDIDATE])
            for name, scored in read.items()
            if name != PER_CANDIDATE
        ]
    return figures


def said(samples: pa.Table, catalog: np.ndarray, unit: np.ndarray, rule: Rule, k: int) -> np.ndarray:
    """float64 [rows, features] of the K behaviors that each sample would be shown with."""
    rows = []
    columns = ("item_id", "candidates", "history", "history_ratings")
    for item, together, history, rated in zip(*(samples[name].to_pylist() for name in columns), strict=True):
        ratings = np.array(rated, dtype=np.float64)
        cosines = unit[rows_of(catalog, np.array(together))] @ unit[rows_of(catalog, np.array(history))].T
        own = together.index(item)
        shown = rule(cosines, own, k)
        alike, stars = cosines[own, shown].astype(np.float64), ratings[shown]
        weighted = [np.average(stars, weights=np.exp(sharpness * alike)) for sharpness in SHARPNESS]
        nearest = alike.argmax()
        rows.append([stars.mean(), *weighted, stars[nearest], alike[nearest], alike.mean(), len(shown)])
    return np.array(rows)


def _first(scores: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def _turns(cosines: np.ndarray, own: int, k: int) -> np.ndarray:
    by_turn = np.argsort(-cosines, axis=1, kind="stable").T.ravel()  # each candidate's nearest, then each one's second
    return np.sort(np.fromiter(dict.fromkeys(by_turn.tolist()), dtype=np.int64)[:k])


def _half_recent(cosines: np.ndarray, own: int, k: int) -> np.ndarray:
    lately = np.arange(cosines.shape[1])[-((k + 1) // 2) :]
    older = cosines[:, : cosines.shape[1] - len(lately)]
    return np.r_[_turns(older, own, k - len(lately)), lately]


RULES: dict[str, Rule] = {
    PER_CANDIDATE: lambda cosines, own, k: _first(cosines[own], k),
    "set, mean": lambda cosines, own, k: _first(cosines.mean(axis=0), k),
    "set, maximum": lambda cosines, own, k: _first(cosines.max(axis=0), k),
    "set, in turns": _turns,
    "half recent, half in turns": _half_recent,
    "recent": lambda cosines, own, k: np.arange(cosines.shape[1])[-k:],
}


if __name__ == "__main__":
    main()
