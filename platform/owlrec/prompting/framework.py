"""Shared parts of the prompt frameworks: a `Framework` is one paper's four templates, and the functions here fill them.

Each framework consists only of templates. All of them quote, clean and truncate behaviors, profiles and attributes in
the same way, so comparing frameworks compares only their questions.
The parts shared by all rows are in the system turn, so a batching engine computes and keeps that prefix once. The
question ends the user turn, since a small model continues from whatever it read last.
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
# Makes untrusted text safe to quote in a prompt, and truncates a history to a token budget.
#
# Titles and profile fields are untrusted: a title may contain another model's control tokens, bidirectional overrides
# or a whole page. Such tokens could end the user's turn early and let a title give instructions to the model.


# Turn, sentence and instruction markers of the chat templates in use (ChatML, Llama 2 and 3, Gemma, Mistral,
# DeepSeek, GLM).
TEMPLATE_TOKEN = re.compile(
    r"<[|｜][^<>]{0,60}?[|｜]>|</?s>|\[/?INST\]|\[/?SYSTEM_PROMPT\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|\[gMASK\]|<sop>|</?think>",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[<\[]")
_CHARS_PER_TOKEN = 12  # more than any tokenizer packs into one
_ROOM = 50  # multiple of the wanted length that is read, so a page of controls is cheap


def clean_text(text: str, *, max_chars: int = 200) -> str:
    """`text` on one line, without control characters or chat-template tokens, at most `max_chars` long.

    Double quotes become single ones, since prompts quote titles in double quotes. An ellipsis marks truncation.
    """
    if text.isascii() and text.isprintable() and not _MARKUP.search(text):  # nearly every title: nothing to remove
        return _on_one_line(text, max_chars)
    text = unicodedata.normalize("NFC", text[: max_chars * _ROOM])
    # Cc and Cf contain control, zero-width and bidirectional characters; Co and Cs private use and lone surrogates.
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
    """The longest run of the most recent `entries` (last = newest) whose token counts sum to at most
    `budget_tokens`.

    The oldest are dropped first: a user's latest behaviors say most about the next one. May be empty.
    """
    spent = 0
    for kept, entry in enumerate(reversed(entries)):
        spent += count_tokens(entry)
        if spent > budget_tokens:
            return entries[len(entries) - kept :]
    return entries


def first_tokens(text: str, budget_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The beginning of `text`, cleaned, in whole words of at most `budget_tokens` together.

    If even the first word does not fit, as in a script without blanks between words, it is truncated.
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
    """Splits `entries` into runs of at most `budget_tokens`, or of a single longer entry.

    Returns the end of each run, ascending; the last one is len(entries). All entries are included.
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


_USUAL_CHARS = 300  # of a title; longer ones are not cached
FrameworkName = Literal["kar", "once", "rlmrec", "trawl"]


@dataclass(frozen=True)
class Framework:
    """Templates of one framework, for `str.format`.

    Each may use the scenario's words {item}, {items}, {consumed}, {history} and {factors}: user factors in
    the user's templates, item factors in the item's.
    """

    user_system: str
    # Must contain {behaviors}; {profile} is "" or a sentence and a space, {passed} is "" or a space and a sentence.
    user_template: str
    item_system: str
    item_template: str  # must contain {description}: the quoted title and, in brackets, the attributes


def user_system(framework: Framework, scenario: Scenario) -> str:
    """System turn shared by all users' prompts of a scenario."""
    return framework.user_system.format(**scenario_words(scenario, scenario.user_factors))


def item_system(framework: Framework, scenario: Scenario) -> str:
    """System turn shared by all items' prompts of a scenario."""
    return framework.item_system.format(**scenario_words(scenario, scenario.item_factors))


def user_prompt(
    framework: Framework,
    scenario: Scenario,
    profile: Mapping[str, str],
    behaviors: Sequence[tuple[str, float | None]],
    passed: Sequence[str] = (),
    *,
    history_tokens: int,
    count_tokens: Callable[[str], int],
) -> tuple[str, str]:
    """Prompt for one user, and the same facts as a separate sentence.

    profile: the user's profile fields; uses only the scenario's fields with a value, and none if the framework does not
    ask for them.
    behaviors: (title, rating) oldest first; with a rating of None, or a scenario without graded ratings, only the
    title is quoted. passed: titles that the user passed over, oldest first. history_tokens: budget for the list of
    behaviors; the oldest are dropped until it fits. Returns two "" if no behavior is left, since there is nothing to
    reason about.
    """
    entries = [quoted_behavior(scenario, title, rating) for title, rating in behaviors]
    kept = fit_recent(entries, history_tokens, count_tokens)
    if not kept:
        return "", ""
    fields = [f"{f} {clean_text(profile[f], max_chars=60)}" for f in scenario.profile_fields if profile.get(f)]
    behaved, about = "; ".join(kept), f"User: {', '.join(fields)}. " if fields else ""
    left = "; ".join(quoted_title(title) for title in passed)
    not_taken = f" The user {scenario.passed_over} these: {left}." if left else ""
    words = scenario_words(scenario, scenario.user_factors)
    text = framework.user_template.format(**words, profile=about, behaviors=behaved, passed=not_taken)
    return text, f"{about}The user {scenario.consumed} these {scenario.items}: {behaved}.{not_taken}"


def item_prompt(
    framework: Framework, scenario: Scenario, title: str, attributes: Mapping[str, str | Sequence[str]]
) -> tuple[str, str]:
    """Prompt for one item, and the same facts as a separate sentence.

    attributes: the item's columns; quotes the scenario's text fields that have a value.
    Returns two "" if the item has neither a title nor such an attribute.
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
    """Words that templates may use."""
    return {
        "item": scenario.item,
        "items": scenario.items,
        "consumed": scenario.consumed,
        "history": scenario.history,
        "unit": scenario.unit,
        "factors": enumerate_words(factors),
    }


def quoted_behavior(scenario: Scenario, title: str, rating: float | None) -> str:
    """A title in quotes, with its rating if there is one and the scenario has graded ratings."""
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
    """Cached, since most titles occur in many histories."""
    return f'"{clean_text(title, max_chars=120)}"'


@lru_cache(maxsize=64)
def enumerate_words(words: tuple[str, ...]) -> str:
    """ "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
