"""The trial with the best valid AUC as an artifact that a serving process opens, checked against the trainer."""

from owlrec.ctr.artifact import PROGRAM, RELEASED, ModelCard, finish_artifact, read_by, write_artifact
from owlrec.ctr.dataset import item_shards
from owlrec.ctr.experiment import TrialResult, finished_trials, grid_folder, trials
from owlrec.ctr.features import encode_items
from owlrec.ctr.knowledge import arm_parts, arm_sources, stored_sources
from owlrec.ctr.pca import open_tables, reduced_folders
from owlrec.ctr.scoring import TOLERANCE, LiveState, Scorer, TableKnowledge, User, export_program, largest_difference
from owlrec.ctr.trainer import read_vocabularies, tables_of
from owlrec.errors import RecipeError, WorkspaceError, did_you_mean
from owlrec.ops.console import note
from owlrec.recipe import Recipe
from owlrec.shards import Card, finished_stage, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.stage import Counts, Outputs, execute, main
from pipelines.train_ctr import shard_pool, written_vectors


def run(recipe: Recipe, workspace: Workspace, *, trial: str | None = None) -> Card:
    """Writes the artifact; its folder is the manifest's output `model`.

    trial: its path (din/knowledge/seed-0), in place of the best one.
    """
    grid = needed_stage(workspace, "train_ctr", "nothing trained yet").outputs["grid"]
    encoded = finished_stage(workspace, "encode")
    best = _chosen(finished_trials(workspace, grid, trials(recipe.ctr)), trial)

    def body() -> tuple[Counts, Outputs]:
        written = written_vectors(recipe, workspace, encoded)
        folders = reduced_folders(workspace, written, grid)
        sources = arm_sources(best.arm, folders)
        read = {source: folders[source] for source in stored_sources(sources)}
        tables = tables_of(best.trial, open_tables(workspace, read, held=False))
        vocabularies = read_vocabularies(workspace, grid_folder(grid))
        items = encode_items(item_shards(workspace, vocabularies), vocabularies)
        projection = next((path for name in read if folders is not written for path in folders[name].values()), None)
        with shard_pool(recipe, workspace) as pool:
            folder = write_artifact(workspace, grid, best.trial, items, projection=projection, pool=pool)
        scorer = Scorer.open(workspace, folder)
        live = LiveState(scorer.model, TableKnowledge(tables) if tables else None)
        example = scorer.batch(User(history=items.ids[:1].tolist()), items.ids[:3].tolist() or [0, 0, 0], live)
        workspace.write_bytes(f"{folder}/{PROGRAM}", export_program(scorer.model, example))
        differences = {}
        for name, path in (("model", scorer), ("program", Scorer.open(workspace, folder, program=True))):
            differences[name] = largest_difference(path, tables, workspace, grid, best.trial)
            if not differences[name] <= TOLERANCE:
                raise WorkspaceError(
                    f"{workspace.path(folder)}: the exported {name} scores up to {differences[name]:.1e} off the "
                    f"trainer's test scores. Were tables or vectors rewritten since? Run `train_ctr` again."
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
    """The best on valid among the trials whose vectors a release holds: the others are controls."""
    servable = {r.trial.path: r for r in results if arm_parts(r.arm)[0] in RELEASED}
    if path is not None and path not in servable:
        raise RecipeError(
            f"there is no trained trial '{path}' to export, of an arm whose vectors a release holds "
            f"({', '.join(RELEASED)}).{did_you_mean(path, servable)}"
        )
    if not servable:
        raise WorkspaceError("no trial of the recipe's arms has finished, or only controls. Run `train_ctr`.")
    return servable[path] if path else max(servable.values(), key=lambda r: r.valid.auc)


if __name__ == "__main__":
    main(run, __doc__ or "")
