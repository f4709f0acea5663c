"""The cascade on held-out lists: DIN orders 20 candidates, a tuned ranker re-orders the first N of them, and the
probabilities of both are blended.

The rule is the one that is served (serving.rank_api): by the blend within the head, which the rest follows in the CTR
model's order. Lists are held-out requests: what a user went on to rate after a moment, asked about with what was known
at that moment. So both classes are real exposures, no negative is made up, and no candidate stands in the history that
another is asked about with.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from benchmarks.ranking_peers import features_of, train
from benchmarks.ranking_scores import ask_ranker
from benchmarks.samples import all_samples
from benchmarks.table import Figure
from owlrec import evaluation as metrics
from owlrec.ctr.experiment import CTRConfig
from owlrec.errors import EngineError, RecipeError
from owlrec.evaluation import load_calibration
from owlrec.ranking.behavior_retrieval import with_candidates
from owlrec.ranking.samples import RankingConfig, in_hash_order
from owlrec.recipe import Recipe
from owlrec.schema import SAMPLES, conform
from owlrec.sources.splits import ItemCatalog
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
    for blended in evaluate_cascade(labels, ctr, llm, depths=DEPTHS, weights=WEIGHTS):
        if blended.weight == 0 and blended.first != DEPTHS[0]:
            continue
        blend = f"first {blended.first}, LLM weight {blended.weight:g}" if blended.weight else "DIN alone"
        measure = f"cascade, {lists} lists of {LENGTH}"
        unit = f"nDCG@10; AUC {blended.auc:.4f}, within lists {blended.list_auc:.4f}"
        figures.append(Figure(measure=measure, method=blend, value=blended.ndcg, unit=unit))
    return figures


def ctr_scores(recipe: Recipe, workspace: Workspace, samples: pa.Table, asked: pa.Table) -> np.ndarray:
    """DIN's, trained on the whole train split: float64 [rows of asked]."""
    known = samples.filter(pc.not_equal(samples["split"], "test")).select(asked.column_names)
    features = features_of(workspace, recipe.domain, pa.concat_tables([known, asked]))
    test = train("din", features, CTRConfig(epochs=10, patience=2), seed=0).test
    assert np.array_equal(test.item_ids, asked["item_id"].to_numpy())
    return test.scores


def llm_scores(recipe: Recipe, workspace: Workspace, folder: str, asked: pa.Table) -> np.ndarray:
    """The ranker's, in the way that its adapter was tuned for last: float64 [rows of asked], nan for none."""
    data = (recipe.ranking or RankingConfig()).data
    asked = with_candidates(asked, asked, ItemCatalog.load(workspace).ids)
    rows = ask_ranker(recipe, workspace, folder, asked, k=data.behaviors, ways=data.shown[-1:])
    if len(rows) != len(asked):
        raise EngineError("cascade: a candidate of the lists has no title. Give all items titles.")
    return rows["tuned"].to_numpy()


class CascadeFigures(BaseModel):
    """Of one depth and one weight, over all lists."""

    first: int  # how many the LLM re-orders
    weight: float  # of the LLM's probability; 0 leaves the CTR model's order
    ndcg: float  # at 10, mean over the lists that hold a positive
    auc: float  # of the scores that are answered with, over all rows
    list_auc: float  # within lists, by place


def held_out_lists(samples: pa.Table, *, lists: int, length: int) -> pa.Table:
    """Requests of `lists` users: SAMPLES rows, list after list, all of a list with its first row's moment and history.

    A list is a user's first `length` samples of the test split, oldest first; users are drawn by a hash, so that fewer
    lists are among more. Raises RecipeError where fewer users have so many samples.
    """
    samples = conform(samples, SAMPLES, name="samples").select(SAMPLES.names)
    rows = samples.filter(pc.equal(samples["split"], "test"))
    rows = rows.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    users, starts, counts = np.unique(rows["user_id"].to_numpy(), return_index=True, return_counts=True)
    enough = np.flatnonzero(counts >= length)
    if len(enough) < lists:
        raise RecipeError(
            f"cascade: {lists} lists of {length} candidates are asked for, but {len(enough)} users of the test split "
            f"have {length} samples. Ask for fewer or shorter lists."
        )
    drawn = starts[enough[in_hash_order([users[enough]], seed=0)[:lists]]]
    listed = rows.take(pa.array((drawn[:, None] + np.arange(length)).ravel()))
    first_rows = rows.take(pa.array(np.repeat(drawn, length)))
    for name in ("timestamp", "history", "history_ratings", "history_labels"):
        listed = listed.set_column(listed.column_names.index(name), SAMPLES.field(name), first_rows[name])
    return listed


def reorder(ctr: np.ndarray, llm: np.ndarray, *, first: int, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """One list in the order that is answered with, and the scores that its candidates are answered with.

    ctr, llm: float [n] in [0, 1]; llm may be nan, where a candidate could not be asked about: it follows those that
    could, in its CTR order. first: the head that the LLM sees; weight: of its probability in the blend, in [0, 1].
    Returns int64 [n], the candidates' rows, best first, and float64 [n], by row. Ties keep the CTR order, and that of
    equal CTR scores is the candidates' own. Raises ValueError where the lengths differ.
    """
    if ctr.shape != llm.shape:
        raise ValueError(f"{len(ctr)} scores of the CTR model, but {len(llm)} of the LLM: give one a candidate.")
    order = np.argsort(-ctr, kind="stable")
    head = order[:first][~np.isnan(llm[order[:first]])]
    scores = np.asarray(ctr, dtype=np.float64).copy()
    scores[head] = weight * llm[head] + (1 - weight) * ctr[head]
    by_blend = head[np.argsort(-scores[head], kind="stable")]
    return np.concatenate([by_blend, order[~np.isin(order, head)]]), scores


def evaluate_cascade(
    labels: np.ndarray, ctr: np.ndarray, llm: np.ndarray, *, depths: Sequence[int], weights: Sequence[float]
) -> list[CascadeFigures]:
    """Each depth with each weight. labels, ctr, llm: [lists, length], as `held_out_lists` lines them up and `reorder`
    takes them.
    """
    figures = []
    lists = np.repeat(np.arange(len(labels)), labels.shape[1])
    for first in depths:
        for weight in weights:
            answers = [reorder(*scores, first=first, weight=weight) for scores in zip(ctr, llm, strict=True)]
            orders = np.array([order for order, _ in answers])
            places = np.argsort(orders, axis=1)
            figures.append(
                CascadeFigures(
                    first=first,
                    weight=weight,
                    ndcg=ndcg(np.take_along_axis(labels, orders, axis=1), 10),
                    auc=metrics.auc(labels.ravel(), np.concatenate([scores for _, scores in answers])),
                    list_auc=metrics.gauc(labels.ravel(), -places.ravel(), lists),
                )
            )
    return figures


def ndcg(labels: np.ndarray, k: int) -> float:
    """nDCG at `k` (Järvelin and Kekäläinen, TOIS 2002), mean over the lists that hold a positive; nan where none does.

    labels: [lists, length], 0 or 1, in the order that is judged.
    """
    discounts = 1 / np.log2(np.arange(2, 2 + min(k, labels.shape[1])))
    gained, best = ((rows[:, :k] * discounts).sum(axis=1) for rows in (labels, -np.sort(-labels, axis=1)))
    usable = best > 0
    return float((gained[usable] / best[usable]).mean()) if usable.any() else float("nan")
