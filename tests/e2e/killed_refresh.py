"""A refresh that dies by SIGKILL at a named step: python killed_refresh.py RECIPE WORKSPACE STEP."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from owlrec.recipe import load_recipe
from owlrec.workspace import Workspace
from pipelines import refresh

# Where the function stands that is called at the step, and whether it is done or not even begun.
STEPS = {
    "planning": ("owlrec.streaming.planning", "begin", "before"),
    "planned": ("owlrec.streaming.planning", "begin", "after"),
    "asking": ("pipelines.refresh", "ShardWatch", "on call"),
    "encoded": ("owlrec.streaming.settling", "stack_partitions", "before"),
    "published": ("owlrec.streaming.settling", "publish", "after"),
    "settled": ("owlrec.streaming.settling", "commit", "before"),
    "committed": ("owlrec.workspace.Workspace", "delete_file", "of PENDING"),
    "sweeping": ("owlrec.streaming.settling", "sweep", "before"),
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(original: Callable[..., Any], when: str) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        if when == "on call":
            return die
        if when == "of PENDING" and not str(arguments[-1]).endswith("PENDING"):
            return original(*arguments, **options)
        if when == "after":
            original(*arguments, **options)
        return die()

    return step


if __name__ == "__main__":
    recipe, place, name = sys.argv[1:]
    where, attribute, moment = STEPS[name]
    owner = Workspace if where.endswith("Workspace") else importlib.import_module(where)
    setattr(owner, attribute, dying(getattr(owner, attribute), moment))
    refresh.run(load_recipe(recipe, workspace=place), Workspace(place))
    sys.exit(f"the step '{name}' did not come")
