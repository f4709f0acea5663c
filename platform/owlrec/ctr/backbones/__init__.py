"""The CTR backbones, one file each.

This registry imports none of them, so that a recipe is checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from owlrec.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from owlrec.ctr.backbones.interface import Backbone

BACKBONES: dict[str, str] = {  # module of this package -> class in it
    "din": "DIN",
    "dien": "DIEN",
    "dcnv1": "DCNv1",
    "dcnv2": "DCNv2",
    "deepfm": "DeepFM",
    "xdeepfm": "XDeepFM",
    "autoint": "AutoInt",
    "fibinet": "FiBiNET",
    "fignn": "FiGNN",
}


def backbone_class_name(name: str) -> str:
    """The class name of backbone `name`. Raises RecipeError, with the nearest valid name, where there is none."""
    if name not in BACKBONES:
        raise RecipeError(f"there is no backbone '{name}'.{did_you_mean(name, BACKBONES)}")
    return BACKBONES[name]


def backbone_class(name: str) -> type["Backbone"]:
    """The class of backbone `name`, imported (with torch) only now. Raises RecipeError where there is none."""
    class_name = backbone_class_name(name)
    found: type[Backbone] = getattr(import_module(f"{__name__}.{name}"), class_name)
    return found
