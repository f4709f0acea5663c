"""The LLM's probability of Yes for pairs of user and item, which CTR models learn from (`ctr.distillation`)."""

from collections.abc import Mapping

from owlrec.errors import RecipeError
from owlrec.evaluation import load_calibration
from owlrec.generation import VllmEngineConfig
from owlrec.generation.job import check_dead_share
from owlrec.ops.console import ShardWatch, note, progress, stage_header, warn
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.questions import ScorePairs, Teacher, pair_inputs
from owlrec.ranking.retrieval import ItemVectors
from owlrec.ranking.tuning import open_adapter
from owlrec.recipe import Recipe
from owlrec.runner import pending_shards
from owlrec.shards import Artifact, Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, table_file
from pipelines.generate import write_texts
from pipelines.stage import Counts, main
from pipelines.train_ctr import shard_pool

STAGE = "score_pairs"


def run(recipe: Recipe, workspace: Workspace, *, retry_dead: bool = False) -> Card:
    """Does every shard that is not done by this very teacher; starts no engine where all are.

    retry_dead: asks again about the pairs of finished shards that ended as dead letters. Raises RecipeError where the
    recipe has no `ctr.distillation`.
    """
    pairs = recipe.ctr.distillation
    if pairs is None:
        raise RecipeError("ctr.distillation: the recipe has no such section. Add `distillation: {}` for the defaults.")
    prepared = needed_stage(workspace, "prepare", "no tables yet")
    teacher = teacher_of(recipe, workspace)
    stage_header(STAGE, f"{teacher.engine.model_identity}, {'tuned' if teacher.adapter else 'as it is'}")
    if teacher.calibration is None:
        warn("the LLM's probabilities are not calibrated: CTR models learn them as they are. `tune-ranker` calibrates.")
    inputs = pair_inputs(workspace, pairs)
    pending, done = pending_shards(workspace, teacher.folder, inputs)
    dead = [shard for shard in inputs if retry_dead and shard.name in done and done[shard.name].rows_dead]
    watch, cards = Stopwatch(), done
    if pending or dead:
        forget_stages(workspace, [STAGE])
        cards = _ask(recipe, workspace, teacher, inputs, pending, dead, done)
    else:
        note(f"all {len(inputs)} shards done already, nothing to do")
    check_dead_share(Artifact(workspace, teacher.folder), cards.values(), recipe.generate)
    content = [(shard.name, cards[shard.name].files[shard.file()].sha256) for shard in inputs]
    counts: Counts = {
        "pairs": sum(card.rows_out for card in cards.values()),
        "dead": sum(card.rows_dead for card in cards.values()),
        "asked": sum(int(card.counts["asked"]) for card in cards.values()),
        "made_for": pairs.made_for(prepared.fingerprint),
    }
    named, outputs = fingerprint(teacher.folder, content), {"soft_labels": teacher.folder}
    before = finished_stage(workspace, STAGE, named)
    if before is not None and before.counts == counts and not pending and not dead:
        return before
    return finish_stage(workspace, STAGE, named, counts=counts, outputs=outputs, seconds=watch.seconds)


def teacher_of(recipe: Recipe, workspace: Workspace) -> Teacher:
    """The recipe's ranker: its own engine, else the recipe's, with the adapter and the calibration of `tune-ranker`
    where that has run.

    Raises what open_adapter does.
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
    with progress("asking about pairs", None, "pairs", hourly_cost=recipe.generate.hourly_cost) as advance:
        on_card = ShardWatch(advance, workspace.log_path("shards"))
        return write_texts(
            recipe, workspace, stage, inputs, rows, on_card, done=done, again=dead, engine=teacher.engine
        )


if __name__ == "__main__":
    main(run, __doc__ or "", retry_dead="ask again about the pairs that ended as dead letters")
