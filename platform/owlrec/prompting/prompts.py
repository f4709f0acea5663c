"""Turns the shards of the users, histories and items tables into prompts, one a row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from owlrec.config import Config
from owlrec.prompting.frameworks import (
    KAR,
    ONCE,
    RLMREC,
    TRAWL,
    Framework,
    FrameworkName,
    clean_text,
    enumerate_words,
    first_tokens,
    item_prompt,
    item_system,
    quoted_title,
    user_prompt,
    user_system,
)
from owlrec.scenario import Scenario
from owlrec.schema import PROMPTS
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import fingerprint

# A prompt quotes a few hundred characters of a field; a field of this length is a mistake.
_MAX_FIELD_CHARS = 100_000
EARLIER = "\x02earlier\x03"  # where a prompt quotes what was answered before: no title has control characters

FRAMEWORKS: dict[FrameworkName, Framework] = {"kar": KAR, "once": ONCE, "rlmrec": RLMREC, "trawl": TRAWL}


class PromptConfig(Config):
    """Which prompts to write. `framework` names the paper whose structure they follow.

    mode: a text for every user and item (individual), one for each cohort that its members share (collective), or both.
    """

    mode: Literal["individual", "collective", "both"] = "individual"
    framework: FrameworkName = "kar"
    history_tokens: int = (
        256  # about 20 film titles: beyond it a small model loses the thread and prefill dominates the cost
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask about one user or item. `text` is "" where there is nothing to ask about."""

    kind: str
    id: int
    as_of: int  # ms; 0 for items, whose facts do not depend on anybody's history
    system: str  # the same for all rows of a kind
    text: str
    facts: str  # the row's own facts in a sentence: what stands in for an answer that cannot be used
    # Above 0: a prompt that goes on from the answer to the same id's prompt before it, and quotes so much of that.
    earlier_tokens: int = 0

    def after(self, answer: str, count_tokens: Callable[[str], int]) -> "Prompt":
        """The prompt with the beginning of an answer in the place of EARLIER."""
        earlier = first_tokens(answer, self.earlier_tokens, count_tokens)
        text, facts = (value.replace(EARLIER, earlier) for value in (self.text, self.facts))
        return replace(self, text=text, facts=facts, earlier_tokens=0)


@dataclass(frozen=True, slots=True)
class UnusableRow:
    """A row of a table that no prompt can be made of, and why."""

    kind: str
    id: int
    as_of: int
    error: str  # WrongType, OversizedText or UndecodableText
    message: str


def template_fingerprint(config: PromptConfig, scenario: Scenario) -> str:
    """SHA-256 of all that shapes a prompt besides its row: a changed wording is another job.

    Of the families only the chosen one counts, so that a change to another leaves finished work valid; nor does the
    mode, which decides what is asked about and not how.
    """
    return fingerprint(config.model_dump(exclude={"mode"}), scenario, *astuple(FRAMEWORKS[config.framework]))


def user_prompts(
    users: pa.Table,
    histories: pa.Table,
    catalog: ItemCatalog,
    config: PromptConfig,
    scenario: Scenario,
    count_tokens: Callable[[str], int],
) -> Iterator[Prompt | UnusableRow]:
    """The prompts for a shard of users, in the order of `histories`.

    users, histories: the same shard of both tables (see schema.py); a user without a history row gets no prompt.
    """
    family = FRAMEWORKS[config.framework]
    system = user_system(family, scenario)
    profiles = dict(zip(users["user_id"].to_pylist(), _rows(users), strict=True))
    behaved, passed = (_titles(histories[column], catalog) for column in ("items", "passed"))
    rows = histories.drop_columns(["items", "passed"]).to_pylist()
    for row, titles, left in zip(rows, behaved, passed, strict=True):
        id_, as_of = row["user_id"], row["as_of"]
        profile = profiles.get(id_, {})
        if isinstance(profile, str) or (wrong := _wrong(profile, scenario.profile_fields)):
            yield _unusable("user", id_, as_of, profile if isinstance(profile, str) else wrong)
            continue
        ratings = row["ratings"] or [None] * len(titles)
        behaviours = [(t, r) for t, r in zip(titles, ratings, strict=True) if t]
        text, facts = user_prompt(
            family,
            scenario,
            profile,
            behaviours,
            [t for t in left if t],
            history_tokens=config.history_tokens,
            count_tokens=count_tokens,
        )
        yield Prompt("user", id_, as_of, system, text, facts)


def _titles(lists: pa.ChunkedArray, catalog: ItemCatalog) -> list[list[str]]:
    """The titles of each list of item ids."""
    items = lists.combine_chunks()
    titles = catalog.titles(items.flatten().to_numpy(zero_copy_only=False))
    bounds = np.r_[0, np.cumsum(items.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))].tolist()
    return [titles[start:end] for start, end in pairwise(bounds)]


def item_prompts(items: pa.Table, scenario: Scenario, framework: FrameworkName) -> Iterator[Prompt | UnusableRow]:
    """The prompts for a shard of items, in its order."""
    family = FRAMEWORKS[framework]
    system = item_system(family, scenario)
    fields = ("title", *scenario.text_fields)
    for id_, row in zip(items["item_id"].to_pylist(), _rows(items), strict=True):
        if isinstance(row, str) or (wrong := _wrong(row, fields)):
            yield _unusable("item", id_, 0, row if isinstance(row, str) else wrong)
            continue
        text, facts = item_prompt(family, scenario, row["title"] or "", row)
        yield Prompt("item", id_, 0, system, text, facts)


def prompts_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Prompts as a table (schema.PROMPTS), to be asked later."""
    columns = [list(column) for column in zip(*map(astuple, prompts), strict=True)] or [[] for _ in PROMPTS]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PROMPTS, strict=True)], schema=PROMPTS)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """What `prompts_table` was made of."""
    return [Prompt(**row) for row in table.select(PROMPTS.names).to_pylist()]


def _rows(table: pa.Table) -> list[dict[str, Any] | str]:
    """The rows of a table; for one whose text is not valid, what is wrong with it (see _unusable)."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        if table.num_rows > 1:
            half = table.num_rows // 2
            return _rows(table.slice(0, half)) + _rows(table.slice(half))
        return ["UndecodableText: a text field is not valid UTF-8"]


def _wrong(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """What makes a row's fields unusable, or ""."""
    for name in fields:
        value = row.get(name)
        for text in value if isinstance(value, list) else (value,):
            if text is None:
                continue
            if not isinstance(text, str):
                return f"WrongType: {name} holds {text!r:.60} ({type(text).__name__}), but text is meant"
            if len(text) > _MAX_FIELD_CHARS:
                return f"OversizedText: {name} has {len(text):,} characters, more than {_MAX_FIELD_CHARS:,}"
    return ""


def _unusable(kind: str, id_: int, as_of: int, wrong: str) -> UnusableRow:
    error, _, message = wrong.partition(": ")
    return UnusableRow(kind, id_, as_of, error, f"{kind} {id_}: {message}. Fix the row in its source.")


# ----------------------------------------------------------------------------------------------------------- collective
# REKI's collective prompts (arXiv 2408.10520): one text for a whole cohort, read off its most representative members.
#
# From the paper: the titles that a group shares stand for it, and every member takes the group's text. Ours: the
# wording, in the scenario's own words and factors (the released prompts call books movies), what the group disliked
# beside what it liked, and attributes that most of it share. A cohort without a title or an attribute is never asked
# about: in the released data nine tenths of one set of groups were, and the answers ask for titles.


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
    """The prompts of cohorts (cohort_model.PROFILES), in their order; "" where there is nothing to ask about."""
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
