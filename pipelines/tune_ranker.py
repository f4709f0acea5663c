"""The LLM ranker: shots from the samples table, LoRA on Ray Train, calibrated on valid, judged on test beside the model
as it is.
"""

from owlrec.errors import RecipeError
from owlrec.generation import token_counter
from owlrec.ops.console import note, progress, table, warn
from owlrec.prompting.ranking import rank_fingerprint
from owlrec.ranking.experiment import RankerRun
from owlrec.ranking.judging import JUDGEMENT_COLUMNS, judge_models, judgement_row, results_of, write_results
from owlrec.ranking.lora import TuningJob, score_questions, tune_adapter
from owlrec.ranking.questions import write_questions
from owlrec.ranking.retrieval import ItemVectors
from owlrec.ranking.scorer import TEMPLATE_OPTIONS
from owlrec.ranking.tuning import Adapter
from owlrec.recipe import Recipe
from owlrec.shards import Card, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main
from pipelines.train_ctr import shard_pool


def run(recipe: Recipe, workspace: Workspace, settings: RankerRun | None = None) -> Card:
    """Goes on where an earlier run was interrupted: an adapter that is tuned stays, one half tuned is tuned on.

    settings: None = the recipe's, and else the defaults.
    """
    prepared, config = needed_stage(workspace, "prepare", "no tables yet"), recipe.ranking
    if config is None:
        raise RecipeError("ranking: the recipe has no such section. Add `ranking: {}` for the defaults.")
    engine, wording = config.ranking_engine(recipe.engine), rank_fingerprint(config.prompt, recipe.domain)
    settings = settings or RankerRun(tuning=config.tuning.settings)
    decides = (config.decides_adapter(settings), TEMPLATE_OPTIONS, recipe.encoder.identity)
    tuned_print = fingerprint(prepared.fingerprint, engine.model_identity, wording, decides)
    job = TuningJob(
        folder=f"ranking/{tuned_print[:16]}",
        model=engine.model,
        revision=engine.revision,
        wording=wording,
        settings=settings.tuning,
    )

    named = fingerprint(tuned_print, config, settings, engine)

    def body() -> tuple[Counts, Outputs]:
        if recipe.split.history_length <= config.data.behaviours:
            warn(
                f"split.history_length is {recipe.split.history_length}, and a prompt shows {config.data.behaviours} "
                "behaviours: retrieved ones are the recent ones. Raise split.history_length and prepare again."
            )
        with shard_pool(recipe, workspace) as pool:
            vectors = ItemVectors.encoded(workspace, recipe.encoder, pool=pool)
        counts: Counts = {}
        count = token_counter(engine)
        counts |= write_questions(workspace, job.folder, config, recipe.domain, vectors, count, settings)
        note(f"{counts['train_rows']:,} rows to tune on, from {counts['train_samples']:,} samples")
        with ray_session(recipe.ray, workspace.log_path("ray")):
            with progress("tuning", None, "steps") as advance:
                adapter = tune_adapter(workspace, job, advance)
            best = adapter.manifest.progress
            note(f"best valid AUC {best.best_auc:.4f}, after {best.best_step} of {best.step} steps")
            valid, test = (workspace.read_parquet(f"{job.folder}/{split}.parquet") for split in ("valid", "test"))
            questions = [(row["system"], row["text"]) for rows in (valid, test) for row in rows.to_pylist()]
            models: dict[str, Adapter | None] = {"zero-shot": None} if settings.zero_shot else {}
            models["tuned"] = adapter
            with progress("scoring", len(models) * len(questions), "questions") as advance:
                scores = score_questions(
                    engine,
                    questions,
                    models,
                    log_path=str(workspace.log_path("score")),
                    use_gpu=settings.tuning.use_gpu,
                    on_scored=advance,
                )
        judgements = judge_models(workspace, job.folder, valid, test, scores)
        write_results(workspace, named[:16], results_of(config, judgements, settings.seed))
        table("test split", JUDGEMENT_COLUMNS, [judgement_row(j) for j in judgements])
        counts |= {"steps": best.step, "best_step": best.best_step, "valid_auc": round(best.best_auc, 4)}
        return counts, {"adapter": job.adapter, "judgements": f"{job.folder}/judgements.json"}

    return execute(workspace, "tune_ranker", named, f"{engine.model}, {config.data.shots or 'all'} shots", body)


if __name__ == "__main__":
    main(run, __doc__ or "")
