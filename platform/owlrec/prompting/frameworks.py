"""The prompt frameworks: KAR, RLMRec, TRAWL and ONCE for texts, ReLLa for ranking, and what fills their templates.

The structure follows each paper, the wording is ours.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import Field

from owlrec.config import Config
from owlrec.scenario import USUAL_BEST, Scenario
from owlrec.storage import fingerprint

# ------------------------------------------------------------------------------------------------------------ framework
# Shared parts of the prompt frameworks: a `Framework` is one paper's four templates, and the functions here fill them.
#
# Each framework consists only of templates. All of them quote, clean and truncate behaviors, profiles and attributes in
# the same way, so comparing frameworks compares only their questions.
# The parts shared by all rows are in the system turn, so a batching engine computes and keeps that prefix once. The
# question ends the user turn, since a small model continues from whatever it read last.


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


# ----------------------------------------------------------------------------------------------------------- frameworks
# The prompt frameworks: KAR, RLMRec, TRAWL and ONCE. The structure follows each paper, the wording is ours.


# ------------------------------------------------------------------------------------------------------------------ kar
# KAR's factorization prompts (RecSys 2024, sec. 3.1): preference reasoning about a user, facts about an item.
#
# A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
# answer. The structure and the factors follow the paper, the wording is ours.


KAR = Framework(
    user_system=(
        "You explain what kinds of {items} a user likes and dislikes, and why. You consider {factors}. "
        "You give a reason from the {history} for each point, in a few clear and brief sentences."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "Analyze the user's preferences on {items} and explain them."
    ),
    item_system=(
        "You introduce {items} and describe their {factors}. You state facts, in a few clear and brief sentences."
    ),
    item_template="Introduce the {item} {description} and describe its attributes.",
)


# --------------------------------------------------------------------------------------------------------------- rlmrec
# RLMRec's profile prompts (WWW 2024): the kinds of users an item appeals to, and the kinds of items a user likes,
# each with a reason.
#
# From the paper: both profiles refer to the other side, so they can be aligned with collaborative
# signals; a summary comes first and a brief reasoning after it; no profile fields, since a user is defined by
# their interactions. Ours: the wording, prose instead of the paper's JSON, and ratings where the paper quotes reviews.
# The paper also quotes the interacted items' finished profiles in a user's prompt; we write users and items at the same
# time, so prompts quote only titles.


RLMREC = Framework(
    user_system=(
        "You tell what kinds of {items} appeal to a user, judging by those that the user {consumed}. First you sum "
        "up the kinds in one or two sentences, then you explain briefly how the {history} shows it."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "What kinds of {items} would appeal to this user, and why?"
    ),
    item_system=(
        "You tell what kinds of users a given {item} appeals to. First you sum up in one or two sentences who they "
        "are and what they look for in {items}, then you explain briefly which features of the {item} show it."
    ),
    item_template="What kinds of users would the {item} {description} appeal to, and why?",
)


# ---------------------------------------------------------------------------------------------------------------- trawl
# TRAWL's prompts (arXiv 2403.06642, CIKM 2025): from all external knowledge, the LLM keeps the parts that help a
# recommendation.
#
# From the paper, judging by its abstract and reviews of it: raw external knowledge is noisy, so the LLM extracts
# the parts relevant to recommending, guided by the domain's key factors, and adds implications by common sense;
# one such text per item and one per user. Ours: the wording, and the sources. The paper uses external documents; here
# they are the item's own text columns and the world knowledge of the LLM, which also informs how a user's
# behaviors are read.


TRAWL = Framework(
    user_system=(
        "You use what you know of {items} to find out a user's preferences: {factors}. You keep only what bears on "
        "the user's next choice, add what common sense implies, and leave out the rest. "
        "You answer with a short summary."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "From what you know of these {items}, summarize what the user prefers."
    ),
    item_system=(
        "You know much about {items}, and keep only what helps to decide whom to recommend the {item} to: {factors}. "
        "You add what common sense implies and leave out the rest. You answer with a short summary."
    ),
    item_template="Recall what you know of the {item} {description} and summarize what matters for recommending it.",
)


# ----------------------------------------------------------------------------------------------------------------- once
# ONCE's prompts for a closed-source LLM (WSDM 2024, the part called GENRE): a content summarizer for items, a user
# profiler.
#
# From the paper: an item's title is rewritten into a clearer and fuller text, objective and neutral; a user is
# described by topics of interest, strongest first, and by other traits (the paper's is the region), derived from the
# titles alone, so without profile fields and factors. Ours: the wording, traits beyond the region, and sentences
# instead of the paper's fixed list, which a small model seldom keeps to. The paper's third use, inventing content for
# users with short histories, is left out: it makes rows, not knowledge about rows.


ONCE = Framework(
    user_system=(
        "You profile users by the {items} in their {history}. You name the topics that interest the user, the "
        "strongest first, and then the traits that this choice suggests, such as background, taste or region. "
        "You leave out what cannot be told, and write a few short sentences."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "Name the topics that interest this user, then the user's traits."
    ),
    item_system=(
        "You describe {items} to readers who know nothing but a title and a few notes. Your descriptions are clearer "
        "and fuller than the title, complete, objective and neutral, in a few short sentences."
    ),
    item_template="Describe what the {item} {description} is about.",
)


# -------------------------------------------------------------------------------------------------------------- ranking
# ReLLa's ranking prompt (WWW 2024, arXiv 2308.11131): a user in a sentence, numbered behaviors with their ratings,
# one candidate, and an answer of Yes or No.
#
# The structure follows the paper, the wording is ours. One function writes all variants, with the most recent
# behaviors, the retrieved ones, or both. The candidate comes last, so an engine with a prefix cache reads the shared
# parts of a request's candidates once: profile and recent behaviors, and the retrieved ones if they are for the whole
# set. The paper retrieves for each candidate, which leaves little to share.


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
