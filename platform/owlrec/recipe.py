"""What describes a run, as a YAML file or as a dict: each section is the Config of the component that it sets up.

This module gathers the stages' Configs, so it imports the stages; none of them imports it. A stage takes its own
Config and nothing else.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from owlrec.cohorts.model import CohortsConfig
from owlrec.config import Config, Registry
from owlrec.ctr.experiment import CTRConfig
from owlrec.encoding.encoder import EncoderConfig
from owlrec.errors import RecipeError, did_you_mean
from owlrec.generation import EngineSection
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.job import GenerateConfig
from owlrec.generation.quality import QualityConfig
from owlrec.prompting.rows import PromptConfig
from owlrec.ranking.experiment import RankingConfig
from owlrec.refresh.events import RefreshConfig
from owlrec.scenario import Scenario, get_scenario
from owlrec.sources import SourceConfig
from owlrec.sources.outcomes import LabelConfig
from owlrec.sources.splits import SplitConfig
from owlrec_decoding import DecodingConfig


class RayConfig(Config):
    """Which Ray cluster a run uses. Inside `ray job submit` it is always the job's own cluster."""

    address: str = "local"  # "local" starts a cluster that ends with the run; "auto" or host:port joins one
    num_cpus: int | None = None  # logical CPUs of a local cluster; None = all cores


class Recipe(Config):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    scenario: Scenario  # the name of one that ships, or a domain of your own, written out
    workspace: str
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    labels: LabelConfig = LabelConfig()
    shard_rows: int = Field(1024, ge=1)  # about this many users or items a shard: the unit of resuming
    cohorts: CohortsConfig | None = None  # None = no cohorts are built; `cohorts: {}` builds them by the defaults
    prompts: PromptConfig = PromptConfig()
    engine: EngineSection
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    quality: QualityConfig = QualityConfig()
    generate: GenerateConfig = GenerateConfig()
    encoder: EncoderConfig = EncoderConfig()
    ctr: CTRConfig = CTRConfig()
    ranking: RankingConfig | None = None  # None = no LLM ranker; `ranking: {}` tunes one by the defaults
    streaming: RefreshConfig = RefreshConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: Any) -> Any:
        return _paths_as_text(values)

    @field_validator("scenario", mode="before")
    @classmethod
    def _by_name(cls, scenario: Any) -> Any:
        try:
            return get_scenario(scenario) if isinstance(scenario, str) else scenario
        except RecipeError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _collective_needs_cohorts(self) -> "Recipe":
        if self.prompts.mode != "individual" and self.cohorts is None:
            raise ValueError(f"prompts.mode {self.prompts.mode} needs cohorts: add `cohorts: {{}}` to the recipe")
        return self

    @property
    def domain(self) -> Scenario:
        """The scenario itself, as this recipe's label rule has it: of positives alone a rating tells how often."""
        changes: dict[str, Any] = {}
        if self.labels.rating_above is not None:
            changes["positive_above"] = self.labels.rating_above
        if self.labels.rule == "positives_only":
            changes |= {"rating_unit": "time", "rating_best": 5, "positive_above": -1}
        return self.scenario.model_copy(update=changes)


def load_recipe(path: str | Path, *, workspace: str | None = None, max_replicas: int | None = None) -> Recipe:
    """Reads and checks a recipe file.

    workspace, max_replicas: take the place of the recipe's own, where given. A relative workspace stands in the
    current folder.
    Raises RecipeError, which lists every mistake with its key, and the nearest valid name for an unknown one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}). Recipes ship under pipelines/recipes/."
        ) from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML ({' '.join(str(error).split())}). Correct it there.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold `key: value` lines at the top. See pipelines/recipes/ for an example.")
    if workspace is not None:
        values["workspace"] = workspace
    if max_replicas is not None:
        generate = values.get("generate")
        values["generate"] = {**(generate if isinstance(generate, dict) else {}), "max_replicas": max_replicas}
    return make_recipe(values, name=str(path))


def make_recipe(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """A recipe of a dict: what stands in a file, where a section may also be its Config and a path a `Path`.

    name: what to call it in errors. Raises as load_recipe.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = _explain(error, values)
        if any("unknown key. Valid names" in line for line in lines):  # no misspelling
            lines.append("Keys of the first edition are gone: `owlrec init` writes a recipe with today's, and")
            lines.append("docs/reference/recipe.md lists them.")
        raise RecipeError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _paths_as_text(entry) for key, entry in value.items()}
    return [_paths_as_text(entry) for entry in value] if isinstance(value, list) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads a bare off, on, yes or no as a truth value: `mode: off` would be refused as False. As in YAML 1.2, only
# true and false are; where a yes or no is meant, pydantic still takes the words.
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
# YAML 1.1 reads 1e-3 as a string; recipes are full of learning rates.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line a mistake in a recipe of these values."""
    lines = []
    for detail in error.errors():
        location = detail["loc"]
        key = ".".join(map(str, location))
        if detail["type"] == "extra_forbidden":
            names = _names_at(location[:-1], values)
            lines.append(f"{key}: unknown key.{did_you_mean(str(location[-1]), names)}")
        elif detail["type"] == "missing":
            lines.append(f"{key}: is missing. Add it to the recipe.")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            value = detail.get("input")
            shown = f" (found {value!r})" if not isinstance(value, dict | list) else ""
            lines.append(f"{key}: {message}{shown}")
    return lines


def _names_at(location: Sequence[Any], values: Any) -> list[str]:
    """The valid keys of the section that an error's location points to, in a recipe of these values."""
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            return []
        values = values[part]
        registry = next((m for m in field.metadata if isinstance(m, Registry)), None)
        models = _models_in(field.annotation) if registry is None else [registry.load(values["type"])]
        if len(models) != 1:
            return []
        model = models[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]
