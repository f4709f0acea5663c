"""Scores of a tuned ranker about any samples, and what scores are worth."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.table import Figure
from owlrec.evaluation import auc, bootstrap_aucs, percentile_interval
from owlrec.generation import token_counter
from owlrec.generation.engines import model_identity
from owlrec.prompting.frameworks import YES, rank_fingerprint
from owlrec.ranking.behavior_retrieval import item_retriever
from owlrec.ranking.lora import open_adapter, score_questions
from owlrec.ranking.samples import RankingConfig, Shown, ask_about
from owlrec.recipe import Recipe
from owlrec.runs.stages import ray_session
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace


class Scored(NamedTuple):
    """Aligned rows: int64 users, float64 labels of 0 and 1, float64 scores, nan for none."""

    users: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def ask_ranker(
    recipe: Recipe,
    workspace: Workspace,
    folder: str,
    samples: pa.Table,
    *,
    k: int,
    ways: tuple[Shown, ...],
    zero_shot: bool = False,
) -> pa.Table:
    """samples.TUNING_ROWS and a column of scores, "tuned" and where asked for "zero-shot": float64, nan for none.

    samples: with their candidates (candidate_sets.with_candidates).
    """
    config = recipe.ranking or RankingConfig()
    engine = config.ranking_engine(recipe.engine)
    rows = ask_about(
        samples,
        workspace.read_table("users"),
        ItemCatalog.load(workspace),
        item_retriever(workspace, recipe.encoder),
        recipe.domain,
        config.prompt,
        token_counter(engine),
        k=k,
        ways=ways,
    ).rows
    adapter = open_adapter(
        workspace,
        f"{folder}/adapter",
        model=model_identity(engine.model, engine.revision),
        wording=rank_fingerprint(config.prompt, recipe.domain),
    )
    questions = [(row["system"], row["text"]) for row in rows.to_pylist()]
    models = ({"zero-shot": None} if zero_shot else {}) | {"tuned": adapter}
    with ray_session(recipe.ray, workspace.log_path("ray")):
        scores = score_questions(engine, questions, models, log_path=str(workspace.log_path("asked")))
    for model, model_scores in scores.items():
        rows = rows.append_column(model, pa.array(model_scores))
    return rows


def scored(table: pa.Table, way: str, column: str = "score") -> Scored:
    """The rows of a table of samples.TUNING_ROWS and scores that were asked in one way."""
    table = table.filter(pc.equal(table["shown"], way))
    labels = np.array([answer == YES for answer in table["answer"].to_pylist()], dtype=np.float64)
    return Scored(table["user_id"].to_numpy(), labels, table[column].to_numpy())


def auc_figure(measure: str, method: str, ours: Scored, base: Scored | None = None) -> Figure:
    """An AUC, or by how much it is above that of `base`, whose rows are the same; rows that one left unscored count
    in neither. The interval is of 95 %, users resampled.
    """
    columns = [ours.scores] if base is None else [ours.scores, base.scores]
    known = np.isfinite(columns).all(axis=0)
    labels, columns = ours.labels[known], [column[known] for column in columns]
    values, drawn = [auc(labels, column) for column in columns], bootstrap_aucs(labels, columns, ours.users[known]).T
    if base is not None:
        values, drawn = [values[0] - values[1]], [drawn[0] - drawn[1]]
    interval, form = percentile_interval(drawn[0]), ".4f" if base is None else "+.4f"
    unit = f"AUC [{interval.low:{form}}, {interval.high:{form}}]"
    return Figure(measure=measure, method=method, value=values[0], unit=unit)
