"""LIBER's cascading prompts (arXiv 2411.14713): what the LLM wrote of a user before, and what the user did since.

From the paper: a long history is read one partition at a time, each beside the text of those before it, so that a
prompt stays short however long the history is. Ours: the wording and the budgets. The earlier text stands in quotes,
because the quality gate counts nothing quoted as an echo, and it opens the facts too, so that a fallback forgets
nothing. No profile is quoted: the earlier text speaks of it.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from owlrec.prompting.framework import quoted_behaviour, scenario_words
from owlrec.prompting.text import clean_text, fit_recent
from owlrec.refresh.config import RefreshConfig
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint

_SYSTEM = "You keep a brief summary of a user's preferences on {items}, with reasons."
_NEXT = (
    'Summary so far: "{earlier}"\n'
    "Since then the user {consumed}, oldest first: {behaviors}.\n"
    "Write the summary anew: what still holds, what is new, and why."
)
_FIRST = (
    "The user {consumed} these {items}, oldest first: {behaviors}.\n"
    "Summarise the user's preferences on {items}, considering {factors}."
)
_CHARS_PER_TOKEN = 12  # more than any tokenizer packs into one


def wording_fingerprint(config: RefreshConfig, scenario: Scenario) -> str:
    """SHA-256 of all that shapes a prompt besides its user."""
    return fingerprint(config.previous_tokens, config.partition_tokens, scenario, _SYSTEM, _NEXT, _FIRST)


def refresh_system(scenario: Scenario) -> str:
    """The system turn that all prompts of a scenario share."""
    return _SYSTEM.format(items=scenario.items)


def refresh_prompt(
    scenario: Scenario,
    previous: str,
    behaviors: Sequence[tuple[str, float | None]],
    config: RefreshConfig,
    count_tokens: Callable[[str], int],
) -> tuple[str, str]:
    """The prompt for one user, and the same facts as sentences of their own.

    previous: what the LLM wrote of the user before, "" for nothing.
    behaviors: (title, rating) of the new partition, oldest first, all with a title; the oldest are dropped until the
    list fits its budget.
    Returns two "" where no behavior is left.
    """
    entries = [quoted_behaviour(scenario, title, rating) for title, rating in behaviors]
    kept = fit_recent(entries, config.partition_tokens, count_tokens)
    if not kept:
        return "", ""
    earlier = first_tokens(previous, config.previous_tokens, count_tokens)
    words, behaved = scenario_words(scenario, scenario.user_factors), "; ".join(kept)
    template, opening = (_NEXT, f"{earlier} Since then the user") if earlier else (_FIRST, "The user")
    text = template.format(**words, earlier=earlier, behaviors=behaved)
    return text, f"{opening} {scenario.consumed} these {scenario.items}: {behaved}."


def first_tokens(text: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The beginning of `text`, cleaned, in whole words that make at most `budget_tokens`.

    Where not even the first word fits, as in a script that puts no blanks between words, it is cut inside.
    """
    if budget_tokens < 1:
        return ""
    text = clean_text(text, max_chars=_CHARS_PER_TOKEN * budget_tokens)
    return _longest(text.split(), " ", budget_tokens, count_tokens) or _longest(text, "", budget_tokens, count_tokens)


def _longest(pieces: Sequence[str], glue: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    ends = range(1, len(pieces) + 1)
    return glue.join(pieces[: bisect_right(ends, budget_tokens, key=lambda end: count_tokens(glue.join(pieces[:end])))])
