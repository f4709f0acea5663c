"""The grid of CTR trials on Ray Train: every backbone with every arm and seed, on the same samples."""

from collections.abc import Iterator
from contextlib import contextmanager

from owlrec.ctr.experiment import summarise, trials
from owlrec.ctr.reduction import reduce_once
from owlrec.ctr.training import needs_ray, stage_pool, train_trials
from owlrec.encoding.vector_shards import partitions_folder
from owlrec.errors import WorkspaceError
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.runner import Pool
from owlrec.shards import Artifact, Card, finished_stage, needed_stage
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
    partitions = partitions_read(recipe, workspace)
    grid_print = fingerprint(prepared.fingerprint, encoded and encoded.fingerprint, settings, *partitions)
    grid = trials(recipe.ctr)

    def body() -> tuple[Counts, Outputs]:
        read = encoded if recipe.ctr.arms != ("none",) else None
        written = written_vectors(recipe, workspace, read)
        note(f"{len(grid)} trials on {prepared.counts['samples_train']:,} samples")
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
