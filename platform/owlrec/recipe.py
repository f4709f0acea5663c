"""The recipe of a run, as a YAML file or a dict: each section is the Config of its component.

This module gathers the stages' Configs, so it imports the stages; none of them imports it. A stage receives only its
own Config.
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
from owlrec.ctr.experiment import CTRConfig, WorkersConfig
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


class Recipe(Config):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    scenario: Scenario  # the name of a built-in scenario, or your own domain
    workspace: str
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    labels: LabelConfig = LabelConfig()
    shard_rows: int = Field(1024, ge=1)  # approximate users or items per shard, the unit of resuming
    cohorts: CohortsConfig | None = None  # None = no cohorts; `cohorts: {}` builds them with the defaults
    prompts: PromptConfig = PromptConfig()
    engine: EngineSection
    sampling: SamplingConfig = SamplingConfig()
    decoding: DecodingConfig = DecodingConfig()
    quality: QualityConfig = QualityConfig()
    generate: GenerateConfig = GenerateConfig()
    encoder: EncoderConfig = EncoderConfig()
    ctr: CTRConfig = CTRConfig()
    training: WorkersConfig = WorkersConfig()
    ranking: RankingConfig | None = None  # None = no LLM ranker; `ranking: {}` tunes one with the defaults
    streaming: RefreshConfig = RefreshConfig()
    # Which Ray cluster a run uses; inside `ray job submit` always the job's own. local: one that ends with the run,
    # with all cores or, as local[4], some; auto or host:port joins one.
    ray: str = Field("local", pattern=r"^(local(\[[1-9]\d*\])?|auto|.+:.+)$")

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
        """The scenario, adjusted to this recipe's label rule: with positives only, a rating is a count."""
        changes: dict[str, Any] = {}
        if self.labels.rating_above is not None:
            changes["positive_above"] = self.labels.rating_above
        if self.labels.rule == "positives_only":
            changes |= {"rating_unit": "time", "positive_above": -1}
        return self.scenario.model_copy(update=changes)


def load_recipe(path: str | Path, *, workspace: str | None = None, max_replicas: int | None = None) -> Recipe:
    """Reads and validates a recipe file.

    workspace, max_replicas: override the recipe's own, if given; of `generate.replicas` that is the most. A
    relative workspace is in the current folder.
    Raises RecipeError, which lists every mistake with its key, and the nearest valid name for an unknown one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). See pipelines/recipes/ for examples.") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML ({' '.join(str(error).split())}). Correct it.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: must have `key: value` lines at the top level. See pipelines/recipes/ for an example."
        )
    if workspace is not None:
        values["workspace"] = workspace
    if max_replicas is not None:
        generate = values.get("generate")
        generate = generate if isinstance(generate, dict) else {}
        replicas: Any = max_replicas
        match generate.get("replicas"):
            case [int(least), _]:
                replicas = [min(least, max_replicas), max_replicas]
        values["generate"] = {**generate, "replicas": replicas}
    return make_recipe(values, name=str(path))


def make_recipe(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """A recipe from a dict with the contents of a file; a section may also be its Config and a path a `Path`.

    name: its name in errors. Raises RecipeError like load_recipe.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = _explain(error, values)
        if any("unknown key. Valid names" in line for line in lines):  # not a misspelling
            lines.append(
                "Keys of the first edition no longer work: `owlrec init` writes a recipe with current ones, and"
            )
            lines.append("docs/reference/recipe.md lists them.")
        raise RecipeError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _paths_as_text(entry) for key, entry in value.items()}
    return [_paths_as_text(entry) for entry in value] if isinstance(value, list) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys: YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads a bare off, on, yes or no as a boolean: `mode: off` would be refused as False. As in YAML 1.2, only
# true and false are booleans here; pydantic still converts yes and no for boolean fields.
_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
# YAML 1.1 reads 1e-3 as a string, and recipes have many learning rates.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


# What pydantic adds to the place of a mistake in a value that may have several forms: "int", "literal['off']",
# "dict[...]", "constrained-int", "function-after[...]".
_FORM = re.compile(r"int|float|str|bool|tuple|list|dict|Every|constrained-\w+|\w[\w-]*\[.*\]|\[key\]")


def _explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line per mistake in a recipe with these values."""
    messages: dict[str, list[str]] = {}  # by key: a value of several forms is told what each of them takes
    for detail in error.errors():
        location = [part for part in detail["loc"] if not _FORM.fullmatch(str(part))]
        if detail["type"] == "extra_forbidden":
            names = _names_at(location[:-1], values)
            message = f"unknown key.{did_you_mean(str(location[-1]), names)}"
        elif detail["type"] == "missing":
            message = "missing. Add it to the recipe."
        else:
            value = detail.get("input")
            shown = f" (found {value!r})" if not isinstance(value, dict | list) else ""
            message = f"{detail['msg'].removeprefix('Value error, ')}{shown}"
        messages.setdefault(".".join(map(str, location)), []).append(message)
    return [f"{key}: {'; or: '.join(dict.fromkeys(told))}" for key, told in messages.items()]


def _names_at(location: Sequence[Any], values: Any) -> list[str]:
    """Valid keys of the section at an error's location, in a recipe with these values."""
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
