"""ReLLa's ranking prompt (WWW 2024, arXiv 2308.11131): a user in a sentence, numbered behaviors with their ratings,
one candidate, and an answer of Yes or No.

The structure follows the paper, the wording is ours. One function writes all variants, with the most recent behaviors,
the retrieved ones, or both. The candidate comes last, so an engine with a prefix cache reads the shared parts of a
request's candidates once: profile and recent behaviors, and the retrieved ones if they are for the
whole set. The paper retrieves for each candidate, which leaves little to share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from owlrec.config import Config
from owlrec.prompting.framework import (
    clean_text,
    enumerate_words,
    fit_recent,
    quoted_behavior,
    quoted_title,
    scenario_words,
)
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint

YES, NO = "Yes", "No"  # the tuned and scored answers

# The system turn has the parts that no row changes. A scenario without ratings asks about the act itself.
_SYSTEM_GRADED = (
    "You judge from a user's {history} whether the user will like one more {item}. "
    "The more {unit}s the user gave, the better the user liked the {item}."
)
_SYSTEM_UNGRADED = "You judge from a user's {history} whether it is likely that the user {consumed} one more {item}."
_RECENT = "The user {consumed} these {items} last, in this order:{behaviors}"
_RETRIEVED = (
    "Of all {items} that the user {consumed}, these are most like the {asked} in question, in this order:{behaviors}"
)
_NO_HISTORY = "Nothing is known of the user's {history}."
_QUESTION_GRADED = "Will the user like the {item} {target}?"
_QUESTION_UNGRADED = "Is it likely that the user {consumed} the {item} {target}?"
_INSTRUCTION = f"Answer only {YES} or {NO}."


RetrievedFor = Literal["set", "candidate"]


class RankPromptConfig(Config):
    """Targets of the retrieval of behaviors, and the length of quoted histories."""

    # set: once for all candidates of a request, which then share all but their titles; candidate: for each (ReLLa).
    retrieved_for: RetrievedFor = "set"
    history_tokens: int = Field(512, ge=0)  # for each list; the paper gains nothing beyond prompts of 700


def rank_fingerprint(config: RankPromptConfig, scenario: Scenario) -> str:
    """SHA-256 of everything that shapes a prompt besides its row: an adapter must not score another wording."""
    graded, ungraded = (_SYSTEM_GRADED, _QUESTION_GRADED), (_SYSTEM_UNGRADED, _QUESTION_UNGRADED)
    shared = (_RECENT, _RETRIEVED, _NO_HISTORY, _INSTRUCTION)
    return fingerprint(config, scenario, graded if scenario.rating_unit else ungraded, shared)


def rank_system(scenario: Scenario) -> str:
    """System turn shared by all prompts of a scenario."""
    template = _SYSTEM_GRADED if scenario.rating_unit else _SYSTEM_UNGRADED
    return template.format(**scenario_words(scenario, scenario.user_factors))


def rank_prompt(
    scenario: Scenario,
    profile: Mapping[str, str],
    target: str,
    config: RankPromptConfig,
    count_tokens: Callable[[str], int],
    *,
    recent: Sequence[tuple[str, float | None]] = (),
    retrieved: Sequence[tuple[str, float | None]] = (),
) -> tuple[str, str]:
    """System turn and user turn that ask whether the user will like one candidate.

    profile: the user's profile fields; uses only the scenario's fields with a value.
    target: the candidate's title. recent, retrieved: (title, rating), oldest first; either may be empty, and a
    behavior without a title is left out. A rating is quoted unchanged, since only the source knows its scale and
    must refuse invalid ones. With a rating of None, or a scenario without graded ratings,
    only the title is quoted.

    The oldest entries of each list are dropped until it fits `history_tokens`. Candidate and question are always
    included, with the title truncated to 120 characters. Each list has its own budget, so the shared beginning depends
    on no candidate. If no behavior is left, the prompt says that none is known. Returns two "" if the candidate has no
    title, since there is nothing to ask.
    """
    if not is_quotable(target):
        return "", ""
    asked = scenario.items if config.retrieved_for == "set" else scenario.item
    words = scenario_words(scenario, scenario.user_factors) | {"target": quoted_title(target), "asked": asked}

    def listed(template: str, behaviors: Sequence[tuple[str, float | None]]) -> str:
        lines = _numbered(scenario, behaviors, config.history_tokens, count_tokens)
        return template.format(**words, behaviors=lines) if lines else ""

    lately, alike = listed(_RECENT, recent), listed(_RETRIEVED, retrieved)
    unknown = "" if lately or alike else _NO_HISTORY.format(**words)
    question = (_QUESTION_GRADED if scenario.rating_unit else _QUESTION_UNGRADED).format(**words)
    parts = (_profile_sentence(scenario, profile), unknown, lately, alike, question, _INSTRUCTION)
    return rank_system(scenario), "\n".join(part for part in parts if part)


def is_quotable(title: str) -> bool:
    """Whether anything of a title is left after cleaning."""
    return quoted_title(title) != quoted_title("")


def _profile_sentence(scenario: Scenario, profile: Mapping[str, str]) -> str:
    values = {field: clean_text(profile.get(field) or "", max_chars=60) for field in scenario.profile_fields}
    facts = tuple(f"{field} is {value}" for field, value in values.items() if value)
    return f"The user's {enumerate_words(facts)}." if facts else ""


def _numbered(
    scenario: Scenario,
    behaviors: Sequence[tuple[str, float | None]],
    budget_tokens: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The latest behaviors that fit, oldest first, each on its own numbered line; "" if none fits."""
    entries = [quoted_behavior(scenario, title, rating) for title, rating in behaviors if is_quotable(title)]
    numbering = count_tokens(f"\n{len(entries)}. ")  # separate, since counts of titles are cached
    kept = fit_recent(entries, budget_tokens, lambda entry: count_tokens(entry) + numbering)
    return "".join(f"\n{number}. {entry}" for number, entry in enumerate(kept, 1))
