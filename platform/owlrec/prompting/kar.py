"""KAR's factorisation prompts (RecSys 2024, sec. 3.1) as pure functions: preference reasoning about a user, facts
about an item.

A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
answer. The structure and the factors follow the paper, the wording is ours. What all rows share stands in the system
turn, so that a batching engine computes and keeps that prefix once; the question ends the user turn, since a small
model goes on with whatever it read last.
"""

from collections.abc import Callable, Mapping, Sequence

from owlrec.prompting.text import clean_text, fit_recent
from owlrec.scenario import Scenario

FRAMEWORK = "kar"

USER_SYSTEM = (
    "You explain what kinds of {items} a user likes and dislikes, and why. You consider {factors}. "
    "You give a reason from the {history} for each point, in a few clear and brief sentences."
)
USER_TEMPLATE = (
    "{profile}The user {consumed} these {items}, oldest first: {behaviours}.\n"
    "Analyse the user's preferences on {items} and explain them."
)
ITEM_SYSTEM = "You introduce {items} and describe their {factors}. You state facts, in a few clear and brief sentences."
ITEM_TEMPLATE = "Introduce the {item} {description} and describe its attributes."


def user_system(scenario: Scenario) -> str:
    """The system turn that all users' prompts of a scenario share."""
    return USER_SYSTEM.format(items=scenario.items, factors=_enumerate(scenario.user_factors), history=scenario.history)


def item_system(scenario: Scenario) -> str:
    """The system turn that all items' prompts of a scenario share."""
    return ITEM_SYSTEM.format(items=scenario.items, factors=_enumerate(scenario.item_factors))


def user_prompt(
    scenario: Scenario,
    profile: Mapping[str, str],
    behaviours: Sequence[tuple[str, float | None]],
    *,
    history_tokens: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The preference-reasoning prompt for one user.

    profile: the user's profile fields; empty ones and those the scenario does not name are left out.
    behaviours: (title, rating) oldest first; a rating of None, or a scenario without graded ratings, quotes the title
    alone. history_tokens: budget for the list of behaviours; the oldest are dropped until it fits.
    Returns "" where no behaviour is left: a user without one has nothing to reason about.
    """
    entries = [_behaviour(scenario, title, rating) for title, rating in behaviours]
    kept = fit_recent(entries, history_tokens, count_tokens)
    if not kept:
        return ""
    fields = [f"{f} {clean_text(profile[f], max_chars=60)}" for f in scenario.profile_fields if profile.get(f)]
    return USER_TEMPLATE.format(
        items=scenario.items,
        consumed=scenario.consumed,
        profile=f"User: {', '.join(fields)}. " if fields else "",
        behaviours="; ".join(kept),
    )


def item_prompt(scenario: Scenario, title: str, attributes: Mapping[str, str | Sequence[str]]) -> str:
    """The factual-knowledge prompt for one item.

    attributes: the item's columns; those that the scenario lists as text fields are quoted, where they have a value.
    Returns "" where the item has neither a title nor such an attribute.
    """
    title = clean_text(title)
    facts = []
    for field in scenario.text_fields:
        value = attributes.get(field) or ""
        text = value if isinstance(value, str) else ", ".join(value)
        if text:
            facts.append(f"{field}: {clean_text(text)}")
    if not facts and not title:
        return ""
    description = " ".join(
        part for part in (f'"{title}"' if title else "", f"({'; '.join(facts)})" if facts else "") if part
    )
    return ITEM_TEMPLATE.format(item=scenario.item, description=description)


def _behaviour(scenario: Scenario, title: str, rating: float | None) -> str:
    quoted = f'"{clean_text(title, max_chars=120)}"'
    if rating is None or not scenario.rating_unit:
        return quoted
    return f"{quoted} {rating:g} {scenario.rating_unit}{'' if rating == 1 else 's'}"


def _enumerate(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
