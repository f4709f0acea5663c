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
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint

# ------------------------------------------------------------------------------------------------------------ framework
# What the prompt families share: a `Framework` is one paper's four templates, and the functions here fill them.
#
# Each family is a module that holds nothing but its templates; how behaviours, profiles and attributes are quoted,
# cleaned and fitted into their budget is the same for all, so that a comparison of families compares their questions.
# What all rows share stands in the system turn, so that a batching engine computes and keeps that prefix once; the
# question ends the user turn, since a small model goes on with whatever it read last.


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


_USUAL_BEST = 5  # rating, which goes without saying
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
        "unit": scenario.rating_unit,
        "factors": enumerate_words(factors),
    }


def quoted_behaviour(scenario: Scenario, title: str, rating: float | None) -> str:
    """A title in quotes, and its rating where there is one and the scenario grades."""
    quoted = quoted_title(title)
    if rating is None or not scenario.rating_unit:
        return quoted
    best = f" of {scenario.rating_best:g}" if scenario.rating_best != _USUAL_BEST else ""
    return f"{quoted} {rating:g}{best} {scenario.rating_unit}{'' if rating == 1 and not best else 's'}"


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


# ----------------------------------------------------------------------------------------------------------- frameworks
# The prompt frameworks: KAR, RLMRec, TRAWL and ONCE. The structure follows each paper, the wording is ours.


# ------------------------------------------------------------------------------------------------------------------ kar
# KAR's factorisation prompts (RecSys 2024, sec. 3.1): preference reasoning about a user, facts about an item.
#
# A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
# answer. The structure and the factors follow the paper, the wording is ours.


KAR = Framework(
    user_system=(
        "You explain what kinds of {items} a user likes and dislikes, and why. You consider {factors}. "
        "You give a reason from the {history} for each point, in a few clear and brief sentences."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "Analyse the user's preferences on {items} and explain them."
    ),
    item_system=(
        "You introduce {items} and describe their {factors}. You state facts, in a few clear and brief sentences."
    ),
    item_template="Introduce the {item} {description} and describe its attributes.",
)


# --------------------------------------------------------------------------------------------------------------- rlmrec
# RLMRec's profile prompts (WWW 2024): what kinds of users an item appeals to, what kinds of items appeal to a user,
# each with its reason.
#
# From the paper: both profiles look across to the other side, which is what lets them be aligned with collaborative
# signals; a summary comes first and a brief reasoning after it; no profile fields, since a user is the sum of what
# they interacted with. Ours: the wording, prose for the paper's JSON, and ratings where the paper quotes reviews. The
# paper also quotes the interacted items' finished profiles in a user's prompt; we ask about users and items at once,
# so there titles speak for themselves.


RLMREC = Framework(
    user_system=(
        "You tell what kinds of {items} appeal to a user, judging by those that the user {consumed}. First you sum "
        "up the kinds in one or two sentences, then you explain briefly how the {history} shows it."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "What kinds of {items} would appeal to this user, and why?"
    ),
    item_system=(
        "You tell what kinds of users a given {item} appeals to. First you sum up in one or two sentences who they "
        "are and what they look for in {items}, then you explain briefly which features of the {item} show it."
    ),
    item_template="What kinds of users would the {item} {description} appeal to, and why?",
)


# ---------------------------------------------------------------------------------------------------------------- trawl
# TRAWL's prompts (arXiv 2403.06642, CIKM 2025): from all that is known outside the data, the LLM keeps what helps a
# recommendation.
#
# From the paper, as far as its abstract and reviews of it tell: raw external knowledge is noisy, so the LLM extracts
# what bears on recommending, guided by the domain's key factors, and adds by common sense what the text only implies;
# one such text an item, one a user. Ours: the wording, and the sources. The paper feeds in external documents; here
# they are the item's own text columns and the world knowledge of the LLM, which is also the light in which a user's
# behaviours are read.


TRAWL = Framework(
    user_system=(
        "You use what you know of {items} to find out a user's preferences: {factors}. You keep only what bears on "
        "the user's next choice, add what common sense implies, and leave out the rest. "
        "You answer with a short summary."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "From what you know of these {items}, summarise what the user prefers."
    ),
    item_system=(
        "You know much about {items}, and keep only what helps to decide whom to recommend the {item} to: {factors}. "
        "You add what common sense implies and leave out the rest. You answer with a short summary."
    ),
    item_template="Recall what you know of the {item} {description} and summarise what matters for recommending it.",
)


# ----------------------------------------------------------------------------------------------------------------- once
# ONCE's prompts for a closed-source LLM (WSDM 2024, the part called GENRE): a content summariser for items, a user
# profiler.
#
# From the paper: an item's title is rewritten into a clearer and fuller text, objective and neutral; a user is told by
# the topics of interest, strongest first, and by further traits (the paper's is the region), read off the titles
# alone, hence no profile fields and no factors. Ours: the wording, traits beyond the region, and sentences where the
# paper wants a fixed list, which a small model seldom keeps to. The paper's third use, inventing content for users
# with short histories, is left out: it makes rows, not knowledge about rows.


ONCE = Framework(
    user_system=(
        "You profile users by the {items} in their {history}. You name the topics that interest the user, the "
        "strongest first, and then the traits that this choice suggests, such as background, taste or region. "
        "You leave out what cannot be told, and write a few short sentences."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "Name the topics that interest this user, then the user's traits."
    ),
    item_system=(
        "You describe {items} to readers who know nothing but a title and a few notes. Your descriptions are clearer "
        "and fuller than the title, complete, objective and neutral, in a few short sentences."
    ),
    item_template="Describe what the {item} {description} is about.",
)


# -------------------------------------------------------------------------------------------------------------- ranking
# ReLLa's question (WWW 2024, arXiv 2308.11131): a user in a sentence, numbered behaviours with their ratings, one
# candidate, and an answer that may only be Yes or No.
#
# The structure follows the paper, the wording is ours. One function writes all its variants: the behaviours shown are
# the most recent ones, retrieved ones, or both. The candidate comes last, so an engine that keeps prefixes reads once
# what the candidates of a request share: profile and recent behaviours, and the retrieved ones where they are those of
# the whole set. The paper retrieves for each candidate, which leaves little to share.


YES, NO = "Yes", "No"  # the answers that are tuned for and scored

# The system turn holds what no row changes. A scenario without ratings asks for the act itself.
_SYSTEM_GRADED = (
    "You judge from a user's {history} whether the user will like one more {item}. "
    "The more {unit}s the user gave, the better the user liked the {item}."
)
_SYSTEM_UNGRADED = "You judge from a user's {history} whether it is likely that the user {consumed} one more {item}."
_RECENT = "The user {consumed} these {items} last, in this order:{behaviours}"
_RETRIEVED = (
    "Of all {items} that the user {consumed}, these are most like the {asked} in question, in this order:{behaviours}"
)
_NO_HISTORY = "Nothing is known of the user's {history}."
_QUESTION_GRADED = "Will the user like the {item} {target}?"
_QUESTION_UNGRADED = "Is it likely that the user {consumed} the {item} {target}?"
_INSTRUCTION = f"Answer only {YES} or {NO}."


class RankPromptConfig(Config):
    """For what behaviors are retrieved, and how much of a history is quoted."""

    # set: once for all candidates of a request, which then share all but their own title; candidate: for each (ReLLa).
    retrieved_for: Literal["set", "candidate"] = "set"
    # For each list: about 28 film titles; the paper gains nothing beyond prompts of 700.
    history_tokens: int = Field(512, ge=0)


def rank_fingerprint(config: RankPromptConfig, scenario: Scenario) -> str:
    """SHA-256 of all that shapes a prompt besides its row: what was tuned on one wording must not score another."""
    graded, ungraded = (_SYSTEM_GRADED, _QUESTION_GRADED), (_SYSTEM_UNGRADED, _QUESTION_UNGRADED)
    shared = (_RECENT, _RETRIEVED, _NO_HISTORY, _INSTRUCTION)
    return fingerprint(config, scenario, graded if scenario.rating_unit else ungraded, shared)


def rank_system(scenario: Scenario) -> str:
    """The system turn that all prompts of a scenario share."""
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

    profile: the user's profile fields; empty ones and those that the scenario does not name are left out.
    target: the candidate's title. recent, retrieved: (title, rating), oldest first; either may be empty, and a
    behaviour without a title is left out. A rating is quoted as it stands, since only the source knows its scale: what
    is out of range the source must refuse. A rating of None, or a scenario without graded ratings,
    quotes the title alone.

    Of each list the oldest are dropped until it fits `history_tokens`; candidate and question always stand, the title
    cut to 120 characters. The lists have a budget each, so that the shared beginning depends on no candidate. Where no
    behaviour is left the prompt says that none is known. Returns two "" where the candidate has no title: there is
    nothing to ask about.
    """
    if not is_quotable(target):
        return "", ""
    asked = scenario.items if config.retrieved_for == "set" else scenario.item
    words = scenario_words(scenario, scenario.user_factors) | {"target": quoted_title(target), "asked": asked}

    def listed(template: str, behaviours: Sequence[tuple[str, float | None]]) -> str:
        lines = _numbered(scenario, behaviours, config.history_tokens, count_tokens)
        return template.format(**words, behaviours=lines) if lines else ""

    lately, alike = listed(_RECENT, recent), listed(_RETRIEVED, retrieved)
    unknown = "" if lately or alike else _NO_HISTORY.format(**words)
    question = (_QUESTION_GRADED if scenario.rating_unit else _QUESTION_UNGRADED).format(**words)
    parts = (_profile_sentence(scenario, profile), unknown, lately, alike, question, _INSTRUCTION)
    return rank_system(scenario), "\n".join(part for part in parts if part)


def is_quotable(title: str) -> bool:
    """Whether anything of a title is left once it is cleaned."""
    return quoted_title(title) != quoted_title("")


def _profile_sentence(scenario: Scenario, profile: Mapping[str, str]) -> str:
    values = {field: clean_text(profile.get(field) or "", max_chars=60) for field in scenario.profile_fields}
    facts = tuple(f"{field} is {value}" for field, value in values.items() if value)
    return f"The user's {enumerate_words(facts)}." if facts else ""


def _numbered(
    scenario: Scenario,
    behaviours: Sequence[tuple[str, float | None]],
    budget_tokens: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The latest behaviours that fit, oldest first, each after its number on a line of its own; "" where none does."""
    entries = [quoted_behaviour(scenario, title, rating) for title, rating in behaviours if is_quotable(title)]
    numbering = count_tokens(f"\n{len(entries)}. ")  # apart: counts of titles are remembered, of numbered lines not
    kept = fit_recent(entries, budget_tokens, lambda entry: count_tokens(entry) + numbering)
    return "".join(f"\n{number}. {entry}" for number, entry in enumerate(kept, 1))
