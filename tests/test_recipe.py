"""A recipe's mistakes are found at once, all of them, with key and remedy."""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic_core
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from owlrec.config import Registry
from owlrec.errors import RecipeError
from owlrec.generation import ENGINES, EngineConfig
from owlrec.generation.quality import DEFAULT_POLICY
from owlrec.recipe import Recipe, _StrictLoader, load_recipe
from owlrec.sources import SOURCES

GOOD = """
name: demo
scenario: movies
workspace: runs/demo
source: {type: movielens-100k}
engine: {type: echo}
"""
KEYS = 77
REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "recipe.md"
RECIPES = sorted((Path(__file__).resolve().parent.parent / "pipelines" / "recipes").glob("*.yaml"))


def load(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_recipe(file)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_load_and_never_use_echo(path: Path) -> None:
    assert load_recipe(path).engine.type != "echo"


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    recipe = load_recipe(file)
    assert recipe.sampling.temperature == 0
    assert recipe.domain.positive_above == 3
    assert load_recipe(file, workspace="/elsewhere").workspace == "/elsewhere"


def test_a_bare_off_is_a_word_and_not_false(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD + "decoding: {mode: off}\ntraining: {use_gpu: yes}\ncohorts: {}\n")
    assert (recipe.decoding.mode, recipe.training.use_gpu, recipe.cohorts is not None) == ("off", True, True)


def test_most_replicas_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for given, most, expected in (
        ("3", 5, (1, 5)),
        ("[2, 9]", 5, (2, 5)),
        ("[8, 9]", 5, (5, 5)),
        ("[2, 9]", None, (2, 9)),
    ):
        file.write_text(GOOD + f"generate: {{replicas: {given}}}\n")
        generate = load_recipe(file, max_replicas=most).generate
        assert (generate.least_replicas, generate.most_replicas) == expected


def test_label_rule_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD + "labels: {rule: {rating_above: 4}}\n")
    assert load_recipe(file).domain.positive_above == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("samplng: {}", "samplng: unknown key. Did you mean 'sampling'?"),
        ("sampling: {max_token: 3}", "sampling.max_token: unknown key. Did you mean 'max_tokens'?"),
        ("split: {method: usr}", "split.method: Input should be 'user', 'item', 'time' or 'column' (found 'usr')"),
        ("shard_rows: 0", "shard_rows: Input should be greater than or equal to 1 (found 0)"),
        ("name: again", "key 'name' occurs twice"),
        ("ctr: {seeds: abc}", "ctr.seeds:"),
        ("labels: {rule: ratings}", "labels.rule: Input should be 'rating_above', 'column' or 'positives_only' (found"),
        ("labels: {negatives: {popular: 4}}", "labels.negatives.popular:"),
        ("split: {cuts: [now, {evry: 1d}]}", "split.cuts.1.evry: unknown key"),
        ("generate: {replicas: [4, 2]}", "generate.replicas: name the least first"),
        ("encoder: {semantic_ids: 3x100}", "encoder.semantic_ids: codes_per_level"),
        ("sampling: {options: {max_tokens: 3}}", "sampling.options: max_tokens"),
        ("ray: {num_cpus: 2}", "ray: Input should be a valid string"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GOOD + change + "\n")
    assert message in str(error.value)
    assert "r.yaml" in str(error.value)


def test_unknown_scenario_and_engine_key_are_explained_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GOOD.replace("movies", "moovies").replace("type: echo", "type: vllm, modell: x"))
    assert "Did you mean 'movies'?" in str(error.value)
    assert "engine.modell: unknown key. Did you mean 'model'?" in str(error.value)
    assert "engine.model: missing" in str(error.value)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{type: vlm, model: x}", "engine: there is no engine 'vlm'. Did you mean 'vllm'?"),
        ("{model: x}", "engine: the type is missing. Valid names: echo, http, vllm."),
        ("[echo]", "engine: Input should be a valid dictionary"),
    ],
)
def test_an_engine_of_no_known_type_is_refused(tmp_path: Path, engine: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GOOD.replace("{type: echo}", engine))
    assert message in str(error.value)


def test_a_section_chosen_by_type_is_dumped_with_its_own_fields(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD.replace("{type: echo}", "{type: echo, answer_tokens: 7}"))
    recipe = load_recipe(file)
    assert recipe.model_dump(mode="json")["engine"]["answer_tokens"] == 7
    assert Recipe.model_validate(recipe.model_dump()) == recipe


WINES = """
  nouns: [wine, wines]
  consumed: tasted
  history: tasting history
  rating_unit: ""
  user_factors: [grape, region]
  item_factors: [grape, region]
  positive_above: 3
  text_fields: [grape]
"""


def test_a_scenario_may_be_written_out(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD.replace(" movies", WINES) + "labels: {rule: {rating_above: 4}}\n")
    domain = load_recipe(file).domain
    assert (domain.item, domain.user_factors, domain.positive_above) == ("wine", ("grape", "region"), 4)
    with pytest.raises(RecipeError) as error:
        load(tmp_path, GOOD.replace(" movies", WINES.replace("history:", "histry:")))
    assert "scenario.histry: unknown key. Did you mean 'history'?" in str(error.value)
    assert "scenario.history: missing" in str(error.value)


def test_missing_file_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load(tmp_path, "a: [1")
    with pytest.raises(RecipeError, match="must have"):
        load(tmp_path, "- 1")


def leaf_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys that hold a value. A second engine has the keys of the first, so it is one more to know."""
    for name, field in model.model_fields.items():
        choices = (field.annotation, *typing.get_args(field.annotation))
        sections = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if sections and not (prefix and issubclass(sections[0], EngineConfig)):
            yield from leaf_keys(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_a_key_more_needs_a_key_less() -> None:
    """The goal is 80: a key stays where two real users would set it differently; all else is a constant beside the
    code that reads it. Lower KEYS with each key that goes.
    """
    assert len(list(leaf_keys(Recipe))) <= KEYS


def test_the_reference_begins_with_twenty_keys_that_exist() -> None:
    keys = re.findall(r"^\| `([a-z_.]+)` \|", REFERENCE.read_text("utf-8").partition("## All keys")[0], re.MULTILINE)
    assert len(set(keys)) == 20
    # A scenario is named; a model is what vLLM and HTTP engines have.
    assert set(keys) - {"scenario", "engine.model"} <= set(leaf_keys(Recipe))


def field_of(key: str) -> FieldInfo:
    """The field of a key that stands in a recipe."""
    model: type[BaseModel] = Recipe
    *sections, name = key.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        choices = (annotation, *typing.get_args(annotation))
        model = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return model.model_fields[name]


def default_of(field: FieldInfo) -> Any:
    """As JSON holds it."""
    return pydantic_core.to_jsonable_python(field.get_default(call_default_factory=True))


def rows_of_reference(columns: int) -> list[list[str]]:
    """The cells of the tables of all keys that have so many columns."""
    page = REFERENCE.read_text("utf-8").partition("## All keys")[2]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines() if line.startswith("| `")]
    return [row for row in rows if len(row) == columns]


def assert_described(field: FieldInfo, type_: str, default: str, why: str) -> None:
    assert type_.strip()
    assert why.strip()
    if field.is_required():
        assert default == "required"
    elif default.startswith("`"):
        assert yaml.load(default.strip("`"), Loader=_StrictLoader) == default_of(field)
    else:  # a word on what follows from other things
        assert default_of(field) in (None, "", DEFAULT_POLICY)


def test_the_reference_tells_type_default_and_why_of_every_key() -> None:
    rows = rows_of_reference(4)
    assert sorted(key.strip("`") for key, *_ in rows) == sorted(leaf_keys(Recipe))
    for key, type_, default, why in rows:
        assert_described(field_of(key.strip("`")), type_, default, why)


@pytest.mark.parametrize(("section", "registry"), [("source", SOURCES), ("engine", ENGINES)])
def test_the_reference_tells_the_keys_of_each_source_and_engine(section: str, registry: Registry) -> None:
    rows = [row for row in rows_of_reference(5) if row[1].startswith(f"`{section}.")]
    expected = {(name, key) for name in registry for key in registry.load(name).model_fields if key != "type"}
    assert {(name.strip("`"), key.strip("`").partition(".")[2]) for name, key, *_ in rows} == expected
    for name, key, *about in rows:
        assert_described(registry.load(name.strip("`")).model_fields[key.strip("`").partition(".")[2]], *about)
