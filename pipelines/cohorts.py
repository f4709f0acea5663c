"""Collaborative vectors, cohorts of users and items, and one prompt for each cohort."""

from contextlib import nullcontext
from functools import partial

import pyarrow as pa

from owlrec.cohorts.building import build_cohorts
from owlrec.cohorts.clustering import ITERATIONS
from owlrec.cohorts.model import POINTER, CohortSettings, previous_folder
from owlrec.errors import WorkspaceError
from owlrec.ops.console import note, progress
from owlrec.prompting.rows import cohort_prompts, collective_fingerprint, prompts_table
from owlrec.recipe import Recipe
from owlrec.runner import Pool
from owlrec.scenario import Scenario
from owlrec.shards import Card, finished_stage, needed_stage
from owlrec.storage import Pointer, fingerprint
from owlrec.workspace import Workspace
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main

_ROWS_HERE = 200_000  # users and items that one process is done with sooner than Ray has started


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Builds the recipe's cohorts; does nothing where it asks for none."""
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    config, scenario = recipe.cohorts, recipe.domain
    if config is None:
        return execute(workspace, "cohorts", fingerprint("none"), "the recipe asks for none", lambda: ({}, {}))
    wording = collective_fingerprint(scenario)
    constants = (CohortSettings(), ITERATIONS)
    named = fingerprint(prepared.fingerprint, config, constants, wording, recipe.split.cuts)
    folder = f"cohorts/{named[:16]}"
    here = int(prepared.counts.get("users", 0)) + int(prepared.counts.get("items", 0)) <= _ROWS_HERE

    def body() -> tuple[Counts, Outputs]:
        log = workspace.log_path("ray")
        pool = Pool(here=here, max_workers=recipe.ray.num_cpus or 1 << 10, log_path=None if here else str(log))
        with (
            nullcontext() if here else ray_session(recipe.ray, log),
            progress("building cohorts", None, "shards") as advance,
        ):
            counts = build_cohorts(
                workspace,
                folder,
                config,
                scenario,
                partial(_ask, scenario=scenario),
                shard_rows=recipe.shard_rows,
                cuts=recipe.split.cuts,
                pool=pool,
                previous=previous_folder(workspace, folder),
                on_card=lambda card: advance(1),
            )
        Pointer(workspace, POINTER).move(folder)
        for kind in ("user", "item"):
            n, members, largest = (counts[f"{kind}_{name}"] for name in ("cohorts", "members", "cohort_largest"))
            note(f"{n:,} cohorts of {kind}s, of {members / n:.0f} members in the mean, {largest:,} in the largest")
        return {**counts}, {"cohorts": folder}

    return execute(workspace, "cohorts", named, "users and items that are alike", body)


def cohorts_folder(recipe: Recipe, workspace: Workspace) -> str | None:
    """The folder of the recipe's cohorts, None where it asks for none. Raises WorkspaceError where they are not built
    yet."""
    if recipe.cohorts is None:
        return None
    built = finished_stage(workspace, "cohorts")
    if built is None or "cohorts" not in built.outputs:
        raise WorkspaceError(f"{workspace.root}: no cohorts yet. Run `cohorts` first, with the same recipe.")
    return built.outputs["cohorts"]


def _ask(profiles: pa.Table, scenario: Scenario) -> pa.Table:
    return prompts_table(cohort_prompts(profiles, scenario))


if __name__ == "__main__":
    main(run, __doc__ or "")
