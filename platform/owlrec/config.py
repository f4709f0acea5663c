"""The base of every component's Config: frozen, and strict about keys, since a mistyped option must never be
silently.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from owlrec.errors import RecipeError, did_you_mean


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown keys; each component subclasses it in its own file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ------------------------------------------------------------------------------------------------------------- registry
# Components selected by name, in a recipe or by an address.
#
# A registry has the dotted path of each component's class and imports it on demand, so a recipe is
# checked without torch, vLLM or Ray. A new component is one file and one line in its registry; your own
# package may add the line itself: `SOURCES["clicks"] = "my_shop.clicks.ClickLog"`.


Component = TypeVar("Component")


class Registry(dict[str, str], Generic[Component]):
    """Names and dotted paths of classes.

    It also annotates a recipe's field: the section's `type` then selects the Config that checks it.
    """

    def __init__(self, what: str, paths: Mapping[str, str]) -> None:
        """what: the noun for error messages."""
        super().__init__(paths)
        self.what = what

    def check(self, name: str) -> str:
        """Returns `name`. Raises RecipeError with the nearest valid name if it is unknown."""
        if name not in self:
            raise RecipeError(f"there is no {self.what} '{name}'.{did_you_mean(name, self)}")
        return name

    def load(self, name: str) -> type[Component]:
        """Imports and returns the class of that name. Raises RecipeError if it is unknown."""
        module, _, class_name = self[self.check(name)].rpartition(".")
        component: type[Component] = getattr(import_module(module), class_name)
        return component

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Dumped by its actual class: the field's declared class has none of its fields.
        as_it_is = core_schema.simple_ser_schema("any")
        return core_schema.no_info_before_validator_function(self._choose, handler(source), serialization=as_it_is)

    def _choose(self, section: Any) -> Any:
        """A section checked by the Config of its `type`. A Config or a missing section stays unchanged."""
        if not isinstance(section, Mapping):
            return section
        if "type" not in section:
            raise ValueError(f"the type is missing.{did_you_mean('', self)}")
        try:
            config: Any = self.load(str(section["type"]))
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return config.model_validate(section)
