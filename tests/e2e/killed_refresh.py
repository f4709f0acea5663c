"""A refresh that dies by SIGKILL at a named step."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owlrec.recipe import load_recipe
from owlrec.runs import upkeep
from owlrec.workspace import Workspace

# Where the function stands that is called at the step, and whether it is done or not even begun.
STEPS = {
    "read": ("owlrec.refresh.plan", "write_plan", "before"),
    "planned": ("owlrec.refresh.plan", "write_plan", "after"),
    "items taken in": ("owlrec.refresh.plan", "InterestsStage", "before"),
    "moved": ("owlrec.refresh.plan", "budget_cut", "before"),
    "asking": ("owlrec.runs.upkeep", "ShardWatch", "on call"),
    "encoded": ("owlrec.refresh.apply", "build_release", "before"),
    "built": ("owlrec.refresh.apply", "make_current", "before"),
    "published": ("owlrec.refresh.apply", "make_current", "after"),
    "items settled": ("owlrec.refresh.apply", "SavePartitions", "before"),
    "partitions stored": ("owlrec.refresh.apply", "SettleStage", "before"),
    "settled": ("owlrec.runs.upkeep", "write_state", "before"),
    "committed": ("owlrec.runs.upkeep", "write_state", "after"),
    "sweeping": ("owlrec.runs.upkeep", "sweep", "before"),
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(original: Callable[..., Any], when: str) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        if when == "on call":
            return die
        if when == "after":
            original(*arguments, **options)
        return die()

    return step


def refresh_until(step: str, recipe: Path, place: str) -> None:
    """For a process of its own."""
    where, attribute, moment = STEPS[step]
    owner = importlib.import_module(where)
    setattr(owner, attribute, dying(getattr(owner, attribute), moment))
    upkeep.run(load_recipe(recipe, workspace=place), Workspace(place))
    sys.exit(f"the step '{step}' did not come")
