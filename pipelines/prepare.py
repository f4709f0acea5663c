"""Raw data to the tables that all later stages read, split in time, with an as_of for every user."""

from collections.abc import Mapping
from contextlib import ExitStack

from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.runner import Pool, Stage, run_stage
from owlrec.shards import Card, Shard, Stopwatch, claimed, finish_stage, finished_stage, forget_stages
from owlrec.sources.outcomes import Labels
from owlrec.sources.preparation import TABLES, USER_TABLES, Preparation
from owlrec.sources.splits import SPLITS
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, from_stage, main

HERE_ROWS = 3_000_000  # interactions of a source that is prepared in this process, in some ten seconds


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Reads the source, builds samples and histories, writes five tables. The card's fingerprint is of their content.

    Raises SourceError or SchemaError, naming file and row, where the source breaks the contract: the tables of an
    earlier run stay then. Raises WorkspaceError where another `prepare` is at this workspace.
    """
    stage_header("prepare", f"{recipe.source.type} to tables")
    source = recipe.source.open()
    labels = Labels.of(recipe.labels, source.outcomes, recipe.scenario.positive_above)
    preparation = Preparation(workspace, source, recipe.split, labels, recipe.shard_rows)
    made_of = preparation.made_of
    done = finished_stage(workspace, "prepare")
    if done is not None and done.counts.get("made_of") == made_of and preparation.whole:
        note("done already, nothing to do")
        return done
    watch = Stopwatch()
    with claimed(workspace, "claims/prepare", "prepare"), ExitStack() as session:
        if preparation.rows > HERE_ROWS:
            session.enter_context(ray_session(recipe.ray, workspace.log_path("ray")))
        log = str(workspace.log_path("prepare"))

        def make(stage: Stage, inputs: Mapping[Shard, str], about: str, rows: int) -> dict[str, Card]:
            if rows <= HERE_ROWS:
                return run_stage(workspace, stage, inputs)
            pool = Pool(here=False, max_workers=len(inputs), log_path=log)
            with progress(about, None) as advance:
                return run_stage(workspace, stage, inputs, pool, on_card=lambda card: advance(card.rows_in))

        made, content = preparation.run(make, lambda: forget_stages(workspace, from_stage("prepare")))
        items, users = made.pop("items"), made.pop("all_users")
        note(f"{users:,} users, {items:,} items, {made['interactions']:,} interactions")
        note(", ".join(f"{made[f'samples_{s}']:,} {s} samples" for s in SPLITS) + f"; {labels.about}")
        counts: Counts = {"items": items, **made, "made_of": made_of, "labels": labels.model_dump_json()}
        outputs = {name: f"{TABLES}/{name}" for name in ("items", *USER_TABLES)}
        card = finish_stage(workspace, "prepare", content, counts=counts, outputs=outputs, seconds=watch.seconds)
        preparation.tidy()
        return card


if __name__ == "__main__":
    main(run, __doc__ or "")
