"""The stages of models: the CTR grid and its export, the LLM ranker and its probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pydantic_core

from owlrec.ctr import artifact as artifacts
from owlrec.ctr.artifact import (
    PROGRAM,
    RELEASED,
    TOLERANCE,
    CtrScorer,
    LiveState,
    ModelCard,
    TableKnowledge,
    User,
    export_program,
    finish_artifact,
    largest_difference,
    read_by,
    read_card,
    write_artifact,
)
from owlrec.ctr.dataset import item_shards, open_tables, reduce_once, reduced_folders
from owlrec.ctr.experiment import (
    ENCODED,
    GAIN,
    SPARSE_ABOVE_ROWS,
    TABLE_LEARNING_RATE,
    CTRConfig,
    SweepGrid,
    Trial,
    TrialResult,
    finished_trials,
    grid_folder,
    read_grid_scores,
    summarize,
    trials,
)
from owlrec.ctr.features import FeatureSections, encode_items
from owlrec.ctr.knowledge_tables import STREAMING, WRITTEN, arm_parts, arm_sources, stored_sources
from owlrec.ctr.trainer import read_vocabularies, tables_of
from owlrec.ctr.training import (
    GridSpec,
    encode_once,
    load_data,
    needs_ray,
    stage_pool,
    train_trials,
    trains_here,
)
from owlrec.encoding.compression import Projection
from owlrec.encoding.inputs import imported_vectors
from owlrec.encoding.vectors import partitions_folder
from owlrec.errors import RecipeError, WorkspaceError, did_you_mean
from owlrec.evaluation import load_calibration
from owlrec.generation import VllmEngineConfig, token_counter
from owlrec.generation.job import check_dead_share
from owlrec.ids import TABLES
from owlrec.ops.console import ShardWatch, note, progress, stage_header, table, warn
from owlrec.ops.report import arm_rows, collect, comparison_rows, render_report
from owlrec.prompting.frameworks import rank_fingerprint
from owlrec.ranking.behavior_retrieval import ItemVectors
from owlrec.ranking.lora import Adapter, TuningSpec, open_adapter, score_questions, tune_adapter
from owlrec.ranking.question_sets import (
    EVALUATION_COLUMNS,
    ScorePairs,
    Teacher,
    evaluate_models,
    evaluation_row,
    pair_inputs,
    results_of,
    write_questions,
    write_results,
)
from owlrec.ranking.samples import RankerRun, RankingConfig
from owlrec.ranking.scorer import TEMPLATE_OPTIONS
from owlrec.recipe import Recipe
from owlrec.releases.release import open_release
from owlrec.runner import Pool, pending_shards
from owlrec.runs.stages import Counts, Outputs, execute, ray_session, write_texts
from owlrec.shards import Artifact, Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.sources.outcomes import Labels
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, table_file

# ------------------------------------------------------------------------------------------------------------------ ctr
# The stages of CTR models: the grid of trials on Ray Train, its report, the export for serving, the sweep.


# Settings outside the grid: growing the grid must not retrain existing trials.
_NOT_IN_FINGERPRINT = {"backbones", "arms", "seeds"}


def train_ctr(recipe: Recipe, workspace: Workspace, *, warm_start: str | None = None) -> Card:
    """Trains trials without a result; if there are no vectors, only those of arm "none".

    warm_start: folder of an artifact of `export_ctr`, relative to the workspace: all trials continue from its weights.
    Raises RecipeError if a trial has another backbone or arm, or vectors come from another encoder.
    """
    prepared, encoded = finished_stage(workspace, "prepare"), finished_stage(workspace, "encode")
    if prepared is None or (encoded is None and recipe.ctr.arm_names != ("none",)):
        raise WorkspaceError(f"{workspace.root}: no tables or vectors yet. Run `prepare` to `encode` first.")
    tables = {"sparse": SPARSE_ABOVE_ROWS, "table_learning_rate": TABLE_LEARNING_RATE}
    settings = recipe.ctr.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT) | tables
    settings["features"] = _plain(recipe.features)
    soft = soft_labels(recipe, workspace, prepared)
    made_from = [prepared.fingerprint, encoded and encoded.fingerprint, settings, soft and soft.fingerprint]
    made_from += others_read(recipe, workspace)
    if warm_start is not None:
        read_card(workspace, warm_start)  # raises if there is none
        made_from.append(workspace.digest(f"{warm_start}/model.safetensors"))
    grid_key = fingerprint(*made_from)
    grid = trials(recipe.ctr)

    def body() -> tuple[Counts, Outputs]:
        read = encoded if recipe.ctr.arm_names != ("none",) else None
        written = written_vectors(recipe, workspace, read)
        projection = going_on_from(workspace, warm_start, grid, written) if warm_start else None
        taught = f" and {soft.counts['pairs']:,} probabilities of the LLM" if soft else ""
        note(f"{len(grid)} trials on {prepared.counts['samples_train']:,} samples{taught}")
        here = trains_here(recipe.ctr, recipe.training, len(grid), int(prepared.counts["samples"]))
        session = nullcontext() if here else ray_session(recipe.ray, workspace.log_path("ray"))
        with session, progress("training", len(grid), "trials") as advance:
            pool = Pool() if here else stage_pool(workspace, int(prepared.counts["samples"]))
            results = train_trials(
                workspace,
                recipe.ctr,
                grid,
                knowledge=reduce_once(workspace, written, recipe.ctr.knowledge_variance, grid_key, pool, projection),
                fingerprint=grid_key,
                features=recipe.features,
                workers=recipe.training,
                soft_labels=soft.outputs["soft_labels"] if soft else None,
                warm_start=warm_start,
                pool=pool,
                here=here,
                on_trial=lambda result: advance(1),
            )
        for row in summarize(results):
            none = row.differences.get("none")
            gain = f" ({none.auc:+.4f} from none)" if none else ""
            note(f"{row.backbone}, {row.arm}: test AUC {row.auc:.4f}{gain}, {row.seeds} seeds")
        counts: Counts = {
            "trials": len(results),
            "samples_per_s": round(sum(r.samples_per_s for r in results) / len(results)),
        }
        return counts, {"grid": grid_key}

    named = fingerprint(grid_key, [t.path for t in grid])
    return execute(
        workspace, "train_ctr", named, f"{', '.join(recipe.ctr.backbones)} with {len(recipe.ctr.arm_names)} arms", body
    )


def _plain(features: FeatureSections) -> Any:
    return pydantic_core.to_jsonable_python(features)


def soft_labels(recipe: Recipe, workspace: Workspace, prepared: Card) -> Card | None:
    """Output of `score-pairs` for this recipe and these tables; None if the recipe has no distillation.

    Raises WorkspaceError if it has not run for them.
    """
    pairs = recipe.ctr.distillation
    if pairs is None:
        return None
    scored = needed_stage(workspace, "score_pairs", "no soft labels yet")
    if scored.counts["made_for"] != pairs.made_for(prepared.fingerprint):
        raise WorkspaceError(
            f"{workspace.root}: the soft labels belong to other tables or another ctr.distillation. Run "
            "`ranker score-pairs` again; it skips pairs with an unchanged prompt."
        )
    return scored


def going_on_from(
    workspace: Workspace, artifact: str, grid: Sequence[Trial], folders: Mapping[str, Mapping[str, str]]
) -> Projection | None:
    """Projection of an artifact, None if its vectors were not reduced. Raises RecipeError if the grid's
    trials cannot continue from its weights.
    """
    card = read_card(workspace, artifact)
    for trial in grid:
        if (trial.backbone, trial.arm) != (card.trial.backbone, card.trial.arm):
            raise RecipeError(
                f"ctr: trial {trial.path} cannot continue from {artifact}, a {card.trial.backbone} with arm "
                f"{card.trial.arm}. List only this backbone and arm under ctr.backbones and ctr.arms."
            )
        reads = read_by(workspace, trial, folders)
        if reads != card.reads:
            raise RecipeError(
                f"ctr: trial {trial.path} cannot continue from {artifact}: it reads {reads}, but that model "
                f"was trained on {card.reads}. Restore the encoder and semantic ids, or train without "
                "--warm-start."
            )
    return artifacts.CtrArtifact.open(workspace, artifact).projection


def vector_folders(workspace: Workspace, *folders: str) -> dict[str, dict[str, str]]:
    """Source -> kind -> folder with the vectors <source>-<kind>, for all written ones."""
    sources: dict[str, dict[str, str]] = {}
    for folder in folders:
        for name in workspace.names(folder):
            source, _, kind = name.rpartition("-")
            if kind in ("user", "item"):
                sources.setdefault(source, {})[kind] = folder
    return sources


def written_vectors(recipe: Recipe, workspace: Workspace, encoded: Card | None) -> dict[str, dict[str, str]]:
    """The same for the output of `encode`, plus the partitions read by refreshes and the imported vectors that arms
    read.
    """
    folders = [encoded.outputs["vectors"]] if encoded else []
    return vector_folders(workspace, *folders, *_partitions(recipe), *_imported(recipe, workspace))


def others_read(recipe: Recipe, workspace: Workspace) -> list[str]:
    """Digests of those partitions and folders, on which a grid depends."""
    cards = [c for folder in _partitions(recipe) for c in Artifact(workspace, folder).cards().values()]
    return sorted(file.sha256 for card in cards for file in card.files.values()) + _imported(recipe, workspace)


def _imported(recipe: Recipe, workspace: Workspace) -> list[str]:
    """Folders of the imported vectors that arms read by a name of their own; a folder is named by its content."""
    sources = {(kind, s) for arm in recipe.ctr.own_arms.values() for kind in TABLES for s in getattr(arm, f"{kind}s")}
    others = [imported_vectors(workspace, kind, s) for kind, s in sorted(sources) if s not in WRITTEN]
    return [vectors.folder.rpartition("/")[0] for vectors in others if vectors is not None]


def _partitions(recipe: Recipe) -> list[str]:
    own = recipe.ctr.own_arms.values()
    reads = {arm_parts(arm).reads for arm in recipe.ctr.arm_names} | {source for arm in own for source in arm.users}
    return [partitions_folder(recipe.encoder.identity)] if STREAMING in reads else []


@contextmanager
def shard_pool(recipe: Recipe, workspace: Workspace) -> Iterator[Pool]:
    """Where a stage over the shards of users runs: in this process if that takes seconds, else on Ray, which is
    connected for the block.
    """
    samples = int(needed_stage(workspace, "prepare", "no tables yet").counts.get("samples", 0))
    if not needs_ray(samples):
        yield Pool()
        return
    with ray_session(recipe.ray, workspace.log_path("ray")):
        yield stage_pool(workspace, samples)


def evaluate(recipe: Recipe, workspace: Workspace) -> Card:
    """Writes the report and prints its main figures; always runs, because it is cheap."""
    prepared = needed_stage(workspace, "prepare", "there are no prepared tables")
    trained = needed_stage(workspace, "train_ctr", "no models have been trained")

    def body() -> tuple[Counts, Outputs]:
        grid, grid_key = trials(recipe.ctr), trained.outputs["grid"]
        results = finished_trials(workspace, grid_key, grid)
        with open_release(workspace, verify=False) as release:
            data = collect(
                workspace,
                release,
                results,
                scores=read_grid_scores(workspace, grid_key, grid),
                run=recipe.name,
                protocol=_protocol(recipe, Labels.from_card(prepared).about),
                facts={k: f"{prepared.counts[k]:,}" for k in ("users", "items", "samples")},
            )
        encoders = [k for k in TABLES if imported_vectors(workspace, k)]
        if encoders and "metadata" in recipe.ctr.arm_names:
            data.notes.append(
                f"Knowledge vectors of {' and '.join(f'{k}s' for k in encoders)} were imported: its difference to "
                "`metadata` includes that between the two encoders."
            )
        report = f"reports/{recipe.name}.html"
        workspace.write_bytes(report, render_report(data).encode())
        for line in data.headlines:
            note(line)
        for kind in ("user", "item"):
            for sample in [s for s in data.samples if s.kind == kind][:1]:
                table(
                    f"{kind} knowledge: {sample.title}",
                    ["read", "written"],
                    [("\n".join(sample.inputs[:8]), sample.text)],
                )
        table("lookup", ["what", "latency"], list(data.lookup.items()))
        table(
            "test split, mean over seeds",
            ["backbone", "arm", "seeds", "AUC", "minus none", "95 % interval", "gAUC", "log-loss"],
            [
                (r.backbone, r.arm, r.seeds, r.auc, r.difference, r.interval, r.gauc, r.log_loss)
                for r in arm_rows(data.arms)
            ],
        )
        if compared := comparison_rows(data.arms):
            table(
                "difference in AUC, paired by seed and row; bootstrap intervals over users and seeds",
                [
                    "backbone",
                    "arm",
                    "compared with",
                    "difference",
                    "95 % interval",
                    "in words",
                    "detectable",
                    "RelaImp",
                ],
                [
                    (r.backbone, r.arm, r.base, r.difference, r.interval, r.verdict, r.detectable, r.rela_imp)
                    for r in compared
                ],
            )
        for line in data.notes:
            note(line)
        note(f"report: {workspace.path(report)}")
        counts: Counts = {"arms": len(data.arms)}
        if data.gain is not None:
            counts[GAIN] = data.gain
        return counts, {"report": report}

    return execute(workspace, "evaluate", trained.fingerprint, "figures and report", body, always=True)


def _protocol(recipe: Recipe, labels: str) -> str:
    """The protocol of the figures in one line: an AUC without its split and label rule means nothing."""
    split = recipe.split
    cuts = ", ".join(cut if isinstance(cut, str) else f"every {cut.every}" for cut in split.cuts)
    samples = "interactions after that half" if "kar" in split.cuts else "every behavior"
    return (
        f"{recipe.source.type}, split by {split.method} {':'.join(map(str, split.ratios))}, "
        f"{labels}, history {split.history_length}; texts about users: {cuts}, from at most {split.llm_history} "
        f"behaviors; samples: {samples}, each reads the newest earlier text; "
        f"seeds {', '.join(map(str, recipe.ctr.seeds))}; early stopping on valid"
    )


def export_ctr(recipe: Recipe, workspace: Workspace, *, trial: str | None = None) -> Card:
    """Writes the artifact; its folder is the manifest's output `model`.

    trial: its path (din/knowledge/seed-0), instead of the best one.
    """
    grid = needed_stage(workspace, "train_ctr", "no models have been trained").outputs["grid"]
    encoded = finished_stage(workspace, "encode")
    best = _chosen(finished_trials(workspace, grid, trials(recipe.ctr)), trial)

    def body() -> tuple[Counts, Outputs]:
        written = written_vectors(recipe, workspace, encoded)
        folders = reduced_folders(workspace, written, grid)
        sources = arm_sources(best.arm, folders, best.own)
        read = {source: folders[source] for source in stored_sources(sources)}
        vocabularies = read_vocabularies(workspace, grid_folder(grid))
        items = encode_items(item_shards(workspace, vocabularies), vocabularies)
        tables = tables_of(best.trial, open_tables(workspace, read, held=False), items.ids)
        projection = next((path for name in read if folders is not written for path in folders[name].values()), None)
        with shard_pool(recipe, workspace) as pool:
            folder = write_artifact(workspace, grid, best.trial, items, projection=projection, pool=pool)
        scorer = CtrScorer.open(workspace, folder)
        live = LiveState(scorer.model, TableKnowledge(tables) if tables else None)
        example = scorer.batch(User(history=items.ids[:1].tolist()), items.ids[:3].tolist() or [0, 0, 0], live)
        workspace.write_bytes(f"{folder}/{PROGRAM}", export_program(scorer.model, example))
        differences = {}
        for name, path in (("model", scorer), ("program", CtrScorer.open(workspace, folder, program=True))):
            differences[name] = largest_difference(path, tables, workspace, grid, best.trial)
            if not differences[name] <= TOLERANCE:
                raise WorkspaceError(
                    f"{workspace.path(folder)}: the exported {name} differs from the trainer's test scores by "
                    f"up to {differences[name]:.1e}. Were tables or vectors rewritten since? Run `train_ctr` "
                    "again."
                )
        note(f"{best.trial.path}, valid AUC {best.valid.auc:.4f}; largest difference {max(differences.values()):.1e}")
        card = ModelCard(
            trial=best.trial,
            grid=grid,
            items=len(items.ids),
            reads=read_by(workspace, best.trial, folders),
            valid=best.valid,
            test=best.test,
        )
        finish_artifact(workspace, folder, card)
        counts: Counts = {"items": card.items}
        counts |= {f"{name}_difference": difference for name, difference in differences.items()}
        return counts, {"model": folder}

    return execute(
        workspace,
        "export_ctr",
        fingerprint(grid, best.trial),
        f"{best.trial.path} as an artifact",
        body,
    )


def _chosen(results: list[TrialResult], path: str | None) -> TrialResult:
    """The best trial on valid whose vectors are in a release; the others are controls."""
    servable = {r.trial.path: r for r in results if _served(r.trial)}
    if path is not None and path not in servable:
        raise RecipeError(
            f"trial '{path}' cannot be exported: it is not trained, or its arm reads no vectors of a release "
            f"({', '.join(RELEASED)}).{did_you_mean(path, servable)}"
        )
    if not servable:
        raise WorkspaceError("no trial of the recipe's arms has finished, except controls. Run `train_ctr`.")
    return servable[path] if path else max(servable.values(), key=lambda r: r.valid.auc)


def _served(trial: Trial) -> bool:
    parts = arm_parts(trial.arm)
    everything = {
        source: ("user", "item") for source in (*WRITTEN, *(trial.own.users + trial.own.items if trial.own else ()))
    }
    sources = arm_sources(trial.arm, everything, trial.own)
    return not parts.shuffled and {*sources.user, *sources.item} <= {*RELEASED}


def sweep_ctr(recipe: Recipe, workspace: Workspace, *, grid: SweepGrid | None = None) -> Card:
    """Writes ctr/<fingerprint>/sweep.json, best first, and prints it."""
    config, arm = recipe.ctr, recipe.ctr.arm_names[min(1, len(recipe.ctr.arm_names) - 1)]
    own = config.own_arms.get(arm_parts(arm).reads)
    prepared = needed_stage(workspace, "prepare", "no tables yet")
    encoded = needed_stage(workspace, "encode", "no vectors yet") if arm != "none" else None
    soft = soft_labels(recipe, workspace, prepared)
    made_from = (prepared.fingerprint, encoded and encoded.fingerprint, soft and soft.fingerprint)
    candidates = (grid or SweepGrid()).candidates(adaptor=arm != "none" and arm_parts(arm).form != "codes")
    settings = (config, SPARSE_ABOVE_ROWS, TABLE_LEARNING_RATE, candidates, _plain(recipe.features))
    named = fingerprint(*made_from, *settings, arm, *others_read(recipe, workspace), "sweep")
    folders = written_vectors(recipe, workspace, encoded)
    sources = arm_sources(arm, folders, own)
    trials = [Trial(backbone=backbone, arm=arm, seed=config.seeds[0], own=own) for backbone in config.backbones]
    path = f"{grid_folder(named)}/sweep.json"

    def body() -> tuple[Counts, Outputs]:
        with ray_session(recipe.ray, workspace.log_path("ray")):
            pool = stage_pool(workspace, int(prepared.counts["samples"]))
            read = reduce_once(workspace, folders, config.knowledge_variance, named, pool)
            spec = GridSpec(
                settings=config,
                workers=recipe.training,
                trials=tuple(trials),
                knowledge={source: dict(read[source]) for source in stored_sources(sources)},
                fingerprint=named,
                features=recipe.features,
                soft_labels=soft.outputs["soft_labels"] if soft else None,
            )
            encode_once(workspace, spec, pool)
            results = tried(workspace, spec, candidates)
        workspace.write_json(path, results)
        for folder in (ENCODED, "vectors"):
            workspace.delete_dir(grid_folder(named), folder)
        rows = [(f["backbone"], f["valid_auc"], f["epochs"], str(f["changes"])) for f in results]
        table(f"sweep, arm {arm}", ["backbone", "valid AUC", "epochs", "settings"], rows)
        note(
            f"best: {results[0]['backbone']} with {results[0]['changes']}; put these settings under `ctr:` in the "
            "recipe"
        )
        return {"candidates": len(results), "best_valid_auc": results[0]["valid_auc"]}, {"sweep": path}

    return execute(workspace, "sweep_ctr", named, f"{len(candidates)} settings, {len(trials)} backbones", body)


def tried(workspace: Workspace, spec: GridSpec, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains each backbone of the grid with each candidate; best valid AUC first. Ray must be initialized."""
    from ray import tune

    plain = [{"backbone": trial.backbone, "changes": changes} for changes in candidates for trial in spec.trials]
    cpus = {"cpu": spec.threads or 1, "gpu": int(spec.workers.use_gpu)}
    name = f"sweep-{spec.fingerprint[:8]}"
    workspace.delete_dir("ctr", "ray", name)  # from an interrupted sweep
    trainable = tune.with_parameters(_try, workspace=workspace, spec=spec.model_dump(mode="json"))
    filesystem, path = workspace.arrow("ctr/ray")
    results = tune.Tuner(
        tune.with_resources(trainable, cpus),
        param_space={"candidate": tune.grid_search(plain)},
        run_config=tune.RunConfig(storage_path=path, storage_filesystem=filesystem, name=name, verbose=0),
    ).fit()
    for error in results.errors:
        raise error
    workspace.delete_dir("ctr", "ray", name)
    outcomes = [
        {**r.config["candidate"], "valid_auc": r.metrics["valid_auc"], "epochs": r.metrics["epochs"]} for r in results
    ]
    return sorted(outcomes, key=lambda f: -f["valid_auc"])


def _try(candidate: dict[str, Any], workspace: Workspace, spec: dict[str, Any]) -> None:
    from ray import tune

    from owlrec.ctr.trainer import train_one

    tried_, parsed = candidate["candidate"], GridSpec.model_validate(spec)
    settings = CTRConfig.model_validate({**parsed.settings.model_dump(), **tried_["changes"]})
    trial = next(t for t in parsed.trials if t.backbone == tried_["backbone"])
    result = train_one(trial, load_data(workspace, parsed), settings).result
    tune.report({"valid_auc": result.valid.auc, "epochs": result.epochs})


# --------------------------------------------------------------------------------------------------------------- ranker
# The stages of the LLM ranker: tuning, and its probabilities of Yes for CTR models.


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
