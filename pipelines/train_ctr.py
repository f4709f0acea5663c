"""The grid of CTR trials on Ray Train: every backbone with every arm and seed, on the same samples."""

from collections.abc import Iterator
from contextlib import contextmanager

from owlrec.ctr.experiment import summarise, trials
from owlrec.ctr.reduction import reduce_once
from owlrec.ctr.training import needs_ray, stage_pool, train_trials
from owlrec.errors import WorkspaceError
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.runner import Pool
from owlrec.shards import Card, finished_stage, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main

# What the grid holds and how it is spread over machines: growing the grid must not retrain what it has.
_NOT_IN_FINGERPRINT = {"backbones", "arms", "seeds", "threads", "max_failures", "checkpoint_steps", "sweep"}


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Trains the trials that have no result yet; of arm "none" alone without vectors too."""
    prepared, encoded = finished_stage(workspace, "prepare"), finished_stage(workspace, "encode")
    if prepared is None or (encoded is None and recipe.ctr.arms != ("none",)):
        raise WorkspaceError(f"{workspace.root}: no tables or vectors yet. Run `prepare` to `encode` first.")
    settings = recipe.ctr.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
    soft = soft_labels(recipe, workspace, prepared)
    grid_print = fingerprint(prepared.fingerprint, encoded and encoded.fingerprint, settings, soft and soft.fingerprint)
    grid = trials(recipe.ctr)

    def body() -> tuple[Counts, Outputs]:
        read = encoded if recipe.ctr.arms != ("none",) else None
        written = vector_folders(workspace, read.outputs["vectors"]) if read else {}
        taught = f" and {soft.counts['pairs']:,} probabilities of the LLM" if soft else ""
        note(f"{len(grid)} trials on {prepared.counts['samples_train']:,} samples{taught}")
        with ray_session(recipe.ray, workspace.log_path("ray")), progress("training", len(grid), "trials") as advance:
            pool = stage_pool(workspace, int(prepared.counts["samples"]))
            results = train_trials(
                workspace,
                recipe.ctr,
                grid,
                knowledge=reduce_once(workspace, written, recipe.ctr.knowledge_dim, grid_print, pool),
                fingerprint=grid_print,
                attributes=recipe.domain.text_fields,
                profile=recipe.domain.profile_fields,
                soft_labels=soft.outputs["soft_labels"] if soft else None,
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


def vector_folders(workspace: Workspace, folder: str) -> dict[str, dict[str, str]]:
    """Source -> side -> the folder that holds the vectors <source>-<side>, of all that `encode` wrote of a side."""
    sources: dict[str, dict[str, str]] = {}
    for name in workspace.names(folder):
        source, _, side = name.rpartition("-")
        if side in ("user", "item"):
            sources.setdefault(source, {})[side] = folder
    return sources


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
