"""The CTR backbones, one file each. This registry imports none of them, so that a recipe can be checked without torch."""

from importlib import import_module
from typing import TYPE_CHECKING

from owlrec.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from owlrec.ctr.backbones.interface import Backbone

BACKBONES: dict[str, str] = {"din": "DIN", "dcnv2": "DCNv2"}  # module of this package -> class in it


def backbone_class(name: str) -> type["Backbone"]:
    """The class of backbone `name`. Raises RecipeError, with the nearest valid name, where there is none."""
    if name not in BACKBONES:
        raise RecipeError(f"ctr.backbones: there is no backbone '{name}'.{did_you_mean(name, BACKBONES)}")
    found: type[Backbone] = getattr(import_module(f"{__name__}.{name}"), BACKBONES[name])
    return found
