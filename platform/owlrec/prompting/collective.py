"""REKI's collective prompts (arXiv 2408.10520): one text for a whole cohort, read off its most representative members.

From the paper: the titles that a group shares stand for it, and every member takes the group's text. Ours: the wording,
in the scenario's own words and factors (the released prompts call books movies), what the group disliked beside what
it liked, and attributes that most of it share. A cohort without a title or an attribute is never asked about: in the
released data nine tenths of one set of groups were, and the answers ask for titles.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from owlrec.prompting.framework import enumerate_words, quoted_title
from owlrec.prompting.rows import Prompt
from owlrec.prompting.text import clean_text
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint

_USER_SYSTEM = (
    "You explain what kinds of {items} a group of similar users likes and dislikes, and why. You consider {factors}. "
    "You give a reason from what the group chose for each point, in a few clear and brief sentences."
)
_USER_TEMPLATE = "{facts}\nAnalyse what these users have in common in their preferences on {items} and explain it."
_ITEM_SYSTEM = (
    "You introduce groups of similar {items} and describe what they share: their {factors}. You state facts, in a few "
    "clear and brief sentences."
)
_ITEM_TEMPLATE = "{facts}\nDescribe what these {items} have in common and whom they appeal to."


def collective_fingerprint(scenario: Scenario) -> str:
    """SHA-256 of the wording."""
    return fingerprint(scenario, _USER_SYSTEM, _USER_TEMPLATE, _ITEM_SYSTEM, _ITEM_TEMPLATE)


def cohort_prompts(profiles: pa.Table, scenario: Scenario) -> Iterator[Prompt]:
    """The prompts of cohorts (cohorts.profiles.PROFILES), in their order; "" where there is nothing to ask about."""
    systems = {
        "user": _USER_SYSTEM.format(items=scenario.items, factors=enumerate_words(scenario.user_factors)),
        "item": _ITEM_SYSTEM.format(items=scenario.items, factors=enumerate_words(scenario.item_factors)),
    }
    for row in profiles.to_pylist():
        if row["kind"] == "user":
            liked, disliked = row["titles"], row["opposite"]
            if row["facet"] == "disliked":
                liked, disliked = disliked, liked
            facts, template = user_group_facts(scenario, liked, disliked, row["attributes"]), _USER_TEMPLATE
        else:
            facts, template = item_group_facts(scenario, row["titles"], row["attributes"]), _ITEM_TEMPLATE
        text = template.format(facts=facts, items=scenario.items) if facts else ""
        yield Prompt("cohort", row["id"], row["as_of"], systems[row["kind"]], text, facts)


def user_group_facts(
    scenario: Scenario, liked: Sequence[str], disliked: Sequence[str], attributes: Sequence[str]
) -> str:
    """What is known of a group of users, in sentences; "" for nothing."""
    parts = []
    if attributes:
        parts.append(f"Most users of this group: {', '.join(clean_text(a, max_chars=60) for a in attributes)}.")
    if liked:
        parts.append(f"Users of this group {scenario.consumed} and liked these {scenario.items}: {_list(liked)}.")
    if disliked:
        parts.append(f"They disliked these or left them alone: {_list(disliked)}.")
    return " ".join(parts)


def item_group_facts(scenario: Scenario, titles: Sequence[str], attributes: Sequence[str]) -> str:
    """What is known of a group of items, in sentences; "" for nothing."""
    parts = []
    if titles:
        parts.append(f"The same users like these {scenario.items}: {_list(titles)}.")
    if attributes:
        parts.append(
            f"Most {scenario.items} of this group: {', '.join(clean_text(a, max_chars=60) for a in attributes)}."
        )
    return " ".join(parts)


def _list(titles: Sequence[str]) -> str:
    return "; ".join(quoted_title(title) for title in titles)
