"""The stages of the LLM ranker: tuning, and its probabilities of Yes for CTR models."""

from collections.abc import Mapping

from owlrec.errors import RecipeError
from owlrec.evaluation import load_calibration
from owlrec.generation import VllmEngineConfig, token_counter
from owlrec.generation.job import check_dead_share
from owlrec.ops.console import ShardWatch, note, progress, stage_header, table, warn
from owlrec.prompting.ranking import rank_fingerprint
from owlrec.ranking.experiment import RankerRun, RankingConfig
from owlrec.ranking.judging import EVALUATION_COLUMNS, evaluate_models, evaluation_row, results_of, write_results
from owlrec.ranking.lora import TuningSpec, score_questions, tune_adapter
from owlrec.ranking.questions import ScorePairs, Teacher, pair_inputs, write_questions
from owlrec.ranking.retrieval import ItemVectors
from owlrec.ranking.scorer import TEMPLATE_OPTIONS
from owlrec.ranking.tuning import Adapter, open_adapter
from owlrec.recipe import Recipe
from owlrec.runner import pending_shards
from owlrec.runs.batch import write_texts
from owlrec.runs.ctr import shard_pool
from owlrec.runs.stage import Counts, Outputs, execute, ray_session
from owlrec.shards import Artifact, Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, table_file


def tune_ranker(recipe: Recipe, workspace: Workspace, settings: RankerRun | None = None) -> Card:
    """Resumes an interrupted run: a finished adapter stays, and an unfinished one continues tuning.

    settings: None = the recipe's, or else the defaults.
    """
    prepared, config = needed_stage(workspace, "prepare", "no tables yet"), recipe.ranking
    if config is None:
        raise RecipeError("ranking: this section is missing. Add `ranking: {}` for the defaults.")
    engine, wording = config.ranking_engine(recipe.engine), rank_fingerprint(config.prompt, recipe.domain)
    settings = settings or RankerRun(tuning=config.tuning.settings(use_gpu=recipe.training.use_gpu))
    decides = (config.decides_adapter(settings), TEMPLATE_OPTIONS, recipe.encoder.identity)
    tuned_key = fingerprint(prepared.fingerprint, engine.model_identity, wording, decides)
    spec = TuningSpec(
        folder=f"ranking/{tuned_key[:16]}",
        model=engine.model,
        revision=engine.revision,
        wording=wording,
        settings=settings.tuning,
        workers=recipe.training,
    )

    named = fingerprint(tuned_key, config, settings, engine)

    def body() -> tuple[Counts, Outputs]:
        if recipe.split.history_length <= config.data.behaviors:
            warn(
                f"split.history_length is {recipe.split.history_length}, and a prompt shows "
                f"{config.data.behaviors} behaviors, so the retrieved ones equal the recent ones. Raise "
                "split.history_length and run `prepare` again."
            )
        with shard_pool(recipe, workspace) as pool:
            vectors = ItemVectors.encoded(workspace, recipe.encoder, pool=pool)
        counts: Counts = {}
        count = token_counter(engine)
        counts |= write_questions(workspace, spec.folder, config, recipe.domain, vectors, count, settings)
        note(f"{counts['train_rows']:,} rows to tune on, from {counts['train_samples']:,} samples")
        with ray_session(recipe.ray, workspace.log_path("ray")):
            with progress("tuning", None, "steps") as advance:
                adapter = tune_adapter(workspace, spec, advance)
            best = adapter.manifest.progress
            note(f"best valid AUC {best.best_auc:.4f}, after {best.best_step} of {best.step} steps")
            valid, test = (workspace.read_parquet(f"{spec.folder}/{split}.parquet") for split in ("valid", "test"))
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
        evaluations = evaluate_models(workspace, spec.folder, valid, test, scores)
        write_results(workspace, named[:16], results_of(config, evaluations, settings.seed))
        table("test split", EVALUATION_COLUMNS, [evaluation_row(j) for j in evaluations])
        counts |= {"steps": best.step, "best_step": best.best_step, "valid_auc": round(best.best_auc, 4)}
        return counts, {"adapter": spec.adapter, "evaluations": f"{spec.folder}/evaluations.json"}

    return execute(workspace, "tune_ranker", named, f"{engine.model}, {config.data.shots or 'all'} shots", body)


def score_pairs(recipe: Recipe, workspace: Workspace, *, retry_dead: bool = False) -> Card:
    """Scores every pending shard with this teacher; starts no engine if there are none.

    retry_dead: retry the pairs of finished shards that ended as dead letters. Raises RecipeError if the
    recipe has no `ctr.distillation`.
    """
    pairs = recipe.ctr.distillation
    if pairs is None:
        raise RecipeError("ctr.distillation: this section is missing. Add `distillation: {}` for the defaults.")
    prepared = needed_stage(workspace, "prepare", "no tables yet")
    teacher = teacher_of(recipe, workspace)
    stage_header("score_pairs", f"{teacher.engine.model_identity}, {'tuned' if teacher.adapter else 'untuned'}")
    if teacher.calibration is None:
        warn(
            "the LLM's probabilities are not calibrated, and CTR models learn the raw values. `ranker tune` "
            "calibrates them."
        )
    inputs = pair_inputs(workspace, pairs)
    pending, done = pending_shards(workspace, teacher.folder, inputs)
    dead = [shard for shard in inputs if retry_dead and shard.name in done and done[shard.name].rows_dead]
    watch, cards = Stopwatch(), done
    if pending or dead:
        forget_stages(workspace, ["score_pairs"])
        cards = _ask(recipe, workspace, teacher, inputs, pending, dead, done)
    else:
        note(f"all {len(inputs)} shards are already done")
    check_dead_share(Artifact(workspace, teacher.folder), cards.values(), recipe.generate)
    content = [(shard.name, cards[shard.name].files[shard.file()].sha256) for shard in inputs]
    counts: Counts = {
        "pairs": sum(card.rows_out for card in cards.values()),
        "dead": sum(card.rows_dead for card in cards.values()),
        "asked": sum(int(card.counts["asked"]) for card in cards.values()),
        "made_for": pairs.made_for(prepared.fingerprint),
    }
    named, outputs = fingerprint(teacher.folder, content), {"soft_labels": teacher.folder}
    before = finished_stage(workspace, "score_pairs", named)
    if before is not None and before.counts == counts and not pending and not dead:
        return before
    return finish_stage(workspace, "score_pairs", named, counts=counts, outputs=outputs, seconds=watch.seconds)


def teacher_of(recipe: Recipe, workspace: Workspace) -> Teacher:
    """The recipe's ranker: its own engine, or else the recipe's, with the adapter and the calibration of `ranker tune`
    if it has run.

    Raises the errors of open_adapter.
    """
    config = recipe.ranking or RankingConfig()
    engine = config.engine or recipe.engine
    plain = Teacher(engine, config, recipe.domain, recipe.encoder)
    tuned = finished_stage(workspace, "tune_ranker")
    if tuned is None or not isinstance(engine, VllmEngineConfig):
        return plain
    folder = tuned.outputs["adapter"]
    adapter = open_adapter(workspace, folder, model=engine.model_identity, wording=plain.wording)
    beside = f"{folder.rpartition('/')[0]}/calibration-tuned-{plain.shown}.json"
    calibration = load_calibration(workspace, beside) if workspace.exists(beside) else None
    return Teacher(engine, config, recipe.domain, recipe.encoder, folder, adapter.manifest.sha256, calibration)


def _ask(
    recipe: Recipe,
    workspace: Workspace,
    teacher: Teacher,
    inputs: Mapping[Shard, str],
    pending: list[Shard],
    dead: list[Shard],
    done: Mapping[str, Card],
) -> dict[str, Card]:
    pairs = recipe.ctr.distillation
    assert pairs is not None
    vectors = None
    if teacher.shown != "recent":
        with shard_pool(recipe, workspace) as pool:
            vectors = ItemVectors.encoded(workspace, teacher.encoder, pool=pool)
    rows = {s.name: workspace.count_rows(table_file("samples", s.number)) for s in pending}
    rows |= {s.name: done[s.name].rows_dead for s in dead}
    note(f"{len(pending)} of {len(inputs)} shards to do; engine log: {workspace.log_path('engine')}")
    stage = ScorePairs(teacher, pairs, recipe.split, vectors)
    with progress("scoring pairs", None, "pairs", hourly_cost=recipe.generate.hourly_cost) as advance:
        on_card = ShardWatch(advance, workspace.log_path("shards"))
        return write_texts(
            recipe, workspace, stage, inputs, rows, on_card, done=done, again=dead, engine=teacher.engine
        )
