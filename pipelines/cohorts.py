"""Who is like whom: collaborative vectors, cohorts of users and items, and one prompt for each cohort."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from owlrec import __version__
from owlrec.cohorts.building import build_cohorts, make_latest, previous_of, read_profiles
from owlrec.errors import WorkspaceError
from owlrec.ops.console import note, progress
from owlrec.prompting.collective import cohort_prompts, collective_fingerprint
from owlrec.prompting.rows import prompts_table
from owlrec.ray_data import map_parts
from owlrec.recipe import Recipe
from owlrec.shards import Card, finished_stage, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Builds the recipe's cohorts; does nothing where it asks for none."""
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    config, scenario = recipe.cohorts, recipe.domain
    if config is None:
        return execute(workspace, "cohorts", fingerprint("none"), "the recipe asks for none", lambda: ({}, {}))
    print_ = fingerprint(prepared.fingerprint, config, collective_fingerprint(scenario), recipe.shard_rows, __version__)
    folder = f"cohorts/{print_[:16]}"

    def body() -> tuple[Counts, Outputs]:
        with (
            ray_session(recipe.ray, workspace.log_path("ray")),
            progress("finding who is like whom", None, "parts") as advance,
        ):

            def spread(work: Callable[[str], Any], parts: Sequence[str]) -> Mapping[str, Any]:
                return map_parts(work, parts, on_part=lambda part: advance(1))

            found = build_cohorts(workspace, folder, config, scenario, spread, previous_of(workspace, folder))
        profiles = read_profiles(workspace, folder)
        rows, step = profiles.num_rows, recipe.shard_rows
        for number, start in enumerate(range(0, rows, step)):
            table = prompts_table(cohort_prompts(profiles.slice(start, step), scenario))
            workspace.write_parquet(f"{folder}/prompts/{shard_file(number)}", table)
        make_latest(workspace, folder)
        for kind in ("user", "item"):
            low, middle, high = (found[f"{kind}_cohort_{name}"] for name in ("smallest", "median", "largest"))
            note(f"{found[f'{kind}_cohorts']:,} cohorts of {kind}s, of {low} to {high} members, {middle} in the median")
        counts: Counts = {**found, "prompts": rows}
        return counts, {"cohorts": folder}

    return execute(workspace, "cohorts", print_, "who is like whom", body)


def cohorts_folder(recipe: Recipe, workspace: Workspace) -> str | None:
    """The folder of the recipe's cohorts, None where it asks for none. Raises WorkspaceError where they are not built
    yet."""
    if recipe.cohorts is None:
        return None
    built = finished_stage(workspace, "cohorts")
    if built is None or "cohorts" not in built.outputs:
        raise WorkspaceError(f"{workspace.root}: no cohorts yet. Run `cohorts` first, with the same recipe.")
    return built.outputs["cohorts"]


if __name__ == "__main__":
    main(run, __doc__ or "")
