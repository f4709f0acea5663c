"""Recipes that generation tests share."""

from collections.abc import Callable

import pytest

from owlrec.recipe import Recipe
from owlrec.workspace import Workspace


@pytest.fixture
def echo_recipe_for() -> Callable[[Workspace], Recipe]:
    """A recipe over a workspace that is prepared already, with the engine that needs no model."""

    def recipe(workspace: Workspace) -> Recipe:
        source = {"type": "movielens-100k"}
        values = {"name": "t", "scenario": "movies", "workspace": workspace.root, "source": source}
        return Recipe.model_validate({**values, "engine": {"type": "echo"}})

    return recipe
