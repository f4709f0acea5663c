"""The grid of CTR trials on Ray Train: every backbone with every arm and seed, on the same samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from owlrec.ctr import scoring
from owlrec.ctr.artifact import read_by, read_card
from owlrec.ctr.experiment import SPARSE_ABOVE_ROWS, Trial, summarise, trials
from owlrec.ctr.pca import reduce_once
from owlrec.ctr.training import needs_ray, stage_pool, train_trials
from owlrec.encoding.projection import Projection
from owlrec.encoding.vectors import partitions_folder
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.runner import Pool
from owlrec.shards import Artifact, Card, finished_stage, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main

# What the grid holds: growing the grid must not retrain what it has.
_NOT_IN_FINGERPRINT = {"backbones", "arms", "seeds"}


def run(recipe: Recipe, workspace: Workspace, *, warm_start: str | None = None) -> Card:
    """Trains the trials that have no result yet; of arm "none" alone without vectors too.

    warm_start: the folder of an artifact of `export_ctr`, relative to the workspace: all trials go on from its weights.
    Raises RecipeError where a trial has another backbone or arm than it, or vectors come from another encoder.
    """
    prepared, encoded = finished_stage(workspace, "prepare"), finished_stage(workspace, "encode")
    if prepared is None or (encoded is None and recipe.ctr.arms != ("none",)):
        raise WorkspaceError(f"{workspace.root}: no tables or vectors yet. Run `prepare` to `encode` first.")
    settings = recipe.ctr.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT) | {"sparse": SPARSE_ABOVE_ROWS}
    soft = soft_labels(recipe, workspace, prepared)
    made_from = [prepared.fingerprint, encoded and encoded.fingerprint, settings, soft and soft.fingerprint]
    made_from += partitions_read(recipe, workspace)
    if warm_start is not None:
        read_card(workspace, warm_start)  # complains where there is none
        made_from.append(workspace.digest(f"{warm_start}/model.safetensors"))
    grid_print = fingerprint(*made_from)
    grid = trials(recipe.ctr)

    def body() -> tuple[Counts, Outputs]:
        read = encoded if recipe.ctr.arms != ("none",) else None
        written = written_vectors(recipe, workspace, read)
        projection = going_on_from(workspace, warm_start, grid, written) if warm_start else None
        taught = f" and {soft.counts['pairs']:,} probabilities of the LLM" if soft else ""
        note(f"{len(grid)} trials on {prepared.counts['samples_train']:,} samples{taught}")
        with ray_session(recipe.ray, workspace.log_path("ray")), progress("training", len(grid), "trials") as advance:
            pool = stage_pool(workspace, int(prepared.counts["samples"]))
            results = train_trials(
                workspace,
                recipe.ctr,
                grid,
                knowledge=reduce_once(workspace, written, recipe.ctr.knowledge_dim, grid_print, pool, projection),
                fingerprint=grid_print,
                attributes=recipe.domain.text_fields,
                profile=recipe.domain.profile_fields,
                soft_labels=soft.outputs["soft_labels"] if soft else None,
                warm_start=warm_start,
                pool=pool,
                on_trial=lambda result: advance(1),
            )
        for row in summarise(results):
            none = row.differences.get("none")
            gain = f" ({none.auc:+.4f} to none)" if none else ""
            note(f"{row.backbone}, {row.arm}: test AUC {row.auc:.4f}{gain}, {row.seeds} seeds")
        counts: Counts = {
            "trials": len(results),
            "samples_per_s": round(sum(r.samples_per_s for r in results) / len(results)),
        }
        return counts, {"grid": grid_print}

    named = fingerprint(grid_print, [t.path for t in grid])
    return execute(
        workspace, "train_ctr", named, f"{', '.join(recipe.ctr.backbones)} with {len(recipe.ctr.arms)} arms", body
    )


def soft_labels(recipe: Recipe, workspace: Workspace, prepared: Card) -> Card | None:
    """What `score-pairs` wrote for this recipe and these tables; None where the recipe has no distillation.

    Raises WorkspaceError where it has not run for them.
    """
    pairs = recipe.ctr.distillation
    if pairs is None:
        return None
    scored = needed_stage(workspace, "score_pairs", "no soft labels yet")
    if scored.counts["made_for"] != pairs.made_for(prepared.fingerprint):
        raise WorkspaceError(
            f"{workspace.root}: the soft labels are of other tables, or of another ctr.distillation. Run `score-pairs` "
            "again; a pair whose question is the same is not asked about twice."
        )
    return scored


def going_on_from(
    workspace: Workspace, artifact: str, grid: Sequence[Trial], folders: Mapping[str, Mapping[str, str]]
) -> Projection | None:
    """The projection of an artifact, None where its vectors were not reduced. Raises RecipeError where the grid's
    trials cannot go on from its weights.
    """
    card = read_card(workspace, artifact)
    for trial in grid:
        if (trial.backbone, trial.arm) != (card.trial.backbone, card.trial.arm):
            raise RecipeError(
                f"ctr: trial {trial.path} cannot go on from {artifact}, a {card.trial.backbone} with arm "
                f"{card.trial.arm}. Name this backbone and arm alone under ctr.backbones and ctr.arms."
            )
        reads = read_by(workspace, trial, folders)
        if reads != card.reads:
            raise RecipeError(
                f"ctr: trial {trial.path} cannot go on from {artifact}: it reads {reads}, but that model was trained "
                f"on {card.reads}. Put encoder and semantic ids back, or train without --warm-start."
            )
    return scoring.Artifact.open(workspace, artifact).projection


def vector_folders(workspace: Workspace, *folders: str) -> dict[str, dict[str, str]]:
    """Source -> side -> the folder that holds the vectors <source>-<side>, of all that was written of a side."""
    sources: dict[str, dict[str, str]] = {}
    for folder in folders:
        for name in workspace.names(folder):
            source, _, side = name.rpartition("-")
            if side in ("user", "item"):
                sources.setdefault(source, {})[side] = folder
    return sources


def written_vectors(recipe: Recipe, workspace: Workspace, encoded: Card | None) -> dict[str, dict[str, str]]:
    """The same of what `encode` wrote, and of the partitions that refreshes have read, where an arm reads them."""
    folders = [encoded.outputs["vectors"]] if encoded else []
    return vector_folders(workspace, *folders, *_partitions(recipe))


def partitions_read(recipe: Recipe, workspace: Workspace) -> list[str]:
    """Digests of those partitions: what a grid depends on."""
    cards = [c for folder in _partitions(recipe) for c in Artifact(workspace, folder).cards().values()]
    return sorted(file.sha256 for card in cards for file in card.files.values())


def _partitions(recipe: Recipe) -> list[str]:
    return [partitions_folder(recipe.encoder.identity)] if "streaming" in recipe.ctr.arms else []


@contextmanager
def shard_pool(recipe: Recipe, workspace: Workspace) -> Iterator[Pool]:
    """Where a stage over the shards of users runs: in this process where that takes seconds, else on Ray, which is
    connected for the block.
    """
    samples = int(needed_stage(workspace, "prepare", "no tables yet").counts.get("samples", 0))
    if not needs_ray(samples):
        yield Pool()
        return
    with ray_session(recipe.ray, workspace.log_path("ray")):
        yield stage_pool(workspace, samples)


if __name__ == "__main__":
    main(run, __doc__ or "")
