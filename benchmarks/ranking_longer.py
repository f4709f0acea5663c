"""A tuned ranker asked about other samples, or about the same with more behaviours than it was tuned on."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.table import Figure
from owlrec.ctr.intervals import bootstrap_aucs, percentile_interval
from owlrec.ctr.metrics import auc
from owlrec.generation import token_counter
from owlrec.generation.models import model_identity
from owlrec.prompting.rella import YES, rank_fingerprint
from owlrec.ranking.adapters import open_adapter
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.items import item_retriever
from owlrec.ranking.lora import score_questions
from owlrec.ranking.samples import Shown, ask_about, draw_shots
from owlrec.recipe import Recipe
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace
from pipelines.session import ray_session

WAYS: tuple[Shown, ...] = ("recent", "retrieved")


def longer_figures(
    recipe: Recipe, workspace: Workspace, folder: str, kept: str, behaviours: list[int], rows: int
) -> list[Figure]:
    """Test AUC of the ranker in `folder` and of the model as it is, by K and way, on as many samples drawn at random.

    The scores stay in `kept`, so that another call asks nobody. Raises RecipeError as `draw_shots` does.
    """
    samples = workspace.read_table("samples")
    asked = samples.take(pa.array(draw_shots(samples, rows, (recipe.ranking or RankingConfig()).judging.seed, "test")))
    figures = []
    for k in behaviours:
        file = f"{kept}/longer-{k}-{rows}.parquet"
        if not workspace.exists(file):
            workspace.write_parquet(file, ask_ranker(recipe, workspace, folder, asked, k=k, ways=WAYS, zero_shot=True))
        table = workspace.read_parquet(file)
        for model in ("zero-shot", "tuned"):
            figures += _of_model(table, model, f"K = {k}, {rows} test rows, {model}")
    return figures


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
    """samples.TUNING_ROWS and a column of scores, "tuned" and where asked for "zero-shot": float64, nan for none."""
    config = recipe.ranking or RankingConfig()
    engine = config.ranking_engine(recipe.engine)
    rows = ask_about(
        samples,
        workspace.read_table("users"),
        ItemCatalog.load(workspace),
        item_retriever(workspace, config.item_encoder(recipe.encoder, engine), config.projection),
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
    for model, found in scores.items():
        rows = rows.append_column(model, pa.array(found))
    return rows


def _of_model(table: pa.Table, model: str, measure: str) -> list[Figure]:
    """Both ways and their difference, with 95 % intervals: users drawn anew, rows paired."""
    recent, retrieved = (table.filter(pc.equal(table["shown"], way)) for way in WAYS)
    labels = np.array([answer == YES for answer in recent["answer"].to_pylist()], dtype=np.float64)
    users, scores = recent["user_id"].to_numpy(), [recent[model].to_numpy(), retrieved[model].to_numpy()]
    drawn = bootstrap_aucs(labels, scores, users).T
    values = [auc(labels, of_way) for of_way in scores]
    found = [*zip(WAYS, values, drawn, strict=True), ("retrieved - recent", values[1] - values[0], drawn[1] - drawn[0])]
    figures = []
    for method, value, of_draws in found:
        interval = percentile_interval(of_draws)
        unit = f"AUC [{interval.low:+.4f}, {interval.high:+.4f}]"
        figures.append(Figure(measure=measure, method=method, value=value, unit=unit))
    return figures
