"""What the prompt families share: a `Framework` is one paper's four templates, and the functions here fill them.

Each family is a module that holds nothing but its templates; how behaviours, profiles and attributes are quoted,
cleaned and fitted into their budget is the same for all, so that a comparison of families compares their questions.
What all rows share stands in the system turn, so that a batching engine computes and keeps that prefix once; the
question ends the user turn, since a small model goes on with whatever it read last.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from owlrec.scenario import USUAL_BEST, Scenario

# ----------------------------------------------------------------------------------------------------------------- text
# Makes untrusted text safe to quote in a prompt, and fits a history into a token budget.
#
# Titles and profile fields come from outside: a title may hold another model's control tokens, bidirectional overrides
# or a whole page. What is removed could otherwise end the user's turn early and let a title give the model orders.


# Turn, sentence and instruction markers of the chat templates in use (ChatML, Llama 2 and 3, Gemma, Mistral,
# DeepSeek, GLM).
TEMPLATE_TOKEN = re.compile(
    r"<[|｜][^<>]{0,60}?[|｜]>|</?s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|\[gMASK\]|<sop>|</?think>",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[<\[]")
_CHARS_PER_TOKEN = 12  # more than any tokenizer packs into one
_ROOM = 50  # times the wanted length that are read at all: a page of controls in place of a title costs no seconds


def clean_text(text: str, *, max_chars: int = 200) -> str:
    """`text` on one line, without control characters or chat-template tokens, at most `max_chars` long.

    Double quotes become single ones, since prompts quote titles in double quotes. A cut is marked by an ellipsis.
    """
    if text.isascii() and text.isprintable() and not _MARKUP.search(text):  # nearly every title: nothing to remove
        return _on_one_line(text, max_chars)
    text = unicodedata.normalize("NFC", text[: max_chars * _ROOM])
    # Cc and Cf hold control, zero-width and bidirectional characters; Co and Cs private use and lone surrogates.
    text = "".join(
        " " if c in "\t\n\r\v\f" else c
        for c in text
        if c in "\t\n\r\v\f" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs")
    )
    while True:  # removing one token may join the halves of another
        stripped = TEMPLATE_TOKEN.sub("", text)
        if stripped == text:
            break
        text = stripped
    return _on_one_line(text, max_chars)


def _on_one_line(text: str, max_chars: int) -> str:
    text = " ".join(text.split()).replace('"', "'")
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def fit_recent(entries: Sequence[str], budget_tokens: int, count_tokens: Callable[[str], int]) -> Sequence[str]:
    """The longest run of the most recent `entries` (last = newest) whose token counts add up to at most
    `budget_tokens`.

    The oldest go first: what a user did lately tells most about what comes next. May be empty.
    """
    spent = 0
    for kept, entry in enumerate(reversed(entries)):
        spent += count_tokens(entry)
        if spent > budget_tokens:
            return entries[len(entries) - kept :]
    return entries


def first_tokens(text: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The beginning of `text`, cleaned, in whole words that make at most `budget_tokens`.

    Where not even the first word fits, as in a script that puts no blanks between words, it is cut inside.
    """
    if budget_tokens < 1:
        return ""
    text = clean_text(text, max_chars=_CHARS_PER_TOKEN * budget_tokens)
    if count_tokens(text) <= budget_tokens:
        return text
    return _longest(text.split(), " ", budget_tokens, count_tokens) or _longest(text, "", budget_tokens, count_tokens)


def _longest(pieces: Sequence[str], glue: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    ends = range(1, len(pieces) + 1)
    return glue.join(pieces[: bisect_right(ends, budget_tokens, key=lambda end: count_tokens(glue.join(pieces[:end])))])


def in_budget(entries: Sequence[str], budget_tokens: int, count_tokens: Callable[[str], int]) -> list[int]:
    """Where to part `entries`, so that each run of them has at most `budget_tokens`, or is a single longer entry.

    Returns the end of each run, ascending; the last one is len(entries). None is left out.
    """
    ends, spent = list[int](), 0
    for place, entry in enumerate(entries):
        tokens = count_tokens(entry)
        if place and spent + tokens > budget_tokens:
            ends.append(place)
            spent = 0
        spent += tokens
    return [*ends, len(entries)] if entries else []


# ------------------------------------------------------------------------------------------------------------ framework


_USUAL_CHARS = 300  # of a title; longer ones are not remembered
FrameworkName = Literal["kar", "once", "rlmrec", "trawl"]


@dataclass(frozen=True)
class Framework:
    """The templates of one family, for `str.format`.

    Each may name the scenario's words {item}, {items}, {consumed}, {history} and {factors}: the user factors in the
    user's templates, the item factors in the item's.
    """

    user_system: str
    # Must name {behaviours}; {profile} is "" or a sentence and a space, {passed} is "" or a space and a sentence.
    user_template: str
    item_system: str
    item_template: str  # must name {description}: the quoted title and, in brackets, the attributes


def user_system(framework: Framework, scenario: Scenario) -> str:
    """The system turn that all users' prompts of a scenario share."""
    return framework.user_system.format(**scenario_words(scenario, scenario.user_factors))


def item_system(framework: Framework, scenario: Scenario) -> str:
    """The system turn that all items' prompts of a scenario share."""
    return framework.item_system.format(**scenario_words(scenario, scenario.item_factors))


def user_prompt(
    framework: Framework,
    scenario: Scenario,
    profile: Mapping[str, str],
    behaviours: Sequence[tuple[str, float | None]],
    passed: Sequence[str] = (),
    *,
    history_tokens: int,
    count_tokens: Callable[[str], int],
) -> tuple[str, str]:
    """The prompt for one user, and the same facts as a sentence of their own.

    profile: the user's profile fields; empty ones and those the scenario does not name are left out, and all of them
    where the family does not ask for them.
    behaviours: (title, rating) oldest first; a rating of None, or a scenario without graded ratings, quotes the title
    alone. passed: titles that the user passed over, oldest first.
    history_tokens: budget for the list of behaviours; the oldest are dropped until it fits.
    Returns two "" where no behaviour is left: a user without one has nothing to reason about.
    """
    entries = [quoted_behaviour(scenario, title, rating) for title, rating in behaviours]
    kept = fit_recent(entries, history_tokens, count_tokens)
    if not kept:
        return "", ""
    fields = [f"{f} {clean_text(profile[f], max_chars=60)}" for f in scenario.profile_fields if profile.get(f)]
    behaved, about = "; ".join(kept), f"User: {', '.join(fields)}. " if fields else ""
    left = "; ".join(quoted_title(title) for title in passed)
    not_taken = f" The user {scenario.passed_over} these: {left}." if left else ""
    words = scenario_words(scenario, scenario.user_factors)
    text = framework.user_template.format(**words, profile=about, behaviours=behaved, passed=not_taken)
    return text, f"{about}The user {scenario.consumed} these {scenario.items}: {behaved}.{not_taken}"


def item_prompt(
    framework: Framework, scenario: Scenario, title: str, attributes: Mapping[str, str | Sequence[str]]
) -> tuple[str, str]:
    """The prompt for one item, and the same facts as a sentence of their own.

    attributes: the item's columns; those that the scenario lists as text fields are quoted, where they have a value.
    Returns two "" where the item has neither a title nor such an attribute.
    """
    title = clean_text(title)
    facts = []
    for field in scenario.text_fields:
        value = attributes.get(field) or ""
        text = value if isinstance(value, str) else ", ".join(value)
        if text:
            facts.append(f"{field}: {clean_text(text)}")
    if not facts and not title:
        return "", ""
    description = " ".join(
        part for part in (f'"{title}"' if title else "", f"({'; '.join(facts)})" if facts else "") if part
    )
    text = framework.item_template.format(**scenario_words(scenario, scenario.item_factors), description=description)
    return text, f"The {scenario.item} {description}."


def scenario_words(scenario: Scenario, factors: tuple[str, ...]) -> dict[str, str]:
    """What templates may name."""
    return {
        "item": scenario.item,
        "items": scenario.items,
        "consumed": scenario.consumed,
        "history": scenario.history,
        "unit": scenario.unit,
        "factors": enumerate_words(factors),
    }


def quoted_behaviour(scenario: Scenario, title: str, rating: float | None) -> str:
    """A title in quotes, and its rating where there is one and the scenario grades."""
    quoted = quoted_title(title)
    if rating is None or not scenario.unit:
        return quoted
    best = f" of {scenario.best_rating:g}" if scenario.best_rating != USUAL_BEST else ""
    return f"{quoted} {rating:g}{best} {scenario.unit}{'' if rating == 1 and not best else 's'}"


def quoted_title(title: str) -> str:
    """A title, cleaned and in quotes."""
    return _quoted(title) if len(title) <= _USUAL_CHARS else _quoted.__wrapped__(title)


@lru_cache(maxsize=1 << 16)
def _quoted(title: str) -> str:
    """Remembered, since most titles stand in many histories."""
    return f'"{clean_text(title, max_chars=120)}"'


@lru_cache(maxsize=64)
def enumerate_words(words: tuple[str, ...]) -> str:
    """ "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
