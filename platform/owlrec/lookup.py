"""`owlrec.open`, and how a place is named: the part of the Python API, and of the command line, that needs no Ray.

A recipe is imported only where one is named.
"""

from collections.abc import Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Union

from owlrec.errors import naming_extras
from owlrec.releases.release import Release, open_release
from owlrec.workspace import Workspace

if TYPE_CHECKING:
    from owlrec.recipe import Recipe

Place = Union[Workspace, "Recipe", Mapping[str, Any], str, PathLike[str]]


def is_recipe(place: str) -> bool:
    """Whether a place is a recipe's file, or else a workspace."""
    return place.endswith((".yaml", ".yml"))


def workspace_of(place: Place) -> Workspace:
    """A workspace, by itself, its folder or URI, or a recipe (a path in .yaml, a dict, a Recipe).

    Raises RecipeError for a recipe that cannot be read.
    """
    if isinstance(place, Workspace):
        return place
    if isinstance(place, str | PathLike):
        if not is_recipe(path := fspath(place)):
            return Workspace(path)
        with naming_extras():
            from owlrec.recipe import load_recipe
        return Workspace(load_recipe(path).workspace)
    with naming_extras():
        from owlrec.recipe import make_recipe
    return Workspace((make_recipe(place) if isinstance(place, Mapping) else place).workspace)


def open(
    source: "Workspace | Recipe | Mapping[str, Any] | str | PathLike[str]",
    release: str | None = None,
    *,
    verify: bool = True,
) -> Release:
    """Opens the current release of a workspace, or the one named `release`, for lookups by raw id.

    source: the workspace's folder or URI, or a recipe (a path in .yaml, a dict, a Recipe).
    verify: first hash the release's files, which takes a second per GB. The result is a context manager. An open
    release never changes, even if another one is published. Raises ReleaseError if nothing has been published.

    >>> import owlrec
    >>> with owlrec.open("shop.yaml") as release:
    ...     text = release["item", "B007"].text
    ...     vectors, known = release.vectors("item", ["B007", "B999"])
    >>> text  # doctest: +ELLIPSIS
    'echo-...'
    >>> vectors.shape, known.tolist()
    ((2, 256), [True, False])
    """
    return open_release(workspace_of(source), release, verify=verify)
