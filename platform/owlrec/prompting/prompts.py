"""Turns the shards of the users, histories and items tables into prompts, one per row."""

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

# A prompt quotes a few hundred characters of a field; a longer field than this is an error.
_MAX_FIELD_CHARS = 100_000
EARLIER = "\x02earlier\x03"  # stands for the earlier answer in a prompt; titles have no control characters

FRAMEWORKS: dict[FrameworkName, Framework] = {"kar": KAR, "once": ONCE, "rlmrec": RLMREC, "trawl": TRAWL}


class PromptConfig(Config):
    """Prompts to write. `framework` names the paper whose structure they follow.

    mode: a text for every user and item (individual), one per cohort for all its members (collective), or both.
    """

    mode: Literal["individual", "collective", "both"] = "individual"
    framework: FrameworkName = "kar"
    history_tokens: int = (
        256  # about 20 film titles: beyond it a small model loses track and prefill dominates the cost
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt about one user or item. `text` is "" if there is nothing to ask."""

    kind: str
    id: int
    as_of: int  # ms; 0 for items, whose facts do not depend on anybody's history
    system: str  # the same for all rows of a kind
    text: str
    facts: str  # the row's own facts in a sentence: replaces an unusable answer
    # Above 0: the prompt continues from the answer to the same id's previous prompt and quotes this many of its tokens.
    earlier_tokens: int = 0

    def after(self, answer: str, count_tokens: Callable[[str], int]) -> "Prompt":
        """The prompt with the beginning of an answer in place of EARLIER."""
        earlier = first_tokens(answer, self.earlier_tokens, count_tokens)
        text, facts = (value.replace(EARLIER, earlier) for value in (self.text, self.facts))
        return replace(self, text=text, facts=facts, earlier_tokens=0)


@dataclass(frozen=True, slots=True)
class UnusableRow:
    """A row of a table without a possible prompt, and the reason."""

    kind: str
    id: int
    as_of: int
    error: str  # WrongType, OversizedText or UndecodableText
    message: str


def template_fingerprint(config: PromptConfig, scenario: Scenario) -> str:
    """SHA-256 of everything that shapes a prompt besides its row: a changed wording is another job.

    Only the chosen framework counts, so a change to another leaves finished work valid. The mode does not count:
    it selects the rows, not the wording.
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
    """Prompts for a shard of users, in the order of `histories`.

    users, histories: the same shard of both tables (see schema.py); a user without a history row gets no prompt.
    """
    templates = FRAMEWORKS[config.framework]
    system = user_system(templates, scenario)
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
        behaviors = [(t, r) for t, r in zip(titles, ratings, strict=True) if t]
        text, facts = user_prompt(
            templates,
            scenario,
            profile,
            behaviors,
            [t for t in left if t],
            history_tokens=config.history_tokens,
            count_tokens=count_tokens,
        )
        yield Prompt("user", id_, as_of, system, text, facts)


def _titles(lists: pa.ChunkedArray, catalog: ItemCatalog) -> list[list[str]]:
    """Titles of each list of item ids."""
    items = lists.combine_chunks()
    titles = catalog.titles(items.flatten().to_numpy(zero_copy_only=False))
    bounds = np.r_[0, np.cumsum(items.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))].tolist()
    return [titles[start:end] for start, end in pairwise(bounds)]


def item_prompts(items: pa.Table, scenario: Scenario, framework: FrameworkName) -> Iterator[Prompt | UnusableRow]:
    """Prompts for a shard of items, in its order."""
    templates = FRAMEWORKS[framework]
    system = item_system(templates, scenario)
    fields = ("title", *scenario.text_fields)
    for id_, row in zip(items["item_id"].to_pylist(), _rows(items), strict=True):
        if isinstance(row, str) or (wrong := _wrong(row, fields)):
            yield _unusable("item", id_, 0, row if isinstance(row, str) else wrong)
            continue
        text, facts = item_prompt(templates, scenario, row["title"] or "", row)
        yield Prompt("item", id_, 0, system, text, facts)


def prompts_table(prompts: Iterable[Prompt]) -> pa.Table:
    """Prompts as a table (schema.PROMPTS), for later use."""
    columns = [list(column) for column in zip(*map(astuple, prompts), strict=True)] or [[] for _ in PROMPTS]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PROMPTS, strict=True)], schema=PROMPTS)


def prompts_from_table(table: pa.Table) -> list[Prompt]:
    """Prompts from a table of `prompts_table`."""
    return [Prompt(**row) for row in table.select(PROMPTS.names).to_pylist()]


def _rows(table: pa.Table) -> list[dict[str, Any] | str]:
    """Rows of a table, or for a row with invalid text its fault (see _unusable)."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        if table.num_rows > 1:
            half = table.num_rows // 2
            return _rows(table.slice(0, half)) + _rows(table.slice(half))
        return ["UndecodableText: a text field is not valid UTF-8"]


def _wrong(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The fault that makes a row's fields unusable, or ""."""
    for name in fields:
        value = row.get(name)
        for text in value if isinstance(value, list) else (value,):
            if text is None:
                continue
            if not isinstance(text, str):
                return f"WrongType: {name} holds {text!r:.60} ({type(text).__name__}), not text"
            if len(text) > _MAX_FIELD_CHARS:
                return f"OversizedText: {name} has {len(text):,} characters, more than {_MAX_FIELD_CHARS:,}"
    return ""


def _unusable(kind: str, id_: int, as_of: int, wrong: str) -> UnusableRow:
    error, _, message = wrong.partition(": ")
    return UnusableRow(kind, id_, as_of, error, f"{kind} {id_}: {message}. Fix the row in its source.")


# ----------------------------------------------------------------------------------------------------------- collective
# REKI's collective prompts (arXiv 2408.10520): one text for a whole cohort, based on its most representative members.
#
# From the paper: the titles that a group shares represent it, and every member gets the group's text. Ours: the
# wording, in the scenario's own words and factors (the released prompts call books movies), the group's dislikes
# as well as its likes, and attributes that most members share. A cohort without a title or an attribute gets no prompt:
# in the released data nine tenths of one set of groups had neither, and the answers ask for titles.


_USER_SYSTEM = (
    "You explain what kinds of {items} a group of similar users likes and dislikes, and why. You consider {factors}. "
    "You give a reason from what the group chose for each point, in a few clear and brief sentences."
)
_USER_TEMPLATE = "{facts}\nAnalyze what these users have in common in their preferences on {items} and explain it."
_ITEM_SYSTEM = (
    "You introduce groups of similar {items} and describe what they share: their {factors}. You state facts, in a few "
    "clear and brief sentences."
)
_ITEM_TEMPLATE = "{facts}\nDescribe what these {items} have in common and whom they appeal to."


def collective_fingerprint(scenario: Scenario) -> str:
    """SHA-256 of the wording."""
    return fingerprint(scenario, _USER_SYSTEM, _USER_TEMPLATE, _ITEM_SYSTEM, _ITEM_TEMPLATE)


def cohort_prompts(profiles: pa.Table, scenario: Scenario) -> Iterator[Prompt]:
    """Prompts of cohorts (cohort_model.PROFILES), in their order; "" if there is nothing to ask."""
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
    """Facts about a group of users, in sentences; "" for none."""
    parts = []
    if attributes:
        parts.append(f"Most users of this group: {', '.join(clean_text(a, max_chars=60) for a in attributes)}.")
    if liked:
        parts.append(f"Users of this group {scenario.consumed} and liked these {scenario.items}: {_list(liked)}.")
    if disliked:
        parts.append(f"They disliked these or left them alone: {_list(disliked)}.")
    return " ".join(parts)


def item_group_facts(scenario: Scenario, titles: Sequence[str], attributes: Sequence[str]) -> str:
    """Facts about a group of items, in sentences; "" for none."""
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
