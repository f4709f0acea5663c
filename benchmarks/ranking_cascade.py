"""The cascade on held-out lists: DIN orders 20 candidates, a tuned ranker re-orders the first N of them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.ranking_peers import features_of, train
from benchmarks.ranking_scores import ask_ranker
from benchmarks.samples import all_samples
from benchmarks.table import Figure
from owlrec.ctr.experiment import CTRConfig
from owlrec.errors import EngineError
from owlrec.evaluation import load_calibration
from owlrec.ranking.cascade import held_out_lists, judge_cascade
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.retrieval import with_candidates
from owlrec.recipe import Recipe
from owlrec.sources.catalog import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

LENGTH, DEPTHS, WEIGHTS = 20, (5, 10, 20), (0.0, 0.25, 0.5, 0.75, 1.0)


def cascade_figures(recipe: Recipe, workspace: Workspace, folder: str, kept: str, lists: int) -> list[Figure]:
    """nDCG@10 and AUC by depth and weight. folder: of the ranker's run; kept: where its calibration lies.

    The scores stay in `kept`, so that another call asks nobody.
    """
    samples = all_samples(workspace)
    asked = held_out_lists(samples, lists=lists, length=LENGTH)
    file = f"{kept}/cascade-{fingerprint(lists, LENGTH)[:8]}.parquet"
    if not workspace.exists(file):
        scores = {
            "ctr": ctr_scores(recipe, workspace, samples, asked),
            "llm": llm_scores(recipe, workspace, folder, asked),
        }
        columns = {"label": asked["label"], **scores}
        workspace.write_parquet(file, pa.table(columns))
    table = workspace.read_parquet(file)
    labels, ctr, raw = (table[name].to_numpy().reshape(lists, LENGTH) for name in ("label", "ctr", "llm"))
    known = ~np.isnan(raw)
    llm = np.full(raw.shape, np.nan)
    llm[known] = load_calibration(workspace, f"{kept}/calibration.json").apply(raw[known])
    figures = []
    for found in judge_cascade(labels, ctr, llm, depths=DEPTHS, weights=WEIGHTS):
        if found.weight == 0 and found.first != DEPTHS[0]:
            continue
        blend = f"first {found.first}, LLM weight {found.weight:g}" if found.weight else "DIN alone"
        measure = f"cascade, {lists} lists of {LENGTH}"
        unit = f"nDCG@10; AUC {found.auc:.4f}, within lists {found.list_auc:.4f}"
        figures.append(Figure(measure=measure, method=blend, value=found.ndcg, unit=unit))
    return figures


def ctr_scores(recipe: Recipe, workspace: Workspace, samples: pa.Table, asked: pa.Table) -> np.ndarray:
    """DIN's, trained on the whole train split: float64 [rows of asked]."""
    known = samples.filter(pc.not_equal(samples["split"], "test")).select(asked.column_names)
    features = features_of(workspace, recipe.domain, pa.concat_tables([known, asked]))
    found = train("din", features, CTRConfig(epochs=10, patience=2, use_profile=True), seed=0).test
    assert np.array_equal(found.item_ids, asked["item_id"].to_numpy())
    return found.scores


def llm_scores(recipe: Recipe, workspace: Workspace, folder: str, asked: pa.Table) -> np.ndarray:
    """The ranker's, in the way that its adapter was tuned for last: float64 [rows of asked], nan for none."""
    data = (recipe.ranking or RankingConfig()).data
    asked = with_candidates(asked, asked, ItemCatalog.load(workspace).ids)
    rows = ask_ranker(recipe, workspace, folder, asked, k=data.behaviours, ways=data.shown[-1:])
    if len(rows) != len(asked):
        raise EngineError("cascade: a candidate of the lists has no title. Give all items titles.")
    return rows["tuned"].to_numpy()
