"""Tables to prompts."""

import numpy as np
import pyarrow as pa

from owlrec.prompting.rows import ItemCatalog, PromptConfig, item_prompts, template_fingerprint, user_prompts
from owlrec.scenario import get_scenario
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
    prompts = list(item_prompts(small_world.read_table("items"), MOVIES))
    assert {p.id for p in prompts} == set(range(100, 130))
    assert all(p.as_of == 0 for p in prompts)


def test_template_fingerprint_sees_scenario_and_settings() -> None:
    prints = {
        template_fingerprint(PromptConfig(), MOVIES),
        template_fingerprint(PromptConfig(history_tokens=7), MOVIES),
        template_fingerprint(PromptConfig(), get_scenario("books")),
    }
    assert len(prints) == 3
