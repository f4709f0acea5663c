"""KAR's prompts, word for word: earlier knowledge, its fingerprints and its published figures rest on this text."""

import pytest

from owlrec.prompting.frameworks import KAR, item_prompt, item_system, user_prompt, user_system
from owlrec.scenario import SCENARIOS, get_scenario

MOVIES = get_scenario("movies")


def test_user_prompt_of_movies() -> None:
    assert user_system(KAR, MOVIES) == (
        "You explain what kinds of movies a user likes and dislikes, and why. You consider genre, director and actors, "
        "time period and country, character, plot and theme, mood and tone, critical acclaim and awards, production "
        "quality and soundtrack. You give a reason from the viewing history for each point, in a few clear and brief "
        "sentences."
    )
    prompt, facts = user_prompt(
        KAR,
        MOVIES,
        {"gender": "female", "age": "25-34", "occupation": ""},
        [("Alien (1979)", 5.0), ("Big (1988)", 1.0), ("Heat (1995)", None)],
        history_tokens=100,
        count_tokens=len,
    )
    assert prompt == (
        'User: gender female, age 25-34. The user watched these movies, oldest first: "Alien (1979)" 5 stars; '
        '"Big (1988)" 1 star; "Heat (1995)".\n'
        "Analyze the user's preferences on movies and explain them."
    )
    assert facts == (
        'User: gender female, age 25-34. The user watched these movies: "Alien (1979)" 5 stars; "Big (1988)" 1 star; '
        '"Heat (1995)".'
    )


def test_item_prompt_of_books() -> None:
    books = get_scenario("books")
    assert item_system(KAR, books) == (
        "You introduce books and describe their genre, author, writing style, theme, setting, length and complexity, "
        "time period, literary quality and critical acclaim. You state facts, in a few clear and brief sentences."
    )
    prompt, facts = item_prompt(KAR, books, "Emma", {"author": "Jane Austen", "categories": ["Classics", "Romance"]})
    assert prompt == (
        'Introduce the book "Emma" (author: Jane Austen; categories: Classics, Romance) and describe its attributes.'
    )
    assert facts == 'The book "Emma" (author: Jane Austen; categories: Classics, Romance).'


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_every_scenarios_factors_are_named(scenario) -> None:
    assert all(f in user_system(KAR, scenario) for f in scenario.user_factors)
    assert all(f in item_system(KAR, scenario) for f in scenario.item_factors)
