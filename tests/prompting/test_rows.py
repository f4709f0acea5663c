"""Tables to prompts."""

from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest

from owlrec.errors import RecipeError
from owlrec.prompting.frameworks import Framework, FrameworkName, item_prompt, item_system, user_system
from owlrec.prompting.prompts import FRAMEWORKS, PromptConfig, item_prompts, template_fingerprint, user_prompts
from owlrec.recipe import load_recipe
from owlrec.scenario import get_scenario
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace

MOVIES = get_scenario("movies")


def test_catalog_aligns_titles_with_ids_and_tolerates_unknown_ones() -> None:
    catalog = ItemCatalog(pa.table({"item_id": pa.array([9, 3], pa.int64()), "title": ["nine", None]}))
    assert catalog.titles(np.array([3, 9, 4, 99])) == ["", "nine", "", ""]


def test_user_prompts_carry_the_as_of_of_their_history(small_world: Workspace) -> None:
    prompts = list(
        user_prompts(
            small_world.read_table("users"),
            small_world.read_table("histories"),
            ItemCatalog.load(small_world),
            PromptConfig(),
            MOVIES,
            len,
        )
    )
    assert len(prompts) == 40
    first = next(p for p in prompts if p.id == 1)
    assert first.as_of == 1_000_000_000_000
    assert '"Film 0 (1970)" 1 star; "Film 1 (1971)" 2 stars' in first.text
    assert len({p.system for p in prompts}) == 1


def test_item_prompts_cover_every_row(small_world: Workspace) -> None:
    prompts = list(item_prompts(small_world.read_table("items"), MOVIES, "kar"))
    assert {p.id for p in prompts} == set(range(100, 130))
    assert all(p.as_of == 0 for p in prompts)


def test_template_fingerprint_sees_scenario_and_settings() -> None:
    fingerprints = {
        template_fingerprint(PromptConfig(), MOVIES),
        template_fingerprint(PromptConfig(history_tokens=7), MOVIES),
        template_fingerprint(PromptConfig(), get_scenario("books")),
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_rows_are_asked_in_the_chosen_frameworks_words(small_world: Workspace, name: FrameworkName) -> None:
    chosen = FRAMEWORKS[name]
    users = list(
        user_prompts(
            small_world.read_table("users"),
            small_world.read_table("histories"),
            ItemCatalog.load(small_world),
            PromptConfig(framework=name),
            MOVIES,
            len,
        )
    )
    assert len(users) == 40
    question = chosen.user_template.splitlines()[-1].format(items="movies")
    for prompt in users:
        assert prompt.system == user_system(chosen, MOVIES)
        assert prompt.text.endswith("\n" + question)
    for prompt in item_prompts(small_world.read_table("items"), MOVIES, name):
        assert prompt.system == item_system(chosen, MOVIES)
        i = prompt.id - 100
        genres = ["Drama", "War"] if i % 2 else ["Comedy"]
        asked = item_prompt(chosen, MOVIES, f"Film {i} (19{70 + i % 30})", {"genres": genres})
        assert (prompt.text, prompt.facts) == asked


@pytest.mark.parametrize("part", [f.name for f in fields(Framework)])
def test_template_fingerprint_moves_with_its_own_framework_only(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fingerprints() -> dict[str, str]:
        return {name: template_fingerprint(PromptConfig(framework=name), MOVIES) for name in FRAMEWORKS}

    before = fingerprints()
    assert len(set(before.values())) == len(FRAMEWORKS)
    monkeypatch.setitem(FRAMEWORKS, "once", replace(FRAMEWORKS["once"], **{part: "Another wording."}))
    assert {name for name, value in fingerprints().items() if value != before[name]} == {"once"}


def test_recipe_takes_every_framework_and_names_an_unknown_one(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    recipe = (
        "name: x\nscenario: movies\nworkspace: w\nsource: {type: movielens-100k}\nengine: {type: echo}\n"
        "prompts: {framework: %s}\n"
    )
    assert set(get_args(FrameworkName)) == set(FRAMEWORKS)
    for name in FRAMEWORKS:
        file.write_text(recipe % name)
        assert load_recipe(file).prompts.framework == name
    file.write_text(recipe % "rlmrecs")
    expected = r"prompts\.framework: Input should be 'kar', 'once', 'rlmrec' or 'trawl' \(found 'rlmrecs'\)"
    with pytest.raises(RecipeError, match=expected):
        load_recipe(file)
