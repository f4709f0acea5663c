"""What every stage does the same way: read the recipe, skip what is done, time it, write its card, report
mistakes plainly.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from owlrec.errors import RecipeError, did_you_mean, root_mistake
from owlrec.ops.console import note, stage_header
from owlrec.recipe import Recipe, load_recipe
from owlrec.shards import Card, Stopwatch, finish_stage, finished_stage, forget_stages
from owlrec.workspace import Workspace

STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr", "evaluate")

Counts = dict[str, float | int | str]
Outputs = dict[str, str]
Stage = Callable[..., Card]  # of a recipe, its workspace and the stage's own switches


def from_stage(stage: str) -> tuple[str, ...]:
    """`stage` and all that come after it; one that `owlrec run` leaves out stands alone."""
    return STAGES[STAGES.index(stage) :] if stage in STAGES else (stage,)


def chosen_stages(first: str = STAGES[0], last: str = STAGES[-1]) -> tuple[str, ...]:
    """The stages from `first` to `last`. Raises RecipeError for a name that is none, or where they are the wrong way
    round.
    """
    for name in (first, last):
        if name not in STAGES:
            raise RecipeError(f"there is no stage '{name}'.{did_you_mean(name, STAGES)}")
    chosen = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if not chosen:
        raise RecipeError(f"stage {first} comes after {last}. The order is {', '.join(STAGES)}.")
    return chosen


def run_stages(recipe: Recipe, stages: Sequence[str], *, retry_dead: bool = False) -> dict[str, Card]:
    """Runs stages one after the other, each of which skips what is done; their cards. retry_dead: of `generate`."""
    workspace = open_workspace(recipe)
    switches = {"generate": {"retry_dead": retry_dead}}
    return {name: load_stage(name)(recipe, workspace, **switches.get(name, {})) for name in stages}


def load_stage(name: str) -> Stage:
    """The function of a stage, imported only now."""
    stage: Stage = import_module(f"pipelines.{name}").run
    return stage


def execute(
    workspace: Workspace,
    stage: str,
    fingerprint: str,
    about: str,
    body: Callable[[], tuple[Counts, Outputs]],
    *,
    always: bool = False,
) -> Card:
    """Runs `body` and records what it returns; unless `always`, skips a stage that has finished under this
    fingerprint.
    """
    stage_header(stage, about)
    done = None if always else finished_stage(workspace, stage, fingerprint)
    if done is not None:
        note("done already, nothing to do")
        return done
    forget_stages(workspace, from_stage(stage))
    watch = Stopwatch()
    counts, outputs = body()
    return finish_stage(workspace, stage, fingerprint, counts=counts, outputs=outputs, seconds=watch.seconds)


def open_workspace(recipe: Recipe) -> Workspace:
    """The recipe's workspace, known to be writable."""
    workspace = Workspace(recipe.workspace)
    workspace.check_writable()
    return workspace


def main(stage: Stage, about: str, **switches: str) -> None:
    """The command line of `python -m pipelines.<stage>`.

    switches: further flags that `stage` takes by name, with their help.
    """
    parser = recipe_parser(stage.__module__, about)
    for name, help_ in switches.items():
        parser.add_argument("--" + name.replace("_", "-"), action="store_true", help=help_)
    arguments = parser.parse_args()
    with plain_errors():
        recipe = load_recipe(arguments.recipe, workspace=arguments.workspace, max_replicas=arguments.max_replicas)
        stage(recipe, open_workspace(recipe), **{name: getattr(arguments, name) for name in switches})


def recipe_parser(module: str, about: str) -> argparse.ArgumentParser:
    """The options that all commands with a recipe share."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--recipe", required=True, help="the YAML file that describes the run")
    parser.add_argument("--workspace", help="where artifacts go, in place of the recipe's own workspace")
    parser.add_argument("--max-replicas", type=int, help="in place of generate.max_replicas")
    return parser


class plain_errors:
    """Ends the process with the message of an OwlRecError, also one that crossed Ray, instead of a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        mistake = root_mistake(error)
        if mistake is not None:
            print(f"error: {mistake}", file=sys.stderr)
            raise SystemExit(1) from None
